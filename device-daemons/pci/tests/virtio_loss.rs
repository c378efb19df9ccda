//! The virtio-pci transport and a back end that loses its connection while it is alive.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test that cannot go on fails"
)]

mod common;
mod transport;

use std::time::{Duration, Instant};

use bulkhead_pci::device::Backed as _;
use bulkhead_pci::frontend::wire::{Request, protocol};
use common::peer::{Answer, Peer};
use transport::*;

/// The back end breaks the protocol, so that it is given up; it keeps its side of the connection.
fn give_up(bench: &mut Bench) -> Peer {
    let peer = bench.peer.take().unwrap();
    peer.send(&Answer::new(Request::GET_QUEUE_NUM as u32, &[]));
    bench.device.advance();
    assert!(!bench.device.is_connected());
    peer
}

/// A back end that is given up while the guest resets its device.
fn given_up_in_a_reset() -> (Bench, Peer) {
    let mut bench = Bench::running();
    bench.write(STATUS, 1, 0);
    bench.device.advance();
    let alive = give_up(&mut bench);
    (bench, alive)
}

#[test]
fn a_reset_is_not_over_while_a_back_end_that_was_given_up_may_write_memory() {
    let (mut bench, _alive) = given_up_in_a_reset();
    assert_eq!(bench.status(), READY);
    assert!(!bench.device.is_quiet());
    // The next answer says that it is done with the old connection.
    bench.connect();
    assert_eq!(bench.status(), 0);
    assert!(bench.device.is_quiet());

    // So does its end of that one.
    let (mut bench, alive) = given_up_in_a_reset();
    bench.device.advance();
    assert_eq!((bench.status(), bench.device.deadline()), (READY, None));
    drop(alive);
    bench.serve();
    assert_eq!(bench.status(), 0);
    assert!(bench.device.is_quiet());
    // A connection that comes to nothing does not.
    let (mut bench, alive) = given_up_in_a_reset();
    let (peer, stream) = Peer::pair(protocol::WANTED);
    bench.device.connected(&virtio().socket, stream);
    drop(peer);
    bench.serve();
    assert_eq!(bench.status(), READY);
    // Nor that nobody listens, while it has the old one.
    let late = Instant::now() + Duration::from_millis(5100);
    std::thread::sleep(late.saturating_duration_since(Instant::now()));
    bench.device.refused(&virtio().socket);
    assert!(!bench.device.is_quiet());
    drop(alive);
    bench.serve();
    assert!(bench.device.is_quiet());
}

#[test]
fn a_restarted_process_waits_for_what_its_predecessor_had_running() {
    let mut bench = Bench::running();
    bench.restart();
    bench.write(STATUS, 1, 0);
    assert_eq!(bench.status(), READY);
    // A back end that begins anew listens soon.
    bench.device.refused(&virtio().socket);
    assert_eq!(bench.status(), READY);
    std::thread::sleep(Duration::from_millis(5100));
    bench.device.refused("side.d0");
    assert_eq!(bench.status(), READY);
    bench.device.refused(&virtio().socket);
    assert_eq!(bench.status(), 0);
    // What was at rest is.
    let mut bench = Bench::running();
    bench.kill();
    bench.restart();
    assert!(bench.device.is_quiet());
    bench.write(STATUS, 1, 0);
    assert_eq!(bench.status(), 0);
}

#[test]
fn queues_go_on_from_where_a_back_end_that_was_given_up_came_to() {
    let mut bench = Bench::running();
    bench.set_indices(0, 9, 5);
    let _alive = give_up(&mut bench);
    bench.set_indices(0, 9, 8);
    bench.connect_with(|peer| peer.asks.push(Request::SET_VRING_BASE as u32));
    let bases: Vec<Vec<u8>> = bench.peer.as_mut().unwrap().asked.drain(..).collect();
    assert_eq!(bases, [[0u32, 8], [1, 0]].map(|state| state.map(u32::to_ne_bytes).concat()));
    assert_eq!(bench.status(), READY);
}

