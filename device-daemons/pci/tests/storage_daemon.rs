//! The front end with QEMU's storage daemon behind it.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test that cannot go on fails"
)]

mod common;
mod storage;

use bulkhead_pci::frontend::{Event, Frontend, Spec, StartError};
use common::{BASE, Ram, VERSION_1, eventually, next};
use storage::{CONFIG, Daemon, SECTORS};

fn ready(daemon: &Daemon) -> Frontend {
    let mut front = Frontend::new(Spec { id: "d0".into(), queues: 2, queue_size: 256, config_len: CONFIG });
    attach(daemon, &mut front);
    front
}

fn attach(daemon: &Daemon, front: &mut Frontend) {
    front.connect(daemon.socket());
    let mut events = next(front);
    // Of the connection before.
    if events == [Event::Ended] {
        events = next(front);
    }
    let [Event::Ready { features, queues, config }] = &events[..] else { panic!("{events:?}") };
    assert_ne!(features & VERSION_1, 0);
    assert_eq!(*queues, 2);
    assert_eq!(config.len(), usize::from(CONFIG));
    assert_eq!(config[..8], u64::from(SECTORS).to_le_bytes());
}

fn check_read(ram: &mut Ram, sector: u8) {
    let used = ram.used();
    ram.offer_read(sector.into());
    nix::unistd::write(&ram.kick, &1u64.to_ne_bytes()).unwrap();
    finish_read(ram, sector, used);
}

fn finish_read(ram: &Ram, sector: u8, used: u16) {
    eventually(|| ram.used() == used.wrapping_add(1));
    assert_eq!((ram.read(0x8000, 512), ram.read(0x9000, 1)), (vec![sector; 512], vec![0]));
}

#[test]
fn sectors_are_read_across_stops_and_connections() {
    let daemon = Daemon::new();
    let mut front = ready(&daemon);
    let mut ram = Ram::new();
    front.start(VERSION_1, &ram.memory, vec![ram.ring(0, 0), ram.ring(1, 0)]).unwrap();
    assert_eq!(next(&mut front), [Event::Started { ring: None }]);
    check_read(&mut ram, 5);
    check_read(&mut ram, 2);

    front.stop();
    assert_eq!(next(&mut front), [Event::Stopped { ring: None, bases: vec![(0, 2), (1, 0)] }]);
    // What is offered while it is stopped is seen without a kick of the guest.
    ram.offer_read(3);
    front.start(VERSION_1, &ram.memory, vec![ram.ring(0, 2)]).unwrap();
    assert_eq!(next(&mut front), [Event::Started { ring: None }]);
    finish_read(&ram, 3, 2);

    front.disconnect();
    ram.offer_read(4);
    attach(&daemon, &mut front);
    front.start(VERSION_1, &ram.memory, vec![ram.ring(0, ram.used())]).unwrap();
    assert_eq!(next(&mut front), [Event::Started { ring: None }]);
    finish_read(&ram, 4, 3);
}

#[test]
fn one_ring_stops_and_starts_alone() {
    let daemon = Daemon::new();
    let mut front = ready(&daemon);
    let mut ram = Ram::new();
    front.start(VERSION_1, &ram.memory, vec![ram.ring(0, 0), ram.ring(1, 0)]).unwrap();
    assert_eq!(next(&mut front), [Event::Started { ring: None }]);
    front.stop_ring(1);
    assert_eq!(next(&mut front), [Event::Stopped { ring: Some(1), bases: vec![(1, 0)] }]);
    check_read(&mut ram, 1);
    front.start_ring(&ram.memory.clone(), ram.ring(1, 0)).unwrap();
    assert_eq!(next(&mut front), [Event::Started { ring: Some(1) }]);
    front.stop();
    assert_eq!(next(&mut front), [Event::Stopped { ring: None, bases: vec![(0, 1), (1, 0)] }]);
}

#[test]
fn a_killed_daemon_is_noticed_and_another_takes_its_place() {
    let mut daemon = Daemon::new();
    let mut front = ready(&daemon);
    let mut ram = Ram::new();
    front.start(VERSION_1, &ram.memory, vec![ram.ring(0, 0)]).unwrap();
    assert_eq!(next(&mut front), [Event::Started { ring: None }]);
    check_read(&mut ram, 6);
    daemon.kill();
    assert_eq!(next(&mut front), [Event::Lost("has closed the connection".into())]);
    assert!(!front.is_connected());
    // A request that nobody serves.
    ram.offer_read(7);
    nix::unistd::write(&ram.kick, &1u64.to_ne_bytes()).unwrap();
    daemon.start();
    attach(&daemon, &mut front);
    front.start(VERSION_1, &ram.memory, vec![ram.ring(0, ram.used())]).unwrap();
    assert_eq!(next(&mut front), [Event::Started { ring: None }]);
    finish_read(&ram, 7, 1);
}

#[test]
fn rings_outside_of_memory_are_not_started() {
    let daemon = Daemon::new();
    let mut front = ready(&daemon);
    let ram = Ram::new();
    let bad = |change: &dyn Fn(&mut bulkhead_pci::frontend::Ring)| {
        let mut ring = ram.ring(1, 0);
        change(&mut ring);
        vec![ram.ring(0, 0), ring]
    };
    let cases = [
        bad(&|ring| ring.desc += 8),
        bad(&|ring| ring.avail += 1),
        bad(&|ring| ring.used += 2),
        bad(&|ring| ring.size = 7),
        bad(&|ring| ring.size = 0),
        bad(&|ring| ring.desc = 0),
        bad(&|ring| ring.used = BASE + common::LEN - 64),
        bad(&|ring| ring.avail = u64::MAX - 1),
    ];
    for rings in cases {
        assert_eq!(front.start(VERSION_1, &ram.memory, rings), Err(StartError::Ring(1)));
    }
    let twice = vec![ram.ring(0, 0), ram.ring(0, 0)];
    assert_eq!(front.start(VERSION_1, &ram.memory, twice), Err(StartError::Ring(0)));
    assert_eq!(front.start(VERSION_1, &ram.memory, vec![ram.ring(2, 0)]), Err(StartError::Ring(2)));
    front.start(VERSION_1, &ram.memory, vec![ram.ring(0, 0)]).unwrap();
    assert_eq!(next(&mut front), [Event::Started { ring: None }]);
    front.disconnect();
    assert_eq!(front.start(VERSION_1, &ram.memory, Vec::new()), Err(StartError::NotReady));
}
