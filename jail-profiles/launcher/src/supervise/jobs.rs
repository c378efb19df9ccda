//! Processes that are started when another one asks: loaders for core, dumps for the broker.

use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::time::Instant;

use bulkhead_jail::pace::Pace;
use nix::poll::{PollFd, PollFlags};
use nix::sys::socket::{MsgFlags, recv};

use super::{Part, packets};

/// The way to ask for one kind of process.
pub struct Trigger {
    /// What is asked for.
    pub part: Part,
    /// The asker's descriptor.
    pub name: &'static str,
    ours: OwnedFd,
    theirs: OwnedFd,
    /// One was asked for and none has been started for it yet.
    wanted: bool,
    pace: Pace,
}

impl Trigger {
    /// Nobody has asked yet. None for a process that lives as long as the VM.
    ///
    /// # Errors
    /// No socket pair.
    pub fn new(part: Part) -> Result<Option<Self>, String> {
        let Some(name) = part.process.boots.trigger() else { return Ok(None) };
        let (ours, theirs) = packets()?;
        Ok(Some(Self { part, name, ours, theirs, wanted: false, pace: Pace::default() }))
    }

    /// The asker's end.
    pub fn theirs(&self) -> BorrowedFd<'_> {
        self.theirs.as_fd()
    }

    /// What to wait for.
    pub fn poll_fd(&self) -> PollFd<'_> {
        PollFd::new(self.ours.as_fd(), PollFlags::POLLIN)
    }

    /// Takes a word; nobody looks at what it says.
    pub fn listen(&mut self) {
        self.wanted |= recv(self.ours.as_raw_fd(), &mut [0; 8], MsgFlags::MSG_DONTWAIT).is_ok();
    }

    /// When to look again, if one is wanted.
    pub fn next(&self) -> Option<Instant> {
        if self.wanted { self.pace.next() } else { None }
    }

    /// Whether one is to be started now, which is noted.
    pub fn take(&mut self) -> bool {
        let due = self.wanted && self.pace.allows();
        if due {
            self.wanted = false;
            self.pace.take();
        }
        due
    }
}
