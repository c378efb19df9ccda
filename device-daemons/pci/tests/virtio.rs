//! The virtio-pci transport with a driver before and a back end behind it.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test that cannot go on fails"
)]

mod common;
mod transport;

use bulkhead_control_api::config::Virtio;
use bulkhead_control_api::side::ToPci;
use bulkhead_jail::link::Link;
use bulkhead_pci::device::{Backed as _, Device as _};
use bulkhead_pci::frontend::wire::{Request, protocol};
use common::peer::{Peer, STOPPED_AT, send};
use common::{BASE, LEN, VERSION_1};
use transport::*;

fn count(log: &[u32], request: Request) -> usize {
    log.iter().filter(|asked| **asked == request as u32).count()
}

#[test]
fn a_driver_starts_all_queues_as_linux_does() {
    let mut bench = Bench::new();
    assert_eq!(bench.read(0x12, 2), 2);
    let offered = bench.offered();
    assert_eq!(offered, VERSION_1 | RING_RESET | 0xff, "no dirty log, no protocol features");
    bench.log();
    bench.drive(VERSION_1);
    assert_eq!(count(&bench.log(), Request::SET_VRING_KICK), 0, "nothing runs before the loop's next turn");
    bench.serve();
    let log = bench.log();
    assert_eq!((count(&log, Request::SET_VRING_KICK), count(&log, Request::SET_VRING_CALL)), (2, 2));
    assert!(bench.kicked(0) && bench.kicked(1));
    assert!(!bench.raised(0) && !bench.raised(1) && !bench.raised(2));
    assert_eq!(bench.status(), READY);
}

#[test]
fn a_reset_is_over_when_the_back_end_has_stopped() {
    let mut bench = Bench::running();
    bench.log();
    bench.write(STATUS, 1, 0);
    assert_eq!(bench.status(), READY, "it is not over yet");
    bench.write(STATUS, 1, 0);
    bench.write(SIZE, 2, 4);
    assert!(!bench.device.is_quiet());
    bench.serve();
    assert_eq!((bench.status(), bench.read(SIZE, 2), bench.read(ENABLE, 2)), (0, 256, 0));
    assert!(bench.device.is_quiet());
    let log = bench.log();
    assert_eq!((count(&log, Request::GET_VRING_BASE), count(&log, Request::RESET_DEVICE)), (2, 1));
    bench.drive(VERSION_1);
    bench.serve();
    assert_eq!(count(&bench.log(), Request::SET_VRING_KICK), 2);
}

#[test]
fn queues_go_on_from_the_used_index_after_a_loss() {
    let mut bench = Bench::running();
    bench.kicked(0);
    bench.set_indices(0, 9, 5);
    bench.set_indices(1, 3, 3);
    bench.kill();
    assert_eq!(bench.status(), READY);
    assert_eq!(bench.device.missing(), ["vhost.d0"]);
    bench.connect_with(|peer| peer.asks.push(Request::SET_VRING_BASE as u32));
    let bases: Vec<Vec<u8>> = bench.peer.as_mut().unwrap().asked.drain(..).collect();
    assert_eq!(bases, [[0u32, 5], [1, 3]].map(|state| state.map(u32::to_ne_bytes).concat()));
    assert!(bench.kicked(0) && bench.kicked(1));
    assert!(bench.raised(1) && bench.raised(2) && !bench.raised(0), "an interrupt may have been lost");
    assert_eq!(bench.status(), READY);
}