#[test]
fn a_device_that_may_lose_requests_is_asked_after_its_back_end_is_done() {
    for (used, status) in [(9, READY), (8, READY | NEEDS_RESET)] {
        let mut bench = Bench::running_of(bulkhead_control_api::config::Virtio {
            resumes: false,
            memory: None,
            ..virtio()
        });
        bench.set_indices(0, 9, 5);
        // Without memory for what is in flight.
        bench.kill();
        assert_eq!(bench.status() & NEEDS_RESET, 0, "the peer has such memory");

        let mut bench = Bench::empty(bulkhead_control_api::config::Virtio { resumes: false, ..virtio() });
        bench.connect_with(|peer| peer.protocol &= !bulkhead_pci::frontend::wire::protocol::INFLIGHT_SHMFD);
        bench.drive(common::VERSION_1);
        bench.serve();
        bench.set_indices(0, 9, 5);
        let _alive = give_up(&mut bench);
        assert_eq!(bench.status(), READY);
        bench.set_indices(0, 9, used);
        bench.connect();
        assert_eq!(bench.status(), status);
    }
}

#[test]
fn a_machine_that_loses_its_patience_does_not_wait_for_a_back_end() {
    let mut bench = Bench::running();
    bench.device.pause();
    bench.device.advance();
    assert!(!bench.device.is_quiet());
    bench.device.abandon();
    assert!(!bench.device.is_connected() && !bench.device.is_quiet());
    assert_eq!(bench.status(), READY);
    bench.connect();
    assert!(bench.device.is_quiet());
    bench.log();
    bench.device.resume();
    bench.serve();
    assert!(bench.log().contains(&(Request::SET_VRING_KICK as u32)));
}

#[test]
fn notes_of_what_is_in_flight_are_of_use_to_a_back_end_that_reads_them() {
    let without = bulkhead_pci::frontend::wire::protocol::INFLIGHT_SHMFD;
    for (used, reads, status) in [(5, true, READY), (5, false, READY | NEEDS_RESET), (9, false, READY)] {
        let mut bench = Bench::running_of(bulkhead_control_api::config::Virtio {
            resumes: false,
            memory: None,
            ..virtio()
        });
        bench.set_indices(0, 9, used);
        bench.kill();
        assert_eq!(bench.status(), READY);
        bench.connect_with(|peer| peer.protocol &= if reads { !0 } else { !without });
        assert_eq!(bench.status(), status, "{used} {reads}");
        // A reset makes it as good as new.
        bench.drive(common::VERSION_1);
        bench.serve();
        assert_eq!(bench.status(), READY);
    }
}

#[test]
fn what_a_lost_back_end_has_left_is_known_to_a_restarted_process() {
    let without = bulkhead_pci::frontend::wire::protocol::INFLIGHT_SHMFD;
    let fragile = || bulkhead_control_api::config::Virtio { resumes: false, ..virtio() };
    for (reads, status) in [(true, READY), (false, READY | NEEDS_RESET)] {
        let mut bench = Bench::running_of(fragile());
        bench.set_indices(0, 9, 5);
        bench.kill();
        bench.restart();
        bench.connect_with(|peer| peer.protocol &= if reads { !0 } else { !without });
        assert_eq!(bench.status(), status, "{reads}");
    }
    // Its memory has not come back.
    let mut bench = Bench::running_of(fragile());
    bench.set_indices(0, 9, 5);
    bench.kill();
    bench.restart_without_kept();
    bench.connect();
    assert_eq!(bench.status(), READY | NEEDS_RESET);
    // Given up, and not yet known to have stopped.
    let mut bench = Bench::empty(fragile());
    bench.connect_with(|peer| peer.protocol &= !without);
    bench.drive(common::VERSION_1);
    bench.serve();
    bench.set_indices(0, 9, 5);
    let _alive = give_up(&mut bench);
    bench.restart();
    assert_eq!(bench.status(), READY);
    bench.connect();
    assert_eq!(bench.status(), READY | NEEDS_RESET);
    // Only this process has died: a back end that stops in order has nothing under way.
    let mut bench = Bench::running_of(fragile());
    bench.set_indices(0, 9, 9);
    bench.restart();
    bench.connect_with(|peer| peer.protocol &= !without);
    assert_eq!(bench.status(), READY);
}

#[test]
fn the_guest_hears_of_a_needed_reset_once_that_is_kept() {
    let mut bench = Bench::running_of(bulkhead_control_api::config::Virtio { resumes: false, ..virtio() });
    bench.commit();
    taken(&bench.wires.vectors[0]);
    bench.set_indices(0, 9, 5);
    bench.kill();
    bench.connect_with(|peer| peer.protocol &= !protocol::INFLIGHT_SHMFD);
    assert_eq!(bench.status(), READY | NEEDS_RESET);
    assert!(!taken(&bench.wires.vectors[0]), "a successor would not know");
    // It dies after the commit: the next one tells the guest.
    bench.restart();
    assert_eq!(bench.status(), READY | NEEDS_RESET);
    assert!(bench.raised(0) && !bench.raised(0));
}
