//! The link to the broker: what it asks, and the events for it.

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::time::{Duration, Instant};

use bulkhead_control_api::VERSION;
use bulkhead_control_api::config::PciDevice;
use bulkhead_control_api::pci::{Answer, Event, FromPci, MAX_TEXT, Op, Refusal, Request};
use bulkhead_jail::link::{Link, LinkError};
use bulkhead_jail::topology::LINK_CONTROL_PCI;
use bulkhead_jail::{info, warn};
use nix::poll::{PollFd, PollFlags};
use nix::sys::socket::MsgFlags;

use crate::device::ToMemory;
use crate::function::Function;
use crate::listing;
use crate::machine::{AddError, Machine, MachineError};

/// A back end of a device that is added has so long to answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// Messages that wait for a broker, or for one that does not read.
const MAX_WAITING: usize = 1024;

/// The link in its stages.
#[derive(Debug)]
enum Peer {
    /// Our hello is out.
    Greeting(Link),
    /// In use.
    Up(Link),
    /// Gone.
    Gone,
}

/// A device that is being added: its back end has not answered yet.
#[derive(Clone, Copy, Debug)]
pub struct Adding {
    /// The request's id.
    request: u32,
    /// Which broker's it is: the next one's ids begin anew.
    broker: u32,
    /// Index of the device.
    pub index: u16,
    /// When it is given up.
    pub deadline: Instant,
}

/// A memory device whose size is to be another one: its daemon has not said yet that it knows.
#[derive(Clone, Copy, Debug)]
pub struct Sizing {
    request: u32,
    broker: u32,
    index: u16,
    bytes: u64,
    /// How often the daemon had said its sizes when it was told; none before that.
    told: Option<u64>,
    /// When it is given up.
    pub deadline: Instant,
}

/// What is said, and the descriptor that comes with it.
type Message = (FromPci, Option<Rc<OwnedFd>>);

/// The broker.
#[derive(Debug)]
pub struct Broker {
    peer: Peer,
    /// Counts brokers.
    number: u32,
    waiting: VecDeque<Message>,
    /// Devices that are being added.
    pub adding: Vec<Adding>,
    /// Memory devices that are being told.
    pub sizing: Vec<Sizing>,
    /// What memory devices had plugged when that was told.
    plugged: BTreeMap<u16, u64>,
}

impl Default for Broker {
    fn default() -> Self {
        Self {
            peer: Peer::Gone,
            number: 0,
            waiting: VecDeque::new(),
            adding: Vec::new(),
            sizing: Vec::new(),
            plugged: BTreeMap::new(),
        }
    }
}

/// A text that fits.
fn cut(mut text: String) -> String {
    let end = (0..=MAX_TEXT).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
    text.truncate(end);
    text
}

fn fitting(refusal: Refusal) -> Refusal {
    match refusal {
        Refusal::BackEnd(text) => Refusal::BackEnd(cut(text)),
        Refusal::NoRoom(text) => Refusal::NoRoom(cut(text)),
        other => other,
    }
}

impl Broker {
    /// Begins the link, in place of one that there was.
    pub fn greet(&mut self, fd: OwnedFd) {
        self.forget();
        match Link::begin(fd, VERSION) {
            Ok(link) => self.peer = Peer::Greeting(link),
            Err(error) => part(&error),
        }
    }

    /// The link is over. What was asked on it is answered to nobody; events wait for the next broker.
    fn forget(&mut self) {
        self.peer = Peer::Gone;
        self.number = self.number.wrapping_add(1);
        self.waiting.retain(|(message, _)| matches!(message, FromPci::Event(_)));
    }

