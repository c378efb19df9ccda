//! What a device is to the queue thread, and what everybody can tell the control thread.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use bulkhead_control_api::side::ToPci;
use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::pieces::Pieces;
use crate::ring::Rings;

/// The most virtqueues of a device: their numbers are bits of a word.
pub const MAX_QUEUES: u16 = 64;

/// How far a device came with a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Nothing is left in it: a kick will tell of more.
    Idle,
    /// There is more, but others have their turn first.
    More,
    /// There may be more, but the device waits for one of its sources; a kick has nothing to tell.
    Blocked,
}

/// A virtio device. It lives on the queue thread, which calls it; nothing in it may wait for a peer.
pub trait Device: Send {
    /// The feature bits of the device type that it offers. They never change.
    fn features(&self) -> u64;
    /// How many virtqueues it has, at most [`MAX_QUEUES`]. That never changes.
    fn queues(&self) -> u16;
    /// Its configuration space. The length never changes.
    fn config(&self) -> &[u8];
    /// The driver writes `data` at `offset`, all inside the configuration space.
    fn write_config(&mut self, _offset: usize, _data: &[u8]) {}
    /// The driver has taken these features.
    fn acknowledge(&mut self, _features: u64) {}
    /// Requests that it took and did not give back are given to its successor: it tracks those in flight.
    fn tracks(&self) -> bool {
        false
    }
    /// There may be something in the ring.
    fn process(&mut self, rings: &mut Rings, queue: u16) -> Progress;
    /// The ring is about to stop, or memory to change: what was taken from it must be given back, or forgotten.
    fn stop(&mut self, _rings: &mut Rings, _queue: u16) {}
    /// Descriptors to wait for, edge-triggered: whoever hears of one reads until nothing is left.
    fn sources(&self) -> Vec<BorrowedFd<'_>> {
        Vec::new()
    }
    /// The source of this index has something. Returns the rings to process, a bit for each.
    fn ready(&mut self, _rings: &mut Rings, _source: usize) -> u64 {
        0
    }
    /// Guest memory is another one now: what was taken from a ring stays taken unless the device says otherwise.
    fn memory_changed(&mut self, rings: &mut Rings, queue: u16) {
        self.stop(rings, queue);
    }
    /// The memory that it makes come and go. That never changes.
    fn pieces(&self) -> Option<Pieces> {
        None
    }
    /// Pci has told something.
    fn told(&mut self, _what: Told) {}
    /// A glance at the sources without a system call, for busy polling: the rings to process.
    fn poll(&mut self, _rings: &mut Rings) -> u64 {
        0
    }
}

/// What pci tells a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Told {
    /// The machine has been reset so many times since it was powered on.
    Resets(u64),
    /// The guest is to plug so many bytes.
    Request(u64),
}

const NEEDS_RESET: u8 = 1;
const CONFIG_CHANGED: u8 = 2;

/// What the queue thread leaves for the control thread to say to pci; clones share it.
#[derive(Clone, Debug)]
pub struct Notices {
    bits: Arc<AtomicU8>,
    wake: Arc<EventFd>,
}

impl Notices {
    /// No notice so far.
    ///
    /// # Errors
    /// The host's.
    pub fn new() -> Result<Self, Errno> {
        let wake = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        Ok(Self { bits: Arc::default(), wake: Arc::new(wake) })
    }

    fn post(&self, bit: u8) {
        self.bits.fetch_or(bit, Ordering::AcqRel);
        let _ = self.wake.write(1);
    }

    /// A queue is broken until the guest resets the device.
    pub fn needs_reset(&self) {
        self.post(NEEDS_RESET);
    }

    /// The configuration space has another content.
    pub fn config_changed(&self) {
        self.post(CONFIG_CHANGED);
    }

    /// Takes what there is to say.
    pub(crate) fn take(&self) -> Vec<ToPci> {
        let _ = self.wake.read();
        let bits = self.bits.swap(0, Ordering::AcqRel);
        let known = [(NEEDS_RESET, ToPci::NeedsReset), (CONFIG_CHANGED, ToPci::ConfigChanged)];
        known.into_iter().filter(|(bit, _)| bits & bit != 0).map(|(_, message)| message).collect()
    }

    /// The control thread has something to look at.
    pub(crate) fn wake(&self) {
        let _ = self.wake.write(1);
    }

    /// Puts back what could not be said.
    pub(crate) fn put_back(&self, message: ToPci) {
        let bit = match message {
            ToPci::NeedsReset => NEEDS_RESET,
            ToPci::ConfigChanged => CONFIG_CHANGED,
            // They are no notices.
            _ => return,
        };
        self.bits.fetch_or(bit, Ordering::AcqRel);
    }

    /// Nothing of what was to be said concerns the next front end.
    pub(crate) fn forget(&self) {
        let _ = self.take();
    }
}

impl AsFd for Notices {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}

/// The descriptors by which a daemon is reached.
#[derive(Debug)]
pub struct Listeners {
    /// `vhost`: a listening stream socket.
    pub vhost: OwnedFd,
    /// `side`: a listening packet socket.
    pub side: OwnedFd,
}
