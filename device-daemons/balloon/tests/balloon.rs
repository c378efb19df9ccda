//! What a driver and the broker get from the balloon daemon, and what the host gets back.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test that cannot go on fails"
)]

use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use bulkhead_balloon::transport::{Parts, Transport};
use bulkhead_control_api::VERSION;
use bulkhead_control_api::balloon::{Answer, FromBalloon, Op, Request, Stats};
use bulkhead_control_api::config::{Balloon, IoThread};
use bulkhead_control_api::side::ToPci;
use bulkhead_framework::Scratch;
use bulkhead_frontend::{EVENT_IDX, FrontEnd, Memory, Queue, next_word, pair_of_packets};
use bulkhead_jail::link::Link;
use bulkhead_jail::starter::Starter;
use bulkhead_kit::device::{Listeners, Notices};
use bulkhead_kit::serve::Daemon;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, listen, socket};
use vhost::vhost_user::VhostUserFrontend as _;
use vhost::vhost_user::message::VhostUserConfigFlags;
use vm_memory::{Bytes as _, GuestAddress};

const LIMIT: Duration = Duration::from_secs(20);
const RAM: u64 = 64 << 20;
const NUMBERS: u64 = 0x20_0000;
const POISON: u64 = 1 << 4;

struct Rig {
    scratch: Scratch,
    memory: Memory,
    broker: Link,
    state: OwnedFd,
    listeners: (UnixListener, OwnedFd),
    starter: Option<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

fn packets() -> OwnedFd {
    socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).unwrap()
}

fn config(life: u64) -> Balloon {
    Balloon {
        life,
        id: "b0".into(),
        ram: RAM,
        deflate_on_oom: true,
        free_page_reporting: true,
        page_poison: true,
        iothread: IoThread::default(),
    }
}

impl Rig {
    fn new() -> Self {
        let scratch = Scratch::new().unwrap();
        let vhost = UnixListener::bind(scratch.path().join("vhost")).unwrap();
        let side = packets();
        bind(side.as_raw_fd(), &UnixAddr::new(&scratch.path().join("side")).unwrap()).unwrap();
        listen(&side, Backlog::new(8).unwrap()).unwrap();
        let state = memfd_create("state", MFdFlags::MFD_CLOEXEC).unwrap();
        let (starter, broker, thread) = Self::begin(&state, (&vhost, &side));
        let (starter, thread) = (Some(starter), Some(thread));
        Self { scratch, memory: Memory::new(RAM), broker, state, listeners: (vhost, side), starter, thread }
    }

    fn begin(state: &OwnedFd, (vhost, side): (&UnixListener, &OwnedFd)) -> (OwnedFd, Link, JoinHandle<()>) {
        let (ours, theirs) = pair_of_packets();
        let notices = Notices::new().unwrap();
        let state = state.try_clone().unwrap();
        let parts = Parts { broker: theirs, opener: None, state, notices: notices.clone() };
        let device = Box::new(Transport::new(&config(1), parts).unwrap());
        let listeners =
            Listeners { vhost: vhost.try_clone().unwrap().into(), side: side.try_clone().unwrap() };
        let mut daemon = Daemon::new(device, &config(1).iothread, notices, listeners).unwrap();
        let (starter, theirs) = pair_of_packets();
        let thread = thread::spawn(move || daemon.serve(&Starter::new(Some(theirs))).unwrap());
        (starter, Link::accept(ours, VERSION).unwrap(), thread)
    }

    fn end(&mut self) {
        drop(self.starter.take());
        self.thread.take().unwrap().join().unwrap();
    }

    fn restart(&mut self) {
        self.end();
        let (starter, broker, thread) = Self::begin(&self.state, (&self.listeners.0, &self.listeners.1));
        (self.starter, self.broker, self.thread) = (Some(starter), broker, Some(thread));
    }

    fn connect(&self, features: u64) -> FrontEnd {
        let stream = UnixStream::connect(self.scratch.path().join("vhost")).unwrap();
        FrontEnd::new(stream, &self.memory, features & !EVENT_IDX)
    }

