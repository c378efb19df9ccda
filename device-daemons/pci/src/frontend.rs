//! The vhost-user front end of one device: a state machine over a non-blocking socket.
//!
//! It never waits. The loop polls [`Frontend::poll_fd`], calls [`Frontend::advance`] when that is ready and
//! [`Frontend::expire`] when [`Frontend::deadline`] is over, and acts on the events.

use std::os::fd::OwnedFd;
use std::rc::Rc;

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
    /// All rings run and have been kicked.
    Started,
    /// All rings, or the one named, are stopped; the back end touches no guest memory for them.
    Stopped {
        /// Number of the one ring that was to stop.
        ring: Option<u16>,
        /// Number and available index of each ring that ran.
        bases: Vec<(u16, u16)>,
    },
    /// Its configuration space has changed.
    Config(Vec<u8>),
    /// The connection is over; the device is to be connected anew. The text says why.
    Lost(String),
}
