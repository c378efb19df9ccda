//! A hostile driver of a virtio device: every register in every state with every width.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test that cannot go on fails")]

mod common;
mod transport;

use bulkhead_control_api::config::Virtio;
use bulkhead_pci::device::{Backed as _, Device as _};
use bulkhead_pci::frontend::wire::Request;
use common::VERSION_1;
use transport::play::check;
use transport::*;

/// Registers of the common configuration: offset, width, and whether a driver writes it.
const REGISTERS: [(u64, u8, bool); 25] = [
    (0x00, 4, true),
    (0x04, 4, false),
    (0x08, 4, true),
    (0x0c, 4, true),
    (0x10, 2, true),
    (0x12, 2, false),
    (0x14, 1, true),
    (0x15, 1, false),
    (0x16, 2, true),
    (0x18, 2, true),
    (0x1a, 2, true),
    (0x1c, 2, true),
    (0x1e, 2, false),
    (0x20, 4, true),
    (0x24, 4, true),
    (0x28, 4, true),
    (0x2c, 4, true),
    (0x30, 4, true),
    (0x34, 4, true),
    (0x20, 8, true),
    (0x28, 8, true),
    (0x30, 8, true),
    (0x38, 2, false),
    (0x3a, 2, true),
    (0x3c, 4, false),
];

/// A device in each of its states.
fn states() -> Vec<(&'static str, Bench)> {
    let acknowledged = || {
        let mut bench = Bench::new();
        bench.add_status(3);
        bench
    };
    let agreed = || {
        let mut bench = Bench::new();
        bench.negotiate(VERSION_1 | RING_RESET);
        bench
    };
    let mut enabled = agreed();
    enabled.set_up_queue(1);
    let mut away = Bench::running();
    away.kill();
    let mut paused = Bench::running();
    paused.device.pause();
    paused.serve();
    let mut resetting = Bench::running();
    resetting.write(STATUS, 1, 0);
    let mut queue_resetting = Bench::running();
    queue_resetting.write(QUEUE_RESET, 2, 1);
    let mut queue_reset = Bench::running();
    queue_reset.write(QUEUE_RESET, 2, 1);
    queue_reset.serve();
    let mut broken = agreed();
    broken.write(ENABLE, 2, 1);
    broken.add_status(4);
    broken.serve();
    assert_ne!(broken.status() & NEEDS_RESET, 0);
    let mut failed = Bench::running();
    failed.add_status(128);
    failed.serve();
    assert!(failed.device.is_quiet(), "the driver has given up");
    let mut restored = Bench::running();
    restored.restart();
    vec![
        ("new", Bench::new()),
        ("unknown", Bench::empty(virtio())),
        ("acknowledged", acknowledged()),
        ("agreed", agreed()),
        ("enabled", enabled),
        ("running", Bench::running()),
        ("away", away),
        ("paused", paused),
        ("resetting", resetting),
        ("a queue is resetting", queue_resetting),
        ("a queue has been reset", queue_reset),
        ("broken", broken),
        ("failed", failed),
        ("restored", restored),
    ]
}

const VALUES: [u64; 9] = [0, 1, 2, 3, 0x80, 0xffff, 0x7fff_ffff, 0xffff_ffff, u64::MAX];

#[test]
fn every_register_of_every_width_is_read_and_written_in_every_state() {
    let count = states().len();
    for state in 0..count {
        for select in [0, 1, 2, 0xffff] {
            let (name, mut bench) = states().swap_remove(state);
            bench.write(SELECT, 2, select);
            for size in [1u8, 2, 4, 8] {
                for offset in (0..0x48).step_by(size.into()) {
                    let known = REGISTERS.iter().find(|(at, width, _)| (*at, *width) == (offset, size));
                    if known.is_none() || matches!(known, Some((0x3c, _, _))) {
                        assert_eq!(bench.read(offset, size), 0, "{name}: {offset:#x}, {size} bytes");
                    }
                    let before = bench.device.save();
                    for value in VALUES {
                        bench.write(offset, size, value);
                        if !known.is_some_and(|(_, _, writable)| *writable) {
                            assert_eq!(bench.device.save(), before, "{name}: {offset:#x}, {size} bytes");
                        }
                    }
                    check(&mut bench);
                }
            }
            bench.serve();
            check(&mut bench);
        }
    }
}

