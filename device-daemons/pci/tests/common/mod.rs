//! Guest RAM with a virtqueue in it, and a loop around a front end.
#![allow(dead_code, reason = "each test binary uses a part of it")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

pub mod drive;
pub mod peer;

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::rc::Rc;
use std::thread;
use std::time::{Duration, Instant};

use bulkhead_bus_api::pci;
use bulkhead_pci::frontend::{Event, Frontend, Ring};
use bulkhead_pci::memory::{Memory, Region};
use nix::poll::{PollFd, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::uio::{pread, pwrite};
use nix::unistd::ftruncate;

pub const VERSION_1: u64 = 1 << 32;
pub const QUEUE: u16 = 8;
/// Where RAM begins; not at 0, so that addresses and offsets differ.
pub const BASE: u64 = 0x10_0000;
pub const LEN: u64 = 0x10_0000;
const PART: u64 = 0x1_0000;

pub fn eventfd() -> Rc<OwnedFd> {
    Rc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).unwrap().into())
}

/// Guest RAM, and the driver of a virtqueue for each index.
pub struct Ram {
    pub memory: Rc<Memory>,
    fd: Rc<OwnedFd>,
    /// Of ring 0.
    pub kick: Rc<OwnedFd>,
    pub call: Rc<OwnedFd>,
    avail: u16,
}

impl Ram {
    pub fn new() -> Self {
        let fd = Rc::new(memfd_create("ram", MFdFlags::MFD_CLOEXEC).unwrap());
        ftruncate(&fd, LEN.try_into().unwrap()).unwrap();
        let region = Region { place: pci::Memory { base: BASE, len: LEN }, fd: Rc::clone(&fd), offset: 0 };
        let memory = Rc::new(Memory { regions: vec![region] });
        Self { memory, fd, kick: eventfd(), call: eventfd(), avail: 0 }
    }

    pub fn read(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        assert_eq!(pread(&self.fd, &mut bytes, offset.try_into().unwrap()), Ok(len));
        bytes
    }

    pub fn write(&self, offset: u64, bytes: &[u8]) {
        assert_eq!(pwrite(&self.fd, bytes, offset.try_into().unwrap()), Ok(bytes.len()));
    }

    /// The ring of an index, going on from `base`.
    pub fn ring(&self, index: u16, base: u16) -> Ring {
        let desc = BASE + PART * u64::from(index);
        let call = Rc::clone(&self.call);
        // Two rings with one doorbell would steal each other's kicks.
        let kick = if index == 0 { Rc::clone(&self.kick) } else { eventfd() };
        Ring { index, size: QUEUE, desc, avail: desc + 0x1000, used: desc + 0x2000, base, kick, call }
    }

    /// Makes a chain of parts (offset, length, the device writes it) available on ring 0, without a kick.
    pub fn offer(&mut self, parts: &[(u64, u32, bool)]) {
        for (i, (offset, len, writes)) in parts.iter().enumerate() {
            let last = i + 1 == parts.len();
            let flags = u16::from(!last) | if *writes { 2 } else { 0 };
            let next = u16::try_from(i + 1).unwrap();
            let mut descriptor = (BASE + offset).to_le_bytes().to_vec();
            descriptor.extend(len.to_le_bytes());
            descriptor.extend([flags, next].map(u16::to_le_bytes).concat());
            self.write(16 * i as u64, &descriptor);
        }
        self.write(0x1004 + 2 * u64::from(self.avail % QUEUE), &0u16.to_le_bytes());
        self.avail += 1;
        self.write(0x1002, &self.avail.to_le_bytes());
    }

    pub fn used(&self) -> u16 {
        self.memory.read_u16(BASE + 0x2002).unwrap()
    }

    /// Offers a request to read a sector of a block device; its bytes will be at 0x8000, its status at 0x9000.
    pub fn offer_read(&mut self, sector: u64) {
        let mut header = vec![0; 8];
        header.extend(sector.to_le_bytes());
        self.write(0x7000, &header);
        self.write(0x9000, &[0xff]);
        self.offer(&[(0x7000, 16, false), (0x8000, 512, true), (0x9000, 1, true)]);
    }
}

/// Runs the front end until it has something to say.
pub fn next(front: &mut Frontend) -> Vec<Event> {
    next_within(front, Duration::from_secs(20)).unwrap_or_else(|| panic!("nothing happened"))
}

pub fn next_within(front: &mut Frontend, limit: Duration) -> Option<Vec<Event>> {
    let end = Instant::now() + limit;
    let mut events = front.advance();
    while events.is_empty() {
        let now = Instant::now();
        if now >= end {
            return None;
        }
        let due = front.deadline().map_or(end, |deadline| deadline.min(end));
        let mut list = Vec::<PollFd<'_>>::new();
        front.watch(&mut list);
        let wait = due.saturating_duration_since(now).as_millis().min(1000) + 1;
        poll(&mut list, PollTimeout::from(u16::try_from(wait).unwrap())).unwrap();
        events = if front.deadline().is_some_and(|at| at <= Instant::now()) {
            front.expire()
        } else {
            front.advance()
        };
    }
    Some(events)
}

pub fn eventually(what: impl Fn() -> bool) {
    let end = Instant::now() + Duration::from_secs(20);
    while !what() {
        assert!(Instant::now() < end, "it has not come true");
        thread::sleep(Duration::from_millis(2));
    }
}

/// Connects to a socket that somebody is about to make.
pub fn connect(path: &Path) -> OwnedFd {
    let end = Instant::now() + Duration::from_secs(20);
    loop {
        match UnixStream::connect(path) {
            Ok(stream) => return stream.into(),
            Err(error) => assert!(Instant::now() < end, "{}: {error}", path.display()),
        }
        thread::sleep(Duration::from_millis(5));
    }
}

/// A source of numbers that are always the same.
pub struct Random(u64);

impl Random {
    pub fn byte(&mut self) -> u8 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.to_le_bytes()[4]
    }

    /// Scripts of some bytes.
    pub fn script(&mut self) -> Vec<u8> {
        let len = 8 + usize::from(self.byte());
        (0..len).map(|_| self.byte()).collect()
    }
}

/// Plays so many scripts; returns what they say together.
pub fn play_all(
    plays: u64,
    make: impl Fn(u64, &mut Random) -> Vec<u8>,
    play: impl Fn(&[u8]) -> (usize, usize) + std::panic::RefUnwindSafe,
) -> (usize, usize) {
    let mut random = Random(0x2545_f491_4f6c_dd1d);
    let mut sum = (0, 0);
    for number in 0..plays {
        let input = make(number, &mut random);
        let result = std::panic::catch_unwind(|| play(&input));
        let (a, b) = result.unwrap_or_else(|_| panic!("play {number}: {input:?}"));
        sum = (sum.0 + a, sum.1 + b);
    }
    sum
}
