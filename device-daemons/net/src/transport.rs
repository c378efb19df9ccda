//! The network device on virtqueues and TAP interfaces.
//!
//! A packet for the driver is read into a buffer of this process first: only then is its length known, and how many of
//! the driver's buffers it takes. One of the driver goes from its buffers to the interface at once.

use std::io::Read as _;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::Arc;

use bulkhead_control_api::config::Net;
use bulkhead_jail::warn;
use bulkhead_kit::chain::Chain;
use bulkhead_kit::device::{Device, Progress};
use bulkhead_kit::io::Vectors;
use bulkhead_kit::memory::Memory;
use bulkhead_kit::ring::{Ring, RingError, Rings};
use nix::errno::Errno;
use nix::sys::uio::{pread, pwrite};

use crate::device::{
    ACK, COMMAND, F_MQ, F_MRG_RXBUF, HEAD, MAX_PACKET, MAX_PAIRS, NAK, Nic, Role, set_num_buffers,
};
use crate::tap::Tap;

/// Packets of one queue before others have their turn.
const TURN: usize = 64;

/// Why there is no device.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// No TAP interface, or too many.
    #[error("configuration: 1 to {MAX_PAIRS} TAP descriptors")]
    Taps,
    /// A descriptor is not a TAP interface of the right kind.
    #[error("descriptor {0:?}: {1}")]
    Tap(String, Errno),
    /// The state cannot be read.
    #[error("state: {0}")]
    State(Errno),
}

/// How many pairs are in use, in a memfd that outlives the process: the driver says it once.
///
/// ```text
/// life u64 | pairs u16
/// ```
#[derive(Debug)]
struct Kept {
    fd: OwnedFd,
    life: u64,
}

impl Kept {
    fn read(&self) -> Result<u16, Errno> {
        let mut bytes = [0; 10];
        let len = pread(&self.fd, &mut bytes, 0)?;
        let (life, pairs) = bytes.split_at(8);
        let known = len == bytes.len() && life == self.life.to_le_bytes();
        Ok(pairs.first_chunk().filter(|_| known).map_or(1, |pairs| u16::from_le_bytes(*pairs)))
    }

    fn write(&self, pairs: u16) {
        let bytes = [&self.life.to_le_bytes()[..], &pairs.to_le_bytes()].concat();
        if let Err(errno) = pwrite(&self.fd, &bytes, 0) {
            warn!("state: {errno}; after a restart one queue pair is used");
        }
    }
}

/// A queue pair.
#[derive(Debug)]
struct Pair {
    tap: Tap,
    attached: bool,
    /// The packet that waits for the driver's buffers.
    packet: Vec<u8>,
    waiting: usize,
    /// Buffers that were taken for it and are not enough yet.
    chains: Vec<Chain>,
}

/// The device with its interfaces.
#[derive(Debug)]
pub struct Transport {
    nic: Nic,
    pairs: Vec<Pair>,
    kept: Kept,
    active: u16,
    vectors: Vectors,
}

/// What became of a packet for the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Placed {
    Yes,
    /// The driver has to give buffers first.
    Waits,
}

impl Transport {
    /// The device of this configuration, with the TAP descriptors in its order.
    ///
    /// # Errors
    /// [`NetError`].
    pub fn new(config: &Net, taps: Vec<OwnedFd>, state: OwnedFd) -> Result<Self, NetError> {
        let count = u16::try_from(taps.len()).ok().filter(|count| (1..=MAX_PAIRS).contains(count));
        let count = count.ok_or(NetError::Taps)?;
        let mut pairs = Vec::new();
        for (name, fd) in config.taps.iter().zip(taps) {
            // As long as `struct virtio_net_hdr` is.
            let tap = Tap::new(fd, 12).map_err(|errno| NetError::Tap(name.clone(), errno))?;
            let packet = vec![0; MAX_PACKET];
            pairs.push(Pair { tap, attached: true, packet, waiting: 0, chains: Vec::new() });
        }
        let kept = Kept { fd: state, life: config.life };
        let active = kept.read().map_err(NetError::State)?.clamp(1, count);
        let nic = Nic::new(config.mac, count);
        let mut device = Self { nic, pairs, kept, active, vectors: Vectors::default() };
        // A predecessor may have left them in any state.
        for pair in device.pairs.iter_mut().filter(|_| count > 1) {
            let _ = pair.tap.attach(true);
        }
        device.steer(active);
        Ok(device)
    }

    /// Uses so many pairs.
    fn steer(&mut self, active: u16) {
        self.active = active;
        for (index, pair) in (0..).zip(&mut self.pairs) {
            let attached = index < active;
            if attached != pair.attached {
                match pair.tap.attach(attached) {
                    Ok(()) => pair.attached = attached,
                    Err(errno) => warn!("queue pair {index}: {errno}"),
                }
            }
        }
    }

    fn set_active(&mut self, active: u16) {
        self.kept.write(active);
        self.steer(active);
    }

    fn receive(&mut self, ring: &mut Ring, pair: u16) -> Progress {
        let merged = self.nic.has(F_MRG_RXBUF);
        let Some(pair) = self.pairs.get_mut(usize::from(pair)) else { return Progress::Idle };
        let memory = ring.memory();
        for _ in 0..TURN {
            if pair.waiting == 0 {
                pair.waiting = match pair.tap.file().read(&mut pair.packet) {
                    Ok(len) if len > HEAD => len,
                    // Nothing there, or the interface is down: it will tell.
                    _ => return if ring.pending() { Progress::Blocked } else { Progress::Idle },
                };
            }
            match pair.place(ring, &memory, merged) {
                Ok(Placed::Yes) => pair.waiting = 0,
                Ok(Placed::Waits) => return Progress::Idle,
                Err(error) => {
                    ring.fail(error);
                    return Progress::Idle;
                }
            }
        }
        Progress::More
    }