#[test]
fn a_device_that_may_lose_requests_needs_a_reset_unless_nothing_was_under_way() {
    let fragile = || Virtio { resumes: false, ..virtio() };
    let without_tracking = |bench: &mut Bench| {
        bench.connect_with(|peer| peer.protocol &= !protocol::INFLIGHT_SHMFD);
        bench.drive(VERSION_1);
        bench.serve();
    };
    for (indices, broken) in [((5, 5), false), ((6, 5), true)] {
        let mut bench = Bench::empty(fragile());
        without_tracking(&mut bench);
        bench.set_indices(0, indices.0, indices.1);
        bench.kill();
        assert_eq!(bench.status() & NEEDS_RESET != 0, broken);
        assert_eq!((bench.raised(0), bench.read(ISR, 1)), (broken, 2 * u64::from(broken)));
        assert_eq!(bench.read(ISR, 1), 0, "read once");
        bench.connect();
        assert_eq!(count(&bench.log(), Request::SET_VRING_KICK), if broken { 0 } else { 2 });
        // The guest does what is asked.
        bench.drive(VERSION_1);
        bench.serve();
        assert_eq!((bench.status(), count(&bench.log(), Request::SET_VRING_KICK)), (READY, 2));
    }
    let mut tracked = Bench::running_of(fragile());
    tracked.set_indices(0, 6, 5);
    tracked.kill();
    tracked.connect();
    assert_eq!(tracked.status(), READY, "the back end notes its requests");
    // Stopped in order, nothing is under way.
    let mut stopped = Bench::empty(fragile());
    without_tracking(&mut stopped);
    stopped.set_indices(0, 6, 5);
    stopped.device.pause();
    stopped.serve();
    stopped.kill();
    assert_eq!(stopped.status(), READY);
}

#[test]
fn a_pause_stops_queues_and_they_go_on_where_they_stopped() {
    let mut bench = Bench::running();
    bench.set_indices(0, 9, 5);
    bench.device.pause();
    assert!(!bench.device.is_quiet());
    bench.serve();
    assert!(bench.device.is_quiet());
    assert_eq!(bench.status(), READY, "the guest sees nothing of it");
    bench.peer.as_mut().unwrap().asks.push(Request::SET_VRING_BASE as u32);
    bench.device.resume();
    bench.serve();
    let bases = bench.peer.as_mut().unwrap().asked.clone();
    assert_eq!(bases, [[0, STOPPED_AT], [1, STOPPED_AT]].map(|state| state.map(u32::to_ne_bytes).concat()));
    assert!(!bench.raised(1), "nothing can have been lost");
    // The same for the bus master bit.
    bench.device.set_master(false);
    bench.serve();
    assert!(bench.device.is_quiet());
    bench.device.set_master(true);
    bench.serve();
    assert!(!bench.device.is_quiet());
}

#[test]
fn one_queue_is_reset_and_set_up_anew() {
    let mut bench = Bench::running();
    bench.log();
    bench.write(SELECT, 2, 1);
    bench.set_areas([0x1000; 3]);
    bench.write(SIZE, 2, 4);
    assert_eq!((bench.read(0x20, 4), bench.read(SIZE, 2)), (Bench::areas(1)[0], 8), "frozen");
    bench.write(QUEUE_RESET, 2, 1);
    assert_eq!((bench.read(QUEUE_RESET, 2), bench.read(ENABLE, 2)), (1, 1));
    bench.serve();
    assert_eq!((bench.read(QUEUE_RESET, 2), bench.read(ENABLE, 2)), (0, 0));
    assert_eq!((bench.read(SIZE, 2), bench.read(VECTOR, 2), bench.read(0x20, 4)), (256, 0xffff, 0));
    let log = bench.log();
    assert_eq!((count(&log, Request::GET_VRING_BASE), count(&log, Request::SET_VRING_KICK)), (1, 0));
    bench.set_up_queue(1);
    bench.serve();
    assert_eq!(count(&bench.log(), Request::SET_VRING_KICK), 1);
    // The other one was never stopped, and one that was not reset stays frozen.
    bench.write(SELECT, 2, 0);
    bench.write(SIZE, 2, 4);
    assert_eq!(bench.read(SIZE, 2), 8);
    // A queue that leaves RAM by this way breaks the device, not the back end.
    bench.write(SELECT, 2, 1);
    bench.write(QUEUE_RESET, 2, 1);
    bench.serve();
    bench.set_areas([0; 3]);
    bench.write(ENABLE, 2, 1);
    bench.serve();
    assert_eq!(bench.status(), READY | NEEDS_RESET);
    assert!(bench.device.is_quiet());
}

