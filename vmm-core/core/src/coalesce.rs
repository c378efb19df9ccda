//! Collected console output: KVM keeps single-byte writes to one port in a ring instead of an exit
//! for each, and whoever talks to the console next takes them along, in order.
//!
//! The port is registered with KVM only while there is output, so that an idle guest causes no
//! wake-ups: the first plain write asks for it ([`Coalescer::wants_start`]), the main thread drains at
//! least every [`PERIOD_MS`] while it is on, and switches it off after [`IDLE_PERIODS`] empty looks.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard};

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
    /// Exactly one drainer at a time, from taking the writes to the daemon's reply.
    drainer: Mutex<()>,
    draining: AtomicBool,
    active: AtomicBool,
    asked: AtomicBool,
}

/// The right to take collected writes, held until they are delivered.
#[derive(Debug)]
pub struct Drain<'a> {
    of: &'a Coalescer,
    ring: &'a Ring,
    _lock: MutexGuard<'a, ()>,
}

impl Drop for Drain<'_> {
    fn drop(&mut self) {
        self.of.draining.store(false, Ordering::SeqCst);
    }
}

impl Drain<'_> {
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
        Self {
            ring,
            drainer: Mutex::new(()),
            draining: AtomicBool::new(false),
            active: AtomicBool::new(false),
            asked: AtomicBool::new(false),
        }
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

    /// Ends collecting; what is left in the ring must be delivered by `last` before it counts.
    pub fn stop(&self, vm: &VmFd, last: impl FnOnce()) -> Result<()> {
        if self.is_active() {
            vm.unregister_coalesced_mmio(ZONE, 1).map_err(kvm("KVM_UNREGISTER_COALESCED_MMIO"))?;
            last();
            self.active.store(false, Ordering::SeqCst);
            self.asked.store(false, Ordering::Relaxed);
        }
        Ok(())
    }

    /// The right to drain, if something is collected or under way; else nobody has to wait.
    pub fn drain(&self) -> Option<Drain<'_>> {
        let ring = self.ring.as_ref().filter(|_| self.is_active())?;
        // The ring first: a drainer says that it drains before it empties the ring, so whoever sees
        // it empty sees that, too, as long as the writes are not delivered.
        if ring.is_empty() && !self.draining.load(Ordering::SeqCst) {
            return None;
        }
        let guard = lock(&self.drainer);
        self.draining.store(true, Ordering::SeqCst);
        Some(Drain { of: self, ring, _lock: guard })
    }
}
