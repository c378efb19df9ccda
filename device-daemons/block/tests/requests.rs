//! What a driver gets from the block daemon.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test that cannot go on fails")]

mod common;

use std::io::{Read as _, Write as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};

use bulkhead_control_api::config::IoThread;
use bulkhead_frontend::EVENT_IDX;
use common::{
    DATA, Driver, HEADER, Rig, STATUS, T_DISCARD, T_FLUSH, T_GET_ID, T_IN, T_OUT, T_WRITE_ZEROES, config,
};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use vm_memory::{Bytes as _, GuestAddress};

fn pattern(seed: u8, len: usize) -> Vec<u8> {
    (0..len).map(|i| u8::try_from((i / 512 * 7 + i + usize::from(seed)) % 251).unwrap()).collect()
}

#[test]
fn reads_see_what_writes_wrote() {
    for features in [0, EVENT_IDX] {
        let rig = Rig::new(&config(1), 4096);
        let mut front_end = rig.connect(features | !0);
        let queue = rig.queue(0, 128, front_end.features & EVENT_IDX != 0);
        front_end.start(&queue, 0);
        let mut driver = Driver { memory: &rig.memory, queue };
        for round in 0..300 {
            let data = pattern(u8::try_from(round % 200).unwrap(), 4096);
            assert_eq!(driver.write(round * 8, &data), 0);
            assert_eq!(driver.read(round * 8, 4096), (0, data), "{round}");
        }
        assert_eq!(driver.request(T_FLUSH, 0, &[]), 0);
        let on_disk = std::fs::read(rig.sockets.path("disk")).unwrap();
        assert_eq!(on_disk[8 * 512..16 * 512], pattern(1, 4096));
        assert_eq!(driver.read(4095, 1024).0, 1, "beyond the end");
        assert_eq!(driver.request(99, 0, &[]), 2, "unknown");
    }
}

#[test]
fn buffers_are_split_anywhere() {
    let rig = Rig::new(&config(1), 4096);
    let mut front_end = rig.connect(!EVENT_IDX);
    let queue = rig.queue(0, 128, false);
    front_end.start(&queue, 0);
    let mut driver = Driver { memory: &rig.memory, queue };
    let data = pattern(9, 1024);
    driver.memory.map.write_slice(&data, GuestAddress(DATA)).unwrap();
    driver.header(HEADER, T_OUT, 3);
    // The header in three pieces, the last one with data behind it.
    driver.memory.map.write_slice(&driver.bytes(HEADER, 16), GuestAddress(DATA - 16)).unwrap();
    let parts = [
        (HEADER, 4, false),
        (HEADER + 4, 7, false),
        (DATA - 5, 5 + 100, false),
        (DATA + 100, 924, false),
        (STATUS, 1, true),
    ];
    assert_eq!(driver.chain(&parts), Some(1));
    // Data and status in one buffer.
    driver.header(HEADER, T_IN, 3);
    let parts = [(HEADER, 16, false), (DATA + 0x1000, 1, true), (DATA + 0x2001, 1024, true)];
    assert_eq!(driver.chain(&parts), Some(1025));
    assert_eq!(driver.bytes(DATA + 0x1000, 1), data[..1]);
    assert_eq!(driver.bytes(DATA + 0x2001, 1024), [&data[1..], &[0]].concat());
}

