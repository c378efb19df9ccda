//! Guest RAM as core hands it over. Only the RAM below the 32-bit hole is mapped: nothing is loaded
//! above it, the guest only has to be told that it is there.

use std::{fs::File, os::fd::OwnedFd};

use bulkhead_bus_api::platform::{HIGH_RAM_START, LOW_RAM_END};
use bulkhead_control_api::loader::Region;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

use crate::{Error, Source};

const PAGE: u64 = 4096;
/// The least RAM with which anything can be booted, in bytes.
const MIN_RAM: u64 = 2 << 20;
/// The most regions (`boot_params` has room for 128 memory map entries, a few are ours).
const MAX_REGIONS: usize = 100;
/// Images are copied in pieces of this size: small enough to stay in the cache.
const PIECE: usize = 64 << 10;
static ZEROS: [u8; 4096] = [0; 4096];

/// Guest RAM.
#[derive(Debug)]
pub struct Ram {
    low: GuestMemoryMmap,
    regions: Vec<Region>,
}

/// Checks what core says about its memory: ascending pages, none in the 32-bit hole, the first at 0.
fn validate(regions: &[Region]) -> Result<Region, Error> {
    let first = *regions.first().ok_or(Error::Ram("there is none"))?;
    if first.gpa != 0 || first.len < MIN_RAM {
        return Err(Error::Ram("less than 2 MiB at address 0: give the VM more memory (-m)"));
    }
    if regions.len() > MAX_REGIONS {
        return Err(Error::Ram("too many regions"));
    }
    let mut end = 0;
    for region in regions {
        if region.gpa % PAGE != 0 || region.len % PAGE != 0 || region.len == 0 {
            return Err(Error::Ram("a region is not made of whole pages"));
        }
        if region.gpa < end {
            return Err(Error::Ram("regions overlap"));
        }
        end = region.gpa.checked_add(region.len).ok_or(Error::Ram("a region has no end"))?;
        if end > LOW_RAM_END && region.gpa < HIGH_RAM_START {
            return Err(Error::Ram("a region lies in the 32-bit hole"));
        }
    }
    Ok(first)
}

impl Ram {
    /// Maps the RAM that core sent with its job.
    ///
    /// # Errors
    /// [`Error::Ram`] for an impossible map, [`Error::Memory`] if it cannot be mapped.
    pub fn map(regions: Vec<Region>, fds: Vec<OwnedFd>) -> Result<Self, Error> {
        if regions.len() != fds.len() {
            return Err(Error::Ram("regions and descriptors differ in number"));
        }
        let first = validate(&regions)?;
        let file = File::from(fds.into_iter().next().ok_or(Error::Ram("there is none"))?);
        // Beyond the end of the file the mapping would fault.
        if file.size()? != first.len {
            return Err(Error::Ram("a region and its descriptor differ in size"));
        }
        Self::build(regions, Some(FileOffset::new(file, 0)))
    }

    /// The same map of fresh private memory, for tests.
    ///
    /// # Errors
    /// As for [`Ram::map`].
    pub fn anonymous(regions: Vec<Region>) -> Result<Self, Error> {
        Self::build(regions, None)
    }

    fn build(regions: Vec<Region>, file: Option<FileOffset>) -> Result<Self, Error> {
        let first = validate(&regions)?;
        let size = usize::try_from(first.len).map_err(|_| Error::Ram("too large"))?;
        let low = GuestMemoryMmap::from_ranges_with_files([(GuestAddress(0), size, file)])
            .map_err(|error| Error::Memory(error.to_string()))?;
        Ok(Self { low, regions })
    }

    /// All of it, ascending.
    #[must_use]
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// End of the RAM that begins at 0, at most the start of the 32-bit hole.
    #[must_use]
    pub fn low_end(&self) -> u64 {
        self.regions.first().map_or(0, |region| region.len)
    }

