//! The surroundings of core, played by the test.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use bulkhead_bus_api::main_link::{Command, FromCore as BusFromCore, ToCore};
use bulkhead_bus_api::{Access, Action, CollectedWrite, Op as BusOp, Reply, Request as BusRequest};
use bulkhead_control_api::config::{Core, CpuTopology};
use bulkhead_control_api::core::{Answer, Counters, Event, FromCore, Op, Refusal, Request, RunState};
use bulkhead_control_api::loader::{Job, Outcome, Start};
use bulkhead_jail::link::Link;
use nix::sys::socket::{
    AddressFamily, Backlog, MsgFlags, SockFlag, SockType, UnixAddr, bind, connect, getsockname, listen, recv,
    send, setsockopt, socket, socketpair, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};

use super::program::{CODE, Program, RESULTS};
use crate::error::{Error, Result};
use crate::power_on::{Parts, power_on};

/// What the played console sends for a request; `None`: nothing, ever.
pub type Answerer = Arc<dyn Fn(&BusRequest<'_>) -> Option<Vec<u8>> + Send + Sync>;

/// One write as the console saw it, and whether it came collected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    pub access: Access,
    pub collected: bool,
}

pub fn listener() -> (OwnedFd, UnixAddr) {
    let fd = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).unwrap();
    bind(fd.as_raw_fd(), &UnixAddr::new_unnamed()).unwrap();
    let addr = getsockname::<UnixAddr>(fd.as_raw_fd()).unwrap();
    listen(&fd, Backlog::new(8).unwrap()).unwrap();
    (fd, addr)
}

pub fn connect_to(addr: &UnixAddr) -> OwnedFd {
    let fd = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).unwrap();
    connect(fd.as_raw_fd(), addr).unwrap();
    setsockopt(&fd, sockopt::ReceiveTimeout, &TimeVal::seconds(20)).unwrap();
    fd
}

/// The reply that a good console gives.
pub fn good_reply(seq: u32, action: Action, data: u64) -> Option<Vec<u8>> {
    Some(Reply { seq, action, data }.encode().to_vec())
}

/// A console that reads the same from everywhere.
pub fn plain_console() -> Answerer {
    Arc::new(|request| good_reply(request.seq, Action::None, 0x1122_3344_5566_7788))
}

pub struct Rig {
    pub console: UnixAddr,
    pub pci: UnixAddr,
    pub broker_addr: UnixAddr,
    pub dump: UnixAddr,
    pub broker: Option<Link>,
    core: Option<JoinHandle<Result<()>>>,
    /// Guest RAM, once a loader has run.
    pub ram: Arc<Mutex<Option<File>>>,
    pub loads: Arc<AtomicUsize>,
    pub seen: Arc<Mutex<Vec<Seen>>>,
    pub commands: Arc<Mutex<Vec<Command>>>,
    last_id: u32,
}

pub fn config(cpus: u32) -> Core {
    Core {
        ram: 16 << 20,
        cpus: CpuTopology { cpus, sockets: 1, cores: cpus, threads: 1 },
        no_reboot: false,
        no_shutdown: false,
        autostart: true,
        device_memory: 1 << 20,
    }
}

/// A loader that puts a program into memory.
pub fn load(program: Program) -> impl Fn(usize, &File) -> Outcome + Send + 'static {
    move |_, ram| {
        ram.write_all_at(program.bytes(), u64::from(CODE)).unwrap();
        Ok(Start::Pvh32 { eip: CODE, ebx: 0 })
    }
}

impl Rig {
    /// Core with a loader; no console and no broker yet.
    pub fn bare(
        config: Core,
        coalesce: bool,
        loader: impl Fn(usize, &File) -> Outcome + Send + 'static,
    ) -> Self {
        Self::with(config, coalesce, false, loader)
    }

