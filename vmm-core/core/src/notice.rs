//! What vCPU threads tell the main thread.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Mutex;

use bulkhead_control_api::dump::Translated;
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::error::{Result, system};
use crate::gate::lock;
use crate::presence::Daemon;

/// Something that a vCPU cannot settle itself. It stays out of KVM until the next release.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum What {
    /// The guest asked for a reset, or a triple fault.
    Reset,
    /// The guest switched itself off.
    PowerOff,
    /// The guest panicked.
    Panicked,
    /// KVM cannot go on; one line for the log.
    KvmError(String),
}

/// A message to the main thread.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notice {
    /// From a vCPU that was running in this epoch.
    Vcpu(u64, What),
    /// A bus daemon is given up: which, and why.
    PeerFailed(Daemon, &'static str),
    /// A bus daemon broke the protocol.
    Breach(Daemon),
    /// Console output begins: collecting writes pays.
    Output,
    /// A vCPU has looked up what a dump asked.
    Translated(Translated),
}

/// The queue, and the descriptor that says that it is not empty.
///
/// Bounded: a vCPU posts once per epoch, a peer fails once and breaks the
/// protocol once for each vCPU until the next one comes, `Output` is posted once until taken, and a dump asks one vCPU at a
/// time.
#[derive(Debug)]
pub struct Notices {
    queue: Mutex<VecDeque<Notice>>,
    event: EventFd,
}

impl Notices {
    /// An empty queue.
    pub fn new() -> Result<Self> {
        let event =
            EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).map_err(system("eventfd"))?;
        Ok(Self { queue: Mutex::default(), event })
    }

    /// Appends a message.
    pub fn post(&self, notice: Notice) {
        lock(&self.queue).push_back(notice);
        // A full counter means that the main thread has a wake-up to come anyway.
        let _ = self.event.write(1);
    }

    /// Takes all messages.
    pub fn take(&self) -> VecDeque<Notice> {
        let _ = self.event.read();
        std::mem::take(&mut *lock(&self.queue))
    }
}

impl AsFd for Notices {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}