#[test]
fn without_the_feature_a_queue_cannot_be_reset() {
    let mut bench = Bench::of(virtio());
    bench.drive(VERSION_1);
    bench.serve();
    bench.write(QUEUE_RESET, 2, 1);
    assert_eq!(bench.read(QUEUE_RESET, 2), 0);
}

#[test]
fn rings_that_are_not_in_memory_are_never_passed_on() {
    let end = BASE + LEN;
    let good = Bench::areas(0);
    // A queue of 8: 128, 22 and 70 bytes.
    let bad = [
        [end - 128 + 16, good[1], good[2]],
        [BASE - 16, good[1], good[2]],
        [good[0] + 8, good[1], good[2]],
        [good[0], end - 20, good[2]],
        [good[0], good[1] + 1, good[2]],
        [good[0], good[1], end - 68],
        [good[0], good[1], good[2] + 2],
        [u64::MAX - 15, good[1], good[2]],
        [good[0], u64::MAX - 1, good[2]],
        [good[0], good[1], u64::MAX - 3],
        [0, 0, 0],
    ];
    let run = |areas: [u64; 3]| {
        let mut bench = Bench::new();
        bench.negotiate(VERSION_1);
        bench.write(0x10, 2, 0);
        bench.write(SIZE, 2, 8);
        bench.set_areas(areas);
        bench.write(ENABLE, 2, 1);
        bench.log();
        bench.add_status(4);
        bench.serve();
        let status = bench.status();
        assert_eq!(bench.raised(0), status & NEEDS_RESET != 0);
        assert_eq!(count(&bench.log(), Request::SET_VRING_ADDR), usize::from(status == READY));
        status
    };
    assert_eq!(run([end - 128, end - 128 - 22, end - 128 - 22 - 74]), READY, "the last ones that fit");
    for areas in bad {
        assert_eq!(run(areas), READY | NEEDS_RESET, "{areas:#x?}");
    }
    // Whether a back end is there or not.
    let mut bench = Bench::new();
    bench.negotiate(VERSION_1);
    bench.write(ENABLE, 2, 1);
    bench.kill();
    bench.add_status(4);
    assert_eq!(bench.status(), READY | NEEDS_RESET);
}

#[test]
fn addresses_are_written_in_halves_or_at_once() {
    let mut bench = Bench::new();
    for (at, area) in [(0x20, 0x1122_3344_5566_7788), (0x28, 0x99aa_bbcc_ddee_ff00), (0x30, u64::MAX - 1)] {
        bench.write(at, 8, area);
        assert_eq!(
            (bench.read(at, 8), bench.read(at, 4), bench.read(at + 4, 4)),
            (area, area & 0xffff_ffff, area >> 32)
        );
        bench.write(at + 4, 4, 7);
        assert_eq!(bench.read(at, 8), 7 << 32 | area & 0xffff_ffff);
        bench.write(at, 4, 9);
        assert_eq!(bench.read(at, 8), 7 << 32 | 9);
    }
}

#[test]
fn features_are_agreed_on_or_not() {
    let mut bench = Bench::new();
    let try_features = |bench: &mut Bench, low: u64, high: u64, beyond: u64| {
        bench.write(STATUS, 1, 0);
        bench.serve();
        for (select, half) in [(0, low), (1, high), (2, beyond)] {
            bench.write(8, 4, select);
            bench.write(12, 4, half);
        }
        bench.add_status(11);
        let status = bench.status();
        // Without an agreement the driver is never ready.
        bench.add_status(4);
        assert_eq!(bench.status() & 4 != 0, status & 8 != 0);
        status
    };
    assert_eq!(try_features(&mut bench, 0x01, 1, 0), 11);
    assert_eq!(try_features(&mut bench, 0x01, 0, 0), 3, "no virtio 1.0");
    assert_eq!(try_features(&mut bench, 0x100, 1, 0), 3, "not offered");
    assert_eq!(try_features(&mut bench, 0x01, 1, 1), 3, "beyond all features");
    assert_eq!(try_features(&mut bench, 0x01, 3, 0), 3, "platform access");
    // Later ones are not accepted.
    assert_eq!(try_features(&mut bench, 0x01, 1, 0), 11);
    bench.accept(u64::MAX);
    bench.write(8, 4, 0);
    assert_eq!(bench.read(12, 4), 1);
    bench.write(8, 4, 7);
    bench.write(0, 4, 7);
    assert_eq!((bench.read(12, 4), bench.read(4, 4)), (0, 0));
}

