//! Guest memory as the device's back end has it, and what the daemon of a memory device says of its own.

use std::os::fd::OwnedFd;
use std::rc::Rc;

use bulkhead_control_api::side::{FromPci, MemorySizes, Piece};

use super::VirtioPci;
use crate::memory::Memory;
use crate::pieces::Ask;

/// What is asked for in one turn, at most.
const MAX_ASKS: usize = 1024;

/// What concerns guest memory.
#[derive(Debug, Default)]
pub struct Share {
    /// The back end has not answered to the last change.
    pub telling: bool,
    /// Queues are not to run.
    pub held: bool,
    /// Resets of the machine.
    pub resets: u64,
    /// What the daemon asks.
    pub asks: Vec<Ask>,
    /// The sizes that it said last.
    pub sizes: Option<MemorySizes>,
    /// How often it has.
    pub said: u64,
    /// The pieces that it has are known.
    pub known: bool,
    /// It has said all of them on this link.
    pub said_all: bool,
}

impl VirtioPci {
    /// Guest memory has changed.
    pub(super) fn change_memory(&mut self, memory: &Rc<Memory>) {
        self.memory = Rc::clone(memory);
        self.share.telling = true;
        self.front.set_memory(memory);
        let events = self.front.advance();
        self.on_events(events);
    }

    /// The daemon's hello has come.
    pub(super) fn greeted(&mut self) {
        self.tell_side(&FromPci::Resets(self.share.resets));
        self.share.said_all = false;
        if self.config.memory.is_some() {
            self.share.asks = vec![Ask::Begin];
        }
    }

    /// Tells the daemon something; false if it is away.
    pub(super) fn tell_side(&mut self, message: &FromPci) -> bool {
        let Some(side) = &self.side else { return false };
        match side.tell(message) {
            Ok(told) => told,
            Err(error) => {
                self.complain(&format!("side link: {error}"));
                self.side = None;
                false
            }
        }
    }

    /// The sizes are in the configuration space, too.
    pub(super) fn on_sizes(&mut self, sizes: MemorySizes) {
        self.share.sizes = Some(sizes);
        self.share.said = self.share.said.wrapping_add(1);
        if self.offer.is_some() && self.sync.ask() {
            self.front.read_config();
        }
    }

    /// The daemon has said all of its pieces, which it does once: core is asked for the absence of all others.
    pub(super) fn on_all_said(&mut self) {
        if std::mem::replace(&mut self.share.said_all, true) {
            self.complain("side link: all pieces were said before");
            self.side = None;
        } else {
            self.share.asks.push(Ask::All);
        }
    }

    pub(super) fn on_piece(&mut self, number: u16, piece: Piece, fd: Option<OwnedFd>) {
        match fd {
            Some(fd) if self.share.asks.len() < MAX_ASKS => {
                self.share.asks.push(Ask::Piece(number, piece, Rc::new(fd)));
            }
            _ => {
                self.complain("side link: a piece of memory without a descriptor");
                self.side = None;
            }
        }
    }
}
