//! The vhost-user front end of one device: a state machine over a non-blocking socket.
//!
//! It never waits. What it is told to do is queued; [`Frontend::advance`] sends, receives and returns what
//! happened. The loop calls that when one of [`Frontend::watch`] is ready or [`Frontend::deadline`] is over (a deadline
//! in the past says that there is work now), and acts on the events. Each start, stop and change of memory
//! ends in one event of its own, in the order of the calls, or in [`Event::Lost`] for all of them. Before
//! [`Event::Ready`] no ring runs and no memory is used, so a stop or a change of memory is over at once.

mod link;
mod machine;
mod script;
pub mod wire;

use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Instant;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

use self::link::{Channel, Got, Stream};
use self::machine::{Asked, Machine};
use crate::memory::Memory;

/// The longest reason in [`Event::Lost`], in bytes; it is one line.
pub const MAX_REASON: usize = 120;
/// Messages in one call of [`Frontend::advance`].
const TURNS: usize = 64;

/// What the device is, for the handshake.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spec {
    /// Id of the device, for messages.
    pub id: String,
    /// Virtqueues that the device has at most.
    pub queues: u16,
    /// Size of a virtqueue at most.
    pub queue_size: u16,
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

impl Ring {
    /// Whether its size is one of a split virtqueue and its three parts are aligned and in guest RAM, each in one
    /// piece (virtio 1.2, 2.7).
    #[must_use]
    pub fn is_in(&self, memory: &Memory) -> bool {
        let size = u64::from(self.size);
        let parts = [(self.desc, 16, 16 * size), (self.avail, 2, 6 + 2 * size), (self.used, 4, 6 + 8 * size)];
        let placed =
            |(base, align, len): (u64, u64, u64)| base % align == 0 && memory.find(base, len).is_some();
        self.size.is_power_of_two() && self.size <= 32768 && parts.into_iter().all(placed)
    }
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
    /// The back end asks for something on its shared memory regions, see [`Frontend::asked`].
    Asked,
    /// The back end uses the memory of the last [`Frontend::set_memory`] and no other.
    Memory,
    /// The connection is over; the device is to be connected anew. The text says why.
    Lost(String),
    /// What ran on a connection that this side has ended runs no more: the back end has ended it, too.
    Ended,
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

/// The front end of one device. It outlives its connections.
#[derive(Debug)]
pub struct Frontend {
    machine: Machine,
    stream: Option<Stream>,
    channel: Option<Channel>,
    /// A connection that this side has ended while rings ran, until the back end ends it.
    former: Option<Stream>,
    /// What a back end sent in place of memory: a message's descriptors at most, and none are taken afterwards.
    foreign: Vec<OwnedFd>,
}

impl Frontend {
    /// Without a connection.
    #[must_use]
    pub fn new(spec: Spec) -> Self {
        Self { machine: Machine::new(spec), stream: None, channel: None, former: None, foreign: Vec::new() }
    }

    /// Begins with a back end: [`Event::Ready`] follows. A former connection is closed.
    pub fn connect(&mut self, fd: OwnedFd) {
        self.disconnect();
        // Without a channel (the process is short of descriptors) the back end cannot say that its configuration has
        // changed; all else works.
        let pair = socketpair(AddressFamily::Unix, SockType::Stream, None, SockFlag::SOCK_CLOEXEC).ok();
        let (ours, theirs) = pair.unzip();
        self.stream = Some(Stream::new(fd, 1));
        self.channel = ours.map(|fd| Channel::new(fd, Instant::now()));
        self.machine.begin(theirs.map(Rc::new));
    }

    /// Ends the connection. No event follows.
    pub fn disconnect(&mut self) {
        self.machine.end();
        self.machine.events();
        self.close();
    }

    /// Lets the connection go. If rings may run at its other end, that end is watched until it is closed.
    fn close(&mut self) {
        let stream = self.stream.take().filter(|stream| self.machine.may_run() && stream.end().is_ok());
        self.former = stream.or(self.former.take());
        self.channel = None;
    }