    fn side(&self) -> Link {
        let fd = packets();
        connect(fd.as_raw_fd(), &UnixAddr::new(&self.scratch.path().join("side")).unwrap()).unwrap();
        Link::connect(fd, VERSION).unwrap()
    }

    fn queue(&self, index: u16) -> Queue {
        Queue::new(&self.memory.map, index, 128, 0x10_0000 + 0x1_0000 * u64::from(index), false)
    }

    fn ask(&mut self, op: Op) -> Answer {
        self.broker.send(&Request { id: 7, op }).unwrap();
        loop {
            match self.broker.recv().unwrap() {
                FromBalloon::Reply { id: 7, answer } => return answer,
                FromBalloon::Changed { .. } => {}
                other => panic!("{other:?}"),
            }
        }
    }

    /// Pages of guest memory that take up room on the host.
    fn pages(&self) -> i64 {
        nix::sys::stat::fstat(self.memory.file()).unwrap().st_blocks / 8
    }

    fn touch(&self, pages: impl Iterator<Item = u64>) {
        pages.for_each(|page| self.memory.map.write_obj(page, GuestAddress(page * 4096)).unwrap());
    }

    fn give(&self, queue: &mut Queue, numbers: &[u32]) {
        let bytes: Vec<u8> = numbers.iter().flat_map(|n| n.to_le_bytes()).collect();
        self.memory.map.write_slice(&bytes, GuestAddress(NUMBERS)).unwrap();
        send(queue, &[(NUMBERS, u32::try_from(bytes.len()).unwrap(), false)]);
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        if !thread::panicking() {
            self.end();
        }
    }
}

fn send(queue: &mut Queue, parts: &[(u64, u32, bool)]) {
    queue.add(parts).unwrap();
    queue.kick(0);
    assert!(queue.wait(LIMIT));
    queue.take().unwrap();
}

#[test]
fn given_pages_are_the_hosts_again_and_no_others() {
    let rig = Rig::new();
    let mut front_end = rig.connect(!POISON);
    let mut inflate = rig.queue(0);
    front_end.start(&inflate, 0);
    rig.touch((4096..8192).chain([NUMBERS / 4096]));
    let before = rig.pages();
    // Out of order, twice, and beyond the end of memory.
    let numbers: Vec<u32> = (4096..5000).rev().chain([4096, 4096, 20_000, u32::MAX]).collect();
    rig.give(&mut inflate, &numbers);
    assert_eq!(before - rig.pages(), 904);
    let read = |page: u64| rig.memory.map.read_obj::<u64>(GuestAddress(page * 4096)).unwrap();
    assert_eq!((read(4999), read(5000)), (0, 5000));
    // What is taken back is there again when it is touched.
    let mut deflate = rig.queue(1);
    front_end.start(&deflate, 0);
    rig.give(&mut deflate, &[4096]);
    rig.touch(4096..4097);
    assert_eq!(read(4096), 4096);
}

#[test]
fn reported_pages_are_freed_unless_they_are_poisoned() {
    let rig = Rig::new();
    rig.touch(4096..8192);
    let mut front_end = rig.connect(u64::MAX);
    let mut report = rig.queue(3);
    front_end.start(&report, 0);
    let before = rig.pages();
    // A page and two halves, then whole ones.
    send(&mut report, &[(4096 * 4096 + 2048, 8192, true), (5000 * 4096, 100 * 4096, true)]);
    assert_eq!(before - rig.pages(), 101);
    front_end.raw.set_config(12, VhostUserConfigFlags::WRITABLE, &[0xaa; 4]).unwrap();
    send(&mut report, &[(6000 * 4096, 100 * 4096, true)]);
    assert_eq!(before - rig.pages(), 101);
}

