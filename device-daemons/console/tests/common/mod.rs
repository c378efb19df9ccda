//! A core and a broker for the console, in this process.
#![allow(dead_code, reason = "each test binary uses a part of it")]
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test that cannot go on fails")]

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use bulkhead_bus_api::main_link::{Command, FromCore, ToCore};
use bulkhead_bus_api::platform::CONSOLE_GSIS;
use bulkhead_bus_api::{Access, Action, CollectedWrite, MAX_REQUEST_LEN, Op, Reply, Request, Space};
use bulkhead_console::chardev::{Chardev, Inherited};
use bulkhead_console::server::{Parts, Server};
use bulkhead_console::state::State;
use bulkhead_control_api::config;
use bulkhead_control_api::console::{self, Answer};
use bulkhead_jail::link::Link;
use bulkhead_jail::starter::Starter;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair};

pub const LSR: u64 = 0x3fd;
pub const THRE: u64 = 0x60;

/// A connected pair of packet sockets.
pub fn pair() -> (OwnedFd, OwnedFd) {
    socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap()
}

/// Core's end of an access link.
pub struct Vcpu {
    pub fd: OwnedFd,
    pub seq: u32,
}

impl Vcpu {
    pub fn send(&self, packet: &[u8]) {
        send(self.fd.as_raw_fd(), packet, MsgFlags::MSG_NOSIGNAL).unwrap();
    }

    pub fn reply(&self) -> Reply {
        let mut buffer = [0; 64];
        let len = recv(self.fd.as_raw_fd(), &mut buffer, MsgFlags::empty()).unwrap();
        Reply::decode(&buffer[..len]).unwrap()
    }

    pub fn packet(&mut self, writes: &[CollectedWrite], addr: u64, size: u8, op: Op) -> Vec<u8> {
        self.seq = self.seq.wrapping_add(1);
        let access = Access { space: Space::Pio, addr, size, op };
        let mut packet = Request::encode_head(self.seq, &access).to_vec();
        packet.extend(writes.iter().flat_map(CollectedWrite::encode));
        assert!(packet.len() <= MAX_REQUEST_LEN);
        packet
    }

    pub fn access(&mut self, writes: &[CollectedWrite], addr: u64, size: u8, op: Op) -> Reply {
        let packet = self.packet(writes, addr, size, op);
        self.send(&packet);
        let reply = self.reply();
        assert_eq!(reply.seq, self.seq);
        reply
    }

    pub fn inb(&mut self, addr: u64) -> u64 {
        self.access(&[], addr, 1, Op::Read).data
    }

    pub fn outb(&mut self, addr: u64, value: u8) -> Action {
        self.access(&[], addr, 1, Op::Write(value.into())).action
    }

    /// Prints as a driver does: a FIFO load whenever the transmitter is empty, collected by core.
    pub fn print(&mut self, text: &[u8]) {
        for chunk in text.chunks(16) {
            while self.inb(LSR) & THRE == 0 {
                thread::sleep(Duration::from_micros(100));
            }
            let writes: Vec<_> = chunk.iter().map(|byte| collected(0x3f8, *byte)).collect();
            self.access(&writes, 0, 1, Op::Flush);
        }
    }
}

pub fn collected(addr: u64, value: u8) -> CollectedWrite {
    CollectedWrite { space: Space::Pio, addr, size: 1, data: value.into() }
}

/// A console with everything around it.
pub struct Rig {
    pub main: Option<Link>,
    pub vcpus: Vec<Vcpu>,
    pub irqs: Vec<EventFd>,
    pub broker: Option<Link>,
    pub server: JoinHandle<Result<(), String>>,
    core_end: Option<OwnedFd>,
    last_id: u32,
    /// The state of the console.
    pub memfd: OwnedFd,
}

/// Life of the core that the rig plays.
pub const LIFE: u64 = 77;

/// A memfd without content.
pub fn memfd() -> OwnedFd {
    memfd_create(c"state", MFdFlags::MFD_CLOEXEC).unwrap()
}

pub fn chardev(kind: config::ChardevKind) -> config::Chardev {
    config::Chardev { id: "serial0".into(), kind }
}

pub fn socket_server(wait: bool, path: &std::path::Path) -> config::Chardev {
    let address = path.to_str().unwrap().to_owned();
    chardev(config::ChardevKind::Socket { fd: "chardev.serial0".into(), address, server: true, wait })
}

impl Rig {
    /// Starts a console with one chardev behind COM1; nobody has said hello to it.
    pub fn silent(chardev: &config::Chardev, fds: Vec<(&str, OwnedFd)>) -> Self {
        Self::with_state(chardev, fds, Inherited::default(), memfd())
    }

    /// Starts one in the place of one that has left this state.
    pub fn with_state(
        chardev: &config::Chardev,
        fds: Vec<(&str, OwnedFd)>,
        inherited: Inherited,
        memfd: OwnedFd,
    ) -> Self {
        Self::with_starter(chardev, fds, (inherited, memfd, Starter::default()))
    }

