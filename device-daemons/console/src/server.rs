//! The event loop: one thread serves core, the broker, the character devices and the timers.
//!
//! ```text
//! held --every wait=on client is there--> greeting --core's hello--> up --welcome--> access links
//! ```
//! Nothing in here waits for a peer. When core closes the main link, the machine is over.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use bulkhead_bus_api::main_link::{Command, FromCore, ToCore};
use bulkhead_control_api::console::{self, Answer, Client, Op, Reply};
use bulkhead_control_api::opener::FromOpener;
use bulkhead_jail::link::{Link, LinkError};
use bulkhead_jail::starter::Starter;
use bulkhead_jail::topology::LINK_CONTROL_CONSOLE;
use bulkhead_jail::{info, notice, warn};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::MsgFlags;
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

use crate::bus::{self, AccessLink, BusError, Served};
use crate::chardev::{Chardev, Input};
use crate::connection;
use crate::device::serial::Serial;
use crate::kept::Keeper;
use crate::machine::{Machine, monotonic};
use crate::state::{Left, Names, State};

/// While bytes stream, output goes to the character device at most this often (nanoseconds) ...
const FLUSH_INTERVAL: u64 = 1_000_000;
/// ... unless so many bytes wait.
const FLUSH_BYTES: usize = 4096;
/// The longest sleep of the timer (nanoseconds): the host's time of day may be set meanwhile.
const LONGEST_SLEEP: u64 = 60_000_000_000;
/// Bound on delivering the last output.
const FINISH: Duration = Duration::from_secs(1);
/// Events taken in one round.
const EVENTS: usize = 32;

const TIMER: u64 = 0;
const CORE: u64 = 1;
const BROKER: u64 = 2;
const OPENER: u64 = 3;
/// Kinds of numbered descriptors, in the upper half of an event's data.
const PEER: u64 = 1 << 32;
const LISTENER: u64 = 2 << 32;
const ACCESS: u64 = 3 << 32;
const KIND: u64 = !0 << 32;

/// Why the process ends otherwise than by core's word.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// Core broke the protocol.
    #[error("{0}")]
    Bus(#[from] BusError),
    /// Core says that this process broke the protocol.
    #[error("core has cut this process off: see its log")]
    SentAway,
    /// The main link failed.
    #[error("main link to core: {0}")]
    Core(LinkError),
    /// The host failed.
    #[error("event loop: {0}")]
    Host(#[from] Errno),
}

/// A link in its stages.
#[derive(Debug)]
enum Peer {
    /// Connected; not a word said.
    Held(OwnedFd),
    /// Our hello is out.
    Greeting(Link),
    /// In use.
    Up(Link),
    /// Gone.
    Gone,
}

/// What a round of the loop knows of the machine's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flow {
    Continue,
    End,
}

/// What the server serves.
#[derive(Debug)]
pub struct Parts {
    /// Main link to core: a connected socket.
    pub core: OwnedFd,
    /// Link to the broker: a connected socket.
    pub broker: OwnedFd,
    /// Where another connection comes from when the broker was started anew.
    pub opener: Option<Link>,
    /// Character devices.
    pub chardevs: Vec<Chardev>,
    /// Index of the one behind COM1.
    pub serial: Option<usize>,
    /// What outlives the process.
    pub state: State,
    /// What a predecessor has left.
    pub left: Option<Left>,
}

/// A character device with what epoll knows of it.
#[derive(Debug)]
struct Slot {
    chardev: Chardev,
    peer_armed: Option<EpollFlags>,
    listener_armed: bool,
    /// The number under which the starter is to keep the peer when it has room.
    unkept: Option<u32>,
}

/// The process.
#[derive(Debug)]
pub struct Server {
    epoll: Epoll,
    timer: TimerFd,
    core: Peer,
    broker: Peer,
    opener: Option<Link>,
    welcomed: bool,
    links: Vec<Option<AccessLink>>,
    machine: Machine,
    slots: Vec<Slot>,
    serial: Option<usize>,
    state: State,
    keeper: Keeper,
    /// Monotonic time of the last flush, in nanoseconds.
    flushed: u64,
}

