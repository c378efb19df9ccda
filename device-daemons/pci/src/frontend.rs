//! The vhost-user front end of one device: a state machine over a non-blocking socket.
//!
//! It never waits. What it is told to do is queued; [`Frontend::advance`] sends, receives and returns what
//! happened. The loop calls that when one of [`Frontend::watch`] is ready or [`Frontend::deadline`] is over (a deadline
//! in the past says that there is work now), and acts on the events. Each start, stop and change of memory
//! ends in one event of its own, in the order of the calls, or in [`Event::Lost`] for all of them.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Instant;

use nix::poll::PollFd;

use crate::memory::Memory;

/// What the device is, for the handshake.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spec {
    /// Id of the device, for messages.
    pub id: String,
    /// Virtqueues that the device has at most.
    pub queues: u16,
    /// Length of the configuration space to read from the back end, in bytes; 0 if it is not the back end's.
    pub config_len: u16,
}

/// A virtqueue that is to run.
#[derive(Clone, Debug)]
pub struct Ring {
    /// Its number.
    pub index: u16,
    /// Its size.
    pub size: u16,
    /// Guest physical address of the descriptor table.
    pub desc: u64,
    /// Of the available ring.
    pub avail: u64,
    /// Of the used ring.
    pub used: u64,
    /// Index from which it goes on.
    pub base: u16,
    /// The guest's doorbell.
    pub kick: Rc<OwnedFd>,
    /// The interrupt.
    pub call: Rc<OwnedFd>,
}

/// What happened at the back end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The handshake is over.
    Ready {
        /// Virtio feature bits that the back end offers.
        features: u64,
        /// Virtqueues that it has.
        queues: u16,
        /// Its configuration space, `config_len` bytes, or nothing.
        config: Vec<u8>,
    },
    /// All rings, or the one named, run and have been kicked.
    Started {
        /// Number of the one ring that was to start.
        ring: Option<u16>,
    },
    /// All rings, or the one named, are stopped; the back end touches no guest memory for them.
    Stopped {
        /// Number of the one ring that was to stop.
        ring: Option<u16>,
        /// Number and available index of each ring that ran.
        bases: Vec<(u16, u16)>,
    },
    /// Its configuration space, `config_len` bytes, as it is now; `changed` if the back end said so by itself.
    Config {
        /// The bytes.
        config: Vec<u8>,
        /// The guest is to be told.
        changed: bool,
    },
    /// The back end uses the memory of the last [`Frontend::set_memory`] and no other.
    Memory,
    /// The connection is over; the device is to be connected anew. The text says why.
    Lost(String),
}

/// Where a back end notes the requests that it has begun, so that it can go on with them in another life
/// (vhost-user, "Inflight I/O tracking"). This process never maps it.
#[derive(Clone, Debug)]
pub struct Inflight {
    /// Its memory.
    pub fd: Rc<OwnedFd>,
    /// Length in bytes.
    pub size: u64,
    /// Offset in the file.
    pub offset: u64,
    /// Virtqueues that it has room for.
    pub queues: u16,
    /// Size of the largest virtqueue that it has room for.
    pub queue_size: u16,
}

/// Why rings cannot be started.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StartError {
    /// There is no back end, or it has not said what it is.
    #[error("the back end is not ready")]
    NotReady,
    /// A ring is not aligned or not in RAM, or the back end has none of this number.
    #[error("ring {0} is invalid")]
    Ring(u16),
}

#[expect(dead_code, reason = "the state machine follows")]
/// What the front end is to do.
#[derive(Debug)]
enum Command {
    Start(u64, Rc<Memory>, Vec<Ring>),
    Stop,
    StartRing(Ring),
    StopRing(u16),
    Call(u16, Rc<OwnedFd>),
    WriteConfig(u32, Vec<u8>),
    ReadConfig,
    Memory(Rc<Memory>),
    Reset,
}