#[test]
fn a_back_end_that_has_become_another_cannot_take_over() {
    for change in [|peer: &mut Peer| peer.features &= !1, |peer: &mut Peer| peer.queues = 1] {
        let mut bench = Bench::of(virtio());
        bench.drive(u64::MAX);
        bench.serve();
        bench.kill();
        bench.connect_with(change);
        assert_eq!(bench.status(), READY | NEEDS_RESET);
        // After the reset the guest sees what there is now.
        bench.negotiate(u64::MAX);
        let changed = (bench.offered() & 0xff, bench.read(0x12, 2)) != (0xff, 2);
        assert!(changed);
    }
    // One of before virtio 1.0 is none at all.
    let mut bench = Bench::empty(virtio());
    bench.device.set_master(true);
    let (mut peer, stream) = Peer::pair(protocol::WANTED);
    peer.features &= !VERSION_1;
    bench.device.connected("vhost.d0", stream);
    bench.peer = Some(peer);
    bench.serve();
    assert!(!bench.device.is_known() && !bench.device.is_connected());
    assert_eq!(bench.device.missing(), ["vhost.d0"]);
}

#[test]
fn the_configuration_space_follows_the_back_end() {
    let mut bench = Bench::running();
    assert_eq!(bench.read(CONFIG, 8), 0x0807_0605_0403_0201);
    assert_eq!((bench.read(CONFIG + 14, 2), bench.read(CONFIG + 16, 4)), (0x100f, 0));
    let generation = bench.read(GENERATION, 1);
    bench.peer.as_mut().unwrap().config[0] = 0x99;
    let channel = bench.peer.as_ref().unwrap().channel.as_ref().unwrap().try_clone().unwrap();
    // VHOST_USER_BACKEND_CONFIG_CHANGE_MSG.
    send(&channel, &[2u32, 1, 0].map(u32::to_ne_bytes).concat(), &[]).unwrap();
    bench.serve();
    assert_eq!(bench.read(CONFIG, 1), 0x99);
    assert_eq!(bench.read(GENERATION, 1), generation + 1);
    assert!(bench.raised(0));
    assert_eq!((bench.read(ISR, 1), bench.read(ISR, 1)), (2, 0));
    // It may have changed while the back end was away.
    bench.kill();
    bench.connect_with(|peer| peer.config[1] = 0x98);
    assert_eq!((bench.read(CONFIG, 2), bench.read(GENERATION, 1)), (0x9801, generation + 2));
    assert!(bench.raised(0));
    bench.device.pause();
    bench.serve();
    bench.write(0x10, 2, 0xffff);
    bench.kill();
    bench.connect();
    assert!(!bench.raised(0), "no vector, no interrupt");
}

#[test]
fn the_guest_writes_what_it_may_and_the_back_end_hears_of_it() {
    let balloon = Virtio { device_type: 5, ..virtio() };
    let mut bench = Bench::running_of(balloon);
    let asked = |bench: &mut Bench| std::mem::take(&mut bench.peer.as_mut().unwrap().asked);
    bench.peer.as_mut().unwrap().asks.push(Request::SET_CONFIG as u32);
    for (offset, size) in [(0, 4), (2, 4), (8, 4), (10, 2), (4, 8), (16, 4), (0x100, 4), (0xffc, 4)] {
        bench.write(CONFIG + offset, size, u64::MAX);
        bench.serve();
    }
    assert_eq!(asked(&mut bench), Vec::<Vec<u8>>::new());
    bench.write(CONFIG + 4, 4, 0x1234);
    bench.write(CONFIG + 4, 4, 0x5678);
    assert_eq!(bench.read(CONFIG + 4, 4), 0x5678);
    bench.serve();
    // What the back end makes of it is what the guest reads: here it keeps its own.
    let told = asked(&mut bench);
    let values: Vec<&[u8]> = told.iter().map(|payload| &payload[12..]).collect();
    assert_eq!(values, [0x1234u32.to_le_bytes(), 0x5678u32.to_le_bytes()]);
    assert_eq!(bench.read(CONFIG + 4, 4), 0x0807_0605);
    // While it is away, the last one waits.
    bench.kill();
    bench.write(CONFIG + 4, 4, 1);
    bench.write(CONFIG + 5, 1, 2);
    bench.restart();
    assert_eq!(bench.read(CONFIG + 4, 4), 0x201);
    bench.connect_with(|peer| peer.asks.push(Request::SET_CONFIG as u32));
    let told = asked(&mut bench);
    assert_eq!(told.len(), 1);
    assert_eq!(told[0], [4u32, 4, 0, 0x201].map(u32::to_ne_bytes).concat());
}