fn event(flags: EpollFlags, data: u64) -> EpollEvent {
    EpollEvent::new(flags, data)
}

/// The number of a numbered descriptor.
fn index(data: u64) -> usize {
    usize::try_from(data & !KIND).unwrap_or(usize::MAX)
}

/// Data of a numbered descriptor.
fn numbered(kind: u64, index: usize) -> u64 {
    kind | u64::try_from(index).unwrap_or(0)
}

impl Server {
    /// Sets everything up; nothing is sent yet, except to the broker.
    ///
    /// # Errors
    /// The host has no descriptor left.
    pub fn new(parts: Parts) -> Result<Self, ServerError> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let timer =
            TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK)?;
        epoll.add(&timer, event(EpollFlags::EPOLLIN, TIMER))?;
        // Until our hello only the end of the link is of interest, which epoll always reports.
        epoll.add(&parts.core, event(EpollFlags::empty(), CORE))?;
        if let Some(opener) = &parts.opener {
            epoll.add(opener, event(EpollFlags::EPOLLIN, OPENER))?;
        }
        let mut server = Self {
            epoll,
            timer,
            core: Peer::Held(parts.core),
            broker: Peer::Gone,
            opener: parts.opener,
            welcomed: false,
            links: Vec::new(),
            machine: Machine::new(parts.serial.is_some()),
            state: parts.state,
            keeper: Keeper::default(),
            slots: parts
                .chardevs
                .into_iter()
                .map(|chardev| Slot { chardev, peer_armed: None, listener_armed: false, unkept: None })
                .collect(),
            serial: parts.serial,
            flushed: 0,
        };
        if let Some(left) = parts.left {
            server.machine = left.machine;
            if let Some(slot) = server.serial.and_then(|i| server.slots.get_mut(i)) {
                slot.chardev.resume(left.input);
            }
            if left.begun {
                server.slots.iter_mut().for_each(|slot| slot.chardev.await_nobody());
            }
        }
        server.commit()?;
        server.greet_broker(parts.broker)?;
        for slot in server.slots.iter().filter(|slot| slot.chardev.awaits_client()) {
            notice!("waiting for connection on: {}", slot.chardev.filename());
        }
        Ok(server)
    }

    /// Commits what has changed to the state.
    fn commit(&mut self) -> Result<(), Errno> {
        let slot = self.serial.and_then(|i| self.slots.get(i));
        self.state.commit(&self.machine, slot.map(|slot| slot.chardev.input()))
    }

    /// Serves until core ends the machine; `starter` keeps the clients' connections.
    ///
    /// # Errors
    /// [`ServerError`]: the machine cannot go on without this process.
    pub fn run(mut self, starter: Starter) -> Result<(), ServerError> {
        self.keeper = Keeper::new(starter);
        let mut events = [EpollEvent::empty(); EVENTS];
        loop {
            if self.greet_core()? == Flow::End {
                return Ok(());
            }
            self.arm()?;
            let timeout = self.timeout()?;
            let count = match self.epoll.wait(&mut events, timeout) {
                Err(Errno::EINTR) => 0,
                result => result?,
            };
            for event in events.iter().take(count) {
                if self.dispatch(event)? == Flow::End {
                    self.finish();
                    return Ok(());
                }
            }
            self.feed()?;
            self.commit()?;
            self.flush()?;
        }
    }

    /// Says hello to core once every awaited client is there: core starts no machine before that.
    fn greet_core(&mut self) -> Result<Flow, ServerError> {
        if !matches!(self.core, Peer::Held(_)) || self.slots.iter().any(|slot| slot.chardev.awaits_client()) {
            return Ok(Flow::Continue);
        }
        if let Peer::Held(fd) = std::mem::replace(&mut self.core, Peer::Gone) {
            self.epoll.modify(&fd, &mut event(EpollFlags::EPOLLIN, CORE))?;
            match Link::begin(fd, bulkhead_bus_api::VERSION) {
                Ok(link) => self.core = Peer::Greeting(link),
                Err(LinkError::Closed) => return Ok(Flow::End),
                Err(error) => return Err(ServerError::Core(error)),
            }
        }
        Ok(Flow::Continue)
    }

    fn dispatch(&mut self, event: &EpollEvent) -> Result<Flow, ServerError> {
        let (data, flags) = (event.data(), event.events());
        match data & KIND {
            ACCESS => self.on_access(index(data))?,
            PEER => self.on_peer(index(data), flags)?,
            LISTENER => self.on_listener(index(data))?,
            _ if data == TIMER => {
                // Only tells that it is over; what is due follows from the clock.
                let _ = self.timer.wait();
                self.machine.update()?;
            }
            _ if data == CORE => return self.on_core(),
            _ if data == OPENER => self.on_opener()?,
            _ => self.on_broker()?,
        }
        Ok(Flow::Continue)
    }

    fn on_access(&mut self, index: usize) -> Result<(), ServerError> {
        let Some(slot) = self.links.get_mut(index) else { return Ok(()) };
        let Some(link) = slot else { return Ok(()) };
        let input = self.serial.and_then(|i| self.slots.get(i)).map(|slot| slot.chardev.input());
        if link.serve(&mut self.machine, &mut self.state, input)? == Served::Closed {
            self.epoll.delete(link)?;
            *slot = None;
        }
        Ok(())
    }

    fn on_core(&mut self) -> Result<Flow, ServerError> {
        let result = match &mut self.core {
            // Only its end is reported in this stage.
            Peer::Held(_) | Peer::Gone => return Ok(Flow::End),
            Peer::Greeting(link) => {
                link.finish(bulkhead_bus_api::VERSION, MsgFlags::MSG_DONTWAIT).map(|()| None)
            }
            Peer::Up(link) => link.recv_with::<FromCore>(MsgFlags::MSG_DONTWAIT).map(Some),
        };
        match result {
            Err(LinkError::WouldBlock) => {}
            Err(LinkError::Closed) => return Ok(Flow::End),
            Err(error) => return Err(ServerError::Core(error)),
            Ok(None) => {
                self.core = match std::mem::replace(&mut self.core, Peer::Gone) {
                    Peer::Greeting(link) => Peer::Up(link),
                    other => other,
                };
            }
            Ok(Some((FromCore::Leave, _))) => return Err(ServerError::SentAway),
            Ok(Some((FromCore::Command { id, what }, fds))) if self.welcomed && fds.is_empty() => {
                return self.command(id, what);
            }
            Ok(Some((message, fds))) if !self.welcomed => self.welcome(message, fds)?,
            Ok(Some(_)) => return Err(ServerError::Core(LinkError::Malformed)),
        }
        Ok(Flow::Continue)
    }

    fn welcome(&mut self, message: FromCore, fds: Vec<OwnedFd>) -> Result<(), ServerError> {
        let (links, eventfds) = bus::welcome(message, fds)?;
        for (i, link) in links.iter().enumerate() {
            self.epoll.add(link, event(EpollFlags::EPOLLIN, numbered(ACCESS, i)))?;
        }
        self.state.begin(links.len());
        self.links = links.into_iter().map(Some).collect();
        self.machine.connect(eventfds)?;
        self.welcomed = true;
        Ok(())
    }

    fn command(&mut self, id: u32, what: Command) -> Result<Flow, ServerError> {
        match what {
            Command::Reset => self.machine.reset(),
            Command::Pause => self.machine.pause(),
            Command::Resume => self.machine.resume()?,
            Command::PressPowerButton => self.machine.press_power_button()?,
        }
        self.commit()?;
        let Peer::Up(link) = &self.core else { return Ok(Flow::End) };
        match link.send_with(&ToCore::Done { id }, &[], MsgFlags::MSG_DONTWAIT) {
            Ok(()) => Ok(Flow::Continue),
            Err(LinkError::Closed) => Ok(Flow::End),
            Err(error) => Err(ServerError::Core(error)),
        }
    }

    /// Begins the link to the broker, in place of one that there was.
    fn greet_broker(&mut self, fd: OwnedFd) -> Result<(), ServerError> {
        self.forget_broker()?;
        match Link::begin(fd, bulkhead_control_api::VERSION) {
            Ok(link) => {
                self.epoll.add(&link, event(EpollFlags::EPOLLIN, BROKER))?;
                self.broker = Peer::Greeting(link);
            }
            Err(LinkError::Closed) => info!("the broker is gone; the machine goes on without it"),
            Err(error) => warn!("link to the broker: {error}; the machine goes on without it"),
        }
        Ok(())
    }

    fn forget_broker(&mut self) -> Result<(), ServerError> {
        if let Peer::Greeting(link) | Peer::Up(link) = &self.broker {
            self.epoll.delete(link)?;
        }
        self.broker = Peer::Gone;
        Ok(())
    }

    /// The opener gives a connection to a broker that was started anew.
    fn on_opener(&mut self) -> Result<(), ServerError> {
        let Some(link) = &mut self.opener else { return Ok(()) };
        match link.recv_with::<FromOpener>(MsgFlags::MSG_DONTWAIT) {
            Err(LinkError::WouldBlock) => Ok(()),
            Ok((FromOpener::Given { name }, fds)) if name == "broker" => match fds.into_iter().next() {
                Some(fd) => self.greet_broker(fd),
                None => Ok(()),
            },
            Ok(_) => {
                warn!("opener: a message that is not for this process");
                Ok(())
            }
            Err(error) => {
                warn!("opener: {error}; a broker that is started anew will not be found");
                self.epoll.delete(link)?;
                self.opener = None;
                Ok(())
            }
        }
    }

    /// The machine runs on without a broker, so nothing here ends it.
    fn on_broker(&mut self) -> Result<(), ServerError> {
        let result = match &mut self.broker {
            Peer::Greeting(link) => {
                link.finish(bulkhead_control_api::VERSION, MsgFlags::MSG_DONTWAIT).map(|()| None)
            }
            Peer::Up(link) => link.recv_with::<console::Request>(MsgFlags::MSG_DONTWAIT).map(Some),
            Peer::Held(_) | Peer::Gone => return Ok(()),
        };
        let result = match result {
            Ok(None) => {
                self.broker = match std::mem::replace(&mut self.broker, Peer::Gone) {
                    Peer::Greeting(link) => Peer::Up(link),
                    other => other,
                };
                Ok(())
            }
            Ok(Some((request, fds))) => self.answer(request, fds)?,
            Err(error) => Err(error),
        };
        match result {
            Ok(()) | Err(LinkError::WouldBlock) => return Ok(()),
            Err(LinkError::Closed) => info!("the broker is gone; the machine goes on without it"),
            Err(error) => warn!("link to the broker: {error}; the machine goes on without it"),
        }
        self.forget_broker()
    }

    /// Does what the broker asks; the inner error is the link's.
    fn answer(
        &mut self,
        request: console::Request,
        mut fds: Vec<OwnedFd>,
    ) -> Result<Result<(), LinkError>, ServerError> {
        let (name, takes) = match request.op {
            Op::Chardevs => ("chardevs", 0),
            Op::PowerButton => ("power-button", 0),
            Op::AddClient { .. } => ("add-client", 1),
        };
        // Core alone knows the run state; this process sees as much of it as concerns its clock.
        let state = if self.machine.runs() { "running" } else { "paused" };
        if !LINK_CONTROL_CONSOLE.permits(name, state) || fds.len() > takes {
            fds.into_iter().for_each(connection::close);
            return Ok(Err(LinkError::Malformed));
        }
        let answer = match request.op {
            Op::Chardevs => Answer::Chardevs(self.describe()),
            Op::PowerButton => {
                self.machine.press_power_button()?;
                Answer::Done
            }
            Op::AddClient { chardev } => Answer::Client(self.add_client(&chardev, fds.pop())?),
        };
        self.commit()?;
        let Peer::Up(link) = &self.broker else { return Ok(Ok(())) };
        match link.send_with(&Reply { id: request.id, answer }, &[], MsgFlags::MSG_DONTWAIT) {
            // It asks and does not read.
            Err(LinkError::WouldBlock) => Ok(Err(LinkError::Malformed)),
            result => Ok(result),
        }
    }

    fn describe(&self) -> Vec<console::Chardev> {
        let describe = |(i, slot): (usize, &Slot)| console::Chardev {
            label: slot.chardev.label().to_owned(),
            filename: slot.chardev.filename().to_owned(),
            frontend_open: self.serial == Some(i),
        };
        self.slots.iter().enumerate().map(describe).collect()
    }

    fn add_client(&mut self, label: &str, fd: Option<OwnedFd>) -> Result<Client, ServerError> {
        let found = self.slots.iter().enumerate().find(|(_, slot)| slot.chardev.label() == label);
        let Some((index, slot)) = found else {
            fd.into_iter().for_each(connection::close);
            return Ok(Client::NoChardev);
        };
        let Some(connection) = fd.and_then(|fd| slot.chardev.judge(fd)) else { return Ok(Client::Refused) };
        if self.serial == Some(index) {
            // What was said before the client came is not for it.
            self.drop_output()?;
        }
        if let Some(slot) = self.slots.get_mut(index) {
            slot.chardev.adopt(connection);
        }
        Ok(Client::Added)
    }

    fn on_listener(&mut self, index: usize) -> Result<(), ServerError> {
        if self.serial == Some(index) {
            // What was said before the client came is not for it.
            self.drop_output()?;
        }
        let Some(slot) = self.slots.get_mut(index) else { return Ok(()) };
        if let Err(error) = slot.chardev.accept() {
            slot.listener_armed = false;
            warn!("chardev {}: cannot accept: {error}; it takes no more clients", slot.chardev.label());
        }
        if slot.chardev.peer().is_some() {
            slot.unkept = Some(self.state.next_name());
            self.keep_clients()?;
        }
        Ok(())
    }

    /// Has the starter keep the clients that it does not; false if it had no room for one.
    fn keep_clients(&mut self) -> Result<bool, ServerError> {
        let (mut all, mut changed) = (true, false);
        for (index, slot) in self.slots.iter_mut().enumerate() {
            let (Some(number), Some(peer)) = (slot.unkept, slot.chardev.peer()) else { continue };
            let kept = self.keeper.keep(number, peer);
            if kept == Err(Errno::EAGAIN) {
                all = false;
                continue;
            }
            slot.unkept = None;
            self.state.set_names(index, Names { peer: kept.ok().map(|()| number), far: None });
            changed = true;
        }
        if changed {
            self.commit()?;
        }
        Ok(all)
    }

    fn drop_output(&mut self) -> Result<(), ServerError> {
        self.commit()?;
        self.machine.with_serial(|serial| serial.consume(serial.output_len()))?;
        Ok(self.state.count_output(&self.machine)?)
    }

    fn on_peer(&mut self, index: usize, flags: EpollFlags) -> Result<(), ServerError> {
        let Some(slot) = self.slots.get_mut(index) else { return Ok(()) };
        if flags.contains(EpollFlags::EPOLLOUT) {
            slot.chardev.unblock();
        }
        // Nobody takes its input and it does not wait for that: make room for the next one.
        let mut gone =
            !slot.chardev.wants_input() && flags.intersects(EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR);
        while slot.chardev.wants_input() && !gone {
            match slot.chardev.read() {
                Input::Some if self.serial == Some(index) => self.state.count_input(slot.chardev.input())?,
                Input::Some => {}
                Input::Nothing => break,
                Input::Gone => gone = true,
            }
        }
        if gone {
            // By hand: another process may share the description, and then closing removes nothing.
            if let Some(peer) = slot.chardev.peer().filter(|_| slot.peer_armed.take().is_some()) {
                self.epoll.delete(peer)?;
            }
            slot.chardev.disconnect();
            slot.unkept = None;
            let names = self.state.names(index);
            self.state.set_names(index, Names::default());
            self.commit()?;
            [names.peer, names.far].into_iter().flatten().for_each(|number| self.keeper.forget(number));
        }
        Ok(())
    }

    /// Gives the serial port the input that it has room for.
    fn feed(&mut self) -> Result<(), ServerError> {
        let Some(slot) = self.serial.and_then(|i| self.slots.get_mut(i)) else { return Ok(()) };
        let room = self.machine.serial().map_or(0, |serial| serial.room());
        if room > 0 && slot.chardev.has_input() {
            self.machine.with_serial(|serial| serial.receive(slot.chardev.take_input(room)))?;
        }
        Ok(())
    }

    /// Hands output to the character device, now or soon.
    fn flush(&mut self) -> Result<(), ServerError> {
        let now = monotonic();
        let recent = now.saturating_sub(self.flushed) < FLUSH_INTERVAL;
        let Some(slot) = self.serial.and_then(|i| self.slots.get_mut(i)) else { return Ok(()) };
        let Some(serial) = self.machine.serial() else { return Ok(()) };
        let waiting = serial.output_len();
        if waiting == 0 || slot.chardev.is_blocked() || (recent && waiting < FLUSH_BYTES) {
            return Ok(());
        }
        self.flushed = now;
        let mut left = FLUSH_BYTES;
        while left > 0 {
            let Some((first, second)) = self.machine.serial().map(Serial::output) else { break };
            let done = slot.chardev.write(first, second);
            self.machine.with_serial(|serial| serial.consume(done))?;
            self.state.count_output(&self.machine)?;
            left = left.saturating_sub(done);
            if done == 0 {
                break;
            }
        }
        Ok(())
    }

    /// How long to sleep: output that was put off is due soon, and so is what the starter had no room for.
    fn timeout(&mut self) -> Result<EpollTimeout, ServerError> {
        let told = self.keeper.retry() & self.keep_clients()?;
        let waiting = self.machine.serial().is_some_and(|serial| serial.output_len() > 0);
        let blocked = self.serial.and_then(|i| self.slots.get(i)).is_some_and(|s| s.chardev.is_blocked());
        Ok(match (waiting && !blocked, told) {
            (true, _) => EpollTimeout::from(1u8),
            (false, false) => EpollTimeout::from(10u8),
            (false, true) => EpollTimeout::NONE,
        })
    }

    /// Brings epoll and the timer up to date with what is wanted.
    fn arm(&mut self) -> Result<(), ServerError> {
        for (i, slot) in self.slots.iter_mut().enumerate() {
            slot.arm(&self.epoll, i)?;
        }
        match self.machine.take_next_event() {
            None => {}
            Some(None) => self.timer.unset()?,
            Some(Some(delay)) => {
                // A delay of 0 would disarm it.
                let delay = Duration::from_nanos(delay.clamp(1, LONGEST_SLEEP));
                let expiration = Expiration::OneShot(TimeSpec::from_duration(delay));
                self.timer.set(expiration, TimerSetTimeFlags::empty())?;
            }
        }
        Ok(())
    }

    /// The machine is over: delivers the last output.
    fn finish(mut self) {
        let deadline = Instant::now() + FINISH;
        let output: Vec<u8> = self.machine.serial().map_or(Vec::new(), |serial| {
            let (first, second) = serial.output();
            [first, second].concat()
        });
        for (i, slot) in self.slots.iter_mut().enumerate() {
            let last: &[u8] = if self.serial == Some(i) { &output } else { &[] };
            slot.chardev.finish(last, deadline);
        }
    }
}

impl Slot {
    fn arm(&mut self, epoll: &Epoll, index: usize) -> Result<(), Errno> {
        let mut wanted = EpollFlags::empty();
        wanted.set(EpollFlags::EPOLLIN, self.chardev.wants_input());
        wanted.set(EpollFlags::EPOLLOUT, self.chardev.is_blocked());
        if let Some(peer) = self.chardev.peer().filter(|_| self.peer_armed != Some(wanted)) {
            let mut event = event(wanted, numbered(PEER, index));
            match self.peer_armed {
                None => epoll.add(peer, event)?,
                Some(_) => epoll.modify(peer, &mut event)?,
            }
            self.peer_armed = Some(wanted);
        }
        let listen = self.chardev.peer().is_none();
        if let Some(listener) = self.chardev.listener().filter(|_| self.listener_armed != listen) {
            if listen {
                epoll.add(listener, event(EpollFlags::EPOLLIN, numbered(LISTENER, index)))?;
            } else {
                epoll.delete(listener)?;
            }
            self.listener_armed = listen;
        }
        Ok(())
    }
}
