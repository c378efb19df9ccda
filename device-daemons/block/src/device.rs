//! virtio-blk (virtio 1.2, 5.2): features, configuration space, and what a request asks for.
//!
//! Nothing here knows a descriptor or a queue: requests come as bytes and lengths and leave as [`Request`].

/// Bytes of a sector, whatever the block size is.
pub const SECTOR: u64 = 512;
/// Length of the identifier string.
pub const ID_LEN: usize = 20;
/// Length of a request's header.
pub const HEADER: usize = 16;
/// Length of a range to discard or to fill with zeroes.
pub const RANGE: usize = 16;
/// The most ranges of one request.
pub const MAX_RANGES: usize = 16;
/// The most sectors of one range: 128 MiB, so that one request does not hold up others for long.
pub const MAX_RANGE_SECTORS: u32 = 1 << 18;
/// The most data segments of a request.
pub const SEG_MAX: u32 = 254;
/// The most bytes of data of a request.
pub const MAX_DATA: u64 = i32::MAX as u64 / SECTOR * SECTOR;

/// Status of a request that worked.
pub const S_OK: u8 = 0;
/// Of one that failed.
pub const S_IOERR: u8 = 1;
/// Of one that the device does not have.
pub const S_UNSUPP: u8 = 2;

const F_SEG_MAX: u64 = 1 << 2;
const F_RO: u64 = 1 << 5;
const F_BLK_SIZE: u64 = 1 << 6;
const F_FLUSH: u64 = 1 << 9;
const F_TOPOLOGY: u64 = 1 << 10;
const F_MQ: u64 = 1 << 12;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;

const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;

/// Length of the configuration space with everything that is offered.
const CONFIG_LEN: usize = 60;

/// A disk as the guest sees it.
#[derive(Clone, Debug)]
pub struct Disk {
    sectors: u64,
    read_only: bool,
    discard: bool,
    queues: u16,
    id: [u8; ID_LEN],
    config: [u8; CONFIG_LEN],
}

/// What a disk is made of.
#[derive(Clone, Copy, Debug)]
pub struct Model<'a> {
    /// Size of the file or device in bytes; what does not fill a sector is not seen.
    pub bytes: u64,
    /// The guest may not write.
    pub read_only: bool,
    /// Discard and write-zeroes are offered, if it may write.
    pub discard: bool,
    /// Request queues.
    pub queues: u16,
    /// Its serial number; what is beyond [`ID_LEN`] bytes is cut.
    pub serial: &'a str,
}

/// A range of the disk, in bytes; inside the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Offset.
    pub offset: u64,
    /// Length.
    pub len: u64,
}

/// What a checked request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Read into the writable bytes before the status.
    Read(Extent),
    /// Write the readable bytes behind the header.
    Write(Extent),
    /// Make what was written durable.
    Flush,
    /// The identifier string into the writable bytes before the status, as far as there is room.
    GetId,
    /// The ranges behind the header need not keep their content: see [`Disk::discard`].
    Discard {
        /// How many.
        ranges: usize,
    },
    /// The ranges behind the header are to read as zeroes: see [`Disk::write_zeroes`].
    WriteZeroes {
        /// How many.
        ranges: usize,
    },
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..).and_then(|b| b.first_chunk()).map_or(0, |b| u32::from_le_bytes(*b))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..).and_then(|b| b.first_chunk()).map_or(0, |b| u64::from_le_bytes(*b))
}

/// `struct virtio_blk_config`.
fn config(model: &Model<'_>) -> [u8; CONFIG_LEN] {
    let mut config = [0; CONFIG_LEN];
    let mut put = |at: usize, field: &[u8]| {
        if let Some(slot) = config.get_mut(at..at + field.len()) {
            slot.copy_from_slice(field);
        }
    };
    put(0, &(model.bytes / SECTOR).to_le_bytes()); // capacity
    put(12, &SEG_MAX.to_le_bytes());
    put(20, &512u32.to_le_bytes()); // blk_size
    put(24, &[3]); // topology: 2^3 logical blocks make a physical one, the page of the host
    put(26, &1u16.to_le_bytes()); // min_io_size
    put(34, &model.queues.to_le_bytes());
    put(36, &MAX_RANGE_SECTORS.to_le_bytes()); // max_discard_sectors
    put(40, &16u32.to_le_bytes()); // max_discard_seg: MAX_RANGES
    put(44, &8u32.to_le_bytes()); // discard_sector_alignment
    put(48, &MAX_RANGE_SECTORS.to_le_bytes()); // max_write_zeroes_sectors
    put(52, &16u32.to_le_bytes()); // max_write_zeroes_seg: MAX_RANGES
    put(56, &[1]); // write_zeroes_may_unmap
    config
}

