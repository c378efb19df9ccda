//! Guest memory as the front end describes it: shared mappings of memfds.

use std::fs::File;
use std::sync::Arc;

use nix::sys::stat::fstat;
use vm_memory::{
    Bytes as _, FileOffset, GuestAddress, GuestMemoryBackend as _, GuestMemoryError, GuestMemoryMmap,
    GuestRegionMmap, MmapRegion,
};

use crate::io;

/// The mapped guest memory.
pub type Memory = GuestMemoryMmap;

/// Why a region is not mapped.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// It is empty, overlaps another one, or wraps around.
    #[error("a memory region of no use")]
    Region,
    /// The file ends before the region does: an access would kill this process.
    #[error("a memory region beyond the end of its file")]
    Short,
    /// The host refused.
    #[error("a memory region cannot be mapped")]
    Map,
}

/// A region as the front end describes it.
#[derive(Clone, Copy, Debug)]
pub struct Range {
    /// Guest physical address.
    pub guest: u64,
    /// Length in bytes.
    pub len: u64,
    /// Address by which the front end names it in ring addresses.
    pub user: u64,
    /// Offset in its file, in bytes.
    pub offset: u64,
}

/// The regions of guest memory and how the front end names them.
#[derive(Debug, Default)]
pub struct Map {
    ranges: Vec<Range>,
    memory: Arc<Memory>,
}

fn map(range: Range, file: File) -> Result<GuestRegionMmap, MemoryError> {
    let len = usize::try_from(range.len).map_err(|_| MemoryError::Region)?;
    let end = range.offset.checked_add(range.len).ok_or(MemoryError::Region)?;
    range.guest.checked_add(range.len).ok_or(MemoryError::Region)?;
    range.user.checked_add(range.len).ok_or(MemoryError::Region)?;
    let stat = fstat(&file).map_err(|_| MemoryError::Map)?;
    if len == 0 {
        return Err(MemoryError::Region);
    }
    if u64::try_from(stat.st_size).map_or(true, |size| size < end) {
        return Err(MemoryError::Short);
    }
    let region =
        MmapRegion::from_file(FileOffset::new(file, range.offset), len).map_err(|_| MemoryError::Map)?;
    io::keep_out_of_dumps(&region);
    GuestRegionMmap::new(region, GuestAddress(range.guest)).ok_or(MemoryError::Region)
}

impl Map {
    /// Maps a whole table.
    ///
    /// # Errors
    /// [`MemoryError`].
    pub fn new(table: Vec<(Range, File)>) -> Result<Self, MemoryError> {
        let ranges = table.iter().map(|(range, _)| *range).collect();
        let regions: Vec<_> =
            table.into_iter().map(|(range, file)| map(range, file)).collect::<Result<_, _>>()?;
        let memory = if regions.is_empty() {
            Memory::default()
        } else {
            Memory::from_regions(regions).map_err(|_| MemoryError::Region)?
        };
        Ok(Self { ranges, memory: Arc::new(memory) })
    }

    /// The map with one region more.
    ///
    /// # Errors
    /// [`MemoryError`].
    pub fn with(&self, range: Range, file: File) -> Result<Self, MemoryError> {
        let region = Arc::new(map(range, file)?);
        let memory = self.memory.insert_region(region).map_err(|_| MemoryError::Region)?;
        let mut ranges = self.ranges.clone();
        ranges.push(range);
        Ok(Self { ranges, memory: Arc::new(memory) })
    }

    /// The map without one region.
    ///
    /// # Errors
    /// [`MemoryError::Region`]: there is none like it.
    pub fn without(&self, guest: u64, len: u64) -> Result<Self, MemoryError> {
        let (memory, _) =
            self.memory.remove_region(GuestAddress(guest), len).map_err(|_| MemoryError::Region)?;
        let ranges = self.ranges.iter().copied().filter(|range| range.guest != guest).collect();
        Ok(Self { ranges, memory: Arc::new(memory) })
    }

    /// The memory.
    #[must_use]
    pub fn memory(&self) -> Arc<Memory> {
        Arc::clone(&self.memory)
    }

    /// Guest physical address of what the front end names by `user`.
    #[must_use]
    pub fn guest(&self, user: u64) -> Option<u64> {
        let range = self.ranges.iter().find(|r| user.checked_sub(r.user).is_some_and(|at| at < r.len))?;
        Some(user - range.user + range.guest)
    }
}

/// Reads a little-endian field.
pub(crate) fn read_u16(memory: &Memory, at: u64) -> Result<u16, GuestMemoryError> {
    memory.load::<u16>(GuestAddress(at), std::sync::atomic::Ordering::Acquire).map(u16::from_le)
}

/// Whether all of the range is memory.
pub(crate) fn contains(memory: &Memory, at: u64, len: u64) -> bool {
    usize::try_from(len).is_ok_and(|len| memory.check_range(GuestAddress(at), len))
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;

    use nix::sys::memfd::{MFdFlags, memfd_create};

    use super::*;

    fn memfd(len: i64) -> File {
        let fd: OwnedFd = memfd_create("ram", MFdFlags::MFD_CLOEXEC).unwrap();
        nix::unistd::ftruncate(&fd, len).unwrap();
        fd.into()
    }

    fn range(guest: u64, len: u64, offset: u64) -> Range {
        Range { guest, len, user: guest + (1 << 46), offset }
    }

    #[test]
    fn regions_come_and_go_and_are_found_by_the_front_ends_names() {
        let map = Map::new(vec![(range(0, 0x2000, 0), memfd(0x2000))]).unwrap();
        let map = map.with(range(0x10_0000, 0x1000, 0x1000), memfd(0x2000)).unwrap();
        assert_eq!(map.guest((1 << 46) + 0x10_0fff), Some(0x10_0fff));
        assert_eq!(map.guest((1 << 46) + 0x10_1000), None);
        assert!(contains(&map.memory(), 0x10_0000, 0x1000) && !contains(&map.memory(), 0x1fff, 2));
        let map = map.without(0, 0x2000).unwrap();
        assert_eq!(map.guest(1 << 46), None);
        assert!(map.without(0, 0x2000).is_err());
    }

    #[test]
    fn regions_that_would_kill_or_confuse_are_refused() {
        let refused = |range, len| Map::new(vec![(range, memfd(len))]).is_err();
        assert!(refused(range(0, 0x3000, 0), 0x2000), "beyond the end of the file");
        assert!(refused(range(0, 0x1000, u64::MAX - 0xfff), 0x2000), "the offset wraps");
        assert!(refused(range(0, 0, 0), 0x2000), "empty");
        assert!(refused(Range { guest: u64::MAX - 0xfff, len: 0x2000, user: 0, offset: 0 }, 0x2000), "wraps");
        let map = Map::new(vec![(range(0, 0x2000, 0), memfd(0x2000))]).unwrap();
        assert!(map.with(range(0x1000, 0x1000, 0), memfd(0x1000)).is_err(), "overlap");
    }
}
