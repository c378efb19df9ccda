//! The driver's side of a split virtqueue.

use std::collections::BTreeMap;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use std::os::fd::AsRawFd as _;
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// A buffer of a request: address, length, and whether the device writes it.
pub type Part = (u64, u32, bool);

/// A queue in guest memory.
pub struct Queue {
    /// Its number.
    pub index: u16,
    /// Its size.
    pub size: u16,
    /// Descriptor table.
    pub desc: u64,
    /// Available ring.
    pub avail: u64,
    /// Used ring.
    pub used: u64,
    /// The doorbell.
    pub kick: EventFd,
    /// The interrupt.
    pub call: EventFd,
    epoll: Epoll,
    map: GuestMemoryMmap,
    free: Vec<u16>,
    chains: BTreeMap<u16, Vec<u16>>,
    next_avail: u16,
    next_used: u16,
    event_idx: bool,
}

impl Queue {
    /// Lays an empty queue out at `base` (16-byte aligned); it takes less than 32 bytes per descriptor and 64 more.
    #[must_use]
    pub fn new(map: &GuestMemoryMmap, index: u16, size: u16, base: u64, event_idx: bool) -> Self {
        let desc = base;
        let avail = desc + 16 * u64::from(size);
        let used = (avail + 6 + 2 * u64::from(size)).next_multiple_of(16);
        let len = usize::try_from(used - base).unwrap() + 6 + 8 * usize::from(size);
        map.write_slice(&vec![0; len], GuestAddress(base)).unwrap();
        let event = || EventFd::new(EFD_NONBLOCK).unwrap();
        let (call, epoll) = (event(), Epoll::new().unwrap());
        let interrupt = EpollEvent::new(EventSet::IN, 0);
        epoll.ctl(ControlOperation::Add, call.as_raw_fd(), interrupt).unwrap();
        Self {
            index,
            size,
            desc,
            avail,
            used,
            kick: event(),
            call,
            epoll,
            map: map.clone(),
            free: (0..size).rev().collect(),
            chains: BTreeMap::new(),
            next_avail: 0,
            next_used: 0,
            event_idx,
        }
    }

    /// Writes descriptor `index` of the table at `table`.
    pub fn describe(&self, table: u64, index: u16, (addr, len, flags, next): (u64, u32, u16, u16)) {
        let at = table + 16 * u64::from(index);
        let bytes = [&addr.to_le_bytes()[..], &len.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()];
        self.map.write_slice(&bytes.concat(), GuestAddress(at)).unwrap();
    }

    /// Makes a chain available, without a kick; none if there is no room.
    pub fn add(&mut self, parts: &[Part]) -> Option<u16> {
        if self.free.len() < parts.len() {
            return None;
        }
        let taken = self.free.split_off(self.free.len() - parts.len());
        for (at, (addr, len, write)) in parts.iter().enumerate() {
            let next = taken.get(at + 1).copied();
            let flags = if *write { WRITE } else { 0 } | if next.is_some() { NEXT } else { 0 };
            self.describe(self.desc, *taken.get(at).unwrap(), (*addr, *len, flags, next.unwrap_or(0)));
        }
        let head = *taken.first().unwrap();
        self.chains.insert(head, taken);
        self.offer(head);
        Some(head)
    }

    /// Makes a chain available that lies in an indirect table at `table`.
    pub fn add_indirect(&mut self, table: u64, parts: &[Part]) -> Option<u16> {
        let head = self.free.pop()?;
        for (index, (addr, len, write)) in (0u16..).zip(parts) {
            let last = usize::from(index) + 1 == parts.len();
            let flags = if *write { WRITE } else { 0 } | if last { 0 } else { NEXT };
            self.describe(table, index, (*addr, *len, flags, index + 1));
        }
        let len = u32::try_from(16 * parts.len()).unwrap();
        self.describe(self.desc, head, (table, len, INDIRECT, 0));
        self.chains.insert(head, vec![head]);
        self.offer(head);
        Some(head)
    }

    /// Puts any number into the available ring.
    pub fn offer(&mut self, head: u16) {
        let at = self.avail + 4 + 2 * u64::from(self.next_avail % self.size);
        self.map.write_obj(head.to_le(), GuestAddress(at)).unwrap();
        self.set_avail(self.next_avail.wrapping_add(1));
    }

    /// Sets the available index.
    pub fn set_avail(&mut self, index: u16) {
        self.next_avail = index;
        self.map.store(index.to_le(), GuestAddress(self.avail + 2), Ordering::Release).unwrap();
    }

    /// Whether the device wants a kick for what was added since the available index was `since`.
    #[must_use]
    pub fn wants_kick(&self, since: u16) -> bool {
        fence(Ordering::SeqCst);
        if self.event_idx {
            let event = self.load(self.used + 4 + 8 * u64::from(self.size));
            let (new, old) = (self.next_avail, since);
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            self.load(self.used) & 1 == 0
        }
    }

    /// Kicks the device if it wants that.
    pub fn kick(&self, since: u16) {
        if self.wants_kick(since) {
            self.kick.write(1).unwrap();
        }
    }

    /// The available index.
    #[must_use]
    pub const fn avail_index(&self) -> u16 {
        self.next_avail
    }

    fn load(&self, at: u64) -> u16 {
        u16::from_le(self.map.load(GuestAddress(at), Ordering::Acquire).unwrap())
    }

    /// The used index.
    #[must_use]
    pub fn used_index(&self) -> u16 {
        self.load(self.used + 2)
    }

    /// Takes a finished request: its head and the length that the device says.
    pub fn take(&mut self) -> Option<(u16, u32)> {
        if self.used_index() == self.next_used {
            return None;
        }
        let at = self.used + 4 + 8 * u64::from(self.next_used % self.size);
        let element: u64 = self.map.read_obj(GuestAddress(at)).unwrap();
        let element = u64::from_le(element);
        self.next_used = self.next_used.wrapping_add(1);
        let head = u16::try_from(element & 0xffff_ffff).unwrap();
        let freed = self.chains.remove(&head).unwrap_or_else(|| unknown(head));
        self.free.extend(freed);
        Some((head, u32::try_from(element >> 32).unwrap()))
    }

    /// Asks for an interrupt with the next finished request, and looks whether there is one already.
    #[must_use]
    pub fn arm(&self) -> bool {
        if self.event_idx {
            let at = self.avail + 4 + 2 * u64::from(self.size);
            self.map.store(self.next_used.to_le(), GuestAddress(at), Ordering::Release).unwrap();
        }
        fence(Ordering::SeqCst);
        self.used_index() != self.next_used
    }

    /// Waits for an interrupt; false after `limit`.
    #[must_use]
    pub fn interrupted(&self, limit: Duration) -> bool {
        let limit = i32::try_from(limit.as_millis()).unwrap_or(i32::MAX).max(1);
        let came = self.epoll.wait(limit, &mut [EpollEvent::default()]).is_ok_and(|count| count > 0);
        came && self.call.read().is_ok()
    }

    /// Waits for an interrupt, or until there is a finished request; false after `limit`.
    #[must_use]
    pub fn wait(&self, limit: Duration) -> bool {
        let end = Instant::now() + limit;
        while !self.arm() {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let _ = self.interrupted(left);
        }
        true
    }
}

#[expect(clippy::panic, reason = "a device that gives back what it did not take has failed the test")]
fn unknown(head: u16) -> Vec<u16> {
    panic!("the device gave back {head}, which is not its own")
}