    /// Whether a connection that this side has ended while rings ran is still open at its other end.
    #[must_use]
    pub const fn lingers(&self) -> bool {
        self.former.is_some()
    }

    /// Whether there is a connection.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.machine.is_connected()
    }

    /// Whether the back end may work on rings. After the end of a connection that the back end did not close itself (it was
    /// late, or broke the protocol) this stays so until [`Event::Ended`], or the next one: a process that serves one
    /// connection at a time answers on the next one when it is done with this.
    #[must_use]
    pub fn may_run(&self) -> bool {
        self.machine.may_run()
    }

    /// Whether the back end has done all that it was asked for.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.machine.is_idle()
    }

    /// Adds the descriptors to watch and what for.
    pub fn watch<'a>(&'a self, list: &mut Vec<PollFd<'a>>) {
        if let Some(stream) = &self.stream {
            let sending = self.machine.outgoing().is_some();
            let out = if sending { PollFlags::POLLOUT } else { PollFlags::empty() };
            list.push(PollFd::new(stream.fd(), PollFlags::POLLIN | out));
        }
        if let Some(channel) = self.channel.as_ref().filter(|_| self.machine.asked().is_none()) {
            let what = if channel.is_full() { PollFlags::POLLOUT } else { PollFlags::POLLIN };
            list.push(PollFd::new(channel.fd(), what));
        }
        list.extend(self.former.as_ref().map(|former| PollFd::new(former.fd(), PollFlags::empty())));
    }

    /// Sends, receives, returns what happened; bounded work. To be called after any other call, too.
    pub fn advance(&mut self) -> Vec<Event> {
        let now = Instant::now();
        for _ in 0..TURNS {
            self.machine.run(now);
            let moved = [self.send(), self.receive(), self.serve(now)];
            if !moved.contains(&true) {
                break;
            }
        }
        if !self.machine.is_connected() {
            self.close();
        }
        let mut events = self.machine.events();
        if events.iter().any(|event| matches!(event, Event::Ready { .. })) {
            // It serves one at a time.
            self.former = None;
        } else if self.former.as_ref().is_some_and(Stream::is_ended) {
            self.former = None;
            events.push(Event::Ended);
        }
        events
    }

    /// Sends; says whether anything went.
    fn send(&mut self) -> bool {
        let (Some(stream), Some(packet)) = (&self.stream, self.machine.outgoing()) else { return false };
        match stream.send(packet) {
            Ok(len) => self.machine.sent(len),
            Err(Errno::EAGAIN) => return false,
            Err(Errno::EPIPE | Errno::ECONNRESET) => self.machine.closed(),
            Err(errno) => self.machine.lose(format!("cannot be told anything: {errno}")),
        }
        true
    }

    /// Receives; says whether anything came.
    fn receive(&mut self) -> bool {
        let Some(stream) = self.stream.as_mut().filter(|_| self.machine.is_connected()) else { return false };
        match stream.receive(self.machine.awaits_memory()) {
            Got::Nothing => return false,
            Got::Part => {}
            Got::Message(message) => self.machine.take(message),
            Got::Closed => self.machine.closed(),
            Got::Wrong(why) => self.machine.lose(why),
            Got::Foreign(fds) => {
                self.foreign = fds;
                self.machine.distrust();
            }
        }
        true
    }

    /// Serves the back end's requests; says whether there was anything.
    fn serve(&mut self, now: Instant) -> bool {
        let listens = self.machine.is_connected() && self.machine.asked().is_none();
        let Some(channel) = self.channel.as_mut().filter(|_| listens) else { return false };
        match channel.turn(now, self.machine.shares()) {
            Got::Nothing => return false,
            Got::Part => {}
            Got::Message(message) => {
                if let Some(answer) = self.machine.request(message) {
                    channel.answer(answer);
                }
            }
            // It may do without.
            Got::Closed => self.channel = None,
            Got::Wrong(why) => self.machine.lose(why),
            Got::Foreign(fds) => {
                self.foreign = fds;
                self.machine.distrust();
            }
        }
        true
    }

    /// What the back end asks on its shared memory regions. It is heard no further before [`Self::answer`].
    #[must_use]
    pub fn asked(&self) -> Option<&Asked> {
        self.machine.asked()
    }

    /// Says whether that is done.
    pub fn answer(&mut self, done: bool) {
        if let (Some(packet), Some(channel)) = (self.machine.answer(done), &mut self.channel) {
            channel.answer(packet);
        }
    }

    /// The back end's shared memory regions, as of [`Event::Ready`]: id and length in bytes of each.
    #[must_use]
    pub fn shmem(&self) -> &[(u8, u64)] {
        self.machine.shmem()
    }

    /// When [`Self::expire`] is due.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        if self.machine.is_busy() { Some(Instant::now()) } else { self.machine.deadline() }
    }

    /// The deadline is over: as [`Self::advance`], and a back end that is late is given up.
    pub fn expire(&mut self) -> Vec<Event> {
        self.expire_at(Instant::now())
    }

    /// As [`Self::expire`], at another time.
    pub fn expire_at(&mut self, now: Instant) -> Vec<Event> {
        let mut events = self.advance();
        self.machine.expire(now);
        events.extend(self.advance());
        events
    }

    /// Starts rings with the virtio features that the guest has accepted: [`Event::Started`] follows.
    ///
    /// # Errors
    /// See [`StartError`]; nothing is started then.
    pub fn start(&mut self, features: u64, memory: &Rc<Memory>, rings: Vec<Ring>) -> Result<(), StartError> {
        self.machine.start(features, memory, &rings)
    }

    /// Stops all rings: [`Event::Stopped`] follows.
    pub fn stop(&mut self) {
        self.machine.stop();
    }

    /// Starts one more ring: [`Event::Started`] follows.
    ///
    /// # Errors
    /// See [`StartError`].
    pub fn start_ring(&mut self, memory: &Rc<Memory>, ring: Ring) -> Result<(), StartError> {
        self.machine.start_ring(ring, memory)
    }

    /// Stops one ring: [`Event::Stopped`] follows.
    pub fn stop_ring(&mut self, index: u16) {
        self.machine.stop_ring(index);
    }

    /// After a stop: the device goes to its power-on state, and what was in flight is forgotten.
    pub fn reset(&mut self) {
        self.machine.reset();
    }

    /// A running ring gets another interrupt.
    pub fn set_call(&mut self, index: u16, call: &Rc<OwnedFd>) {
        self.machine.set_call(index, call);
    }

    /// The guest has written configuration space. What lies outside of what the back end has is dropped.
    pub fn write_config(&mut self, offset: u32, bytes: &[u8]) {
        self.machine.write_config(offset, bytes);
    }

    /// Reads configuration space anew: [`Event::Config`] follows, if the back end has one.
    pub fn read_config(&mut self) {
        self.machine.read_config();
    }

    /// Guest RAM has changed: [`Event::Memory`] follows. A piece is the same only if its memfd is the same object.
    pub fn set_memory(&mut self, memory: &Rc<Memory>) {
        self.machine.set_memory(memory);
    }

    /// Whether the back end, if it is there, takes so many regions of guest memory while it runs.
    ///
    /// # Errors
    /// A text says why not.
    pub fn room(&self, regions: usize) -> Result<(), String> {
        self.machine.room(regions)
    }

    /// What the back end notes its requests in, once rings have been started. To be kept beyond this process.
    #[must_use]
    pub fn inflight(&self) -> Option<&Inflight> {
        self.machine.inflight()
    }

    /// What a predecessor kept.
    pub fn set_inflight(&mut self, inflight: Option<Inflight>) {
        self.machine.set_inflight(inflight);
    }

    /// Whether the back end can go on with the requests that another life of it had begun.
    #[must_use]
    pub fn tracks_inflight(&self) -> bool {
        self.machine.tracks_inflight()
    }
}