#[test]
fn every_place_of_both_bars_is_read_and_written() {
    let mut bench = Bench::running();
    for bar in 0..=7 {
        for size in [1u8, 2, 4, 8] {
            for offset in (0x40..0x4000).step_by(size.into()) {
                bench.device.write(bar, offset, size, u64::MAX);
                let value = bench.device.read(bar, offset, size);
                let config = bar == BAR && (CONFIG..CONFIG + 16).contains(&offset);
                assert_eq!(value != 0, config, "{bar} {offset:#x} {size}");
            }
        }
        for offset in [0x4000, 0xffff_ffff, 1 << 32, u64::MAX - 7] {
            bench.device.write(bar, offset, 8, u64::MAX);
            assert_eq!(bench.device.read(bar, offset, 8), 0);
        }
    }
    bench.serve();
    assert_eq!(bench.status(), READY);
}

#[test]
fn a_queue_that_is_not_there_reads_nothing_and_takes_nothing() {
    for select in [2, 3, 63, 64, 0x7fff, 0x8000, 0xffff] {
        let mut bench = Bench::running();
        bench.log();
        bench.write(SELECT, 2, select);
        assert_eq!(bench.read(SELECT, 2), select);
        let before = bench.device.save();
        for (offset, size) in [(SIZE, 2), (ENABLE, 2), (0x1e, 2), (QUEUE_RESET, 2)] {
            bench.write(offset, size, 1);
            assert_eq!(bench.read(offset, size), 0);
        }
        bench.set_areas([0x1000; 3]);
        bench.write(VECTOR, 2, 1);
        assert_eq!(bench.read(VECTOR, 2), 0xffff);
        assert!((0x20..0x38).step_by(4).all(|at| bench.read(at, 4) == 0));
        assert_eq!(bench.device.save(), before);
        bench.serve();
        assert!(bench.log().is_empty());
    }
}

#[test]
fn nothing_but_vectors_changes_once_the_driver_is_ready() {
    let mut bench = Bench::of(virtio());
    bench.negotiate(VERSION_1);
    bench.set_up_queue(0);
    bench.add_status(4);
    bench.serve();
    bench.log();
    // Queue 0 is enabled, queue 1 is not.
    for select in [0, 1] {
        bench.write(SELECT, 2, select);
        // The select register of features is not the device's concern.
        bench.write(8, 4, 1);
        let before = bench.device.save();
        bench.write(SIZE, 2, 16);
        bench.set_areas(Bench::areas(1));
        bench.write(ENABLE, 2, 0);
        bench.write(ENABLE, 2, 1);
        bench.write(QUEUE_RESET, 2, 1);
        bench.accept(0);
        for status in [1, 2, 4, 8, 16, 32, 64] {
            bench.write(STATUS, 1, status);
        }
        assert_eq!(bench.device.save(), before);
    }
    bench.serve();
    assert!(bench.log().is_empty(), "the back end hears nothing of it");
}

#[test]
fn sizes_that_no_queue_can_have_are_refused() {
    let mut bench = Bench::new();
    bench.negotiate(VERSION_1);
    for size in 0..=0xffffu64 {
        bench.write(SIZE, 2, 256);
        bench.write(SIZE, 2, size);
        let valid = size.is_power_of_two() && size <= 256;
        assert_eq!(bench.read(SIZE, 2), if valid { size } else { 256 });
    }
}

/// Offset of the window's capability in [`Bench`]: the last of five.
const WINDOW: u16 = 0x60 + 4 * 20;