#[test]
fn reads_of_a_cold_disk_are_right() {
    let rig = Rig::new(&config(1), 4096);
    let disk = std::fs::File::options().write(true).open(rig.sockets.path("disk")).unwrap();
    let block = |slot: u64| pattern(u8::try_from(slot).unwrap(), 4096);
    for slot in 0..60 {
        disk.write_all_at(&block(slot), slot * 4096).unwrap();
    }
    disk.sync_all().unwrap();
    posix_fadvise(&disk, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).unwrap();
    let mut front_end = rig.connect(0);
    let queue = rig.queue(0, 256, false);
    front_end.start(&queue, 0);
    let mut driver = Driver { memory: &rig.memory, queue };
    // Every other one beyond the end, which fails alone.
    for slot in 0..60u64 {
        let at = 0x100_0000 + slot * 0x2000;
        driver.header(at, T_IN, if slot % 2 == 0 { slot * 8 } else { 4090 });
        driver.queue.add(&[(at, 16, false), (at + 0x1000, 4096, true), (at + 0x100, 1, true)]).unwrap();
    }
    driver.queue.kick(0);
    for _ in 0..60 {
        assert!(driver.queue.wait(common::LIMIT));
        driver.queue.take().unwrap();
    }
    for slot in 0..60u64 {
        let at = 0x100_0000 + slot * 0x2000;
        assert_eq!(driver.bytes(at + 0x100, 1)[0], u8::from(slot % 2 == 1), "{slot}");
        if slot % 2 == 0 {
            assert_eq!(driver.bytes(at + 0x1000, 4096), block(slot), "{slot}");
        }
    }
}

#[test]
fn an_indirect_table_holds_a_request() {
    let rig = Rig::new(&config(1), 64);
    let mut front_end = rig.connect(0);
    let queue = rig.queue(0, 8, false);
    front_end.start(&queue, 0);
    let mut driver = Driver { memory: &rig.memory, queue };
    driver.header(HEADER, T_GET_ID, 0);
    let parts: Vec<_> = [(HEADER, 16, false)]
        .into_iter()
        .chain((0..20).map(|i| (DATA + 2 * i, 1, true)))
        .chain([(STATUS, 1, true)])
        .collect();
    driver.queue.add_indirect(0x90_0000, &parts).unwrap();
    driver.queue.kick(0);
    assert!(driver.queue.wait(common::LIMIT));
    assert_eq!(driver.queue.take(), Some((0, 21)));
    let id: Vec<u8> = driver.bytes(DATA, 12).into_iter().step_by(2).collect();
    assert_eq!(id, b"s3r1al");
}

#[test]
fn discarded_and_zeroed_space_is_given_back() {
    let rig = Rig::new(&config(1), 8192);
    let mut front_end = rig.connect(!EVENT_IDX);
    let queue = rig.queue(0, 128, false);
    front_end.start(&queue, 0);
    let mut driver = Driver { memory: &rig.memory, queue };
    assert_eq!(driver.write(0, &vec![7; 1 << 20]), 0);
    let blocks = || std::fs::metadata(rig.sockets.path("disk")).unwrap().blocks();
    let full = blocks();
    let range = |sector: u64, sectors: u32, flags: u32| {
        [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
    };
    let send = |driver: &mut Driver<'_>, kind, bytes: &[u8]| {
        driver.memory.map.write_slice(bytes, GuestAddress(DATA)).unwrap();
        driver.request(kind, 0, &[(DATA, u32::try_from(bytes.len()).unwrap(), false)])
    };
    assert_eq!(send(&mut driver, T_DISCARD, &range(0, 512, 0)), 0);
    assert!(blocks() < full);
    assert_eq!(driver.read(0, 4096).1, vec![0; 4096]);
    let two = [range(512, 8, 1), range(1024, 8, 0)].concat();
    assert_eq!(send(&mut driver, T_WRITE_ZEROES, &two), 0);
    assert_eq!(driver.read(512, 4096).1, vec![0; 4096]);
    assert_eq!(driver.read(1024, 4096).1, vec![0; 4096]);
    assert_eq!(driver.read(1032, 4096).1, vec![7; 4096]);
    assert_eq!(send(&mut driver, T_DISCARD, &range(8191, 2, 0)), 1);
}