    /// Adds the link's descriptor to what is watched.
    pub fn watch<'a>(&'a self, list: &mut Vec<PollFd<'a>>) {
        match &self.peer {
            Peer::Greeting(link) => list.push(PollFd::new(link.as_fd(), PollFlags::POLLIN)),
            Peer::Up(link) => {
                let out = if self.waiting.is_empty() { PollFlags::empty() } else { PollFlags::POLLOUT };
                list.push(PollFd::new(link.as_fd(), PollFlags::POLLIN | out));
            }
            Peer::Gone => {}
        }
    }

    /// Takes the next message and does what it asks. The machine runs on without a broker, so nothing that it does ends
    /// it.
    ///
    /// # Errors
    /// The machine's.
    pub fn serve(&mut self, machine: &mut Machine, now: Instant) -> Result<(), MachineError> {
        self.flush();
        let result = match &mut self.peer {
            Peer::Greeting(link) => link.finish(VERSION, MsgFlags::MSG_DONTWAIT).map(|()| None),
            Peer::Up(link) => link.recv_with::<Request>(MsgFlags::MSG_DONTWAIT).map(Some),
            Peer::Gone => return Ok(()),
        };
        match result {
            Err(LinkError::WouldBlock) => {}
            Err(error) => {
                part(&error);
                self.forget();
            }
            Ok(None) => {
                self.peer = match std::mem::replace(&mut self.peer, Peer::Gone) {
                    Peer::Greeting(link) => Peer::Up(link),
                    other => other,
                };
                self.flush();
            }
            Ok(Some((request, fds))) => {
                let name = match &request.op {
                    Op::Functions { .. } => "functions",
                    Op::Thread { .. } => "thread",
                    Op::Add(_) => "add",
                    Op::Remove { .. } => "remove",
                    Op::RequestMemory { .. } => "request-memory",
                };
                // Core alone knows the run state; none of these depends on it.
                if !fds.is_empty() || !LINK_CONTROL_PCI.permits(name, "running") {
                    part(&LinkError::Malformed);
                    self.forget();
                    return Ok(());
                }
                self.answer(machine, request, now)?;
            }
        }
        Ok(())
    }

    fn answer(&mut self, machine: &mut Machine, request: Request, now: Instant) -> Result<(), MachineError> {
        let result = match request.op {
            Op::Functions { from } => Ok(listing::functions(&machine.bus, from)),
            Op::Thread { socket } => {
                match machine.bus.thread(&socket) {
                    Ok(thread) => self.reply_with(request.id, Ok(Answer::Thread), thread),
                    Err(refusal) => self.reply(request.id, Err(refusal)),
                }
                return Ok(());
            }
            Op::RequestMemory { id, bytes } => match machine.memory_device(&id) {
                Some(index) => {
                    let (request, broker, deadline) = (request.id, self.number, now + PATIENCE);
                    self.sizing.push(Sizing { request, broker, index, bytes, told: None, deadline });
                    return Ok(());
                }
                None => Err(Refusal::NoDevice),
            },
            Op::Remove { id } => machine.bus.unplug(&id, now).map(|()| Answer::Done),
            Op::Add(device) => match add(machine, &device) {
                Ok(index) => {
                    let (request, broker, deadline) = (request.id, self.number, now + PATIENCE);
                    self.adding.push(Adding { request, broker, index, deadline });
                    machine.settle()?;
                    return Ok(());
                }
                Err(AddError::Refused(refusal)) => Err(refusal),
                Err(AddError::Machine(error)) => return Err(error),
            },
        };
        machine.settle()?;
        self.tell_events(machine);
        self.reply(request.id, result);
        Ok(())
    }

    fn reply(&mut self, id: u32, result: Result<Answer, Refusal>) {
        self.reply_with(id, result, None);
    }

    fn reply_with(&mut self, id: u32, result: Result<Answer, Refusal>, fd: Option<Rc<OwnedFd>>) {
        if matches!(self.peer, Peer::Up(_)) {
            self.put((FromPci::Reply { id, result: result.map_err(fitting) }, fd));
        }
    }

    /// Tells of what has happened on the bus.
    pub fn tell_events(&mut self, machine: &mut Machine) {
        for event in machine.bus.take_events() {
            self.tell(event);
        }
    }

    /// Tells of an event.
    pub fn tell(&mut self, event: Event) {
        self.put((FromPci::Event(event), None));
    }

    fn put(&mut self, message: Message) {
        self.waiting.push_back(message);
        self.flush();
        if self.waiting.len() > MAX_WAITING {
            if matches!(self.peer, Peer::Up(_)) {
                warn!("the broker does not read what it is told; the machine goes on without it");
                self.forget();
            }
            self.waiting.pop_front();
        }
    }

    fn flush(&mut self) {
        while let (Peer::Up(link), Some(message)) = (&self.peer, self.waiting.front()) {
            let (message, fd) = message;
            let fds: Vec<BorrowedFd<'_>> = fd.iter().map(|fd| fd.as_fd()).collect();
            match link.send_with(message, &fds, MsgFlags::MSG_DONTWAIT) {
                Ok(()) => drop(self.waiting.pop_front()),
                Err(LinkError::WouldBlock) => return,
                Err(error) => {
                    part(&error);
                    self.forget();
                }
            }
        }
    }

    /// Lets devices be seen whose back ends have answered, and gives up those whose did not in time.
    ///
    /// # Errors
    /// The machine's.
    pub fn advance(&mut self, machine: &mut Machine, now: Instant) -> Result<(), MachineError> {
        self.advance_sizes(machine, now);
        for adding in std::mem::take(&mut self.adding) {
            let function = machine.bus.get(adding.index);
            let known = function.and_then(|f| f.device_ref()).is_some_and(|device| device.is_known());
            // A successor of the broker that asked knows nothing of it, and has its daemon ended.
            let asked = adding.broker == self.number;
            let known = known && asked;
            if !known && asked && now < adding.deadline {
                self.adding.push(adding);
                continue;
            }
            let result = if known {
                machine.bus.plug(adding.index);
                Ok(Answer::Done)
            } else {
                machine.bus.remove(adding.index);
                Err(Refusal::BackEnd("its back end did not answer".to_owned()))
            };
            machine.settle()?;
            self.tell_events(machine);
            if asked {
                self.reply(adding.request, result);
            }
        }
        Ok(())
    }
}