    /// The same; `has_pci`: the machine has a pci daemon, which is not there yet either.
    pub fn with(
        config: Core,
        coalesce: bool,
        has_pci: bool,
        loader: impl Fn(usize, &File) -> Outcome + Send + 'static,
    ) -> Self {
        let (console_fd, console) = listener();
        let (pci_fd, pci) = listener();
        let (broker_fd, broker_addr) = listener();
        let (loader_fd, loader_addr) = listener();
        let (dump_fd, dump) = listener();
        let (boot, wanted) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap();
        let ram = Arc::new(Mutex::new(None));
        let loads = Arc::new(AtomicUsize::new(0));
        let (ram_out, loads_out) = (Arc::clone(&ram), Arc::clone(&loads));
        thread::spawn(move || {
            while recv(wanted.as_raw_fd(), &mut [0; 16], MsgFlags::empty()).is_ok_and(|n| n > 0) {
                let Ok(mut link) = Link::connect(connect_to(&loader_addr), bulkhead_control_api::VERSION)
                else {
                    return;
                };
                let (job, mut fds) = link.recv_with::<Job>(MsgFlags::empty()).unwrap();
                assert_eq!(job.regions.len(), fds.len());
                let file = File::from(fds.remove(0));
                let outcome = loader(loads_out.fetch_add(1, Ordering::SeqCst), &file);
                *ram_out.lock().unwrap() = Some(file);
                let _ = link.send(&outcome);
            }
        });
        let kvm = File::options()
            .read(true)
            .write(true)
            .open("/dev/kvm")
            .expect("/dev/kvm cannot be opened: run these tests in the lab");
        let core = thread::spawn(move || {
            let machine = power_on(Parts {
                config,
                kvm: kvm.into(),
                console: console_fd,
                pci: has_pci.then_some(pci_fd),
                broker: broker_fd,
                loader: loader_fd,
                dump: dump_fd,
                boot,
                tasks: None,
                coalesce,
            })?;
            machine.run()
        });
        Self {
            console,
            pci,
            broker_addr,
            dump,
            broker: None,
            core: Some(core),
            ram,
            loads,
            seen: Arc::default(),
            commands: Arc::default(),
            last_id: 0,
        }
    }

    /// Core with everything, asked to start.
    pub fn started(config: Core, program: Program, console: Answerer) -> Self {
        let mut rig = Self::bare(config, true, load(program));
        rig.connect_console(console);
        rig.connect_broker();
        assert_eq!(rig.ask(Op::Start), (Ok(Answer::Done), vec![(Event::Resume, RunState::Running)]));
        rig
    }

    pub fn connect_broker(&mut self) {
        let fd = connect_to(&self.broker_addr);
        self.broker = Some(Link::connect(fd, bulkhead_control_api::VERSION).unwrap());
    }

    /// The broker dies and is started again.
    pub fn connect_broker_again(&mut self) {
        self.broker = None;
        self.connect_broker();
    }

    /// Connects a console that answers every access by `answerer` and carries out commands.
    pub fn connect_console(&self, answerer: Answerer) -> JoinHandle<()> {
        let mut main = Link::connect(connect_to(&self.console), bulkhead_bus_api::VERSION).unwrap();
        let (welcome, fds) = main.recv_with::<BusFromCore>(MsgFlags::empty()).unwrap();
        let BusFromCore::Welcome { vcpus, irqs } = welcome else { panic!("{welcome:?}") };
        assert_eq!(fds.len(), usize::from(vcpus) + 1 + irqs.len());
        for fd in fds.into_iter().take(usize::from(vcpus) + 1) {
            let (answerer, seen) = (Arc::clone(&answerer), Arc::clone(&self.seen));
            thread::spawn(move || answer_accesses(&fd, &answerer, &seen));
        }
        let commands = Arc::clone(&self.commands);
        setsockopt(&main, sockopt::ReceiveTimeout, &TimeVal::seconds(600)).unwrap();
        thread::spawn(move || {
            while let Ok(BusFromCore::Command { id, what }) = main.recv() {
                commands.lock().unwrap().push(what);
                main.send(&ToCore::Done { id }).unwrap();
            }
        })
    }

