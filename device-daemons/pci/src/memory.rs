//! Guest memory as core names it. It is never mapped here: back ends get it, and what a dead one has left in a used
//! ring is read with `pread`.

use std::os::fd::OwnedFd;
use std::rc::Rc;

use bulkhead_bus_api::pci;
use nix::sys::uio::pread;

/// A piece of guest RAM.
#[derive(Clone, Debug)]
pub struct Region {
    /// Where the guest has it.
    pub place: pci::Memory,
    /// The file with it.
    pub fd: Rc<OwnedFd>,
    /// Offset there, in bytes.
    pub offset: u64,
}

impl Region {
    /// The same place and the same part of the same file.
    #[must_use]
    pub fn is(&self, other: &Self) -> bool {
        self.place == other.place && self.offset == other.offset && Rc::ptr_eq(&self.fd, &other.fd)
    }
}

/// Guest memory: RAM in ascending order, then what memory devices have.
#[derive(Debug, Default)]
pub struct Memory {
    /// Its pieces.
    pub regions: Vec<Region>,
}

impl Memory {
    /// The piece that holds `len` bytes at a guest physical address, and the offset in it.
    #[must_use]
    pub fn find(&self, address: u64, len: u64) -> Option<(&Region, u64)> {
        self.regions.iter().find_map(|region| {
            let offset = address.checked_sub(region.place.base)?;
            let end = offset.checked_add(len)?;
            (end <= region.place.len).then_some((region, offset))
        })
    }

    /// Reads a little-endian number of 16 bits, as the indices of rings are.
    #[must_use]
    pub fn read_u16(&self, address: u64) -> Option<u16> {
        let (region, offset) = self.find(address, 2)?;
        let mut bytes = [0; 2];
        let offset = region.offset.checked_add(offset)?;
        let read = pread(&region.fd, &mut bytes, i64::try_from(offset).ok()?);
        (read == Ok(2)).then_some(u16::from_le_bytes(bytes))
    }
}

#[cfg(test)]
mod tests {
    use nix::sys::memfd::{MFdFlags, memfd_create};

    use super::*;

    #[test]
    fn only_what_lies_in_one_piece_is_found() {
        let region = |base, len| Region {
            place: pci::Memory { base, len },
            fd: Rc::new(memfd_create("ram", MFdFlags::MFD_CLOEXEC).unwrap()),
            offset: 0,
        };
        let memory = Memory { regions: vec![region(0, 0x3000), region(0x3000, 0x1000)] };
        let at = |address, len| memory.find(address, len).map(|(region, offset)| (region.place.base, offset));
        assert_eq!(at(0x2ff0, 16), Some((0, 0x2ff0)));
        assert_eq!(at(0x3000, 0x1000), Some((0x3000, 0)));
        for (address, len) in [(0x2ff0, 17), (0x4000, 1), (0x3000, 0x1001), (u64::MAX, 2), (8, u64::MAX)] {
            assert_eq!(at(address, len), None, "{address:#x} {len:#x}");
        }
    }

    #[test]
    fn a_number_is_read_where_the_guest_has_it() {
        let fd = Rc::new(memfd_create("ram", MFdFlags::MFD_CLOEXEC).unwrap());
        nix::unistd::ftruncate(&fd, 0x1000).unwrap();
        nix::sys::uio::pwrite(&fd, &[0x34, 0x12], 0xffe).unwrap();
        let memory = Memory {
            regions: vec![Region { place: pci::Memory { base: 0x1000, len: 0x800 }, fd, offset: 0x800 }],
        };
        assert_eq!(memory.read_u16(0x17fe), Some(0x1234));
        assert_eq!((memory.read_u16(0x17ff), memory.read_u16(0xffe)), (None, None));
    }
}
