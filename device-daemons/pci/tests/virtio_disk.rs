//! The virtio-pci transport with QEMU's storage daemon behind it: a driver reads its disk.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test that cannot go on fails"
)]

mod common;
mod storage;
mod transport;

use std::time::{Duration, Instant};

use bulkhead_control_api::config::Virtio;
use bulkhead_pci::device::Backed as _;
use bulkhead_pci::event;
use common::VERSION_1;
use nix::poll::{PollTimeout, poll};
use storage::{CONFIG as CONFIG_LEN, Daemon, SECTORS};
use transport::*;

/// Runs the device's loop until something is true.
fn until(bench: &mut Bench, what: &str, is: impl Fn(&mut Bench) -> bool) {
    let end = Instant::now() + Duration::from_secs(20);
    while !is(bench) {
        assert!(Instant::now() < end, "{what}");
        let mut list = Vec::new();
        bench.device.watch(&mut list);
        poll(&mut list, PollTimeout::from(5u16)).unwrap();
        bench.device.advance();
        if bench.device.deadline().is_some_and(|at| at <= Instant::now()) {
            bench.device.expire();
        }
    }
}

fn attach(bench: &mut Bench, daemon: &Daemon) {
    assert_eq!(bench.device.missing(), ["vhost.d0"]);
    bench.device.connected("vhost.d0", daemon.socket());
    until(bench, "no back end", |bench| bench.device.is_connected());
}

fn read_sector(bench: &mut Bench, sector: u8) {
    let used = bench.ram.used();
    bench.ram.offer_read(sector.into());
    event::signal(&bench.wires.bells[0]).unwrap();
    until(bench, "the request is not answered", |bench| bench.ram.used() == used + 1);
    assert_eq!((bench.ram.read(0x8000, 512), bench.ram.read(0x9000, 1)), (vec![sector; 512], vec![0]));
    until(bench, "no interrupt", |bench| bench.raised(1));
}

#[test]
fn a_driver_reads_a_disk_over_pauses_resets_and_deaths() {
    let mut daemon = Daemon::new();
    let config = vec![0; CONFIG_LEN.into()];
    // It may lose requests, and has no memory for what is in flight.
    let mut bench = Bench::empty(Virtio { config, resumes: false, ..virtio() });
    attach(&mut bench, &daemon);
    assert_eq!(bench.read(CONFIG, 4), u64::from(SECTORS));
    bench.drive(VERSION_1);
    until(&mut bench, "no kick", |bench| {
        event::is_signalled(&bench.wires.bells[0]) || bench.device.deadline().is_none()
    });
    read_sector(&mut bench, 3);

    bench.device.pause();
    until(&mut bench, "no rest", |bench| bench.device.is_quiet());
    bench.ram.offer_read(4);
    event::signal(&bench.wires.bells[0]).unwrap();
    bench.device.resume();
    until(&mut bench, "a request of the pause is lost", |bench| bench.ram.used() == 2);
    assert_eq!(bench.ram.read(0x8000, 512), [4; 512]);

    // Nothing is under way, so that nothing is lost.
    daemon.kill();
    until(&mut bench, "it is not noticed", |bench| !bench.device.is_connected());
    assert_eq!(bench.status(), READY);
    daemon.start();
    attach(&mut bench, &daemon);
    read_sector(&mut bench, 5);

    bench.write(STATUS, 1, 0);
    until(&mut bench, "no reset", |bench| bench.status() == 0);
    assert!(bench.device.is_quiet());
    // A request that nobody serves, and nobody can tell.
    daemon.kill();
    until(&mut bench, "it is not noticed", |bench| !bench.device.is_connected());
    daemon.start();
    attach(&mut bench, &daemon);
    bench.set_indices(0, 0, 0);
    bench.drive(VERSION_1);
    until(&mut bench, "it does not start", |bench| bench.device.deadline().is_none());
    daemon.kill();
    bench.set_indices(0, 1, 0);
    until(&mut bench, "it is not noticed", |bench| !bench.device.is_connected());
    assert_eq!(bench.status(), READY | NEEDS_RESET);
}
