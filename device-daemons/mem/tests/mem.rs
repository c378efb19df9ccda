//! What a driver and pci get from the virtio-mem daemon, and what the host gets back.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test that cannot go on fails"
)]

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use bulkhead_control_api::VERSION;
use bulkhead_control_api::config::{IoThread, Mem};
use bulkhead_control_api::side::{FromPci, MemorySizes, ToPci};
use bulkhead_frontend::{FrontEnd, Memory, Queue, Sockets, pair_of_packets};
use bulkhead_jail::link::Link;
use bulkhead_jail::starter::Starter;
use bulkhead_kit::device::{Listeners, Notices};
use bulkhead_kit::serve::Daemon;
use bulkhead_mem::transport::{Parts, Transport};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::MsgFlags;
use vm_memory::{Bytes as _, GuestAddress};

const LIMIT: Duration = Duration::from_secs(60);
const MIB: u64 = 1 << 20;
const BLOCK: u64 = 2 * MIB;
const REGION: u64 = 512 * MIB;
const ADDR: u64 = 1 << 40;
const REQUEST: u64 = 0x20_0000;
const RESPONSE: u64 = 0x20_1000;
const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;
/// Types of response.
const ACK: u16 = 0;
const NACK: u16 = 1;
const BUSY: u16 = 2;
const ERROR: u16 = 3;

struct Rig {
    sockets: Sockets,
    ram: Memory,
    memory: File,
    state: OwnedFd,
    starter: Option<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl Rig {
    fn new() -> Self {
        let memory = File::from(memfd_create("memory", MFdFlags::MFD_CLOEXEC).unwrap());
        memory.set_len(REGION).unwrap();
        let state = memfd_create("state", MFdFlags::MFD_CLOEXEC).unwrap();
        let (sockets, ram) = (Sockets::new(), Memory::new(64 * MIB));
        let mut rig = Self { sockets, ram, memory, state, starter: None, thread: None };
        rig.begin();
        rig
    }

    fn begin(&mut self) {
        let config = Mem {
            life: 1,
            id: "vm0".into(),
            addr: ADDR,
            size: REGION,
            block_size: BLOCK,
            requested_size: 64 * MIB,
            node: None,
            iothread: IoThread::default(),
        };
        let notices = Notices::new().unwrap();
        let memory = self.memory.try_clone().unwrap().into();
        let parts = Parts { memory, state: self.state.try_clone().unwrap(), notices: notices.clone() };
        let device = Box::new(Transport::new(&config, parts).unwrap());
        let vhost = self.sockets.vhost.try_clone().unwrap().into();
        let listeners = Listeners { vhost, side: self.sockets.side.try_clone().unwrap() };
        let mut daemon = Daemon::new(device, &config.iothread, notices, listeners).unwrap();
        let (starter, theirs) = pair_of_packets();
        self.thread = Some(thread::spawn(move || daemon.serve(&Starter::new(Some(theirs))).unwrap()));
        self.starter = Some(starter);
    }

    fn end(&mut self) {
        drop(self.starter.take());
        self.thread.take().unwrap().join().unwrap();
    }

    fn pci(&self) -> Pci {
        let mut link = Link::connect(self.sockets.connect_side(), VERSION).unwrap();
        link.send(&FromPci::Resets(0)).unwrap();
        let (word, fds) = link.recv_with::<ToPci>(MsgFlags::empty()).unwrap();
        assert_eq!((word, fds.len()), (ToPci::Thread, 1));
        Pci { link, sizes: None }
    }

    /// A pci to which nothing was to be said but sizes.
    fn fresh_pci(&self) -> Pci {
        let mut pci = self.pci();
        assert_eq!(pci.next(), ToPci::Pieces);
        pci.say(FromPci::Pieces);
        pci
    }

    fn driver(&self) -> Driver<'_> {
        let front_end = FrontEnd::new(self.sockets.connect(), &self.ram, !bulkhead_frontend::EVENT_IDX);
        Driver { front_end, queue: Queue::new(&self.ram.map, 0, 16, 0x10_0000, false), rig: self }
    }

    /// Bytes of the file that take up room on the host.
    fn used(&self) -> u64 {
        self.memory.metadata().unwrap().blocks() * 512
    }

