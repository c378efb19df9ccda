//! The virtio-pci transport with a driver before and a back end behind it.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test that cannot go on fails"
)]

mod common;
mod transport;

use bulkhead_pci::device::Backed as _;
use bulkhead_pci::frontend::wire::Request;
use common::VERSION_1;
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