impl Disk {
    /// A disk of this model.
    #[must_use]
    pub fn new(model: &Model<'_>) -> Self {
        let mut id = [0; ID_LEN];
        for (slot, byte) in id.iter_mut().zip(model.serial.bytes()) {
            *slot = byte;
        }
        Self {
            sectors: model.bytes / SECTOR,
            read_only: model.read_only,
            discard: model.discard && !model.read_only,
            queues: model.queues,
            id,
            config: config(model),
        }
    }

    /// Feature bits of the device type that it offers.
    #[must_use]
    pub const fn features(&self) -> u64 {
        let mut features = F_SEG_MAX | F_BLK_SIZE | F_FLUSH | F_TOPOLOGY;
        if self.read_only {
            features |= F_RO;
        }
        if self.discard {
            features |= F_DISCARD | F_WRITE_ZEROES;
        }
        if self.queues > 1 {
            features |= F_MQ;
        }
        features
    }

    /// Request queues.
    #[must_use]
    pub const fn queues(&self) -> u16 {
        self.queues
    }

    /// Configuration space.
    #[must_use]
    pub const fn config(&self) -> &[u8] {
        &self.config
    }

    /// The identifier string.
    #[must_use]
    pub const fn id(&self) -> &[u8; ID_LEN] {
        &self.id
    }

    fn extent(&self, sector: u64, len: u64) -> Option<Extent> {
        let end = sector.checked_add(len / SECTOR)?;
        let offset = sector.checked_mul(SECTOR)?;
        (len.is_multiple_of(SECTOR) && end <= self.sectors).then_some(Extent { offset, len })
    }

    /// What a request asks for, of which the device reads `data_out` bytes behind the header and writes `data_in`
    /// before the status.
    ///
    /// # Errors
    /// The status with which it ends at once.
    pub fn request(&self, header: &[u8; HEADER], data_out: u64, data_in: u64) -> Result<Request, u8> {
        let sector = u64_at(header, 8);
        let data = |len: u64| match self.extent(sector, len) {
            Some(extent) if len <= MAX_DATA => Ok(extent),
            _ => Err(S_IOERR),
        };
        match u32_at(header, 0) {
            T_IN => data(data_in).map(Request::Read),
            T_OUT if self.read_only => Err(S_IOERR),
            T_OUT => data(data_out).map(Request::Write),
            T_FLUSH => Ok(Request::Flush),
            T_GET_ID => Ok(Request::GetId),
            T_DISCARD if self.discard => ranges(data_out).map(|ranges| Request::Discard { ranges }),
            T_WRITE_ZEROES if self.discard => ranges(data_out).map(|ranges| Request::WriteZeroes { ranges }),
            _ => Err(S_UNSUPP),
        }
    }

    fn range(&self, range: &[u8; RANGE]) -> Result<(Extent, u32), u8> {
        let (sector, sectors, flags) = (u64_at(range, 0), u32_at(range, 8), u32_at(range, 12));
        // Bit 0 is unmap (5.2.6), the others are reserved.
        if flags & !1 != 0 {
            return Err(S_UNSUPP);
        }
        let extent = self.extent(sector, u64::from(sectors) * SECTOR).ok_or(S_IOERR)?;
        if sectors > MAX_RANGE_SECTORS { Err(S_IOERR) } else { Ok((extent, flags)) }
    }

    /// What to discard.
    ///
    /// # Errors
    /// The status.
    pub fn discard(&self, range: &[u8; RANGE]) -> Result<Extent, u8> {
        match self.range(range)? {
            (extent, 0) => Ok(extent),
            _ => Err(S_UNSUPP),
        }
    }

    /// What to fill with zeroes, and whether its space may be given back.
    ///
    /// # Errors
    /// The status.
    pub fn write_zeroes(&self, range: &[u8; RANGE]) -> Result<(Extent, bool), u8> {
        self.range(range).map(|(extent, flags)| (extent, flags == 1))
    }
}

