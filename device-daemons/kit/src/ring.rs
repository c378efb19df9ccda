//! A split virtqueue (virtio 1.2, 2.7) that runs.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering, fence};

use bulkhead_jail::warn;
use virtio_queue::{Error as QueueError, Queue, QueueOwnedT as _, QueueT as _};
use vm_memory::{Bytes as _, GuestAddress};

use crate::chain::{Chain, ChainError};
use crate::inflight::Tracker;
use crate::memory::{Memory, contains, read_u16};

/// The largest queue size.
pub const MAX_QUEUE_SIZE: u16 = 1024;
/// `VIRTQ_AVAIL_F_NO_INTERRUPT`.
const NO_INTERRUPT: u16 = 1;

/// Why a ring does not run, or runs no more until the device is reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    /// Its size is not a power of two of at most [`MAX_QUEUE_SIZE`], or an address is not aligned.
    #[error("ring of a wrong size or alignment")]
    Shape,
    /// Part of it is not in guest memory.
    #[error("ring outside of guest memory")]
    Memory,
    /// The available index is ahead of what a ring can hold.
    #[error("available index out of range")]
    Available,
    /// A chain breaks the rules.
    #[error("{0}")]
    Chain(#[from] ChainError),
    /// A request has no room for what every request has.
    #[error("{0}")]
    Request(&'static str),
}

/// Where a ring is and how it begins.
#[derive(Debug)]
pub struct Setup {
    /// Number of the queue.
    pub index: u16,
    /// Its size.
    pub size: u16,
    /// Guest physical address of the descriptor table.
    pub desc: u64,
    /// Of the available ring.
    pub avail: u64,
    /// Of the used ring.
    pub used: u64,
    /// Available index at which it goes on, if nothing is known of requests in flight.
    pub base: u16,
    /// `VIRTIO_F_EVENT_IDX` is negotiated.
    pub event_idx: bool,
    /// The interrupt.
    pub call: Option<OwnedFd>,
    /// Requests in flight.
    pub tracker: Option<Tracker>,
}

/// A ring that runs.
#[derive(Debug)]
pub struct Ring {
    index: u16,
    queue: Queue,
    memory: Arc<Memory>,
    call: Option<OwnedFd>,
    tracker: Option<Tracker>,
    /// Taken by a predecessor, to be done again.
    owed: VecDeque<u16>,
    spare: Vec<Chain>,
    given: bool,
    /// So many were given back behind the used index: the driver sees them with the next one.
    unseen: u16,
    /// The used index when it was last asked whether the driver wants to hear of it.
    asked: u16,
    /// The driver has begun it anew, and nobody has asked for that yet.
    new: bool,
    /// It goes on where a predecessor may have given something back and died before it said so.
    unsaid: bool,
    /// Somebody waits for the queue thread: no request is begun before that.
    hurry: Arc<AtomicBool>,
    broken: Option<RingError>,
}

fn queue(setup: &Setup) -> Result<Queue, QueueError> {
    let mut queue = Queue::new(MAX_QUEUE_SIZE)?;
    queue.try_set_size(setup.size)?;
    queue.try_set_desc_table_address(GuestAddress(setup.desc))?;
    queue.try_set_avail_ring_address(GuestAddress(setup.avail))?;
    queue.try_set_used_ring_address(GuestAddress(setup.used))?;
    queue.set_event_idx(setup.event_idx);
    queue.set_ready(true);
    Ok(queue)
}

impl Ring {
    /// Starts a ring where its predecessor stopped.
    ///
    /// # Errors
    /// [`RingError::Shape`], [`RingError::Memory`].
    pub fn new(mut setup: Setup, memory: Arc<Memory>) -> Result<Self, RingError> {
        let mut queue = queue(&setup).map_err(|_| RingError::Shape)?;
        let size = u64::from(setup.size);
        let parts = [(setup.desc, 16 * size), (setup.avail, 6 + 2 * size), (setup.used, 6 + 8 * size)];
        // virtio-queue takes an available ring at 0 for one that is not set.
        if setup.avail == 0 || !parts.iter().all(|(at, len)| contains(&memory, *at, *len)) {
            return Err(RingError::Memory);
        }
        let used = read_u16(&memory, setup.used + 2).map_err(|_| RingError::Memory)?;
        let left = setup.tracker.as_mut().map(|tracker| tracker.recover(setup.base, used));
        let next_avail = left.as_ref().map_or(setup.base, |left| left.next_avail);
        queue.set_next_used(used);
        queue.set_next_avail(next_avail);
        Ok(Self {
            index: setup.index,
            queue,
            memory,
            call: setup.call,
            tracker: setup.tracker,
            owed: left.map_or_else(VecDeque::new, |left| left.heads.into()),
            spare: Vec::new(),
            given: false,
            unseen: 0,
            asked: used,
            new: next_avail == 0 && used == 0,
            unsaid: next_avail != 0,
            hurry: Arc::default(),
            broken: None,
        })
    }

    /// Guest memory.
    #[must_use]
    pub fn memory(&self) -> Arc<Memory> {
        Arc::clone(&self.memory)
    }

    pub(crate) fn set_hurry(&mut self, hurry: Arc<AtomicBool>) {
        self.hurry = hurry;
    }

    pub(crate) fn set_memory(&mut self, memory: Arc<Memory>) {
        self.memory = memory;
    }

    pub(crate) fn set_call(&mut self, call: Option<OwnedFd>) {
        self.call = call;
    }

    /// The ring stops; returns the available index at which a successor goes on.
    pub(crate) fn stop(self) -> u16 {
        // After a mistake only a reset helps, and then nothing of this ring is to be done again.
        if let Some(tracker) = self.tracker.filter(|_| self.broken.is_some()) {
            tracker.forget();
        }
        self.queue.next_avail()
    }

    /// Why it does not run any more.
    pub(crate) const fn broken(&self) -> Option<RingError> {
        self.broken
    }

    /// The driver broke the rules: the ring stands still until the device is reset.
    pub fn fail(&mut self, error: RingError) {
        if self.broken.is_none() {
            self.broken = Some(error);
        }
    }

    fn next_head(&mut self) -> Result<Option<u16>, RingError> {
        let mut heads = self.queue.iter(&*self.memory).map_err(|error| match error {
            QueueError::InvalidAvailRingIndex => RingError::Available,
            _ => RingError::Memory,
        })?;
        Ok(heads.next().map(|chain| chain.head_index()))
    }

    fn take(&mut self) -> Result<Option<Chain>, RingError> {
        let (head, again) = match self.owed.pop_front() {
            Some(head) => (head, true),
            None => match self.next_head()? {
                Some(head) => (head, false),
                None => return Ok(None),
            },
        };
        let mut chain = self.spare.pop().unwrap_or_default();
        chain.walk(&self.memory, (self.queue.desc_table(), self.queue.size()), head)?;
        if let Some(tracker) = self.tracker.as_mut().filter(|_| !again) {
            tracker.take(head);
        }
        Ok(Some(chain))
    }

    /// Takes the next request; none if there is none, or the ring is broken, or somebody waits for this thread.
    pub fn pop(&mut self) -> Option<Chain> {
        if self.broken.is_some() || self.hurry.load(Ordering::Relaxed) {
            return None;
        }
        match self.take() {
            Ok(chain) => chain,
            Err(error) => {
                self.fail(error);
                None
            }
        }
    }

    /// Whether the driver has begun this ring anew, with nothing in it ever; says so once.
    pub fn take_new(&mut self) -> bool {
        std::mem::take(&mut self.new)
    }

    /// Its size.
    #[must_use]
    pub fn size(&self) -> usize {
        self.queue.size().into()
    }

    /// Gives a request back unused, as if it had not been taken; those that were taken last,
    /// all of them, in any order.
    pub fn put_back(&mut self, chain: Chain) {
        // Only devices without in-flight tracking do this.
        self.queue.set_next_avail(self.queue.next_avail().wrapping_sub(1));
        self.spare.push(chain);
    }

    /// Gives a request back, with `len` bytes of it written.
    pub fn done(&mut self, chain: Chain, len: u32) {
        if self.broken.is_some() {
            return;
        }
        let head = chain.head();
        if let Some(tracker) = &self.tracker {
            tracker.giving(head);
        }
        self.queue.set_next_used(self.queue.next_used().wrapping_add(std::mem::take(&mut self.unseen)));
        if self.queue.add_used(&*self.memory, head, len).is_err() {
            return self.fail(RingError::Memory);
        }
        if let Some(tracker) = &self.tracker {
            tracker.given(head, self.queue.next_used());
        }
        self.given = true;
        if self.spare.len() < MAX_QUEUE_SIZE.into() {
            self.spare.push(chain);
        }
    }

    /// Gives a request back with `len` bytes of it written, but the driver sees that only together with the next one
    /// that is done, as with the buffers of one packet (virtio 1.2, 5.1.6.4). For devices without in-flight tracking.
    pub fn done_with_next(&mut self, chain: Chain, len: u32) {
        if self.broken.is_some() {
            return;
        }
        let slot = self.queue.next_used().wrapping_add(self.unseen) % self.queue.size();
        let element = u64::from(chain.head()) | u64::from(len) << 32;
        let at = GuestAddress(self.queue.used_ring() + 4 + 8 * u64::from(slot));
        if self.memory.write_obj(element.to_le(), at).is_err() {
            return self.fail(RingError::Memory);
        }
        self.unseen = self.unseen.wrapping_add(1);
        if self.spare.len() < MAX_QUEUE_SIZE.into() {
            self.spare.push(chain);
        }
    }

    /// Whether the driver wants to hear of what was given back since the last call (2.7.7.2, 2.7.10).
    fn wants_interrupt(&mut self) -> bool {
        // What was given back is seen before the driver's wish is looked at.
        fence(Ordering::SeqCst);
        let (avail, size) = (self.queue.avail_ring(), u64::from(self.queue.size()));
        let (new, old) = (self.queue.next_used(), self.asked);
        self.asked = new;
        let wants = if self.queue.event_idx_enabled() {
            let event = read_u16(&self.memory, avail + 4 + 2 * size);
            event.map(|event| new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old))
        } else {
            read_u16(&self.memory, avail).map(|flags| flags & NO_INTERRUPT == 0)
        };
        wants.unwrap_or_else(|_| {
            self.fail(RingError::Memory);
            false
        })
    }

    /// Raises the interrupt if there is reason to.
    pub fn signal(&mut self) {
        let unsaid = std::mem::take(&mut self.unsaid);
        let wanted = std::mem::take(&mut self.given) && self.wants_interrupt();
        if !wanted && !unsaid {
            return;
        }
        let Some(call) = &self.call else { return };
        if let Err(error) = nix::unistd::write(call, &1u64.to_ne_bytes()) {
            warn!("interrupt of queue {}: {error}", self.index);
        }
    }

    /// Asks the driver for no kicks while the ring is looked at anyway.
    pub(crate) fn quiet(&mut self) {
        if self.broken.is_none() && self.queue.disable_notification(&*self.memory).is_err() {
            self.fail(RingError::Memory);
        }
    }

    /// Asks for kicks again; true if there is something in the ring already.
    pub(crate) fn rearm(&mut self) -> bool {
        if self.broken.is_some() {
            return false;
        }
        match self.queue.enable_notification(&*self.memory) {
            Ok(more) => more || !self.owed.is_empty(),
            Err(_) => {
                self.fail(RingError::Memory);
                false
            }
        }
    }

    /// Whether there is something in the ring.
    #[must_use]
    pub fn pending(&self) -> bool {
        let next = self.queue.next_avail();
        self.broken.is_none()
            && (!self.owed.is_empty()
                || read_u16(&self.memory, self.queue.avail_ring() + 2).is_ok_and(|index| index != next))
    }
}

/// The rings of a device that run, by number.
#[derive(Debug, Default)]
pub struct Rings {
    slots: Vec<Option<Ring>>,
}

impl Rings {
    /// Room for so many.
    #[must_use]
    pub fn new(queues: u16) -> Self {
        Self { slots: (0..queues).map(|_| None).collect() }
    }

    /// The ring of this number, if it runs.
    pub fn get(&mut self, queue: u16) -> Option<&mut Ring> {
        self.slots.get_mut(usize::from(queue)).and_then(Option::as_mut)
    }

    /// Starts a ring.
    pub fn insert(&mut self, queue: u16, ring: Ring) {
        if let Some(slot) = self.slots.get_mut(usize::from(queue)) {
            *slot = Some(ring);
        }
    }

    /// Stops one.
    pub fn remove(&mut self, queue: u16) -> Option<Ring> {
        self.slots.get_mut(usize::from(queue)).and_then(Option::take)
    }

    /// Those that run.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = (u16, &mut Ring)> {
        (0..).zip(&mut self.slots).filter_map(|(index, slot)| Some((index, slot.as_mut()?)))
    }
}
