//! A host for pci in this process: core's side of the links, memfds that outlive a pci, the guest's accesses.
#![allow(dead_code, reason = "each test uses a part")]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test that cannot go on fails"
)]

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::rc::Rc;
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::Duration;

use bulkhead_bus_api::main_link::Command;
use bulkhead_bus_api::pci::{Ask, FromCore, Memory as Place, ToCore};
use bulkhead_bus_api::platform::ECAM;
use bulkhead_bus_api::{Access, Op, Reply, Request, Space, VERSION};
use bulkhead_control_api::config::PciDevice;
use bulkhead_jail::link::Link;
use bulkhead_jail::starter::Starter;
use bulkhead_pci::core_link::CoreLink;
use bulkhead_pci::device::Factory;
use bulkhead_pci::machine::{Machine, MachineError};
use bulkhead_pci::memory::{Memory, Region};
use bulkhead_pci::state::State;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair};
use nix::sys::uio::pread;

use crate::guest::{Core, Mock, Seen, eventfd};

pub const RAM: u64 = 0x4000_0000;
const LIFE: u64 = 7;

pub fn pair() -> (OwnedFd, OwnedFd) {
    socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap()
}

pub fn memfd() -> OwnedFd {
    memfd_create("test", MFdFlags::MFD_CLOEXEC).unwrap()
}

/// What core has, whichever pci told it.
#[derive(Default)]
pub struct Inner {
    pub core: Core,
    eventfds: BTreeMap<(bool, u16), OwnedFd>,
    /// Requests that are still answered; none: all.
    pub patience: Option<usize>,
    /// How many changes were asked for.
    pub changes: usize,
}

impl Inner {
    fn eventfd(&mut self, bell: bool, number: u16) -> OwnedFd {
        let made = || Rc::try_unwrap(eventfd()).unwrap();
        self.eventfds.entry((bell, number)).or_insert_with(made).try_clone().unwrap()
    }

    /// Answers a request; false if the pci that made it is to die.
    fn answer(&mut self, link: &Link, id: u32, what: Ask) -> bool {
        match &mut self.patience {
            Some(0) => return false,
            Some(left) => *left -= 1,
            None => {}
        }
        let fds: Vec<OwnedFd> = match what {
            Ask::Eventfds { vectors, bells } => {
                let vectors: Vec<OwnedFd> =
                    vectors.iter().map(|number| self.eventfd(false, *number)).collect();
                let bells = bells.iter().map(|number| self.eventfd(true, *number));
                vectors.into_iter().chain(bells).collect()
            }
            Ask::Apply(changes) => {
                assert!(changes.len() <= 256);
                self.changes += changes.len();
                changes.into_iter().for_each(|change| self.core.change(change));
                Vec::new()
            }
        };
        let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
        link.send_with(&FromCore::Answer { id, result: Ok(()) }, &fds, MsgFlags::empty()).is_ok()
    }
}

/// What a test sees of each mock by the id of its device; the latest one's.
pub type Mocks = Rc<RefCell<BTreeMap<String, Rc<RefCell<Seen>>>>>;

/// Makes mocks. `begin` prepares each.
pub fn factory(mocks: &Mocks, begin: fn(&mut Seen)) -> Factory {
    let mocks = Rc::clone(mocks);
    Box::new(move |config, _| {
        let (mock, seen) = Mock::new();
        begin(&mut seen.borrow_mut());
        mocks.borrow_mut().insert(config.id.clone(), seen);
        Ok(Box::new(mock))
    })
}

/// The host.
pub struct Host {
    pub inner: Arc<Mutex<Inner>>,
    pub ecam: OwnedFd,
    pub state: OwnedFd,
    ram: OwnedFd,
    pub devices: Vec<PciDevice>,
    pub mocks: Mocks,
}

impl Host {
    pub fn new(devices: Vec<PciDevice>) -> Self {
        let ecam = memfd();
        nix::unistd::ftruncate(&ecam, ECAM.len.try_into().unwrap()).unwrap();
        let mocks = Rc::new(RefCell::new(BTreeMap::new()));
        Self { inner: Arc::default(), ecam, state: memfd(), ram: memfd(), devices, mocks }
    }

