//! In-flight tracking of split rings (vhost-user, "Inflight I/O tracking"): which requests were taken and not given
//! back when a back end died, in memory that outlives it.
//!
//! ```text
//! queue:   features u64 | version u16 | desc_num u16 | last_batch_head u16 | used_idx u16 | { descriptor }*
//! descriptor: inflight u8 | 0 x 5 | next u16 | counter u64
//! ```
//! Every store is made in the order of the specification, by one thread; the next process sees a prefix of them.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::stat::fstat;
use vm_memory::{AtomicInteger, FileOffset, MmapRegion, VolatileMemory as _};

/// Version of the layout.
const VERSION: u16 = 1;
const HEADER: usize = 16;
const DESCRIPTOR: usize = 16;
/// Alignment of a queue's part, in bytes.
const ALIGN: usize = 64;

const AT_VERSION: usize = 8;
const AT_DESC_NUM: usize = 10;
const AT_LAST_BATCH_HEAD: usize = 12;
const AT_USED_IDX: usize = 14;
const IN_NEXT: usize = 6;
const IN_COUNTER: usize = 8;

/// Bytes of one queue's part.
const fn part(queue_size: u16) -> usize {
    (HEADER + DESCRIPTOR * queue_size as usize).next_multiple_of(ALIGN)
}

/// The front end gave an area that cannot be one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the in-flight area does not hold its queues")]
pub struct Unfit;

/// The area of all queues of a device.
#[derive(Clone, Debug)]
pub struct Area {
    map: Arc<MmapRegion>,
    queues: u16,
    queue_size: u16,
}

/// A new area's file, made before the jail is entered and handed to the front end that asks for one.
#[derive(Debug)]
pub struct Fresh {
    fd: OwnedFd,
    area: Area,
}

impl Fresh {
    /// Room for `queues` queues of `queue_size` descriptors.
    ///
    /// # Errors
    /// The host's.
    pub fn new(queues: u16, queue_size: u16) -> Result<Self, Errno> {
        let fd = memfd_create("bulkhead-inflight", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
        let len = usize::from(queues) * part(queue_size);
        nix::unistd::ftruncate(&fd, i64::try_from(len).map_err(|_| Errno::EINVAL)?)?;
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        fcntl(&fd, FcntlArg::F_ADD_SEALS(seals))?;
        let area = Area::map(fd.try_clone().map_err(|_| Errno::EMFILE)?.into(), 0, queues, queue_size);
        Ok(Self { fd, area: area.map_err(|_| Errno::EINVAL)? })
    }

    /// The area for `queues` queues of `queue_size`, emptied, with its file and its length in bytes.
    ///
    /// # Errors
    /// [`Unfit`]: it has no room for so many.
    pub fn give(&self, queues: u16, queue_size: u16) -> Result<(Area, File, u64), Unfit> {
        let len = usize::from(queues) * part(queue_size);
        if queues == 0 || queue_size == 0 || len > self.area.map.size() {
            return Err(Unfit);
        }
        let slice = self.area.map.get_slice(0, self.area.map.size()).map_err(|_| Unfit)?;
        slice.copy_from(&vec![0u8; self.area.map.size()]);
        let file = self.fd.try_clone().map_err(|_| Unfit)?.into();
        let area = Area { map: Arc::clone(&self.area.map), queues, queue_size };
        Ok((area, file, u64::try_from(len).map_err(|_| Unfit)?))
    }
}

impl Area {
    /// Maps an area of the front end's.
    ///
    /// # Errors
    /// [`Unfit`].
    pub fn map(file: File, offset: u64, queues: u16, queue_size: u16) -> Result<Self, Unfit> {
        let len = usize::from(queues) * part(queue_size);
        let end = u64::try_from(len).ok().and_then(|len| offset.checked_add(len)).ok_or(Unfit)?;
        let size = fstat(&file).map_err(|_| Unfit)?.st_size;
        if len == 0 || u64::try_from(size).map_or(true, |size| size < end) {
            return Err(Unfit);
        }
        let map = MmapRegion::from_file(FileOffset::new(file, offset), len).map_err(|_| Unfit)?;
        Ok(Self { map: Arc::new(map), queues, queue_size })
    }