    fn touch(&self, offset: u64, len: u64) {
        let page = [1; 4096];
        (offset..offset + len).step_by(4096).for_each(|at| self.memory.write_all_at(&page, at).unwrap());
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        if !thread::panicking() {
            self.end();
        }
    }
}

/// The other end of the side link.
struct Pci {
    link: Link,
    sizes: Option<MemorySizes>,
}

impl Pci {
    /// The next word about pieces.
    fn next(&mut self) -> ToPci {
        loop {
            let (word, fds) = self.link.recv_with::<ToPci>(MsgFlags::empty()).unwrap();
            assert_eq!(fds.len(), usize::from(matches!(word, ToPci::Piece { .. })), "{word:?}");
            match word {
                ToPci::Memory(sizes) => self.sizes = Some(sizes),
                ToPci::ConfigChanged => {}
                word => return word,
            }
        }
    }

    fn say(&mut self, word: FromPci) {
        self.link.send(&word).unwrap();
    }

    fn next_piece(&mut self) -> (u16, u64, u64, u64) {
        match self.next() {
            ToPci::Piece { number, piece } => (number, piece.addr, piece.len, piece.offset),
            word => panic!("{word:?}"),
        }
    }

    fn settle(&mut self, number: u16) {
        self.say(FromPci::Settled { number, result: Ok(()) });
    }

    fn wait_sizes(&mut self) -> MemorySizes {
        loop {
            let (word, _) = self.link.recv_with::<ToPci>(MsgFlags::empty()).unwrap();
            if let ToPci::Memory(sizes) = word {
                return sizes;
            }
        }
    }
}

struct Driver<'a> {
    front_end: FrontEnd,
    queue: Queue,
    rig: &'a Rig,
}

impl Driver<'_> {
    fn start(&mut self, base: u16) {
        self.front_end.start(&self.queue, base);
    }

    fn send(&mut self, kind: u16, block: u64, count: u16) {
        let addr = ADDR.wrapping_add(block * BLOCK);
        let fields = [&kind.to_le_bytes()[..], &[0; 6], &addr.to_le_bytes(), &count.to_le_bytes(), &[0; 6]];
        self.rig.ram.map.write_slice(&fields.concat(), GuestAddress(REQUEST)).unwrap();
        self.rig.ram.map.write_slice(&[0xff; 10], GuestAddress(RESPONSE)).unwrap();
        self.queue.add(&[(REQUEST, 24, false), (RESPONSE, 10, true)]).unwrap();
        self.queue.kick(0);
    }

    fn has_answer(&self) -> bool {
        self.queue.wait(Duration::from_millis(50))
    }

    fn answer(&mut self) -> (u16, u16) {
        assert!(self.queue.wait(LIMIT));
        assert_eq!(self.queue.take().unwrap().1, 10);
        let at = |addr| self.rig.ram.map.read_obj::<u16>(GuestAddress(addr)).unwrap();
        (at(RESPONSE), at(RESPONSE + 8))
    }

    fn ask(&mut self, kind: u16, block: u64, count: u16) -> (u16, u16) {
        self.send(kind, block, count);
        self.answer()
    }

    fn field(&mut self, at: u32) -> u64 {
        u64::from_le_bytes(self.front_end.config(at, 8).unwrap().try_into().unwrap())
    }
}