#[test]
fn the_broker_aims_and_hears_of_changes_over_a_restart() {
    let mut rig = Rig::new();
    let mut side = rig.side();
    let mut front_end = rig.connect(!POISON);
    assert_eq!(rig.ask(Op::Target { bytes: RAM / 2 }), Answer::Done);
    assert_eq!(next_word(&mut side), ToPci::ConfigChanged);
    let target = u32::try_from(RAM / 2 / 4096).unwrap().to_le_bytes();
    assert_eq!(front_end.config(0, 4).unwrap(), target);
    front_end.raw.set_config(4, VhostUserConfigFlags::WRITABLE, &100u32.to_le_bytes()).unwrap();
    let changed = FromBalloon::Changed { actual: RAM - 100 * 4096 };
    assert_eq!(rig.broker.recv::<FromBalloon>().unwrap(), changed);
    drop((front_end, side));
    rig.restart();
    assert_eq!(rig.ask(Op::Query), Answer::Balloon { actual: RAM - 100 * 4096 });
    assert_eq!(rig.connect(0).config(0, 4).unwrap(), target);
}

/// A guest changes its balloon faster than the broker reads.
#[test]
fn a_broker_that_is_slow_hears_of_the_last_change() {
    const CHANGES: u32 = 3000;
    let mut rig = Rig::new();
    let mut front_end = rig.connect(!POISON);
    for actual in 1..=CHANGES {
        front_end.raw.set_config(4, VhostUserConfigFlags::WRITABLE, &actual.to_le_bytes()).unwrap();
    }
    let last = RAM - u64::from(CHANGES) * 4096;
    let mut heard = 0;
    while rig.broker.recv::<FromBalloon>().unwrap() != (FromBalloon::Changed { actual: last }) {
        heard += 1;
    }
    assert!(heard < CHANGES, "all of them had room");
    assert_eq!(rig.ask(Op::Query), Answer::Balloon { actual: last });
}

#[test]
fn statistics_come_when_they_are_wanted() {
    let mut rig = Rig::new();
    let mut front_end = rig.connect(!POISON);
    let mut queue = rig.queue(2);
    front_end.start(&queue, 0);
    let entry = |tag: u16, value: u64| [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat();
    rig.memory.map.write_slice(&entry(4, 1000), GuestAddress(NUMBERS)).unwrap();
    queue.add(&[(NUMBERS, 10, false)]).unwrap();
    queue.kick(0);
    let stats = |rig: &mut Rig| match rig.ask(Op::Stats) {
        Answer::Stats(stats) => stats,
        other => panic!("{other:?}"),
    };
    while stats(&mut rig).values.is_empty() {
        thread::sleep(Duration::from_millis(1));
    }
    let Stats { last_update, values, polling_interval } = stats(&mut rig);
    assert!(last_update > 0);
    assert_eq!((values, polling_interval), (vec![(4, 1000)], 0));
    assert!(queue.take().is_none(), "the device keeps the buffer");
    assert_eq!(rig.ask(Op::PollingInterval { seconds: 1 }), Answer::Done);
    assert!(queue.wait(LIMIT));
    queue.take().unwrap();
    assert_eq!(stats(&mut rig).polling_interval, 1);
    // A buffer that the device has kept is the next process's, too.
    queue.add(&[(NUMBERS, 10, false)]).unwrap();
    queue.kick(1);
    thread::sleep(Duration::from_millis(50));
    assert_eq!(front_end.stop(queue.index), 1, "it was put back");
}

#[test]
fn hostile_chains_break_the_queue_and_nothing_else() {
    let rig = Rig::new();
    let mut side = rig.side();
    let mut front_end = rig.connect(!POISON);
    let mut inflate = rig.queue(0);
    front_end.start(&inflate, 0);
    rig.give(&mut inflate, &[]);
    // No whole number; a buffer to write where one to read is due.
    send(&mut inflate, &[(NUMBERS, 3, false)]);
    send(&mut inflate, &[(NUMBERS, 4096, true)]);
    inflate.add(&[(NUMBERS, (1 << 20) + 1, false)]).unwrap();
    inflate.kick(3);
    assert_eq!(next_word(&mut side), ToPci::NeedsReset);
    let mut deflate = rig.queue(1);
    front_end.start(&deflate, 0);
    rig.give(&mut deflate, &[1, 2, u32::MAX]);
}
