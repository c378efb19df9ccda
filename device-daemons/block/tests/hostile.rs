//! Drivers that break the rules: the ring stands still and pci hears of it, or the request fails. The other queue goes on,
//! and a reset mends all.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test that cannot go on fails")]

mod common;

use std::os::fd::AsFd as _;
use std::time::Duration;

use bulkhead_control_api::VERSION;
use bulkhead_control_api::side::ToPci;
use bulkhead_frontend::{FrontEnd, Queue, next_word};
use bulkhead_jail::link::Link;
use common::{DATA, Driver, HEADER, LIMIT, Rig, STATUS, T_DISCARD, T_FLUSH, T_IN, T_OUT, config};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::MsgFlags;
use vm_memory::{Bytes as _, GuestAddress};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const RAM: u64 = 64 << 20;
const TABLE: u64 = 0x90_0000;

/// Descriptors: address, length, flags, next.
type Table<'a> = &'a [(u64, u32, u16, u16)];

struct Hostile {
    rig: Rig,
    front_end: FrontEnd,
    side: Link,
    other: Queue,
}

impl Hostile {
    fn new() -> Self {
        let rig = Rig::new(&config(2), 4096);
        let mut side = Link::connect(rig.sockets.connect_side(), VERSION).unwrap();
        let (first, _) = side.recv_with::<ToPci>(MsgFlags::empty()).unwrap();
        assert_eq!(first, ToPci::Thread);
        let mut front_end = rig.connect(0);
        let _ = front_end.get_inflight(2, 16);
        let other = rig.queue(1, 16, false);
        front_end.start(&other, 0);
        Self { rig, front_end, side, other }
    }

    fn hears(&mut self, limit: u16) -> Option<ToPci> {
        let readable = PollFlags::POLLIN;
        let came = poll(&mut [PollFd::new(self.side.as_fd(), readable)], PollTimeout::from(limit)).unwrap();
        (came > 0).then(|| self.side.recv().unwrap())
    }

    /// The other queue goes on; a new ring of the first one, too.
    fn goes_on(mut self, what: &str) -> Self {
        let mut driver = Driver { memory: &self.rig.memory, queue: self.other };
        assert_eq!(driver.request(T_FLUSH, 0, &[]), 0, "{what}: the other queue");
        self.other = driver.queue;
        self.front_end.stop(0);
        let queue = self.rig.queue(0, 16, false);
        self.front_end.start(&queue, 0);
        let mut driver = Driver { memory: &self.rig.memory, queue };
        assert_eq!(driver.write(5, &[0x5a; 512]), 0, "{what}: after the reset");
        self.front_end.stop(0);
        assert_eq!(self.hears(0), None, "{what}: one word is enough");
        self
    }

    /// A new ring with these descriptors, of which `head` is offered.
    fn offer(&mut self, table: Table<'_>, head: u16) -> Queue {
        let mut queue = self.rig.queue(0, 16, false);
        for (index, descriptor) in (0..).zip(table) {
            queue.describe(queue.desc, index, *descriptor);
        }
        self.front_end.start(&queue, 0);
        queue.offer(head);
        queue.kick(0);
        queue
    }

    /// The ring stands still and pci hears of it.
    fn breaks(mut self, what: &str, table: Table<'_>, head: u16) -> Self {
        let queue = self.offer(table, head);
        assert_eq!(self.hears(20_000), Some(ToPci::NeedsReset), "{what}");
        assert_eq!(queue.used_index(), 0, "{what}");
        self.goes_on(what)
    }