#[test]
fn what_the_guest_writes_early_is_told_after_the_features() {
    let mut bench = Bench::of(Virtio { device_type: 5, ..virtio() });
    bench.negotiate(u64::MAX);
    bench.log();
    bench.write(CONFIG + 12, 4, 0xaaaa_aaaa);
    bench.serve();
    assert_eq!((bench.log(), bench.read(CONFIG + 12, 4)), (vec![], 0xaaaa_aaaa));
    bench.write(0x10, 2, 0);
    bench.add_status(4);
    bench.serve();
    let log = bench.log();
    let at = |request: Request| log.iter().position(|asked| *asked == request as u32).unwrap();
    assert!(at(Request::SET_FEATURES) < at(Request::SET_CONFIG));
    // Before that a reset takes it back.
    bench.negotiate(u64::MAX);
    let config = bench.read(CONFIG + 12, 4);
    bench.write(CONFIG + 12, 4, 0xaaaa_aaaa);
    bench.write(STATUS, 1, 0);
    bench.serve();
    assert_eq!((bench.status(), bench.read(CONFIG + 12, 4)), (0, config));
}

#[test]
fn a_daemon_says_all_of_its_pieces_once_on_a_link() {
    let mut bench = Bench::running_of(Virtio { side: Some("side.d0".into()), ..virtio() });
    for times in [1, 2] {
        let (a, b) = pair_of_packets();
        bench.device.connected("side.d0", a);
        let daemon = Link::connect(b, bulkhead_control_api::VERSION).unwrap();
        (0..times).for_each(|_| daemon.send(&ToPci::Pieces).unwrap());
        bench.serve();
        assert_eq!(bench.device.missing().is_empty(), times == 1);
        drop(daemon);
        bench.serve();
        assert_eq!(bench.device.missing(), ["side.d0"]);
    }
}

#[test]
fn a_side_link_says_what_vhost_user_cannot() {
    let mut bench = Bench::running_of(Virtio { side: Some("side.d0".into()), ..virtio() });
    assert_eq!(bench.device.missing(), ["side.d0"]);
    let (a, b) = pair_of_packets();
    bench.device.connected("side.d0", a);
    assert!(bench.device.missing().is_empty());
    let daemon = Link::connect(b, bulkhead_control_api::VERSION).unwrap();
    bench.peer.as_mut().unwrap().config[0] = 0x99;
    (0..10).for_each(|_| daemon.send(&ToPci::ConfigChanged).unwrap());
    bench.log();
    bench.serve();
    assert_eq!((bench.read(CONFIG, 1), bench.raised(0)), (0x99, true));
    assert_eq!(count(&bench.log(), Request::GET_CONFIG), 2, "two reads tell it all");
    daemon.send(&ToPci::NeedsReset).unwrap();
    bench.serve();
    assert_eq!((bench.status(), bench.raised(0)), (READY | NEEDS_RESET, true));
    assert!(bench.device.is_quiet());
    // What is said of queues that are no more does not concern a device that has been reset.
    bench.write(STATUS, 1, 0);
    daemon.send(&ToPci::NeedsReset).unwrap();
    bench.serve();
    assert_eq!(bench.status(), 0);
    drop(daemon);
    bench.serve();
    assert_eq!(bench.device.missing(), ["side.d0"]);
    assert!(bench.device.is_connected());
}