    /// Asks core; returns the answer and the events before it.
    pub fn ask(&mut self, op: Op) -> (std::result::Result<Answer, Refusal>, Vec<(Event, RunState)>) {
        self.last_id += 1;
        let id = self.last_id;
        let link = self.broker.as_mut().unwrap();
        link.send(&Request { id, op }).unwrap();
        let mut events = vec![];
        loop {
            match link.recv().unwrap() {
                FromCore::Event { event, state } => events.push((event, state)),
                FromCore::Reply { id: replied, result } => {
                    assert_eq!(replied, id);
                    return (result, events);
                }
            }
        }
    }

    pub fn event(&mut self) -> (Event, RunState) {
        match self.broker.as_mut().unwrap().recv().unwrap() {
            FromCore::Event { event, state } => (event, state),
            other => panic!("{other:?}"),
        }
    }

    pub fn status(&mut self) -> RunState {
        match self.ask(Op::Status) {
            (Ok(Answer::Status(state)), events) if events.is_empty() => state,
            other => panic!("{other:?}"),
        }
    }

    pub fn counters(&mut self) -> Counters {
        match self.ask(Op::Counters).0 {
            Ok(Answer::Counters(counters)) => counters,
            other => panic!("{other:?}"),
        }
    }

    /// The result word at `at`.
    pub fn result(&self, at: u32) -> u32 {
        let ram = self.ram.lock().unwrap();
        let Some(file) = ram.as_ref() else { return 0 };
        let mut word = [0; 4];
        file.read_exact_at(&mut word, u64::from(RESULTS + at)).unwrap();
        u32::from_le_bytes(word)
    }

    /// Waits until the result word satisfies the test's condition.
    pub fn wait_result(&self, at: u32, ok: impl Fn(u32) -> bool) -> u32 {
        let start = Instant::now();
        while !ok(self.result(at)) {
            assert!(start.elapsed() < Duration::from_secs(20), "result {at:#x} is {:#x}", self.result(at));
            thread::sleep(Duration::from_millis(1));
        }
        self.result(at)
    }

    /// Waits for core's end after the given events.
    pub fn expect_end(mut self, events: &[(Event, RunState)]) {
        for expected in events {
            assert_eq!(self.event(), *expected);
        }
        let state = events.last().map(|e| e.1);
        let (event, last) = self.event();
        assert_eq!(event, Event::Exiting);
        assert!(state.is_none_or(|s| s == last));
        self.broker = None;
        self.end().unwrap();
    }

    /// Asks core to quit and waits for its end.
    pub fn quit(mut self) {
        let state = self.status();
        let (answer, events) = self.ask(Op::Quit);
        assert_eq!(answer, Ok(Answer::Done));
        assert_eq!(events, [(Event::Shutdown(bulkhead_control_api::core::Cause::HostQmpQuit), state)]);
        self.expect_end(&[]);
    }

    /// Core's result.
    pub fn end(&mut self) -> std::result::Result<(), Error> {
        self.core.take().unwrap().join().unwrap()
    }
}

fn answer_accesses(fd: &OwnedFd, answerer: &Answerer, seen: &Mutex<Vec<Seen>>) {
    let mut packet = vec![0; bulkhead_bus_api::MAX_REQUEST_LEN];
    loop {
        let Ok(n @ 1..) = recv(fd.as_raw_fd(), &mut packet, MsgFlags::empty()) else { return };
        let request = BusRequest::decode(&packet[..n]).unwrap();
        let mut seen = seen.lock().unwrap();
        for write in request.writes() {
            let CollectedWrite { space, addr, size, data } = write.unwrap();
            seen.push(Seen { access: Access { space, addr, size, op: BusOp::Write(data) }, collected: true });
        }
        if request.access.op != BusOp::Flush {
            seen.push(Seen { access: request.access, collected: false });
        }
        drop(seen);
        let Some(reply) = answerer(&request) else { continue };
        if send(fd.as_raw_fd(), &reply, MsgFlags::MSG_NOSIGNAL).is_err() {
            return;
        }
    }
}
