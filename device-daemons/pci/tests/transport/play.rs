//! Plays a driver and a back end after a script of bytes, and checks what must hold whatever the script.
#![allow(dead_code, reason = "each test binary uses a part of it")]

use bulkhead_pci::device::{Backed as _, Device as _};
use bulkhead_pci::frontend::wire::Request;
use bulkhead_pci::virtio::VirtioPci;

use super::{BAR, Bench, ISR, STATUS, config, virtio};
use crate::common::{BASE, LEN};

/// Turns that a script has.
const TURNS: usize = 300;
/// What is added to the guest physical address for the back end.
const BIAS: u64 = 1 << 46;

/// What the guest reads without changing anything.
pub fn look(device: &mut VirtioPci) -> Vec<u64> {
    let mut seen = Vec::new();
    for size in [1, 2, 4, 8] {
        let places = (0..0x40).chain(0x2000..0x2020).step_by(usize::from(size));
        seen.extend(places.map(|offset| device.read(BAR, offset, size)));
    }
    seen
}

/// What must hold after each step.
pub fn check(bench: &mut Bench) {
    let status = bench.status();
    assert_eq!(status & 0x30, 0, "reserved bits");
    assert!(status & 4 == 0 || status & 8 != 0, "ready without an agreement: {status:#x}");
    assert!(bench.read(0x12, 2) <= bench.virtio.queues.into());
    assert!(bench.read(super::SIZE, 2) <= bench.virtio.queue_size.into());
    let vector = bench.read(super::VECTOR, 2);
    assert!(vector == 0xffff || vector <= bench.virtio.queues.into());
    if let Some(peer) = &mut bench.peer {
        check_rings(peer.asked.drain(..));
    }
    check_successor(bench);
}

/// Every ring that a back end was told of is in RAM.
fn check_rings(told: impl Iterator<Item = Vec<u8>>) {
    for payload in told {
        let number = |at: usize, len: usize| -> u64 {
            payload[at..at + len].iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
        };
        if payload.len() == 8 {
            assert!((1..=1024).contains(&number(4, 4)), "{payload:?}");
            continue;
        }
        // Index, flags, descriptor table, used ring, available ring, log.
        for (at, align) in [(8, 16), (16, 4), (24, 2)] {
            let address = number(at, 8).checked_sub(BIAS).unwrap();
            // Of the smallest queue; `is_in` of a ring knows the size.
            assert!((BASE..BASE + LEN - 6).contains(&address) && address % align == 0, "{address:#x}");
        }
    }
}

/// One that takes over what is saved answers the same.
fn check_successor(bench: &mut Bench) {
    let saved = bench.device.save();
    assert!(saved.len() <= bulkhead_pci::device::MAX_SAVED);
    let mut next = VirtioPci::new(&config(bench.virtio.clone()), &bench.ram.memory).unwrap();
    next.wire(bench.wires.clone());
    assert!(next.restore(&saved));
    assert_eq!(next.is_known(), bench.device.is_known());
    // A reset is over there only when the back end has said so, or some time later.
    assert_eq!(look(&mut next), look(&mut bench.device));
    assert_eq!(next.read(BAR, ISR, 1), bench.read(ISR, 1));
}

struct Script<'a>(&'a [u8]);

impl Script<'_> {
    fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    fn number(&mut self, len: usize) -> u64 {
        (0..len).fold(0, |value, _| value << 8 | u64::from(self.byte()))
    }

    /// An address in RAM, at its edges, or anywhere.
    fn address(&mut self) -> u64 {
        match self.byte() % 8 {
            0..4 => BASE + u64::from(self.byte()) * 0x1000,
            4 => BASE + LEN - self.number(2),
            5 => BASE.wrapping_sub(8).wrapping_add(self.number(1)),
            6 => self.number(8),
            _ => BASE + self.number(2),
        }
    }
}

/// Returns how often queues were started, and how often the device needed a reset.
pub fn play(input: &[u8]) -> (usize, usize) {
    let mut script = Script(input);
    let mut config = virtio();
    config.resumes = script.byte() % 2 == 0;
    let mut bench = Bench::of(config);
    watch(&mut bench);
    let (mut started, mut broken) = (0, 0);
    for _ in 0..TURNS {
        if script.0.is_empty() {
            break;
        }
        turn(&mut bench, &mut script);
        started += bench.log().iter().filter(|asked| **asked == Request::SET_VRING_KICK as u32).count();
        broken += usize::from(bench.status() & super::NEEDS_RESET != 0);
        check(&mut bench);
    }
    (started, broken)
}

fn watch(bench: &mut Bench) {
    if let Some(peer) = &mut bench.peer {
        peer.asks = vec![Request::SET_VRING_ADDR as u32, Request::SET_VRING_NUM as u32];
    }
}

fn turn(bench: &mut Bench, script: &mut Script<'_>) {
    match script.byte() % 24 {
        0..4 => bench.serve(),
        4..7 => {
            let areas = [script.address(), script.address(), script.address()];
            bench.set_areas(areas);
        }
        7 => bench.write(super::ENABLE, 2, 1),
        8 => bench.write(super::SELECT, 2, script.number(1) % 3),
        9 => bench.write(super::SIZE, 2, 1 << (script.byte() % 12)),
        10 => bench.add_status(script.number(1)),
        11 => bench.write(STATUS, 1, script.number(1) & 15),
        12 => bench.write(super::QUEUE_RESET, 2, 1),
        13 => {
            let features = bench.offered() & script.number(8) | 1 << 32 | 1 << 40;
            bench.accept(features);
        }
        14 => bench.device.set_master(!script.byte().is_multiple_of(4)),
        15 => bench.device.pause(),
        16 => bench.device.resume(),
        17 if bench.peer.is_some() => bench.kill(),
        18 if bench.peer.is_none() => {
            bench.connect();
            watch(bench);
        }
        19 => bench.restart(),
        20 if !bench.device.is_quiet() => bench.device.abandon(),
        21 => anything(bench, script),
        // As an honest driver.
        22 => {
            bench.write(STATUS, 1, 0);
            bench.serve();
            if bench.status() == 0 && bench.offered() != 0 {
                bench.device.set_master(true);
                bench.drive(u64::MAX);
            }
        }
        _ => {
            bench.device.read(script.byte() % 6, script.number(2) & !7, 1 << (script.byte() % 4));
        }
    }
}

/// A write of any width anywhere.
fn anything(bench: &mut Bench, script: &mut Script<'_>) {
    let size = 1 << (script.byte() % 4);
    let offset = script.number(2) % 0x4000 / size * size;
    let value = script.number(8);
    bench.write(offset, u8::try_from(size).unwrap(), value);
}