#[expect(dead_code, reason = "the state machine follows")]
/// The front end of one device. It outlives its connections.
#[derive(Debug)]
pub struct Frontend {
    spec: Spec,
    link: Option<OwnedFd>,
    inflight: Option<Inflight>,
    commands: VecDeque<Command>,
}

impl Frontend {
    /// Without a connection.
    #[must_use]
    pub fn new(spec: Spec) -> Self {
        Self { spec, link: None, inflight: None, commands: VecDeque::new() }
    }

    /// Begins with a back end: [`Event::Ready`] follows. A former connection is closed.
    pub fn connect(&mut self, fd: OwnedFd) {
        self.disconnect();
        self.link = Some(fd);
    }

    /// Ends the connection. No event follows.
    pub fn disconnect(&mut self) {
        self.link = None;
        self.commands.clear();
    }

    /// Whether there is a connection.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.link.is_some()
    }

    /// Adds the descriptors to watch and what for.
    pub fn watch<'a>(&'a self, _list: &mut Vec<PollFd<'a>>) {}

    /// Sends, receives, returns what happened; bounded work. To be called after any other call, too.
    pub fn advance(&mut self) -> Vec<Event> {
        Vec::new()
    }

    /// When [`Self::expire`] is due.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        None
    }

    /// The deadline is over.
    pub fn expire(&mut self) -> Vec<Event> {
        self.advance()
    }

    /// Starts rings with the virtio features that the guest has accepted: [`Event::Started`] follows.
    ///
    /// # Errors
    /// See [`StartError`]; nothing is started then.
    pub fn start(&mut self, features: u64, memory: &Rc<Memory>, rings: Vec<Ring>) -> Result<(), StartError> {
        self.commands.push_back(Command::Start(features, Rc::clone(memory), rings));
        Ok(())
    }

    /// Stops all rings: [`Event::Stopped`] follows.
    pub fn stop(&mut self) {
        self.commands.push_back(Command::Stop);
    }

    /// Starts one more ring: [`Event::Started`] follows.
    ///
    /// # Errors
    /// See [`StartError`].
    pub fn start_ring(&mut self, ring: Ring) -> Result<(), StartError> {
        self.commands.push_back(Command::StartRing(ring));
        Ok(())
    }

    /// Stops one ring: [`Event::Stopped`] follows.
    pub fn stop_ring(&mut self, index: u16) {
        self.commands.push_back(Command::StopRing(index));
    }

    /// After a stop: the device goes to its power-on state, and what was in flight is forgotten.
    pub fn reset(&mut self) {
        self.inflight = None;
        self.commands.push_back(Command::Reset);
    }

    /// A running ring gets another interrupt.
    pub fn set_call(&mut self, index: u16, call: Rc<OwnedFd>) {
        self.commands.push_back(Command::Call(index, call));
    }

    /// The guest has written configuration space. What lies outside of what the back end has is dropped.
    pub fn write_config(&mut self, offset: u32, bytes: &[u8]) {
        self.commands.push_back(Command::WriteConfig(offset, bytes.to_vec()));
    }

    /// Reads configuration space anew: [`Event::Config`] follows, if the back end has one.
    pub fn read_config(&mut self) {
        self.commands.push_back(Command::ReadConfig);
    }

    /// Guest RAM has changed: [`Event::Memory`] follows. A piece is the same only if its memfd is the same object.
    pub fn set_memory(&mut self, memory: &Rc<Memory>) {
        self.commands.push_back(Command::Memory(Rc::clone(memory)));
    }

    /// What the back end notes its requests in, once rings have been started. To be kept beyond this process.
    #[must_use]
    pub fn inflight(&self) -> Option<&Inflight> {
        self.inflight.as_ref()
    }

    /// What a predecessor kept.
    pub fn set_inflight(&mut self, inflight: Option<Inflight>) {
        self.inflight = inflight;
    }

    /// Whether the back end can go on with the requests that another life of it had begun.
    #[must_use]
    pub fn tracks_inflight(&self) -> bool {
        false
    }
}