    /// End of all RAM.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.regions.last().map_or(0, |region| region.gpa + region.len)
    }

    /// Writes bytes.
    ///
    /// # Errors
    /// [`Error::Memory`] outside the low RAM.
    pub fn write(&self, gpa: u64, bytes: &[u8]) -> Result<(), Error> {
        self.low.write_slice(bytes, GuestAddress(gpa)).map_err(|error| Error::Memory(error.to_string()))
    }

    /// Reads bytes, for tests.
    ///
    /// # Errors
    /// [`Error::Memory`] outside the low RAM.
    pub fn read(&self, gpa: u64, bytes: &mut [u8]) -> Result<(), Error> {
        self.low.read_slice(bytes, GuestAddress(gpa)).map_err(|error| Error::Memory(error.to_string()))
    }

    /// Streams `len` bytes of `source` from `offset` to `gpa`.
    ///
    /// # Errors
    /// [`Error::Read`] of the source, [`Error::Memory`] outside the low RAM.
    pub fn copy<S: Source + ?Sized>(&self, source: &S, offset: u64, len: u64, gpa: u64) -> Result<(), Error> {
        let mut buffer = vec![0; PIECE];
        pieces(len, PIECE, |done, size| {
            let piece = buffer.get_mut(..size).unwrap_or_default();
            source.read_at(offset + done, piece)?;
            self.write(gpa + done, piece)
        })
    }

    /// Writes `len` zeros: RAM keeps its contents over a reset.
    ///
    /// # Errors
    /// [`Error::Memory`] outside the low RAM.
    pub fn zero(&self, gpa: u64, len: u64) -> Result<(), Error> {
        pieces(len, ZEROS.len(), |done, size| self.write(gpa + done, ZEROS.get(..size).unwrap_or_default()))
    }
}

/// Calls `each` with offset and size of all pieces of `len` bytes, each of `most` bytes or less.
fn pieces(len: u64, most: usize, mut each: impl FnMut(u64, usize) -> Result<(), Error>) -> Result<(), Error> {
    let mut done = 0;
    while done < len {
        let size = usize::try_from(len - done).unwrap_or(most).min(most);
        each(done, size)?;
        done += size as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn regions(list: &[(u64, u64)]) -> Vec<Region> {
        list.iter().map(|&(gpa, len)| Region { gpa, len }).collect()
    }

    #[test]
    fn impossible_maps_are_refused() {
        let low = (0, 16 << 20);
        for list in [
            &[][..],
            &[(0x1000, 16 << 20)],
            &[(0, 1 << 20)],
            &[low, (0x10, 4096)],
            &[low, (16 << 20, 100)],
            &[low, (8 << 20, 16 << 20)],
            &[low, (16 << 20, 0)],
            &[low, (0xd000_0000, 4096)],
            &[low, (16 << 20, 4 << 30)],
            &[(0, 0xc000_1000)],
            &[low, (u64::MAX - 4095, 8192)],
            &[low, (u64::MAX - 4095, 4096)],
        ] {
            assert!(matches!(Ram::anonymous(regions(list)), Err(Error::Ram(_))), "{list:x?}");
        }
        assert!(matches!(Ram::map(regions(&[low]), Vec::new()), Err(Error::Ram(_))));
    }

    #[test]
    fn hundreds_of_gib_lie_on_both_sides_of_the_hole() {
        let ram = Ram::anonymous(regions(&[(0, LOW_RAM_END), (HIGH_RAM_START, 509 << 30)])).unwrap();
        assert_eq!((ram.low_end(), ram.regions().len()), (LOW_RAM_END, 2));
    }

    #[test]
    fn copies_and_zeros_end_where_they_should() {
        let ram = Ram::anonymous(regions(&[(0, 4 << 20)])).unwrap();
        let image: Vec<u8> = (0..PIECE + 1000).map(|i| u8::try_from(i % 251).unwrap()).collect();
        ram.write(0x10_0000, &vec![0xee; PIECE + 2000]).unwrap();
        ram.copy(&image[..], 10, (PIECE + 500) as u64, 0x10_0000).unwrap();
        let mut back = vec![0; PIECE + 501];
        ram.read(0x10_0000, &mut back).unwrap();
        assert_eq!(back[..PIECE + 500], image[10..PIECE + 510]);
        assert_eq!(back[PIECE + 500], 0xee);
        ram.zero(0x10_0001, PIECE as u64).unwrap();
        ram.read(0x10_0000, &mut back).unwrap();
        assert!(back[0] == image[10] && back[1..=PIECE].iter().all(|&b| b == 0) && back[PIECE + 1] != 0);
        assert!(matches!(ram.write((4 << 20) - 1, &[0; 2]), Err(Error::Memory(_))));
        assert!(matches!(ram.copy(&image[..], 1 << 20, 1, 0), Err(Error::Read(_))));
    }
}
