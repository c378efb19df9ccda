//! The block daemon is killed again and again under load and loses nothing: each request is answered once, all data is
//! right, no interrupt is missing. The daemon runs under its seccomp filter, so this also shows that the filter allows
//! what it needs.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test that cannot go on fails")]

mod common;

use std::collections::BTreeMap;
use std::env;
use std::fs::File;
use std::os::fd::AsFd as _;
use std::os::unix::fs::FileExt as _;
use std::time::{Duration, Instant};

use bulkhead_block::transport::Transport;
use bulkhead_frontend::{EVENT_IDX, FrontEnd, Life, Memory, Queue, Sockets};
use bulkhead_jail::starter::Starter;
use bulkhead_jail::topology::BLOCK;
use bulkhead_kit::device::{Listeners, Notices};
use bulkhead_kit::serve::Daemon;
use common::{LIMIT, T_IN, T_OUT, config};
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryMmap};

/// Names the disk, in the process that is the daemon.
const DISK: &str = "BULKHEAD_TEST_DISK";
/// Requests in flight at most; each has its own place in memory and on the disk.
const SLOTS: u64 = 32;
/// Bytes of a request.
const LEN: usize = 16 * 1024;
const SECTORS: u64 = 32;
/// Lives of the daemon.
const LIVES: u32 = 30;
const LIFE: Duration = Duration::from_millis(100);

fn main() {
    if let Ok(disk) = env::var(DISK) {
        return be_daemon(&disk);
    }
    for features in [0, EVENT_IDX] {
        nothing_is_lost_however_often_the_daemon_is_killed(features);
        println!("nothing_is_lost_however_often_the_daemon_is_killed ({features:#x}) ... ok");
    }
    println!("test result: ok. 2 passed; 0 failed");
}

/// Serves on standard input (vhost) and standard output (side) until it is killed.
fn be_daemon(disk: &str) {
    let disk = File::options().read(true).write(true).open(disk).unwrap();
    let config = config(1);
    let listeners = Listeners {
        vhost: std::io::stdin().as_fd().try_clone_to_owned().unwrap(),
        side: std::io::stdout().as_fd().try_clone_to_owned().unwrap(),
    };
    let device = Transport::new(&config, disk.into()).unwrap();
    let mut daemon =
        Daemon::new(Box::new(device), &config.iothread, Notices::new().unwrap(), listeners).unwrap();
    seccompiler::apply_filter_all_threads(BLOCK.filter).unwrap();
    daemon.serve(&Starter::default()).unwrap();
}

/// A request under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Work {
    Write,
    Read,
}

/// The load: each slot writes another content, reads it back, and so on.
struct Load {
    map: GuestMemoryMmap,
    queue: Queue,
    /// By head: slot and what it does.
    under_way: BTreeMap<u16, (u64, Work)>,
    versions: Vec<u32>,
    finished: u64,
}

fn content(slot: u64, version: u32) -> Vec<u8> {
    let mut state = (slot + 1) * 0x9e37_79b9 + u64::from(version) * 0x85eb_ca6b;
    let mut bytes = Vec::with_capacity(LEN);
    while bytes.len() < LEN {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        bytes.extend(state.to_le_bytes());
    }
    bytes
}

const fn at(slot: u64) -> (u64, u64, u64) {
    let base = 0x80_0000 + slot * 0x1_0000;
    (base, base + 0x100, base + 0x1000)
}

