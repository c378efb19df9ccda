//! Guest memory as core has given it: which memfd an address is in.

use std::os::fd::OwnedFd;

use bulkhead_control_api::dump;
use bulkhead_control_api::loader::Region;

/// The regions in ascending order, each with its memfd.
#[derive(Debug)]
pub struct Memory(Vec<(Region, OwnedFd)>);

/// A stretch of guest physical addresses.
#[derive(Debug)]
pub enum Part<'a> {
    /// RAM: bytes of a memfd.
    Ram {
        /// The memfd.
        fd: &'a OwnedFd,
        /// The first byte in it.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// No RAM: so many bytes that read as zero.
    Nothing(u64),
}

impl Memory {
    /// What core has sent; none if descriptors and regions do not match, or regions are empty, overlap or go beyond the
    /// address space.
    #[must_use]
    pub fn new(memory: dump::Memory, fds: Vec<OwnedFd>) -> Option<Self> {
        let mut end = 0u64;
        for region in &memory.regions {
            if region.len == 0 || region.gpa < end {
                return None;
            }
            end = region.gpa.checked_add(region.len)?;
        }
        (memory.regions.len() == fds.len()).then(|| Self(memory.regions.into_iter().zip(fds).collect()))
    }

    /// What is at `addr`: at most `len` bytes, and not beyond the end of the address space.
    #[must_use]
    pub fn at(&self, addr: u64, len: u64) -> Part<'_> {
        // 0 is the whole address space, which `len` cannot be.
        let to_end = addr.wrapping_neg();
        let len = if to_end == 0 { len } else { len.min(to_end) };
        for (region, fd) in &self.0 {
            if let Some(before) = region.gpa.checked_sub(addr).filter(|before| *before > 0) {
                return Part::Nothing(len.min(before));
            }
            let offset = addr - region.gpa;
            if let Some(left) = region.len.checked_sub(offset).filter(|left| *left > 0) {
                return Part::Ram { fd, offset, len: len.min(left) };
            }
        }
        Part::Nothing(len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory(regions: &[(u64, u64)]) -> Option<Memory> {
        let fd = || OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        let regions: Vec<Region> = regions.iter().map(|(gpa, len)| Region { gpa: *gpa, len: *len }).collect();
        let fds = regions.iter().map(|_| fd()).collect();
        Memory::new(dump::Memory { regions }, fds)
    }

    /// Offset, if it is RAM, and length.
    fn at(memory: &Memory, addr: u64, len: u64) -> (Option<u64>, u64) {
        match memory.at(addr, len) {
            Part::Ram { offset, len, .. } => (Some(offset), len),
            Part::Nothing(len) => (None, len),
        }
    }

    #[test]
    fn what_is_no_ram_lies_between_and_after_the_regions() {
        let memory = memory(&[(0, 0x3000), (0x10000, 0x1000)]).unwrap();
        assert_eq!(at(&memory, 0, 0x10), (Some(0), 0x10));
        assert_eq!(at(&memory, 0x2ff8, 0x10), (Some(0x2ff8), 8));
        assert_eq!(at(&memory, 0x3000, u64::MAX), (None, 0xd000));
        assert_eq!(at(&memory, 0x3000, 1), (None, 1));
        assert_eq!(at(&memory, 0x10800, 0x1000), (Some(0x800), 0x800));
        assert_eq!(at(&memory, 0x11000, 77), (None, 77));
        assert_eq!(at(&memory, u64::MAX, 77), (None, 1), "then comes address 0");
        assert_eq!(at(&memory, u64::MAX - 7, 8), (None, 8));
        let empty = self::memory(&[]).unwrap();
        assert_eq!(at(&empty, 0, 9), (None, 9));
    }

    #[test]
    fn memory_that_cannot_be_is_refused() {
        for wrong in [vec![(0, 0x2000), (0x1000, 0x1000)], vec![(0, 0)], vec![(u64::MAX - 0xfff, 0x1001)]] {
            assert!(memory(&wrong).is_none(), "{wrong:?}");
        }
        assert!(Memory::new(dump::Memory { regions: vec![Region { gpa: 0, len: 1 }] }, Vec::new()).is_none());
    }
}