fn ranges(len: u64) -> Result<usize, u8> {
    let count = usize::try_from(len).map_err(|_| S_IOERR)?;
    if count == 0 || !count.is_multiple_of(RANGE) || count / RANGE > MAX_RANGES {
        return Err(S_IOERR);
    }
    Ok(count / RANGE)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(read_only: bool) -> Disk {
        let bytes = 100 * SECTOR + 511;
        Disk::new(&Model { bytes, read_only, discard: true, queues: 2, serial: "0123456789abcdefghijklm" })
    }

    fn header(kind: u32, sector: u64) -> [u8; HEADER] {
        let mut header = [0; HEADER];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        header
    }

    fn range(sector: u64, sectors: u32, flags: u32) -> [u8; RANGE] {
        let mut range = [0; RANGE];
        range[..8].copy_from_slice(&sector.to_le_bytes());
        range[8..12].copy_from_slice(&sectors.to_le_bytes());
        range[12..].copy_from_slice(&flags.to_le_bytes());
        range
    }

    #[test]
    fn a_part_of_a_sector_and_of_a_serial_are_not_seen() {
        let disk = disk(false);
        assert_eq!(u64_at(disk.config(), 0), 100);
        assert_eq!(disk.id(), b"0123456789abcdefghij");
        assert_eq!(u32_at(disk.config(), 40), u32::try_from(MAX_RANGES).unwrap());
    }

    #[test]
    fn requests_end_at_the_end_of_the_disk() {
        let disk = disk(false);
        let read = |sector, len| disk.request(&header(T_IN, sector), 0, len);
        assert_eq!(read(99, 512), Ok(Request::Read(Extent { offset: 99 * 512, len: 512 })));
        assert_eq!(read(100, 0), Ok(Request::Read(Extent { offset: 51_200, len: 0 })));
        for (sector, len) in [(99, 1024), (100, 512), (u64::MAX, 512), (1 << 55, 512), (0, 511), (0, 1 << 32)]
        {
            assert_eq!(read(sector, len), Err(S_IOERR), "{sector} {len}");
            assert_eq!(disk.request(&header(T_OUT, sector), len, 0), Err(S_IOERR), "{sector} {len}");
        }
    }

    #[test]
    fn a_disk_for_reading_takes_nothing_else() {
        let disk = disk(true);
        assert_eq!(disk.features() & (F_RO | F_DISCARD | F_WRITE_ZEROES), F_RO);
        assert_eq!(disk.request(&header(T_OUT, 0), 512, 0), Err(S_IOERR));
        assert_eq!(disk.request(&header(T_DISCARD, 0), 16, 0), Err(S_UNSUPP));
        assert_eq!(disk.request(&header(T_WRITE_ZEROES, 0), 16, 0), Err(S_UNSUPP));
        assert_eq!(disk.request(&header(T_FLUSH, 0), 0, 0), Ok(Request::Flush));
    }

    #[test]
    fn ranges_are_whole_few_and_inside() {
        let disk = disk(false);
        for (len, result) in
            [(0, Err(S_IOERR)), (15, Err(S_IOERR)), (16, Ok(1)), (256, Ok(16)), (272, Err(S_IOERR))]
        {
            let request = disk.request(&header(T_DISCARD, 0), len, 0);
            assert_eq!(request, result.map(|ranges| Request::Discard { ranges }), "{len}");
        }
        assert_eq!(disk.discard(&range(10, 90, 0)), Ok(Extent { offset: 5120, len: 46_080 }));
        assert_eq!(disk.discard(&range(10, 1, 1)), Err(S_UNSUPP));
        assert_eq!(disk.write_zeroes(&range(10, 1, 1)), Ok((Extent { offset: 5120, len: 512 }, true)));
        assert_eq!(disk.write_zeroes(&range(10, 1, 2)), Err(S_UNSUPP));
        for (sector, sectors) in [(10, 91), (u64::MAX, 1), (0, u32::MAX), (1 << 60, 1)] {
            assert_eq!(disk.write_zeroes(&range(sector, sectors, 0)), Err(S_IOERR), "{sector} {sectors}");
        }
        assert_eq!(disk.request(&header(77, 0), 0, 0), Err(S_UNSUPP));
    }
}