#[test]
fn vectors_change_while_queues_run() {
    let mut bench = Bench::running();
    let calls = |bench: &mut Bench| count(&bench.log(), Request::SET_VRING_CALL);
    calls(&mut bench);
    for vector in [0, 2, 3, 0xfffe, 0xffff] {
        bench.write(SELECT, 2, 1);
        bench.write(VECTOR, 2, vector);
        let taken = if vector < 3 { vector } else { 0xffff };
        assert_eq!(bench.read(VECTOR, 2), taken);
        bench.write(0x10, 2, vector);
        assert_eq!(bench.read(0x10, 2), taken);
        bench.serve();
        assert_eq!(calls(&mut bench), 1);
    }
}

#[test]
fn a_write_to_a_doorbell_that_exits_rings_it() {
    let mut bench = Bench::running();
    bench.kicked(0);
    bench.kicked(1);
    for (offset, size, rung) in
        [(0, 2, Some(0)), (4, 4, Some(1)), (4, 1, Some(1)), (2, 2, None), (8, 4, None), (0xffc, 4, None)]
    {
        bench.write(NOTIFY + offset, size, 0);
        assert_eq!([bench.kicked(0), bench.kicked(1)], [rung == Some(0), rung == Some(1)], "{offset}");
    }
}

#[test]
fn a_restarted_process_goes_on() {
    let mut bench = Bench::running();
    bench.set_indices(0, 9, 5);
    let inflight = bench.device.kept().unwrap();
    bench.restart();
    assert!(bench.device.is_known() && !bench.device.is_quiet(), "the back end may not have noticed yet");
    assert!(bench.device.kept().is_some());
    drop(inflight);
    bench.connect_with(|peer| peer.asks.push(Request::SET_INFLIGHT_FD as u32));
    let peer = bench.peer.as_ref().unwrap();
    assert_eq!(count(&peer.log, Request::GET_INFLIGHT_FD), 0);
    assert_eq!(peer.asked.len(), 1);
    assert!(bench.raised(1) && bench.raised(2));
    assert_eq!(bench.status(), READY);
    // Into the middle of a reset.
    bench.write(STATUS, 1, 0);
    bench.restart();
    assert_eq!(bench.status(), READY);
    bench.connect();
    assert_eq!(bench.status(), 0);
    bench.drive(VERSION_1);
    bench.serve();
    assert_eq!(count(&bench.log(), Request::SET_VRING_KICK), 2);
}

#[test]
fn a_state_of_another_device_is_refused() {
    let saved = Bench::running().device.save();
    for other in [
        Virtio { queues: 3, ..virtio() },
        Virtio { queue_size: 128, ..virtio() },
        Virtio { config: vec![0; 3], ..virtio() },
    ] {
        let mut bench = Bench::empty(other);
        let before = bench.device.save();
        assert!(!bench.device.restore(&saved));
        assert_eq!(bench.device.save(), before);
    }
    let mut bench = Bench::empty(virtio());
    for len in 0..saved.len() {
        assert!(!bench.device.restore(&saved[..len]), "{len}");
    }
    assert!(bench.device.restore(&saved));
}

#[test]
fn the_state_of_the_largest_device_has_room() {
    let mut bench = Bench::empty(Virtio { queues: 64, config: vec![0xff; 256], ..virtio() });
    bench.connect_with(|peer| peer.queues = 1000);
    bench.negotiate(u64::MAX);
    assert_eq!(bench.read(0x12, 2), 64);
    for index in 0..64 {
        bench.write(SELECT, 2, index);
        bench.set_areas([u64::MAX; 3]);
        bench.write(VECTOR, 2, 64);
        bench.write(ENABLE, 2, 1);
    }
    bench.add_status(4);
    assert_eq!(bench.status(), READY | NEEDS_RESET);
    bench.restart();
    assert_eq!(bench.status(), READY | NEEDS_RESET);
}