    /// Starts one that tells this starter what to keep.
    pub fn with_starter(
        chardev: &config::Chardev,
        fds: Vec<(&str, OwnedFd)>,
        (inherited, memfd, starter): (Inherited, OwnedFd, Starter),
    ) -> Self {
        let mut fds: BTreeMap<String, OwnedFd> = fds.into_iter().map(|(n, f)| (n.to_owned(), f)).collect();
        let take = |name: &str| fds.remove(name).ok_or_else(|| io::Error::other(name.to_owned()));
        let chardev = Chardev::new(chardev, inherited, take).unwrap();
        let (core, core_end) = pair();
        let (broker, broker_end) = pair();
        let (state, left) = State::open(memfd.try_clone().unwrap(), LIFE, 1, true).unwrap();
        let parts =
            Parts { opener: None, core, broker, chardevs: vec![chardev], serial: Some(0), state, left };
        let server = thread::spawn(move || {
            Server::new(parts).and_then(|server| server.run(starter)).map_err(|error| error.to_string())
        });
        let broker = Link::accept(broker_end, bulkhead_control_api::VERSION).unwrap();
        Self {
            main: None,
            vcpus: Vec::new(),
            irqs: Vec::new(),
            broker: Some(broker),
            server,
            core_end: Some(core_end),
            last_id: 0,
            memfd,
        }
    }

    /// Whether the console has said hello to core.
    pub fn greeted(&self, wait: Duration) -> bool {
        readable(self.core_end.as_ref().unwrap().as_fd(), wait)
    }

    /// Core's side of the handshake.
    pub fn greet(&mut self) {
        let link = Link::accept(self.core_end.take().unwrap(), bulkhead_bus_api::VERSION).unwrap();
        self.main = Some(link);
    }

    /// Core's welcome.
    pub fn welcome(&mut self, vcpus: u16) {
        self.welcome_after(vcpus, 0);
    }

    /// The same where requests up to this number have been made before.
    pub fn welcome_after(&mut self, vcpus: u16, seq: u32) {
        let (ours, theirs): (Vec<_>, Vec<_>) = (0..=vcpus).map(|_| pair()).unzip();
        self.irqs = CONSOLE_GSIS
            .iter()
            .map(|_| EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).unwrap())
            .collect();
        let mut fds: Vec<BorrowedFd<'_>> = theirs.iter().map(AsFd::as_fd).collect();
        fds.extend(self.irqs.iter().map(AsFd::as_fd));
        let message = FromCore::Welcome { vcpus, irqs: CONSOLE_GSIS.to_vec() };
        self.main.as_ref().unwrap().send_with(&message, &fds, MsgFlags::empty()).unwrap();
        self.vcpus = ours.into_iter().map(|fd| Vcpu { fd, seq }).collect();
    }

    /// A console that is ready to serve `vcpus` vCPUs.
    pub fn up(chardev: &config::Chardev, fds: Vec<(&str, OwnedFd)>, vcpus: u16) -> Self {
        let mut rig = Self::silent(chardev, fds);
        rig.greet();
        rig.welcome(vcpus);
        rig
    }

    pub fn null() -> Self {
        Self::up(&chardev(config::ChardevKind::Null), vec![], 1)
    }

    pub fn vcpu(&mut self) -> &mut Vcpu {
        &mut self.vcpus[0]
    }

    pub fn command(&mut self, what: Command) {
        self.last_id += 1;
        let id = self.last_id;
        let main = self.main.as_mut().unwrap();
        main.send(&FromCore::Command { id, what }).unwrap();
        assert_eq!(main.recv::<ToCore>().unwrap(), ToCore::Done { id });
    }

    pub fn ask(&mut self, op: console::Op) -> Answer {
        let broker = self.broker.as_mut().unwrap();
        broker.send(&console::Request { id: 7, op }).unwrap();
        let reply: console::Reply = broker.recv().unwrap();
        assert_eq!(reply.id, 7);
        reply.answer
    }

    /// Hands a connection over to `chardev`.
    pub fn add_client(&mut self, chardev: &str, fd: Option<OwnedFd>) -> Answer {
        let op = console::Op::AddClient { chardev: chardev.to_owned() };
        let broker = self.broker.as_mut().unwrap();
        let fds: Vec<BorrowedFd<'_>> = fd.iter().map(AsFd::as_fd).collect();
        broker.send_with(&console::Request { id: 7, op }, &fds, MsgFlags::empty()).unwrap();
        drop(fd);
        broker.recv::<console::Reply>().unwrap().answer
    }

    pub fn filename(&mut self) -> String {
        match self.ask(console::Op::Chardevs) {
            Answer::Chardevs(list) => list[0].filename.clone(),
            Answer::Done | Answer::Client(_) => String::new(),
        }
    }

    /// Waits for an interrupt of the line at `index` of CONSOLE_GSIS.
    pub fn interrupted(&self, index: usize, wait: Duration) -> bool {
        readable(self.irqs[index].as_fd(), wait) && self.irqs[index].read().is_ok()
    }

    /// Core goes away; how the console ended and how long it took.
    pub fn end(mut self) -> (Result<(), String>, Duration) {
        let start = Instant::now();
        self.main = None;
        self.core_end = None;
        let result = self.server.join().unwrap();
        (result, start.elapsed())
    }

    /// The console ended by itself, with this error.
    pub fn failure(self) -> String {
        self.server.join().unwrap().unwrap_err()
    }
}

pub fn readable(fd: BorrowedFd<'_>, wait: Duration) -> bool {
    let millis = PollTimeout::try_from(wait).unwrap();
    poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], millis).unwrap() > 0
}

/// Waits until `condition` holds, for at most five seconds.
pub fn eventually(mut condition: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + Duration::from_secs(5);
    while Instant::now() < deadline {
        if condition() {
            return true;
        }
        thread::sleep(Duration::from_millis(2));
    }
    false
}