fn set_window(bench: &mut Bench, space: &mut [u8], (bar, offset, len): (u8, u32, u32)) -> bool {
    let at = usize::from(WINDOW);
    space[at + 4] = bar;
    space[at + 8..at + 12].copy_from_slice(&offset.to_le_bytes());
    space[at + 12..at + 16].copy_from_slice(&len.to_le_bytes());
    bench.device.config_written(WINDOW + 12, 4, space)
}

#[test]
fn the_window_onto_the_structures_takes_what_a_bar_takes() {
    let mut bench = Bench::new();
    let mut space = vec![0; 256];
    let data = usize::from(WINDOW) + 16;
    assert!(set_window(&mut bench, &mut space, (BAR, 0x16, 2)));
    space[data..data + 4].copy_from_slice(&[1, 0, 0xaa, 0xbb]);
    bench.device.config_written(WINDOW + 16, 4, &mut space);
    assert_eq!(bench.read(SELECT, 2), 1, "queue_select");
    bench.write(SELECT, 2, 0x1234);
    for (at, size, value) in
        [(16, 4, 0xbbaa_1234), (16, 2, 0x1234), (17, 1, 0x12), (18, 2, 0xbbaa), (19, 1, 0xbb)]
    {
        assert_eq!(bench.device.config_read(WINDOW + at, size, &space), Some(value), "{at} {size}");
    }
    for at in (0..16).chain(20..24) {
        assert_eq!(bench.device.config_read(WINDOW + at, 1, &space), None);
    }
    assert!(!set_window(&mut bench, &mut space, (BAR, 0x16, 0)), "taken away");
    assert_eq!(bench.device.config_read(WINDOW + 16, 4, &space), None);
}

#[test]
fn a_window_to_anywhere_else_is_none() {
    let mut bench = Bench::new();
    let before = bench.device.save();
    let mut space = vec![0xff; 256];
    let edges = [0, 1, 2, 3, 0x14, 0x3ffc, 0x3ffd, 0x3fff, 0x4000, 0x7fff_ffff, 0xffff_fffc, u32::MAX];
    for bar in 0..=255u8 {
        for offset in edges {
            for len in [0, 1, 2, 3, 4, 5, 8, 0x100, 0x8000_0000, u32::MAX] {
                let valid = bar == BAR && matches!(len, 1 | 2 | 4) && offset.is_multiple_of(len);
                let valid = valid && offset <= 0x4000 - len;
                assert_eq!(set_window(&mut bench, &mut space, (bar, offset, len)), valid);
                assert_eq!(bench.device.config_read(WINDOW + 16, 1, &space).is_some(), valid);
                if !valid {
                    bench.device.config_written(WINDOW + 16, 4, &mut space);
                }
            }
        }
    }
    assert_eq!(bench.device.save(), before);
    // Nor has one before the bus has said where it is, or in a space that is too short.
    let mut bench = Bench::new();
    bench.device.placed(&[]);
    assert!(!set_window(&mut bench, &mut space, (BAR, 0, 4)));
    bench.device.placed(&[250]);
    assert!(!set_window(&mut bench, &mut space, (BAR, 0, 4)));
}

#[test]
fn a_driver_that_floods_its_device_does_not_flood_the_back_end() {
    let mut bench = Bench::running_of(Virtio { device_type: 5, ..virtio() });
    bench.log();
    for turn in 0..20_000u64 {
        bench.write(CONFIG + 4, 4, turn);
        bench.write(VECTOR, 2, turn % 3);
    }
    bench.serve();
    // What is under way and what came after it: writes and reads of the configuration, the vector.
    let log = bench.log();
    assert!(log.len() <= 6, "{log:?}");
    for turn in 0..20_000u64 {
        bench.write(QUEUE_RESET, 2, 1);
        bench.write(ENABLE, 2, 1);
        bench.device.set_master(turn % 2 == 0);
        bench.write(STATUS, 1, 0);
    }
    bench.device.set_master(true);
    bench.serve();
    let log = bench.log();
    assert!(log.len() < 20, "{log:?}");
    bench.drive(VERSION_1);
    bench.serve();
    assert!(bench.log().contains(&(Request::SET_VRING_KICK as u32)));
}