    fn transmit(&mut self, ring: &mut Ring, pair: u16) -> Progress {
        let Some(pair) = self.pairs.get(usize::from(pair)) else { return Progress::Idle };
        let memory = ring.memory();
        for _ in 0..TURN {
            let Some(chain) = ring.pop() else { return Progress::Idle };
            let packet = chain.readable();
            let len = usize::try_from(packet.len()).unwrap_or(usize::MAX);
            if len < HEAD {
                ring.fail(RingError::Request("packet without a head"));
                return Progress::Idle;
            }
            if len <= MAX_PACKET {
                // An interface that is full, or down, or does not like the packet, drops it: networks do.
                let _ = self.vectors.write(pair.tap.as_fd(), &memory, &packet);
            }
            ring.done(chain, 0);
        }
        Progress::More
    }

    fn control(&mut self, ring: &mut Ring) -> Progress {
        let memory = ring.memory();
        for _ in 0..TURN {
            let Some(chain) = ring.pop() else { return Progress::Idle };
            match self.command(&memory, &chain) {
                Ok(()) => ring.done(chain, 1),
                Err(error) => {
                    ring.fail(error);
                    return Progress::Idle;
                }
            }
        }
        Progress::More
    }

    fn command(&mut self, memory: &Memory, chain: &Chain) -> Result<(), RingError> {
        let answer = chain.writable().slice(0, 1).ok_or(RingError::Request("command without an answer"))?;
        let mut command = [0; COMMAND];
        let len = chain.readable().read(memory, &mut command)?;
        let active = self.nic.command(command.get(..len).unwrap_or_default());
        if let Some(active) = active {
            self.set_active(active);
        }
        answer.write(memory, &[if active.is_some() { ACK } else { NAK }])?;
        Ok(())
    }
}

impl Pair {
    /// The buffers that were taken are the ring's again.
    fn give_up(&mut self, ring: &mut Ring) {
        self.chains.drain(..).for_each(|chain| ring.put_back(chain));
    }

    /// Puts the packet into buffers of the driver: several if they are merged. A packet for which the whole ring has no
    /// room is dropped.
    fn place(&mut self, ring: &mut Ring, memory: &Arc<Memory>, merged: bool) -> Result<Placed, RingError> {
        let len = self.waiting;
        let bytes = |chain: &Chain| usize::try_from(chain.writable().len()).unwrap_or(usize::MAX);
        let mut room: usize = self.chains.iter().map(bytes).sum();
        while room < len {
            let Some(chain) = ring.pop() else { break };
            room += bytes(&chain);
            self.chains.push(chain);
            if !merged {
                break;
            }
        }
        if room < len {
            let hopeless = if merged { self.chains.len() >= ring.size() } else { !self.chains.is_empty() };
            if !hopeless {
                return Ok(Placed::Waits);
            }
            self.give_up(ring);
            return Ok(Placed::Yes);
        }
        let count = u16::try_from(self.chains.len()).unwrap_or(u16::MAX);
        let packet = self.packet.get_mut(..len).unwrap_or_default();
        set_num_buffers(packet, count);
        let (mut rest, last) = (&*packet, self.chains.len().saturating_sub(1));
        for (index, chain) in self.chains.drain(..).enumerate() {
            let done = chain.writable().write(memory, rest)?;
            rest = rest.get(done..).unwrap_or_default();
            let len = u32::try_from(done).unwrap_or(u32::MAX);
            // The driver may look at the ring at any moment: it is to find the whole packet, or nothing.
            if index < last { ring.done_with_next(chain, len) } else { ring.done(chain, len) }
        }
        Ok(Placed::Yes)
    }
}

impl Device for Transport {
    fn features(&self) -> u64 {
        self.nic.offers()
    }

    fn queues(&self) -> u16 {
        self.nic.queues()
    }

    fn config(&self) -> &[u8] {
        self.nic.config()
    }

    fn acknowledge(&mut self, features: u64) {
        self.nic.acknowledge(features);
        for pair in &self.pairs {
            if let Err(errno) = pair.tap.set_offloads(features) {
                warn!("offloads: {errno}");
            }
        }
        if !self.nic.has(F_MQ) {
            self.set_active(1);
        }
    }

    fn process(&mut self, rings: &mut Rings, queue: u16) -> Progress {
        let Some(ring) = rings.get(queue) else { return Progress::Idle };
        if ring.take_new() && queue == 0 {
            // The driver has begun anew: with one pair (5.1.6.5.5).
            self.set_active(1);
        }
        match self.nic.role(queue) {
            Some(Role::Receive(pair)) => self.receive(ring, pair),
            Some(Role::Transmit(pair)) => self.transmit(ring, pair),
            Some(Role::Control) => self.control(ring),
            None => Progress::Idle,
        }
    }

    fn stop(&mut self, rings: &mut Rings, queue: u16) {
        let Some(Role::Receive(pair)) = self.nic.role(queue) else { return };
        if let (Some(pair), Some(ring)) = (self.pairs.get_mut(usize::from(pair)), rings.get(queue)) {
            pair.give_up(ring);
        }
    }

    fn sources(&self) -> Vec<BorrowedFd<'_>> {
        self.pairs.iter().map(|pair| pair.tap.as_fd()).collect()
    }

    fn ready(&mut self, _rings: &mut Rings, source: usize) -> u64 {
        // Its queue for receiving.
        u32::try_from(source * 2).ok().and_then(|queue| 1u64.checked_shl(queue)).unwrap_or(0)
    }
}