#[test]
fn a_chunk_comes_with_its_first_block_and_goes_with_its_last() {
    let rig = Rig::new();
    let (mut pci, mut driver) = (rig.fresh_pci(), rig.driver());
    driver.start(0);
    assert_eq!((driver.field(0), driver.field(16), driver.field(24)), (BLOCK, ADDR, REGION));
    driver.send(PLUG, 63, 2);
    assert_eq!(pci.next_piece(), (0, ADDR, 128 * MIB, 0));
    assert_eq!(pci.next_piece(), (1, ADDR + 128 * MIB, 128 * MIB, 128 * MIB));
    pci.settle(1);
    assert!(!driver.has_answer(), "one of them is not there yet");
    pci.settle(0);
    assert_eq!(driver.answer(), (ACK, 0));
    assert_eq!(pci.wait_sizes(), MemorySizes { plugged: 2 * BLOCK, requested: 64 * MIB });
    assert_eq!(driver.ask(STATE, 63, 2), (ACK, 0));
    assert_eq!(driver.ask(STATE, 62, 2), (ACK, 2));
    assert_eq!(driver.ask(STATE, 65, 1), (ACK, 1));
    assert_eq!(driver.ask(PLUG, 64, 1).0, ERROR, "plugged twice");
    assert_eq!(driver.ask(PLUG, 66, 31).0, NACK, "more than requested");
    // In a chunk that is there: nobody is asked.
    assert_eq!(driver.ask(PLUG, 66, 30).0, ACK);
    assert_eq!(driver.field(40), 64 * MIB);
    rig.touch(63 * BLOCK, 2 * BLOCK);
    driver.send(UNPLUG, 63, 1);
    assert_eq!(pci.next(), ToPci::NoPiece { number: 0 });
    assert!(!driver.has_answer());
    assert_eq!(rig.used(), 2 * BLOCK, "nothing is freed while somebody may still touch it");
    pci.settle(0);
    assert_eq!(driver.answer().0, ACK);
    assert_eq!(rig.used(), BLOCK);
    driver.send(UNPLUG_ALL, 0, 0);
    assert_eq!(pci.next(), ToPci::NoPiece { number: 1 });
    pci.settle(1);
    assert_eq!(driver.answer().0, ACK);
    assert_eq!((rig.used(), driver.field(40)), (0, 0));
}

#[test]
fn a_back_end_without_room_makes_the_guest_wait_and_nothing_stays() {
    let rig = Rig::new();
    let (mut pci, mut driver) = (rig.fresh_pci(), rig.driver());
    driver.start(0);
    driver.send(PLUG, 60, 8);
    assert_eq!((pci.next_piece().0, pci.next_piece().0), (0, 1));
    pci.settle(0);
    pci.say(FromPci::Settled { number: 1, result: Err("block: no memory slot".into()) });
    assert_eq!(pci.next(), ToPci::NoPiece { number: 0 });
    pci.settle(0);
    assert_eq!(driver.answer().0, BUSY);
    assert_eq!(driver.ask(STATE, 60, 8), (ACK, 1));
    driver.send(PLUG, 0, 1);
    assert_eq!(pci.next_piece().0, 0);
    pci.settle(0);
    assert_eq!(driver.answer().0, ACK);
}

#[test]
fn memory_that_changes_meanwhile_does_not_disturb_a_request() {
    let rig = Rig::new();
    let (mut pci, mut driver) = (rig.fresh_pci(), rig.driver());
    driver.start(0);
    driver.send(PLUG, 0, 1);
    assert_eq!(pci.next_piece().0, 0);
    // As pci does it: the daemon's own connection has the piece first.
    let file = rig.memory.try_clone().unwrap();
    let region = vhost::VhostUserMemoryRegionInfo {
        guest_phys_addr: ADDR,
        memory_size: 128 * MIB,
        userspace_addr: ADDR + bulkhead_frontend::BIAS,
        mmap_offset: 0,
        mmap_handle: std::os::fd::AsRawFd::as_raw_fd(&file),
    };
    vhost::vhost_user::VhostUserFrontend::add_mem_region(&mut driver.front_end.raw, &region).unwrap();
    pci.settle(0);
    assert_eq!(driver.answer().0, ACK);
}

#[test]
fn a_queue_that_stops_undoes_what_is_not_done() {
    let rig = Rig::new();
    let (mut pci, mut driver) = (rig.fresh_pci(), rig.driver());
    driver.start(0);
    driver.send(PLUG, 0, 1);
    assert_eq!(pci.next_piece().0, 0);
    let base = driver.front_end.stop(0);
    assert_eq!(base, 0, "the request is the driver's again");
    pci.settle(0);
    assert_eq!(pci.next(), ToPci::NoPiece { number: 0 });
    // It begins anew, and is carried out when the old one is undone.
    driver.start(base);
    assert!(!driver.has_answer());
    pci.settle(0);
    assert_eq!(pci.next_piece().0, 0);
    pci.settle(0);
    assert_eq!(driver.answer().0, ACK);
}