impl Load {
    fn send(&mut self, slot: u64, work: Work) {
        let (header, status, data) = at(slot);
        let kind = if work == Work::Write { T_OUT } else { T_IN };
        let bytes = [&kind.to_le_bytes()[..], &[0; 4], &(slot * SECTORS).to_le_bytes()].concat();
        self.map.write_slice(&bytes, GuestAddress(header)).unwrap();
        self.map.write_obj(0xffu8, GuestAddress(status)).unwrap();
        let index = usize::try_from(slot).unwrap();
        let filling = if work == Work::Write {
            self.versions[index] += 1;
            content(slot, self.versions[index])
        } else {
            vec![0xee; LEN]
        };
        self.map.write_slice(&filling, GuestAddress(data)).unwrap();
        let half = u32::try_from(LEN / 2).unwrap();
        let read = work == Work::Read;
        let second = data + u64::from(half);
        let parts = [(header, 16, false), (data, half, read), (second, half, read), (status, 1, true)];
        let since = self.queue.avail_index();
        let head = self.queue.add(&parts).unwrap();
        assert!(self.under_way.insert(head, (slot, work)).is_none());
        self.queue.kick(since);
    }

    /// Takes what is finished and sends what is next.
    fn turn(&mut self, on: bool) {
        while let Some((head, _)) = self.queue.take() {
            let (slot, work) = self.under_way.remove(&head).unwrap();
            let (_, status, data) = at(slot);
            assert_eq!(self.map.read_obj::<u8>(GuestAddress(status)).unwrap(), 0, "status of slot {slot}");
            self.finished += 1;
            if work == Work::Read {
                let mut bytes = vec![0; LEN];
                self.map.read_slice(&mut bytes, GuestAddress(data)).unwrap();
                let expected = content(slot, self.versions[usize::try_from(slot).unwrap()]);
                assert!(bytes == expected, "slot {slot} reads another content than it wrote");
            }
            if on {
                self.send(slot, if work == Work::Read { Work::Write } else { Work::Read });
            }
        }
    }
}

// #[test], run by `main`
fn nothing_is_lost_however_often_the_daemon_is_killed(features: u64) {
    let sockets = Sockets::new();
    let disk = File::create(sockets.path("disk")).unwrap();
    disk.set_len(SLOTS * SECTORS * 512).unwrap();
    let memory = Memory::new(64 << 20);
    let queue = Queue::new(&memory.map, 0, 256, 0x10_0000, features & EVENT_IDX != 0);
    let map = memory.map.clone();
    let versions = vec![0; usize::try_from(SLOTS).unwrap()];
    let mut load = Load { map, queue, under_way: BTreeMap::new(), versions, finished: 0 };
    let mut area = None;
    let mut again = 0;
    for life in 0..LIVES {
        let child = Life::begin(&sockets, (DISK, &sockets.path("disk")));
        let mut front_end = FrontEnd::new(sockets.connect(), &memory, features);
        match &area {
            None => area = Some(front_end.get_inflight(1, 256)),
            Some(area) => front_end.set_inflight(area),
        }
        again += load.under_way.len();
        // What is known of a dead back end without the area.
        let base = load.queue.used_index();
        front_end.start(&load.queue, base);
        if life == 0 {
            (0..SLOTS).for_each(|slot| load.send(slot, Work::Write));
        }
        let last = life + 1 == LIVES;
        let end = Instant::now() + LIFE;
        while Instant::now() < end {
            assert!(load.queue.wait(LIMIT), "an interrupt is missing in life {life}");
            load.turn(!last);
            if last && load.under_way.is_empty() {
                break;
            }
        }
        while last && !load.under_way.is_empty() {
            assert!(load.queue.wait(LIMIT), "{} requests were lost", load.under_way.len());
            load.turn(false);
        }
        drop(child);
    }
    println!("{} requests finished, {again} were under way at {} deaths", load.finished, LIVES - 1);
    assert!(again > 0 && load.finished > SLOTS);
    for slot in 0..SLOTS {
        let mut bytes = vec![0; LEN];
        let disk = File::open(sockets.path("disk")).unwrap();
        disk.read_exact_at(&mut bytes, slot * SECTORS * 512).unwrap();
        let version = load.versions[usize::try_from(slot).unwrap()];
        assert!(bytes == content(slot, version), "slot {slot} on disk");
    }
}