#[test]
fn the_configuration_ends_where_it_ends() {
    let rig = Rig::new(&config(3), 4096);
    let mut front_end = rig.connect(0);
    let config = front_end.config(0, 60).unwrap();
    assert_eq!(config[..8], 4096u64.to_le_bytes());
    assert_eq!(config[34..36], 3u16.to_le_bytes());
    assert_eq!(front_end.config(56, 4).unwrap(), [1, 0, 0, 0]);
    for (offset, len) in [(0, 61), (60, 1), (59, 2), (200, 56)] {
        assert_eq!(front_end.config(offset, len), None, "{offset} {len}");
        // A refusal is an answer; the connection stays.
        assert!(front_end.config(0, 8).is_some());
    }
}

#[test]
fn queues_are_served_side_by_side_and_stop_where_they_are() {
    let rig = Rig::new(&config(2), 4096);
    let mut front_end = rig.connect(!EVENT_IDX);
    let queues = [rig.queue(0, 64, false), rig.queue(1, 64, false)];
    for queue in &queues {
        front_end.start(queue, 0);
    }
    let [first, second] = queues;
    let mut first = Driver { memory: &rig.memory, queue: first };
    assert_eq!(first.write(0, &[1; 512]), 0);
    let mut second = Driver { memory: &rig.memory, queue: second };
    assert_eq!(second.read(0, 512), (0, vec![1; 512]));
    assert_eq!(front_end.stop(0), 1);
    assert_eq!(second.read(0, 512), (0, vec![1; 512]));
    // What comes while it stands still is done when it runs again.
    first.header(HEADER, T_FLUSH, 0);
    first.queue.add(&[(HEADER, 16, false), (STATUS, 1, true)]).unwrap();
    first.queue.kick(1);
    front_end.start(&first.queue, 1);
    assert!(first.queue.wait(common::LIMIT));
    assert!(first.queue.take().is_some());
    // A ring that goes on raises its interrupt: its last one may have died with a daemon.
    let _ = first.queue.call.read();
    assert_eq!(front_end.stop(0), 2);
    front_end.start(&first.queue, 2);
    assert!(first.queue.interrupted(common::LIMIT));
}

#[test]
fn front_ends_come_and_go() {
    let rig = Rig::new(&config(1), 4096);
    for round in 0..20u8 {
        let mut front_end = rig.connect(!EVENT_IDX);
        let queue = rig.queue(0, 64, false);
        front_end.start(&queue, 0);
        let mut driver = Driver { memory: &rig.memory, queue };
        if round > 0 {
            assert_eq!(driver.read(0, 512), (0, vec![round - 1; 512]));
        }
        assert_eq!(driver.write(0, &[round; 512]), 0);
    }
}

#[test]
fn a_thread_that_polls_is_kicked_less() {
    let mut config = config(1);
    config.iothread = IoThread { id: "io0".into(), poll_max_ns: 100_000_000, poll_grow: 0, poll_shrink: 0 };
    let rig = Rig::new(&config, 4096);
    let mut front_end = rig.connect(0);
    let queue = rig.queue(0, 64, false);
    front_end.start(&queue, 0);
    let mut driver = Driver { memory: &rig.memory, queue };
    let mut kicks = 0;
    for round in 0..1000 {
        assert_eq!(driver.request(T_FLUSH, 0, &[]), 0, "{round}");
        kicks += u32::from(driver.queue.wants_kick(driver.queue.avail_index().wrapping_sub(1)));
    }
    println!("{kicks} kicks for 1,000 requests");
    assert!(kicks < 500, "{kicks} kicks");
}

#[test]
fn a_message_that_does_not_go_on_ends_its_connection() {
    let rig = Rig::new(&config(1), 4096);
    for part in [&[1, 0, 0, 0, 1][..], &[5, 0, 0, 0, 1, 0, 0, 0, 200, 0, 0, 0, 1]] {
        let mut stream = rig.sockets.connect();
        stream.write_all(part).unwrap();
        stream.set_read_timeout(Some(common::LIMIT)).unwrap();
        assert!(matches!(stream.read(&mut [0; 16]), Ok(0) | Err(_)));
        // The next one is served.
        assert!(rig.connect(0).config(0, 8).is_some());
    }
}
