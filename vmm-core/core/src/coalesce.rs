//! Collected console output: KVM keeps single-byte writes to one port in a ring instead of an exit
//! for each, and whoever talks to the console next takes them along, in order.
//!
//! The port is registered with KVM only while there is output, so that an idle guest causes no
//! wake-ups: the first plain write asks for it ([`Coalescer::wants_start`]), the main thread drains at
//! least every [`PERIOD_MS`] while it is on, and switches it off after [`IDLE_PERIODS`] empty looks.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use bulkhead_bus_api::platform::COALESCED_PORT;
use bulkhead_bus_api::{CollectedWrite, Space, WRITE_LEN};
use kvm_ioctls::{IoEventAddress, VmFd};

use crate::error::{Result, kvm};
use crate::gate::lock;
use crate::sys::Ring;

/// The longest that a written byte waits, in milliseconds.
pub const PERIOD_MS: u16 = 1;
/// Empty looks after which collecting ends.
pub const IDLE_PERIODS: u32 = 20;

const ZONE: IoEventAddress = IoEventAddress::Pio(COALESCED_PORT as u64);

/// The ring and who may drain it.
#[derive(Debug)]
pub struct Coalescer {
    /// None: switched off, or KVM cannot.
    ring: Option<Ring>,
    /// Whether somebody has the turn: one drainer at a time, from taking the writes to the daemon's reply.
    taken: Mutex<bool>,
    free: Condvar,
    draining: AtomicBool,
    active: AtomicBool,
    asked: AtomicBool,
}

/// The right to take collected writes, held until they are delivered.
#[derive(Debug)]
pub struct Drain<'a> {
    of: &'a Coalescer,
    ring: &'a Ring,
}

/// Waiting for the turn ended without it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LetGo;

impl Drop for Drain<'_> {
    fn drop(&mut self) {
        let mut taken = lock(&self.of.taken);
        self.of.draining.store(false, Ordering::SeqCst);
        *taken = false;
        drop(taken);
        self.of.free.notify_one();
    }
}

impl Drain<'_> {
    /// Keeps the turn beyond this value's life, until [`Coalescer::kept`].
    pub fn keep(self) {
        std::mem::forget(self);
    }

    /// Moves collected writes into `room`, in order; returns their number.
    pub fn fill(&self, room: &mut [u8]) -> usize {
        let mut count = 0;
        for slot in room.chunks_exact_mut(WRITE_LEN) {
            let Some(entry) = self.ring.pop() else { break };
            let size = u8::try_from(entry.len).unwrap_or(1);
            let data = u64::from_le_bytes(entry.data);
            slot.copy_from_slice(
                &CollectedWrite { space: Space::Pio, addr: entry.phys_addr, size, data }.encode(),
            );
            count += 1;
        }
        count
    }
}

impl Coalescer {
    /// Collects through `ring`; never without one.
    pub fn new(ring: Option<Ring>) -> Self {
        let (taken, free, draining, active, asked) = Default::default();
        Self { ring, taken, free, draining, active, asked }
    }

    /// Whether a plain write should ask the main thread to begin; true once.
    pub fn wants_start(&self) -> bool {
        self.ring.is_some() && !self.is_active() && !self.asked.swap(true, Ordering::Relaxed)
    }

    /// Whether the main thread must look every [`PERIOD_MS`].
    pub fn is_active(&self) -> bool {
        self.active.load(Ordering::SeqCst)
    }

    /// Begins to collect.
    pub fn start(&self, vm: &VmFd) -> Result<()> {
        if self.ring.is_some() && !self.is_active() {
            // First the flag: a write may be collected as soon as KVM knows the port.
            self.active.store(true, Ordering::SeqCst);
            vm.register_coalesced_mmio(ZONE, 1).map_err(kvm("KVM_REGISTER_COALESCED_MMIO"))?;
        }
        Ok(())
    }

    /// Ends collecting; what is left in the ring must be delivered by `last` before it counts. If that says
    /// that it could not, this is to be tried again.
    pub fn stop(&self, vm: &VmFd, last: impl FnOnce() -> bool) -> Result<()> {
        if self.is_active() {
            // Of a port that is not registered any more this is no error.
            vm.unregister_coalesced_mmio(ZONE, 1).map_err(kvm("KVM_UNREGISTER_COALESCED_MMIO"))?;
            if !last() {
                return Ok(());
            }
            self.active.store(false, Ordering::SeqCst);
            self.asked.store(false, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Whether something is collected or under way.
    pub fn has_more(&self) -> bool {
        // The ring first: a drainer says that it drains before it empties the ring, so whoever sees
        // it empty sees that, too, as long as the writes are not delivered.
        let ring = self.ring.as_ref().filter(|_| self.is_active());
        ring.is_some_and(|ring| !ring.is_empty() || self.draining.load(Ordering::SeqCst))
    }

    /// The right to drain, if something is collected or under way; else nobody has to wait. Waiting for the turn ends
    /// when `let_go` says so, too.
    pub fn drain(&self, let_go: impl Fn() -> bool) -> std::result::Result<Option<Drain<'_>>, LetGo> {
        if !self.has_more() {
            return Ok(None);
        }
        let taken = lock(&self.taken);
        let wait = self.free.wait_while(taken, |taken| *taken && !let_go());
        let taken = wait.unwrap_or_else(PoisonError::into_inner);
        if *taken { Err(LetGo) } else { Ok(self.take(taken)) }
    }

    /// Makes who waits for the turn ask whether it is let go.
    pub fn wake(&self) {
        drop(lock(&self.taken));
        self.free.notify_all();
    }

    /// The same without waiting for who has the turn.
    pub fn try_drain(&self) -> Option<Drain<'_>> {
        let taken = Some(lock(&self.taken)).filter(|taken| !**taken && self.has_more())?;
        self.take(taken)
    }

    fn take(&self, mut taken: MutexGuard<'_, bool>) -> Option<Drain<'_>> {
        *taken = true;
        self.draining.store(true, Ordering::SeqCst);
        drop(taken);
        self.kept()
    }

    /// The turn that the caller has kept.
    pub fn kept(&self) -> Option<Drain<'_>> {
        Some(Drain { of: self, ring: self.ring.as_ref()? })
    }
}