impl Broker {
    /// Tells memory devices what is wanted of them, and the broker what they say.
    fn advance_sizes(&mut self, machine: &mut Machine, now: Instant) {
        for mut sizing in std::mem::take(&mut self.sizing) {
            let device = machine.bus.get_mut(sizing.index).and_then(Function::as_device);
            let result = match device {
                None => Err(Refusal::NoDevice),
                Some(device) => {
                    let said = device.sizes().map_or(0, |(_, said)| said);
                    if sizing.told.is_none() && device.tell_memory(ToMemory::Request(sizing.bytes)) {
                        sizing.told = Some(said);
                    }
                    if sizing.told.is_some_and(|before| before != said) {
                        Ok(Answer::Done)
                    } else if now < sizing.deadline {
                        self.sizing.push(sizing);
                        continue;
                    } else {
                        Err(Refusal::BackEnd("its daemon did not answer".to_owned()))
                    }
                }
            };
            if sizing.broker == self.number {
                self.reply(sizing.request, result);
            }
        }
        let sizes: Vec<(u16, String, u64)> = machine
            .bus
            .functions()
            .filter_map(|(index, function)| {
                let (sizes, _) = function.device_ref()?.sizes()?;
                Some((index, function.config.id.clone(), sizes.plugged))
            })
            .collect();
        self.plugged.retain(|known, _| sizes.iter().any(|(index, ..)| index == known));
        for (index, id, plugged) in sizes {
            // The first one is no news.
            if self.plugged.insert(index, plugged).is_some_and(|before| before != plugged) {
                self.tell(Event::MemorySize { id, plugged });
            }
        }
    }
}

fn add(machine: &mut Machine, device: &PciDevice) -> Result<u16, AddError> {
    let place = machine.find_place(device).map_err(AddError::Refused)?;
    machine.add(device, place, false)
}

fn part(error: &LinkError) {
    match error {
        LinkError::Closed => info!("the broker is gone; the machine goes on without it"),
        error => warn!("link to the broker: {error}; the machine goes on without it"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_cut_at_a_character() {
        assert_eq!(cut("ä".repeat(300)).len(), 512);
        assert_eq!(cut(format!("a{}", "ä".repeat(300))).len(), 511);
        assert_eq!(cut("short".to_owned()), "short");
    }
}
