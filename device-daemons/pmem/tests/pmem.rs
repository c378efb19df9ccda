//! What a driver and pci get from the virtio-pmem daemon.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

use std::fs::File;
use std::os::fd::OwnedFd;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use bulkhead_control_api::VERSION;
use bulkhead_control_api::config::{IoThread, Pmem};
use bulkhead_control_api::side::{FromPci, MemorySizes, Piece, ToPci};
use bulkhead_framework::Scratch;
use bulkhead_frontend::{FrontEnd, Memory, Queue, Sockets, next_word, pair_of_packets};
use bulkhead_jail::link::Link;
use bulkhead_jail::starter::Starter;
use bulkhead_kit::device::{Listeners, Notices};
use bulkhead_kit::serve::Daemon;
use bulkhead_pmem::transport::Transport;
use vm_memory::{Bytes as _, GuestAddress};

const LIMIT: Duration = Duration::from_secs(60);
const SIZE: u64 = 4 << 20;
const ADDR: u64 = 1 << 40;
const REQUEST: u64 = 0x20_0000;
const RESPONSE: u64 = 0x20_1000;

struct Rig {
    sockets: Sockets,
    ram: Memory,
    starter: Option<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

/// The daemon on this file.
fn rig(file: impl Into<OwnedFd>) -> Rig {
    let (sockets, ram) = (Sockets::new(), Memory::new(64 << 20));
    let config = Pmem { life: 1, id: "p0".into(), addr: ADDR, size: SIZE, iothread: IoThread::default() };
    let notices = Notices::new().unwrap();
    let device = Box::new(Transport::new(&config, file.into(), notices.clone()).unwrap());
    let vhost = sockets.vhost.try_clone().unwrap().into();
    let listeners = Listeners { vhost, side: sockets.side.try_clone().unwrap() };
    let mut daemon = Daemon::new(device, &config.iothread, notices, listeners).unwrap();
    let (starter, theirs) = pair_of_packets();
    let thread = thread::spawn(move || daemon.serve(&Starter::new(Some(theirs))).unwrap());
    Rig { sockets, ram, starter: Some(starter), thread: Some(thread) }
}

impl Drop for Rig {
    fn drop(&mut self) {
        drop(self.starter.take());
        let ended = self.thread.take().map(JoinHandle::join);
        assert!(thread::panicking() || ended.is_some_and(|ended| ended.is_ok()));
    }
}

impl Rig {
    /// Sends so many requests at once; their answers.
    fn ask(&self, kind: u32, count: u64) -> Vec<u32> {
        let mut front_end = FrontEnd::new(self.sockets.connect(), &self.ram, 0);
        let mut queue = Queue::new(&self.ram.map, 0, 64, 0x10_0000, false);
        self.ram.map.write_obj(kind, GuestAddress(REQUEST)).unwrap();
        for index in 0..count {
            self.ram.map.write_obj(u32::MAX, GuestAddress(RESPONSE + index * 4)).unwrap();
            queue.add(&[(REQUEST, 4, false), (RESPONSE + index * 4, 4, true)]).unwrap();
        }
        front_end.start(&queue, 0);
        let answers = (0..count).map(|index| {
            assert!(queue.wait(LIMIT));
            assert_eq!(queue.take().unwrap().1, 4);
            self.ram.map.read_obj(GuestAddress(RESPONSE + index * 4)).unwrap()
        });
        answers.collect()
    }
}

#[test]
fn the_file_is_the_guests_and_a_flush_is_answered() {
    let file = nix::sys::memfd::memfd_create("pmem", nix::sys::memfd::MFdFlags::MFD_CLOEXEC).unwrap();
    let rig = rig(file);
    let mut pci = Link::connect(rig.sockets.connect_side(), VERSION).unwrap();
    pci.send(&FromPci::Resets(3)).unwrap();
    assert_eq!(next_word(&mut pci), ToPci::Memory(MemorySizes { plugged: SIZE, requested: SIZE }));
    let piece = Piece { addr: ADDR, len: SIZE, offset: 0 };
    assert_eq!(next_word(&mut pci), ToPci::Piece { number: 0, piece });
    assert_eq!(next_word(&mut pci), ToPci::Pieces);
    pci.send(&FromPci::Pieces).unwrap();
    pci.send(&FromPci::Settled { number: 0, result: Ok(()) }).unwrap();
    let mut front_end = FrontEnd::new(rig.sockets.connect(), &rig.ram, 0);
    assert_eq!(front_end.config(0, 16).unwrap(), [ADDR.to_le_bytes(), SIZE.to_le_bytes()].concat());
    drop(front_end);
    assert_eq!(rig.ask(0, 1), [0]);
    assert_eq!(rig.ask(0, 30), [0; 30]);
}

#[test]
fn what_the_file_system_says_is_what_the_guest_hears() {
    // A pipe cannot be synchronised.
    let (pipe, _end) = nix::unistd::pipe().unwrap();
    assert_eq!(rig(pipe).ask(0, 3), [1; 3]);
    let scratch = Scratch::new().unwrap();
    let file = File::create_new(scratch.path().join("pmem")).unwrap();
    file.set_len(SIZE).unwrap();
    assert_eq!(rig(file).ask(0, 2), [0; 2]);
}

#[test]
fn another_request_breaks_the_queue_and_no_more() {
    let (pipe, _end) = nix::unistd::pipe().unwrap();
    let rig = rig(pipe);
    let mut pci = Link::connect(rig.sockets.connect_side(), VERSION).unwrap();
    let mut front_end = FrontEnd::new(rig.sockets.connect(), &rig.ram, 0);
    let mut queue = Queue::new(&rig.ram.map, 0, 64, 0x10_0000, false);
    rig.ram.map.write_obj(1u32, GuestAddress(REQUEST)).unwrap();
    queue.add(&[(REQUEST, 4, false), (RESPONSE, 4, true)]).unwrap();
    front_end.start(&queue, 0);
    while next_word(&mut pci) != ToPci::NeedsReset {}
}
