//! A block daemon with a driver, in this process.
#![allow(dead_code, reason = "each test binary uses a part of it")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::fs::File;
use std::os::fd::OwnedFd;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use bulkhead_block::transport::Transport;
use bulkhead_control_api::config::{Block, IoThread};
use bulkhead_frontend::{FrontEnd, Memory, Part, Queue, Sockets, pair_of_packets};
use bulkhead_jail::starter::Starter;
use bulkhead_kit::device::{Listeners, Notices};
use bulkhead_kit::serve::Daemon;
use vm_memory::{Bytes as _, GuestAddress};

/// Longest wait for a request.
pub const LIMIT: Duration = Duration::from_secs(20);

pub const T_IN: u32 = 0;
pub const T_OUT: u32 = 1;
pub const T_FLUSH: u32 = 4;
pub const T_GET_ID: u32 = 8;
pub const T_DISCARD: u32 = 11;
pub const T_WRITE_ZEROES: u32 = 13;

pub fn config(queues: u16) -> Block {
    Block {
        life: 1,
        id: "d0".into(),
        disk: "disk".into(),
        path: "disk.img".into(),
        read_only: false,
        serial: "s3r1al".into(),
        queues,
        discard: true,
        iothread: IoThread::default(),
    }
}

pub fn listeners(sockets: &Sockets) -> Listeners {
    Listeners { vhost: sockets.vhost.try_clone().unwrap().into(), side: sockets.side.try_clone().unwrap() }
}

/// A daemon in a thread; it ends with the value.
pub struct Rig {
    pub sockets: Sockets,
    pub memory: Memory,
    starter: Option<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl Rig {
    pub fn new(config: &Block, sectors: u64) -> Self {
        let sockets = Sockets::new();
        let disk =
            File::options().read(true).write(true).create_new(true).open(sockets.path("disk")).unwrap();
        disk.set_len(sectors * 512).unwrap();
        let device = Transport::new(config, disk.into()).unwrap();
        let (starter, theirs) = pair_of_packets();
        let notices = Notices::new().unwrap();
        let mut daemon =
            Daemon::new(Box::new(device), &config.iothread, notices, listeners(&sockets)).unwrap();
        let thread = thread::spawn(move || daemon.serve(&Starter::new(Some(theirs))).unwrap());
        Self { sockets, memory: Memory::new(64 << 20), starter: Some(starter), thread: Some(thread) }
    }

    pub fn connect(&self, features: u64) -> FrontEnd {
        FrontEnd::new(self.sockets.connect(), &self.memory, features)
    }

    pub fn queue(&self, index: u16, size: u16, event_idx: bool) -> Queue {
        Queue::new(&self.memory.map, index, size, 0x10_0000 * (1 + u64::from(index)), event_idx)
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        drop(self.starter.take());
        let ended = self.thread.take().unwrap().join();
        assert!(ended.is_ok() || thread::panicking());
    }
}

/// One request at a time, its buffers at fixed places.
pub struct Driver<'a> {
    pub memory: &'a Memory,
    pub queue: Queue,
}

pub const HEADER: u64 = 0x80_0000;
pub const STATUS: u64 = 0x80_0100;
pub const DATA: u64 = 0x81_0000;

impl Driver<'_> {
    pub fn header(&self, at: u64, kind: u32, sector: u64) {
        let bytes = [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat();
        self.memory.map.write_slice(&bytes, GuestAddress(at)).unwrap();
    }

    /// Sends a chain and waits; returns the length that the device says.
    pub fn chain(&mut self, parts: &[Part]) -> Option<u32> {
        let since = self.queue.avail_index();
        self.queue.add(parts).unwrap();
        self.queue.kick(since);
        self.queue.wait(LIMIT).then(|| self.queue.take().unwrap().1)
    }

    /// Sends a request with these buffers between header and status; returns its status.
    pub fn request(&mut self, kind: u32, sector: u64, data: &[Part]) -> u8 {
        self.header(HEADER, kind, sector);
        self.memory.map.write_obj(0xffu8, GuestAddress(STATUS)).unwrap();
        let parts = [&[(HEADER, 16, false)], data, &[(STATUS, 1, true)]].concat();
        self.chain(&parts).unwrap();
        self.memory.map.read_obj(GuestAddress(STATUS)).unwrap()
    }

    pub fn write(&mut self, sector: u64, data: &[u8]) -> u8 {
        self.memory.map.write_slice(data, GuestAddress(DATA)).unwrap();
        self.request(T_OUT, sector, &[(DATA, u32::try_from(data.len()).unwrap(), false)])
    }

    pub fn read(&mut self, sector: u64, len: usize) -> (u8, Vec<u8>) {
        let status = self.request(T_IN, sector, &[(DATA, u32::try_from(len).unwrap(), true)]);
        (status, self.bytes(DATA, len))
    }

    pub fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.map.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }
}