    /// A pci's main link, with core's side of it in a thread.
    fn link(&self) -> Link {
        let (ours, theirs) = pair();
        let inner = Arc::clone(&self.inner);
        thread::spawn(move || {
            let mut link = Link::accept(ours, VERSION).unwrap();
            while let Ok((message, _)) = link.recv_with::<ToCore>(MsgFlags::empty()) {
                if let ToCore::Ask { id, what } = message
                    && !inner.lock().unwrap().answer(&link, id, what)
                {
                    break;
                }
            }
        });
        Link::connect(theirs, VERSION).unwrap()
    }

    /// A pci, in the place of one that there was.
    pub fn machine(&self) -> Result<Machine, MachineError> {
        let (state, left) = State::open(self.state.try_clone().unwrap(), LIFE).unwrap();
        let fd = Rc::new(self.ram.try_clone().unwrap());
        let memory = Memory { regions: vec![Region { place: Place { base: 0, len: RAM }, fd, offset: 0 }] };
        let ecam = self.ecam.try_clone().unwrap();
        let factory = factory(&self.mocks, |_| {});
        let mut machine = Machine::new(CoreLink::new(self.link()), ecam, memory, state, factory);
        machine.assemble(&self.devices, left, 1, &mut |_| None)?;
        Ok(machine)
    }

    /// What the guest reads without an exit, if core has the page.
    pub fn mapped(&self, addr: u64, size: u8) -> Option<u64> {
        let at = addr.checked_sub(ECAM.base).filter(|at| *at < ECAM.len)?;
        let page = u16::try_from(at >> 12).unwrap();
        if !self.inner.lock().unwrap().core.mapped.contains(&page) {
            return None;
        }
        let mut bytes = [0; 8];
        let len = pread(&self.ecam, &mut bytes[..usize::from(size)], at.try_into().unwrap()).unwrap();
        assert_eq!(len, usize::from(size));
        Some(u64::from_le_bytes(bytes))
    }
}

pub fn read(addr: u64, size: u8) -> Access {
    Access { space: Space::Mmio, addr, size, op: Op::Read }
}

pub fn write(addr: u64, size: u8, value: u64) -> Access {
    Access { space: Space::Mmio, addr, size, op: Op::Write(value) }
}

/// What a starter gives beside the links.
#[derive(Default)]
pub struct Given {
    pub state: Option<OwnedFd>,
    pub listeners: BTreeMap<String, UnixListener>,
    pub connections: BTreeMap<String, OwnedFd>,
    pub kept: BTreeMap<String, OwnedFd>,
    pub starter: Starter,
}

/// A pci's server in a thread, with core's ends of its links.
pub struct Rig {
    pub host: Arc<Mutex<Inner>>,
    pub broker: Link,
    pub opener: Link,
    /// Messages of pci on the main link that are no requests.
    pub said: mpsc::Receiver<ToCore>,
    pub commands: mpsc::Sender<FromCore>,
    pub vcpu: Vcpu,
    pub server: thread::JoinHandle<Result<(), String>>,
}

/// Core's end of an access link.
pub struct Vcpu {
    pub fd: OwnedFd,
    pub seq: u32,
}

impl Vcpu {
    pub fn send(&mut self, access: &Access) {
        self.seq = self.seq.wrapping_add(1);
        let packet = Request::encode_head(self.seq, access);
        send(self.fd.as_raw_fd(), &packet, MsgFlags::MSG_NOSIGNAL).unwrap();
    }

    pub fn reply(&self) -> u64 {
        let mut buffer = [0; 64];
        let len = recv(self.fd.as_raw_fd(), &mut buffer, MsgFlags::empty()).unwrap();
        let reply = Reply::decode(&buffer[..len]).unwrap();
        assert_eq!(reply.seq, self.seq);
        reply.data
    }

