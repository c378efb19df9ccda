//! What of a device outlives the process.

use std::rc::Rc;
use std::time::Instant;

use bulkhead_control_api::{decode, encode};
use serde::{Deserialize, Serialize};

use super::common::{Common, Offer};
use super::sync::Span;
use super::window::most_regions;
use super::{Stage, VirtioPci};
use crate::frontend::Inflight;

/// Memory for requests in flight, beside the descriptor: length, offset, virtqueues, size of a virtqueue.
type Room = (u64, u64, u16, u16);

/// The state. Whether the guest lets the device master the bus, and whether it is paused, others know.
#[derive(Debug, Serialize, Deserialize)]
struct Saved {
    shown: Option<Offer>,
    common: Common,
    space: Vec<u8>,
    dirty: Vec<Span>,
    isr: u8,
    used: bool,
    /// Nothing runs at the back end. The state is committed before one is told to run something.
    halted: bool,
    orphaned: bool,
    noted: bool,
    inflight: Option<Room>,
    /// Its shared memory regions, and whether the back end has had something mapped there.
    regions: Vec<(u8, u64)>,
    mapped: bool,
}

impl VirtioPci {
    /// Encodes it.
    pub(super) fn saved(&self) -> Vec<u8> {
        let room =
            |inflight: &Inflight| (inflight.size, inflight.offset, inflight.queues, inflight.queue_size);
        let saved = Saved {
            shown: self.shown,
            common: self.common.clone(),
            space: self.space.clone(),
            dirty: self.sync.unknown(),
            isr: self.isr,
            used: self.used,
            halted: self.stage == Stage::Stopped,
            orphaned: self.orphaned,
            noted: self.noted,
            inflight: self.front.inflight().map(room),
            regions: self.shmem.offered(),
            mapped: !self.shmem.pieces().is_empty(),
        };
        // It is shorter than a message by far.
        encode(&saved).unwrap_or_default()
    }

    /// Goes on from it; false, and nothing is changed, if it belongs to another device.
    pub(super) fn take_over(&mut self, saved: &[u8]) -> bool {
        let inherited = self.inherited.take();
        let Ok(saved) = decode::<Saved>(saved) else { return false };
        let most = most_regions(saved.space.len());
        if !saved.common.fits(self.shape)
            || saved.space.len() != self.space.len()
            || !self.shmem.show(&saved.regions, most)
        {
            return false;
        }
        self.shown = saved.shown;
        self.common = saved.common;
        self.space = saved.space;
        saved.dirty.into_iter().for_each(|span| self.sync.add(span));
        self.isr = saved.isr;
        // The guest may have been interrupted for it, or not.
        self.told = self.isr != 0;
        self.used = saved.used;
        (self.orphaned, self.noted) = (saved.orphaned, saved.noted);
        if self.used && !saved.halted {
            self.stage = Stage::Stale(Instant::now());
        }
        if let (Some(fd), Some((size, offset, queues, queue_size))) = (inherited, saved.inflight) {
            let inflight = Inflight { fd: Rc::new(fd), size, offset, queues, queue_size };
            self.front.set_inflight(Some(inflight));
        }
        if saved.mapped {
            // The connection on which it asked for that is no more.
            self.lose_shared();
        }
        self.settle();
        true
    }
}