    /// The part of queue `index`, if the area has it with room for `size` descriptors.
    #[must_use]
    pub fn tracker(&self, index: u16, size: u16) -> Option<Tracker> {
        let fits = index < self.queues && size <= self.queue_size && size > 0;
        let base = usize::from(index) * part(self.queue_size);
        fits.then(|| Tracker { map: Arc::clone(&self.map), base, size, counter: 0 })
    }
}

/// The requests in flight of one queue.
#[derive(Debug)]
pub struct Tracker {
    map: Arc<MmapRegion>,
    base: usize,
    size: u16,
    counter: u64,
}

/// What a predecessor left of a queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Left {
    /// Heads of the requests that were taken and not given back, oldest first.
    pub heads: Vec<u16>,
    /// Available index at which to go on.
    pub next_avail: u16,
}

impl Tracker {
    fn at<A: AtomicInteger>(&self, offset: usize) -> Option<&A> {
        // In the mapping, whose length `Area` has checked, and aligned as the layout is.
        self.map.get_atomic_ref::<A>(self.base + offset).ok()
    }

    fn get(&self, offset: usize) -> u16 {
        self.at::<AtomicU16>(offset).map_or(0, |field| AtomicU16::load(field, Ordering::Acquire))
    }

    fn set(&self, offset: usize, value: u16) {
        if let Some(field) = self.at::<AtomicU16>(offset) {
            AtomicU16::store(field, value, Ordering::Release);
        }
    }

    const fn descriptor(head: u16) -> usize {
        HEADER + DESCRIPTOR * head as usize
    }

    fn inflight(&self, head: u16) -> bool {
        self.at::<AtomicU8>(Self::descriptor(head))
            .is_some_and(|field| AtomicU8::load(field, Ordering::Acquire) != 0)
    }

    fn set_inflight(&self, head: u16, inflight: bool) {
        if let Some(field) = self.at::<AtomicU8>(Self::descriptor(head)) {
            AtomicU8::store(field, inflight.into(), Ordering::Release);
        }
    }

    /// What the predecessor left, or a new beginning: at `base`, with `used` as the used index in guest memory.
    pub fn recover(&mut self, base: u16, used: u16) -> Left {
        let known = self.get(AT_VERSION) == VERSION && self.get(AT_DESC_NUM) == self.size;
        let batch = used.wrapping_sub(self.get(AT_USED_IDX));
        if !known || batch > 1 {
            // New, or of a ring that is no more: the guest has begun another one since. Requests are given back one by one, so
            // the predecessor of this one is at most one behind.
            self.forget();
            self.set(AT_DESC_NUM, self.size);
            self.set(AT_LAST_BATCH_HEAD, 0);
            self.set(AT_USED_IDX, used);
            self.set(AT_VERSION, VERSION);
            return Left { heads: Vec::new(), next_avail: base };
        }
        // The last one was given back, but it may not say so.
        let head = self.get(AT_LAST_BATCH_HEAD);
        if batch == 1 && head < self.size {
            self.set_inflight(head, false);
        }
        self.set(AT_USED_IDX, used);
        let counter = |head: u16| {
            let field = self.at::<AtomicU64>(Self::descriptor(head) + IN_COUNTER);
            field.map_or(0, |field| AtomicU64::load(field, Ordering::Acquire))
        };
        let mut heads: Vec<u16> = (0..self.size).filter(|head| self.inflight(*head)).collect();
        heads.sort_by_key(|head| counter(*head));
        self.counter = heads.last().map_or(0, |head| counter(*head).wrapping_add(1));
        // No more than `size`, which fits.
        let count = u16::try_from(heads.len()).unwrap_or(self.size);
        Left { heads, next_avail: used.wrapping_add(count) }
    }

    /// Nothing is in flight any more.
    pub fn forget(&self) {
        (0..self.size).for_each(|head| self.set_inflight(head, false));
    }