    pub fn read(&mut self, addr: u64, size: u8) -> u64 {
        self.send(&read(addr, size));
        self.reply()
    }

    pub fn write(&mut self, addr: u64, size: u8, value: u64) {
        self.send(&write(addr, size, value));
        self.reply();
    }
}

impl Rig {
    /// Starts a pci with these devices; `begin` prepares the mocks.
    pub fn new(devices: Vec<PciDevice>, begin: fn(&mut Seen)) -> Self {
        Self::with(devices, begin, Given::default())
    }

    /// The same with more that its starter gives.
    pub fn with(devices: Vec<PciDevice>, begin: fn(&mut Seen), given: Given) -> Self {
        let inner = Arc::new(Mutex::new(Inner::default()));
        let (core_ours, core) = pair();
        let (broker_ours, broker) = pair();
        let (opener_ours, opener) = pair();
        let server = thread::spawn(move || {
            let (state, left) = State::open(given.state.unwrap_or_else(memfd), LIFE).unwrap();
            let mocks = Rc::default();
            let parts = bulkhead_pci::server::Parts {
                core,
                broker: Some(broker),
                opener: Some(Link::connect(opener, bulkhead_control_api::VERSION).unwrap()),
                devices,
                factory: factory(&mocks, begin),
                listeners: given.listeners,
                connections: given.connections,
                kept: given.kept,
                state,
                left,
            };
            let server = bulkhead_pci::server::Server::new(parts).map_err(|error| error.to_string())?;
            server.run(given.starter).map_err(|error| error.to_string())
        });
        let opener = Link::accept(opener_ours, bulkhead_control_api::VERSION).unwrap();
        let broker = Link::accept(broker_ours, bulkhead_control_api::VERSION).unwrap();
        let (vcpu, access) = pair();
        let (said_to, said) = mpsc::channel();
        let (commands, to_send) = mpsc::channel();
        let host = Arc::clone(&inner);
        thread::spawn(move || core_side(core_ours, access, &inner, &said_to, &to_send));
        Self { host, broker, opener, said, commands, vcpu: Vcpu { fd: vcpu, seq: 0 }, server }
    }

    pub fn command(&self, id: u32, what: Command) {
        self.commands.send(FromCore::Command { id, what }).unwrap();
    }

    /// What pci says next.
    pub fn next(&self) -> ToCore {
        self.said.recv_timeout(Duration::from_secs(10)).unwrap()
    }

    /// That pci says nothing for a while.
    pub fn silence(&self) {
        assert!(self.said.recv_timeout(Duration::from_millis(200)).is_err());
    }
}

/// Core's main link: welcome, commands, answers.
fn core_side(
    fd: OwnedFd,
    access: OwnedFd,
    inner: &Mutex<Inner>,
    said: &mpsc::Sender<ToCore>,
    commands: &mpsc::Receiver<FromCore>,
) {
    let mut link = Link::accept(fd, VERSION).unwrap();
    let ecam = memfd();
    nix::unistd::ftruncate(&ecam, ECAM.len.try_into().unwrap()).unwrap();
    let ram = memfd();
    let memory = vec![Place { base: 0, len: RAM }];
    let fds = [access.as_fd(), ram.as_fd(), ecam.as_fd()];
    link.send_with(&FromCore::Welcome { vcpus: 1, memory }, &fds, MsgFlags::empty()).unwrap();
    drop(access);
    loop {
        match commands.try_recv() {
            Ok(command) => link.send(&command).unwrap(),
            Err(mpsc::TryRecvError::Disconnected) => return,
            Err(mpsc::TryRecvError::Empty) => {}
        }
        match link.recv_with::<ToCore>(MsgFlags::MSG_DONTWAIT) {
            Ok((ToCore::Ask { id, what }, _)) => {
                if !inner.lock().unwrap().answer(&link, id, what) {
                    return;
                }
            }
            Ok((message, _)) => said.send(message).unwrap(),
            Err(bulkhead_jail::link::LinkError::WouldBlock) => thread::sleep(Duration::from_micros(200)),
            Err(_) => return,
        }
    }
}
