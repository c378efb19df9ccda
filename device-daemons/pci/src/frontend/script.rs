//! What is to be done with a back end, step by step.

use std::os::fd::OwnedFd;
use std::rc::Rc;

use super::wire::{self, Packet, Request};
use super::{Inflight, Ring};
use crate::memory::Region;

/// What a request is answered with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expect {
    /// Nothing, or an acknowledgement if that was negotiated; a refusal ends the connection.
    Done,
    /// Nothing at all: acknowledgements are not negotiated yet.
    Silence,
    /// As [`Self::Done`], but a refusal is the guest's affair.
    Tried,
    /// Virtio features.
    Features,
    /// Protocol features.
    ProtocolFeatures,
    /// Number of queues.
    Queues,
    /// Number of pieces of memory.
    Slots,
    /// This many bytes of configuration space.
    Config {
        /// Bytes.
        len: usize,
        /// Why they are read.
        why: Why,
    },
    /// Index from which a ring goes on.
    Base(u16),
    /// Memory for what is in flight, for this many queues of this size.
    Inflight(u16, u16),
    /// Shared memory regions.
    Shmem,
    /// Virtio features, of no interest: all that was asked before is done.
    Barrier,
}

/// Why configuration space is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// It is part of the handshake.
    Handshake,
    /// It was asked for.
    Asked,
    /// The back end said that it has changed.
    Changed,
}

/// One step.
#[derive(Debug)]
pub enum Step {
    /// Send this and take the answer.
    Ask {
        /// Which request.
        request: Request,
        /// Its payload.
        payload: Vec<u8>,
        /// Its descriptors.
        fds: Vec<Rc<OwnedFd>>,
        /// Its answer.
        expect: Expect,
    },
    /// The handshake is over.
    Ready,
    /// Kick these and say that they, or the one named, run.
    Started(Vec<Rc<OwnedFd>>, Option<u16>),
    /// Say that all rings, or the one named, are stopped.
    Stopped(Option<u16>),
    /// Say that memory is what it was to be.
    Memory,
    /// Read configuration space as far as the back end has it.
    Reread(Why),
    /// What was in flight does not matter any more.
    Forget,
    /// The back end cannot be used.
    Unusable(String),
}

impl Step {
    /// A request without descriptors.
    pub fn ask(request: Request, payload: Vec<u8>, expect: Expect) -> Self {
        Self::Ask { request, payload, fds: Vec::new(), expect }
    }

    /// A request that hands over descriptors.
    pub fn hand(request: Request, payload: Vec<u8>, fds: Vec<Rc<OwnedFd>>) -> Self {
        Self::Ask { request, payload, fds, expect: Expect::Done }
    }

    /// Waits until all before is done.
    pub fn barrier() -> Self {
        Self::ask(Request::GET_FEATURES, Vec::new(), Expect::Barrier)
    }

    /// Reads `len` bytes of configuration space.
    pub fn config(len: usize, why: Why) -> Self {
        Self::ask(Request::GET_CONFIG, wire::config(0, &vec![0; len]), Expect::Config { len, why })
    }

    /// Hands over memory for what is in flight.
    pub fn inflight(inflight: &Inflight) -> Self {
        Self::hand(Request::SET_INFLIGHT_FD, inflight.payload(), vec![Rc::clone(&inflight.fd)])
    }

    /// Hands over a descriptor that belongs to a ring.
    pub fn ring_fd(request: Request, index: u16, fd: &Rc<OwnedFd>) -> Self {
        Self::hand(request, u64::from(index).to_ne_bytes().to_vec(), vec![Rc::clone(fd)])
    }

    /// Enables or disables a ring.
    pub fn enable(index: u16, enabled: bool) -> Self {
        Self::ask(Request::SET_VRING_ENABLE, wire::ring_state(index, enabled.into()), Expect::Done)
    }
}

/// Sets a ring up. It is started by the last message, once it is also enabled.
pub fn set_up(ring: &Ring) -> [Step; 5] {
    let state = |number| wire::ring_state(ring.index, number);
    [
        Step::ask(Request::SET_VRING_NUM, state(ring.size), Expect::Done),
        Step::ask(Request::SET_VRING_BASE, state(ring.base), Expect::Done),
        Step::ask(Request::SET_VRING_ADDR, wire::ring_addresses(ring), Expect::Done),
        Step::ring_fd(Request::SET_VRING_CALL, ring.index, &ring.call),
        Step::ring_fd(Request::SET_VRING_KICK, ring.index, &ring.kick),
    ]
}

/// Stops a ring; the answer says where.
pub fn stop(index: u16) -> Step {
    Step::ask(Request::GET_VRING_BASE, wire::ring_state(index, 0), Expect::Base(index))
}

/// Takes a piece of memory away, or adds one.
pub fn change(region: &Region, add: bool) -> Step {
    let payload = wire::memory_region(region);
    if add {
        Step::hand(Request::ADD_MEM_REG, payload, vec![Rc::clone(&region.fd)])
    } else {
        Step::ask(Request::REM_MEM_REG, payload, Expect::Done)
    }
}

/// Replaces all memory.
pub fn replace(regions: &[Region]) -> Step {
    let fds = regions.iter().map(|region| Rc::clone(&region.fd)).collect();
    Step::hand(Request::SET_MEM_TABLE, wire::memory_table(regions), fds)
}

/// The message of a request, and whether an answer follows.
pub fn message(step: (Request, &[u8], Vec<Rc<OwnedFd>>), expect: Expect, acks: bool) -> (Packet, bool) {
    let (request, payload, fds) = step;
    let ack = acks && matches!(expect, Expect::Done | Expect::Tried);
    let answer = ack || !matches!(expect, Expect::Done | Expect::Tried | Expect::Silence);
    (Packet::request(request, ack, payload, fds), answer)
}