    /// A request has been taken.
    pub fn take(&mut self, head: u16) {
        if let Some(field) = self.at::<AtomicU64>(Self::descriptor(head) + IN_COUNTER) {
            AtomicU64::store(field, self.counter, Ordering::Release);
        }
        self.counter = self.counter.wrapping_add(1);
        self.set_inflight(head, true);
    }

    /// A request is about to be given back: a batch of one.
    pub fn giving(&self, head: u16) {
        self.set(Self::descriptor(head) + IN_NEXT, self.get(AT_LAST_BATCH_HEAD));
        self.set(AT_LAST_BATCH_HEAD, head);
    }

    /// It has been given back: the used index in guest memory is `used` now.
    pub fn given(&self, head: u16, used: u16) {
        self.set_inflight(head, false);
        self.set(AT_USED_IDX, used);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn area() -> (Area, Fresh) {
        let fresh = Fresh::new(2, 8).unwrap();
        (fresh.give(2, 8).unwrap().0, fresh)
    }

    #[test]
    fn a_new_area_begins_at_the_base() {
        let (area, _fresh) = area();
        let mut tracker = area.tracker(1, 8).unwrap();
        assert_eq!(tracker.recover(5, 5), Left { heads: vec![], next_avail: 5 });
        assert!(area.tracker(2, 8).is_none() && area.tracker(0, 16).is_none());
    }

    /// Dies after each single store of taking and giving back.
    #[test]
    fn each_moment_of_death_leaves_what_is_owed() {
        for death in 0..6 {
            let (area, _fresh) = area();
            let mut tracker = area.tracker(1, 8).unwrap();
            tracker.recover(0, 0);
            for head in [3, 1, 7] {
                tracker.take(head);
            }
            tracker.giving(3);
            tracker.given(3, 1);
            // The request of head 1 at its various moments; `used` is what guest memory has.
            let mut used = 1;
            if death > 0 {
                tracker.set(Tracker::descriptor(1) + IN_NEXT, tracker.get(AT_LAST_BATCH_HEAD));
            }
            if death > 1 {
                tracker.set(AT_LAST_BATCH_HEAD, 1);
            }
            if death > 2 {
                used = 2;
            }
            if death > 3 {
                tracker.set_inflight(1, false);
            }
            if death > 4 {
                tracker.set(AT_USED_IDX, 2);
            }
            let left = area.tracker(1, 8).unwrap().recover(99, used);
            let owed = if death > 2 { vec![7] } else { vec![1, 7] };
            assert_eq!(left, Left { heads: owed, next_avail: 3 }, "death {death}");
        }
    }

    #[test]
    fn what_another_ring_or_a_liar_left_is_harmless() {
        let (area, _fresh) = area();
        let mut tracker = area.tracker(0, 8).unwrap();
        tracker.recover(0, 500);
        tracker.take(2);
        // The guest has begun anew.
        assert_eq!(area.tracker(0, 8).unwrap().recover(0, 0), Left { heads: vec![], next_avail: 0 });
        let mut tracker = area.tracker(0, 8).unwrap();
        tracker.take(2);
        tracker.set(AT_LAST_BATCH_HEAD, 60_000);
        assert_eq!(tracker.recover(0, 1), Left { heads: vec![2], next_avail: 2 });
        // No daemon of ours is so far behind.
        assert_eq!(tracker.recover(7, 3), Left { heads: vec![], next_avail: 7 });
        tracker.take(2);
        assert_eq!(tracker.recover(2, 2), Left { heads: vec![], next_avail: 2 });
    }

    #[test]
    fn an_area_that_is_too_small_is_refused() {
        let (_area, fresh) = area();
        assert!(fresh.give(3, 8).is_err() && fresh.give(2, 16).is_err() && fresh.give(0, 8).is_err());
        let file = || fresh.give(1, 8).unwrap().1;
        assert!(Area::map(file(), 0, 2, 8).is_ok());
        assert!(Area::map(file(), 4096, 2, 8).is_err() && Area::map(file(), u64::MAX, 2, 8).is_err());
        assert!(Area::map(file(), 0, 64, 1024).is_err() && Area::map(file(), 0, 0, 8).is_err());
    }
}