#[test]
fn a_reset_of_the_machine_unplugs_everything() {
    let rig = Rig::new();
    let (mut pci, mut driver) = (rig.fresh_pci(), rig.driver());
    driver.start(0);
    driver.send(PLUG, 0, 4);
    assert_eq!(pci.next_piece().0, 0);
    pci.settle(0);
    assert_eq!(driver.answer().0, ACK);
    rig.touch(0, 4 * BLOCK);
    pci.say(FromPci::Resets(0));
    assert_eq!(driver.ask(STATE, 0, 4), (ACK, 0), "that is no news");
    pci.say(FromPci::Resets(1));
    assert_eq!(pci.next(), ToPci::NoPiece { number: 0 });
    pci.settle(0);
    assert_eq!(pci.wait_sizes().plugged, 0);
    assert_eq!((rig.used(), driver.ask(STATE, 0, 4)), (0, (ACK, 1)));
    // And with nothing plugged.
    pci.say(FromPci::Resets(2));
    assert_eq!(pci.wait_sizes().plugged, 0);
}

#[test]
fn the_request_of_the_host_is_what_the_guest_may_plug() {
    let rig = Rig::new();
    let (mut pci, mut driver) = (rig.fresh_pci(), rig.driver());
    driver.start(0);
    pci.say(FromPci::Request { bytes: BLOCK });
    while pci.wait_sizes().requested != BLOCK {}
    assert_eq!(driver.ask(PLUG, 0, 2).0, NACK);
    assert_eq!(driver.field(48), BLOCK);
    pci.say(FromPci::Request { bytes: u64::MAX });
    while pci.wait_sizes().requested != REGION {}
    assert_eq!((driver.field(48), driver.field(32)), (REGION, REGION));
}

#[test]
fn a_successor_says_its_pieces_again_and_answers_what_was_done() {
    let mut rig = Rig::new();
    let base = {
        let (mut pci, mut driver) = (rig.fresh_pci(), rig.driver());
        driver.start(0);
        driver.send(PLUG, 0, 2);
        assert_eq!(pci.next_piece().0, 0);
        pci.settle(0);
        assert_eq!(driver.answer().0, ACK);
        // What a predecessor left in the file without counting it.
        rig.touch(0, 8 * BLOCK);
        driver.front_end.stop(0)
    };
    rig.end();
    rig.begin();
    let mut pci = rig.pci();
    assert_eq!(pci.next_piece(), (0, ADDR, 128 * MIB, 0));
    assert_eq!(pci.next(), ToPci::Pieces);
    assert_eq!(pci.sizes, Some(MemorySizes { plugged: 2 * BLOCK, requested: 64 * MIB }));
    let mut driver = rig.driver();
    driver.start(base - 1);
    // The answer to the last request never came: it is asked for again, and is still right.
    driver.send(PLUG, 0, 2);
    assert!(!driver.has_answer(), "pci has not said that the others are gone");
    pci.settle(0);
    pci.say(FromPci::Pieces);
    assert_eq!(driver.answer().0, ACK);
    assert_eq!(rig.used(), 2 * BLOCK);
    assert_eq!(driver.ask(PLUG, 0, 2).0, ERROR, "once");
}

#[test]
fn another_pci_is_told_all_again() {
    let rig = Rig::new();
    let mut driver = rig.driver();
    driver.start(0);
    {
        let mut pci = rig.fresh_pci();
        driver.send(PLUG, 0, 2);
        assert_eq!(pci.next_piece().0, 0);
    }
    let mut pci = rig.pci();
    assert_eq!(pci.next_piece().0, 0);
    assert_eq!(pci.next(), ToPci::Pieces);
    pci.say(FromPci::Pieces);
    pci.settle(0);
    assert_eq!(driver.answer().0, ACK);
}

#[test]
fn requests_of_a_wrong_shape_break_the_queue_and_no_more() {
    let rig = Rig::new();
    let (mut pci, mut driver) = (rig.fresh_pci(), rig.driver());
    driver.start(0);
    assert_eq!(driver.ask(77, 0, 1).0, ERROR, "no such type");
    for kind in [PLUG, UNPLUG, STATE] {
        for (block, count) in [(256, 1), (0, 0), (0, u16::MAX), (u64::MAX / BLOCK, 1)] {
            assert_eq!(driver.ask(kind, block, count).0, ERROR, "{kind} {block} {count}");
        }
    }
    driver.queue.add(&[(REQUEST, 23, false), (RESPONSE, 10, true)]).unwrap();
    driver.queue.kick(0);
    assert_eq!(pci.next(), ToPci::NeedsReset);
}
