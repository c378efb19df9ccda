//! What an access costs over a bus link, beside a bare packet ping-pong between two threads.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test that cannot go on fails")]

mod common;

use std::os::fd::{AsRawFd, OwnedFd};
use std::thread;
use std::time::{Duration, Instant};

use bulkhead_bus_api::{Access, Op, REPLY_LEN, REQUEST_LEN, Request, Space};
use common::{LSR, Rig, pair};
use nix::sys::socket::{MsgFlags, recv, send};

const ROUNDS: u32 = 5_000;
const BATCHES: usize = 7;

fn exchange(fd: &OwnedFd, packet: &[u8]) {
    send(fd.as_raw_fd(), packet, MsgFlags::MSG_NOSIGNAL).unwrap();
    let mut reply = [0; 64];
    assert_eq!(recv(fd.as_raw_fd(), &mut reply, MsgFlags::empty()).unwrap(), REPLY_LEN);
}

/// Time of one round trip over a connected access link.
fn round_trip(fd: &OwnedFd, seq: &mut u32) -> Duration {
    let start = Instant::now();
    for _ in 0..ROUNDS {
        *seq = seq.wrapping_add(1);
        let access = Access { space: Space::Pio, addr: LSR, size: 1, op: Op::Read };
        exchange(fd, &Request::encode_head(*seq, &access));
    }
    start.elapsed() / ROUNDS
}

/// The other side of the comparison: a thread that only answers.
fn echo() -> OwnedFd {
    let (near, far) = pair();
    thread::spawn(move || {
        let mut buffer = [0; 64];
        while recv(far.as_raw_fd(), &mut buffer, MsgFlags::empty()).unwrap_or(0) == REQUEST_LEN {
            send(far.as_raw_fd(), &[0; REPLY_LEN], MsgFlags::MSG_NOSIGNAL).unwrap();
        }
    });
    near
}

#[test]
fn an_access_costs_little_more_than_its_two_packets() {
    let bare = echo();
    let mut rig = Rig::null();
    let vcpu = rig.vcpu();
    let mut seq = vcpu.seq;
    // Taking turns, so that a change of the machine's speed hits both; the best of each counts.
    let times: Vec<(Duration, Duration)> =
        (0..BATCHES).map(|_| (round_trip(&bare, &mut 0), round_trip(&vcpu.fd, &mut seq))).collect();
    let bare = times.iter().map(|t| t.0).min().unwrap();
    let bus = times.iter().map(|t| t.1).min().unwrap();
    println!("bus link {bus:?}, bare packets {bare:?}: {:.2} times", bus.as_secs_f64() / bare.as_secs_f64());
    // The goal is 1.3; a loaded machine and an unoptimized build get some room.
    assert!(bus < bare * 3, "{bus:?} against {bare:?}");
}

#[test]
fn a_boot_log_goes_out_in_fifo_loads() {
    const LOG: usize = 64 * 1024;
    let mut rig = Rig::null();
    let start = Instant::now();
    rig.vcpu().print(&[b'x'; LOG]);
    let time = start.elapsed();
    println!("64 KiB of output, 16 bytes per status poll and load: {time:?}");
    assert!(time < Duration::from_secs(5));
}
