//! The event loop: one thread serves core, the broker, the opener and the devices' back ends.
//!
//! ```text
//! greeting --core's hello--> greeted --welcome--> serving: every device known --Ready--> the machine starts
//! ```
//! Nothing in here waits for a peer but core, which answers at once. When core closes the main link, the machine is
//! over.

mod house;

use std::collections::BTreeMap;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant};

use bulkhead_bus_api::main_link::Command;
use bulkhead_bus_api::pci::FromCore;
use bulkhead_control_api::config::{CpuTopology, PciDevice};
use bulkhead_control_api::opener::FromOpener;
use bulkhead_jail::keeper::{self, Keeper};
use bulkhead_jail::link::{Link, LinkError};
use bulkhead_jail::starter::Starter;
use bulkhead_jail::warn;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::MsgFlags;

use crate::access::{AccessError, AccessLink, Received};
use crate::broker::Broker;
use crate::connector::Connector;
use crate::core_link::{CoreError, CoreLink};
use crate::device::Factory;
use crate::function::Function;
use crate::machine::{Machine, MachineError};
use crate::memory::{Memory, Region};
use crate::state::{Left, State};

/// A listener that cannot accept is tried again after this.
const DEAF: Duration = Duration::from_secs(1);

/// Why the process ends otherwise than by core's word.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// An access link.
    #[error("{0}")]
    Access(#[from] AccessError),
    /// The machine.
    #[error("{0}")]
    Machine(#[from] MachineError),
    /// The host failed.
    #[error("event loop: {0}")]
    Host(#[from] Errno),
    /// The welcome does not describe this machine.
    #[error("core's welcome names {vcpus} vCPUs, {memory} pieces of memory and {fds} descriptors")]
    Welcome {
        /// vCPUs.
        vcpus: u16,
        /// Pieces of memory.
        memory: usize,
        /// Descriptors.
        fds: usize,
    },
}

impl From<CoreError> for ServerError {
    fn from(error: CoreError) -> Self {
        Self::Machine(error.into())
    }
}

/// What the server serves.
pub struct Parts {
    /// Main link to core: a connected socket.
    pub core: OwnedFd,
    /// Link to the broker: a connected socket.
    pub broker: Option<OwnedFd>,
    /// Where connections come from.
    pub opener: Option<Link>,
    /// Devices of the command line.
    pub devices: Vec<PciDevice>,
    /// Makes them.
    pub factory: Factory,
    /// By name, listeners on which back ends connect.
    pub listeners: BTreeMap<String, UnixListener>,
    /// By name, connections to back ends.
    pub connections: BTreeMap<String, OwnedFd>,
    /// By name, what the starter has kept for this process.
    pub kept: BTreeMap<String, OwnedFd>,
    /// What outlives the process.
    pub state: State,
    /// What a predecessor has left.
    pub left: Option<Left>,
}

/// What is needed until core's welcome.
struct Waiting {
    link: Link,
    greeted: bool,
    devices: Vec<PciDevice>,
    factory: Factory,
    kept: BTreeMap<String, OwnedFd>,
    state: State,
    left: Option<Left>,
}

/// How far core has come.
enum Stage {
    /// It has not welcomed us.
    Waiting(Box<Waiting>),
    /// The machine is there.
    Serving(Box<Machine>),
    /// The machine is over.
    Over,
}

/// A command that is being carried out.
#[derive(Clone, Copy, Debug)]
struct Running {
    id: u32,
    what: Command,
    deadline: Instant,
}

/// A watched descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Token {
    Core,
    Access(usize),
    Broker,
    Opener,
    Listener(usize),
    Device(u16),
}

/// The process.
pub struct Server {
    stage: Stage,
    broker: Broker,
    opener: Option<Link>,
    links: Vec<Option<AccessLink>>,
    listeners: BTreeMap<String, UnixListener>,
    /// One of them could not accept: none is looked at before this.
    deaf: Option<Instant>,
    /// Which of them a device lacks now.
    wanted: BTreeMap<String, u16>,
    connections: BTreeMap<String, OwnedFd>,
    connector: Connector,
    keeper: Keeper,
    running: Option<Running>,
    ready: bool,
    /// A reset waits for devices to come to rest, and core for the word that the machine is ready.
    held: bool,
    /// When the machine began to wait for back ends, until that is said.
    begun: Option<Instant>,
    /// When the starter is to hear that this process is alive.
    alive: Option<Instant>,
}

impl Server {
    /// Greets core and the broker.
    ///
    /// # Errors
    /// Core is gone.
    pub fn new(parts: Parts) -> Result<Self, ServerError> {
        let link = Link::begin(parts.core, bulkhead_bus_api::VERSION).map_err(CoreError::from)?;
        let mut broker = Broker::default();
        if let Some(fd) = parts.broker {
            broker.greet(fd);
        }
        let waiting = Waiting {
            link,
            greeted: false,
            devices: parts.devices,
            factory: parts.factory,
            kept: parts.kept,
            state: parts.state,
            left: parts.left,
        };
        Ok(Self {
            stage: Stage::Waiting(Box::new(waiting)),
            broker,
            opener: parts.opener,
            links: Vec::new(),
            listeners: parts.listeners,
            deaf: None,
            wanted: BTreeMap::new(),
            connections: parts.connections,
            connector: Connector::default(),
            keeper: Keeper::default(),
            running: None,
            ready: false,
            held: false,
            begun: None,
            alive: None,
        })
    }

    /// Serves until core ends the machine; `starter` keeps descriptors.
    ///
    /// # Errors
    /// [`ServerError`]: the machine cannot go on without this process.
    pub fn run(mut self, starter: Starter) -> Result<(), ServerError> {
        self.keeper = Keeper::new(starter);
        loop {
            match self.turn() {
                Ok(()) => {}
                Err(ServerError::Machine(MachineError::Core(CoreError::Gone))) => return Ok(()),
                Err(error) => return Err(error),
            }
            if matches!(self.stage, Stage::Over) {
                return Ok(());
            }
        }
    }

    /// One turn of the loop.
    fn turn(&mut self) -> Result<(), ServerError> {
        self.keep_house(Instant::now())?;
        let timeout = self.timeout(Instant::now());
        for token in self.wait(timeout)? {
            match token {
                Token::Core => self.on_core()?,
                Token::Access(index) => self.on_access(index)?,
                Token::Broker => self.on_broker()?,
                Token::Opener => self.on_opener(),
                Token::Listener(index) => self.on_listener(index),
                Token::Device(index) => self.on_device(index, false)?,
            }
        }
        let Stage::Serving(machine) = &self.stage else { return Ok(()) };
        // A device that has something to do at once names the present: the clock is read after that.
        let deadlines: Vec<(u16, Instant)> = machine.deadlines().collect();
        let now = Instant::now();
        for (index, _) in deadlines.into_iter().filter(|(_, at)| *at <= now) {
            self.on_device(index, true)?;
        }
        Ok(())
    }

    /// Waits until something is ready, at most so long.
    fn wait(&self, timeout: PollTimeout) -> Result<Vec<Token>, ServerError> {
        let (mut list, mut tokens) = (Vec::new(), Vec::new());
        match &self.stage {
            Stage::Over => return Ok(tokens),
            Stage::Waiting(waiting) => {
                list.push(PollFd::new(waiting.link.as_fd(), PollFlags::POLLIN));
                tokens.push(Token::Core);
            }
            Stage::Serving(machine) => {
                for (index, link) in self.links.iter().enumerate() {
                    if let Some(link) = link {
                        list.push(PollFd::new(link.as_fd(), PollFlags::POLLIN));
                        tokens.push(Token::Access(index));
                    }
                }
                list.push(PollFd::new(machine.core.as_fd(), PollFlags::POLLIN));
                tokens.push(Token::Core);
                for (index, function) in machine.bus.functions() {
                    if let Some(device) = function.device_ref() {
                        device.watch(&mut list);
                        tokens.resize(list.len(), Token::Device(index));
                    }
                }
                self.broker.watch(&mut list);
                tokens.resize(list.len(), Token::Broker);
                if let Some(opener) = &self.opener {
                    list.push(PollFd::new(opener.as_fd(), PollFlags::POLLIN));
                    tokens.push(Token::Opener);
                }
                for (index, (name, listener)) in self.listeners.iter().enumerate() {
                    if self.wanted.contains_key(name) && self.deaf.is_none() {
                        list.push(PollFd::new(listener.as_fd(), PollFlags::POLLIN));
                        tokens.push(Token::Listener(index));
                    }
                }
            }
        }
        match poll(&mut list, timeout) {
            Err(Errno::EINTR) => return Ok(Vec::new()),
            result => result?,
        };
        let ready = |fd: &PollFd<'_>| fd.revents().is_none_or(|events| !events.is_empty());
        let mut ready: Vec<Token> =
            list.iter().zip(tokens).filter(|(fd, _)| ready(fd)).map(|(_, token)| token).collect();
        // A device with several descriptors advances once.
        ready.dedup();
        Ok(ready)
    }

    fn on_core(&mut self) -> Result<(), ServerError> {
        match &mut self.stage {
            Stage::Over => Ok(()),
            Stage::Serving(machine) => Ok(machine.core.receive()?),
            Stage::Waiting(waiting) if !waiting.greeted => {
                match waiting.link.finish(bulkhead_bus_api::VERSION, MsgFlags::MSG_DONTWAIT) {
                    Err(LinkError::WouldBlock) => {}
                    result => {
                        result.map_err(CoreError::from)?;
                        waiting.greeted = true;
                    }
                }
                Ok(())
            }
            Stage::Waiting(waiting) => match waiting.link.recv_with::<FromCore>(MsgFlags::MSG_DONTWAIT) {
                Err(LinkError::WouldBlock) => Ok(()),
                Err(error) => Err(CoreError::from(error).into()),
                Ok((FromCore::Leave, _)) => Err(CoreError::SentAway.into()),
                Ok((FromCore::Welcome { vcpus, memory }, fds)) => self.welcome(vcpus, &memory, fds),
                Ok(_) => Err(CoreError::Link(LinkError::Malformed).into()),
            },
        }
    }

    /// Core has said what the machine is: the bus is put together.
    fn welcome(
        &mut self,
        vcpus: u16,
        memory: &[bulkhead_bus_api::pci::Memory],
        mut fds: Vec<OwnedFd>,
    ) -> Result<(), ServerError> {
        let links = usize::from(vcpus);
        let possible = (1..=CpuTopology::MAX_CPUS).contains(&u32::from(vcpus)) && !memory.is_empty();
        let ecam = fds.pop().filter(|_| possible && fds.len() == links + memory.len());
        let Some(ecam) = ecam else {
            let (memory, fds) = (memory.len(), fds.len());
            return Err(ServerError::Welcome { vcpus, memory, fds });
        };
        let regions = memory.iter().zip(fds.split_off(links));
        let regions = regions.map(|(place, fd)| Region { place: *place, fd: fd.into(), offset: 0 }).collect();
        self.links = fds.into_iter().map(|fd| Some(AccessLink::new(fd))).collect();
        let Stage::Waiting(waiting) = std::mem::replace(&mut self.stage, Stage::Over) else { return Ok(()) };
        let Waiting { link, devices, factory, mut kept, state, left, .. } = *waiting;
        let mut machine = Machine::new(CoreLink::new(link), ecam, Memory { regions }, state, factory);
        // Core says afterwards whether the machine runs.
        machine.paused = left.is_some();
        machine.assemble(&devices, left, links, &mut |number| kept.remove(&keeper::name(number)))?;
        for name in kept.keys() {
            // Kept by a predecessor that died before it noted what for, or for a device that is gone.
            let _ = self.keeper.starter().forget(name);
        }
        self.begun = Some(Instant::now());
        self.stage = Stage::Serving(Box::new(machine));
        Ok(())
    }

    fn on_access(&mut self, index: usize) -> Result<(), ServerError> {
        let Stage::Serving(machine) = &mut self.stage else { return Ok(()) };
        let Some(slot) = self.links.get_mut(index) else { return Ok(()) };
        let Some(link) = slot else { return Ok(()) };
        let open = match link.receive()? {
            Received::Nothing => true,
            Received::Closed => false,
            Received::Request(seq, writes, access) => {
                let reply = machine.access(index, seq, &writes, &access)?;
                link.reply(&reply)?
            }
        };
        if !open {
            *slot = None;
        }
        self.broker.tell_events(machine);
        Ok(())
    }

    fn on_broker(&mut self) -> Result<(), ServerError> {
        let Stage::Serving(machine) = &mut self.stage else { return Ok(()) };
        Ok(self.broker.serve(machine, Instant::now())?)
    }

    fn on_device(&mut self, index: u16, expired: bool) -> Result<(), ServerError> {
        let Stage::Serving(machine) = &mut self.stage else { return Ok(()) };
        let Some(device) = machine.bus.get_mut(index).and_then(Function::as_device) else { return Ok(()) };
        if expired {
            device.expire();
        } else {
            device.advance();
        }
        machine.bus.touch(index);
        Ok(machine.settle()?)
    }

    /// The opener gives a connection, or says why not.
    fn on_opener(&mut self) {
        let Some(link) = &mut self.opener else { return };
        match link.recv_with::<FromOpener>(MsgFlags::MSG_DONTWAIT) {
            Err(LinkError::WouldBlock) => {}
            Ok((FromOpener::Given { name }, fds)) if name == "broker" => {
                if let Some(fd) = fds.into_iter().next() {
                    self.broker.greet(fd);
                }
            }
            Ok((FromOpener::Given { name }, fds)) => {
                let device = self.connector.answered(&name, Instant::now());
                if let (Some(device), Some(fd)) = (device, fds.into_iter().next()) {
                    self.give(device, &name, fd);
                }
            }
            Ok((FromOpener::NotGiven { name, errno }, _)) => {
                let device = self.connector.answered(&name, Instant::now());
                match Errno::from_raw(errno) {
                    Errno::EPERM if device.is_some() => {
                        warn!("opener: {name} is not this process's to ask for");
                    }
                    Errno::ECONNREFUSED | Errno::ENOENT => {
                        device.into_iter().for_each(|device| self.refuse(device, &name));
                    }
                    _ => {}
                }
            }
            Ok(_) => warn!("opener: a message that is not for this process"),
            Err(error) => {
                warn!("opener: {error}; what is started anew will not be found");
                self.opener = None;
            }
        }
    }

    /// Gives a device a connection that it lacks.
    fn give(&mut self, index: u16, name: &str, fd: OwnedFd) {
        let Stage::Serving(machine) = &mut self.stage else { return };
        if let Some(device) = machine.bus.get_mut(index).and_then(Function::as_device) {
            device.connected(name, fd);
            machine.bus.touch(index);
            machine.changed.insert(index);
        }
    }

    /// Tells a device that nobody listens where its connection would come from.
    fn refuse(&mut self, index: u16, name: &str) {
        let Stage::Serving(machine) = &mut self.stage else { return };
        if let Some(device) = machine.bus.get_mut(index).and_then(Function::as_device) {
            device.refused(name);
            machine.bus.touch(index);
        }
    }

    /// A back end connects.
    fn on_listener(&mut self, index: usize) {
        let Some((name, listener)) = self.listeners.iter().nth(index) else { return };
        let (name, device) = (name.clone(), self.wanted.get(name).copied());
        match listener.accept() {
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(error) => {
                // Out of descriptors, perhaps: that passes.
                warn!("{name}: cannot accept: {error}; it is tried again");
                self.deaf = Some(Instant::now() + DEAF);
            }
            Ok((stream, _)) => {
                if let Some(device) = device {
                    self.give(device, &name, stream.into());
                }
            }
        }
    }
}