    fn header(&self, kind: u32, sector: u64) {
        let bytes = [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat();
        self.rig.memory.map.write_slice(&bytes, GuestAddress(HEADER)).unwrap();
    }

    /// The request ends with this status.
    fn fails(mut self, what: &str, (kind, sector): (u32, u64), data: (u64, u32, u16), status: u8) -> Self {
        self.header(kind, sector);
        let (addr, len, flags) = data;
        let table = [(HEADER, 16, NEXT, 1), (addr, len, flags | NEXT, 2), (STATUS, 1, WRITE, 0)];
        let queue = self.offer(&table, 0);
        assert!(queue.wait(LIMIT), "{what}");
        assert_eq!(self.rig.memory.map.read_obj::<u8>(GuestAddress(STATUS)).unwrap(), status, "{what}");
        self.goes_on(what)
    }
}

#[test]
fn chains_that_break_the_rules_stop_their_ring() {
    let h = Hostile::new();
    h.header(T_IN, 0);
    let head = (HEADER, 16, NEXT, 1);
    let h = h.breaks("a loop of two", &[head, (DATA, 512, NEXT | WRITE, 2), (DATA, 512, NEXT | WRITE, 1)], 0);
    let h = h.breaks("a loop of one", &[(HEADER, 16, NEXT, 0)], 0);
    let h = h.breaks("a successor out of range", &[(HEADER, 16, NEXT, 16)], 0);
    let h = h.breaks("a head out of range", &[], 16);
    let h = h.breaks("a head far out of range", &[], u16::MAX);
    let h = h.breaks("4 GiB", &[head, (0, u32::MAX, WRITE, 0)], 0);
    let h = h.breaks("a buffer behind RAM", &[head, (RAM, 1, WRITE, 0)], 0);
    let h = h.breaks("a buffer over the end of RAM", &[head, (RAM - 1, 2, WRITE, 0)], 0);
    let h = h.breaks("a buffer that wraps", &[head, (u64::MAX, 2, WRITE, 0)], 0);
    let h = h.breaks("nothing at all", &[(HEADER, 0, 0, 0)], 0);
    let h = h.breaks("a short header", &[(HEADER, 15, NEXT, 1), (STATUS, 1, WRITE, 0)], 0);
    let h = h.breaks("no status", &[(HEADER, 16, 0, 0)], 0);
    let h = h.breaks("a header to write", &[(HEADER, 16, NEXT | WRITE, 1), (STATUS, 1, WRITE, 0)], 0);
    let h = h.breaks("a status to read", &[head, (STATUS, 1, 0, 0)], 0);
    let late = [head, (DATA, 512, NEXT | WRITE, 2), (DATA, 512, NEXT, 3), (STATUS, 1, WRITE, 0)];
    let h = h.breaks("readable after writable", &late, 0);
    drop(h);
}

#[test]
fn indirect_tables_that_break_the_rules_stop_their_ring() {
    let h = Hostile::new();
    h.header(T_IN, 0);
    let table = |table: Table<'_>, h: &Hostile| {
        let queue = h.rig.queue(0, 16, false);
        for (index, descriptor) in (0..).zip(table) {
            queue.describe(TABLE, index, *descriptor);
        }
    };
    for (what, at, len, flags) in [
        ("behind RAM", RAM, 32, 0),
        ("over the end of RAM", RAM - 16, 32, 0),
        ("that wraps", u64::MAX - 15, 32, 0),
        ("without length", TABLE, 0, 0),
        ("of half a descriptor", TABLE, 24, 0),
        ("of 4 GiB", 0, u32::MAX - 15, 0),
        ("with a successor", TABLE, 32, NEXT),
    ] {
        let h = Hostile::new().breaks(what, &[(at, len, INDIRECT | flags, 0)], 0);
        drop(h);
    }
    table(&[(TABLE, 32, INDIRECT, 0)], &h);
    let h = h.breaks("nested", &[(TABLE, 16, INDIRECT, 0)], 0);
    table(&[(HEADER, 16, NEXT, 1), (DATA, 512, NEXT | WRITE, 0)], &h);
    let h = h.breaks("with a loop", &[(TABLE, 32, INDIRECT, 0)], 0);
    table(&[(HEADER, 16, NEXT, 2), (STATUS, 1, WRITE, 0)], &h);
    let h = h.breaks("a successor behind the table", &[(TABLE, 32, INDIRECT, 0)], 0);
    // 130 times half of RAM.
    let parts: Vec<_> = (0..130).map(|i| (0, 32 << 20, NEXT | WRITE, i + 2)).collect();
    table(&[&[(HEADER, 16, NEXT, 1)], &parts[..], &[(STATUS, 1, WRITE, 0)]].concat(), &h);
    let h = h.breaks("more than 4 GiB in all", &[(TABLE, 132 * 16, INDIRECT, 0)], 0);
    drop(h);
}

#[test]
fn indices_that_jump_stop_their_ring() {
    let mut h = Hostile::new();
    for jump in [17, 1000, u16::MAX] {
        let mut queue = h.rig.queue(0, 16, false);
        h.front_end.start(&queue, 0);
        queue.set_avail(jump);
        queue.kick.write(1).unwrap();
        assert_eq!(h.hears(20_000), Some(ToPci::NeedsReset), "{jump}");
        h = h.goes_on("jump");
    }
}

#[test]
fn requests_outside_of_the_disk_fail_alone() {
    let h = Hostile::new();
    let into = (DATA, 1024, WRITE);
    let from = (DATA, 1024, 0);
    let h = h.fails("read over the end", (T_IN, 4095), into, 1);
    let h = h.fails("write over the end", (T_OUT, 4095), from, 1);
    let h = h.fails("overflow", (T_IN, u64::MAX), into, 1);
    let h = h.fails("overflow in bytes", (T_OUT, 1 << 55), from, 1);
    let h = h.fails("half a sector", (T_OUT, 0), (DATA, 700, 0), 1);
    let h = h.fails("a read into nothing", (T_IN, 0), from, 0);
    let h = h.fails("half a range", (T_DISCARD, 0), (DATA, 8, 0), 1);
    let h = h.fails("more than the disk", (T_IN, 0), (0, 32 << 20, WRITE), 1);
    let h = h.fails("unknown", (0xffff_ffff, 0), into, 2);
    drop(h);
}

#[test]
fn rings_over_themselves_and_over_each_other_end_nothing() {
    let mut h = Hostile::new();
    // Reads from the disk land in the descriptor table and in both rings.
    let queue = h.rig.queue(0, 16, false);
    for target in [queue.desc, queue.avail & !0xf, queue.used] {
        h.header(T_IN, 0);
        let table = [(HEADER, 16, NEXT, 1), (target, 512, NEXT | WRITE, 2), (STATUS, 1, WRITE, 0)];
        let _ = h.offer(&table, 0);
        std::thread::sleep(Duration::from_millis(20));
        while h.hears(50).is_some() {}
        h = h.goes_on("a ring as a buffer");
    }
    // All three parts at one place.
    let mut queue = h.rig.queue(0, 16, false);
    (queue.avail, queue.used) = (queue.desc, queue.desc);
    h.front_end.start(&queue, 0);
    queue.offer(0);
    queue.kick.write(1).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    while h.hears(50).is_some() {}
    let h = h.goes_on("a ring over itself");
    // A ring that ends behind RAM.
    let Hostile { rig, mut front_end, mut side, other } = h;
    let mut queue = rig.queue(0, 16, false);
    queue.used = RAM - 16;
    front_end.start(&queue, 0);
    assert_eq!(next_word(&mut side), ToPci::NeedsReset);
    let _ = Hostile { rig, front_end, side, other }.goes_on("a ring behind RAM");
}
