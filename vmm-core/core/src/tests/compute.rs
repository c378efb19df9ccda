//! Accesses: round trips, unclaimed addresses, collected output, exact stops.

use std::thread;
use std::time::{Duration, Instant};

use bulkhead_bus_api::{Op as BusOp, Space};
use bulkhead_control_api::core::{Answer, Event, Op, RunState};

use super::program::Program;
use super::rig::{Rig, config, load, plain_console};

#[test]
fn accesses_of_every_width_make_the_round_trip() {
    let program = Program::default()
        .in8(0x3fd, 0)
        .in32(0x608, 4)
        .out8(0x3f8, b'A')
        .raw(&[0xb8, 0x34, 0x12, 0, 0, 0x66, 0xba, 0x04, 0x06, 0x66, 0xef]) // mov eax, 0x1234; out 0x604, ax
        .count(0x10)
        .halt();
    let mut rig = Rig::started(config(1), program, plain_console());
    rig.wait_result(0x10, |n| n == 1);
    assert_eq!((rig.result(0), rig.result(4)), (0x88, 0x5566_7788));
    let seen: Vec<_> = rig.seen.lock().unwrap().iter().map(|s| s.access).collect();
    let expected = [
        (0x3fd, 1, BusOp::Read),
        (0x608, 4, BusOp::Read),
        (0x3f8, 1, BusOp::Write(0x41)),
        (0x604, 2, BusOp::Write(0x1234)),
    ];
    assert_eq!(seen.iter().map(|a| (a.addr, a.size, a.op)).collect::<Vec<_>>(), expected);
    assert!(seen.iter().all(|a| a.space == Space::Pio));
    assert_eq!(rig.counters().forwarded, 4);
    rig.quit();
}

#[test]
fn nobody_reads_all_ones_and_is_counted() {
    let program = Program::default()
        .in8(0x80, 0)
        .in32(0x3fd, 4) // across the end of COM1
        .in32(0x1234, 8)
        .load(0xd000_0000, 0xc)
        .out8(0x80, 1)
        .poke(0xd000_0000, 7)
        .count(0x10)
        .halt();
    let mut rig = Rig::started(config(1), program, plain_console());
    rig.wait_result(0x10, |n| n == 1);
    let results = [0, 4, 8, 0xc].map(|at| rig.result(at));
    assert_eq!(results, [0xff, u32::MAX, u32::MAX, u32::MAX]);
    assert_eq!((rig.counters().unclaimed, rig.counters().forwarded), (6, 0));
    rig.quit();
}

#[test]
fn string_output_is_one_request_per_item() {
    // mov esi, CODE; mov ecx, 40; mov dx, 0x3f8; rep outsb
    let program = Program::default()
        .raw(&[0xbe, 0, 0x10, 0, 0, 0xb9, 40, 0, 0, 0, 0x66, 0xba, 0xf8, 0x03, 0xf3, 0x6e])
        .count(0)
        .halt();
    let bytes: Vec<u8> = (0..40).map(|i| program.bytes().get(i).copied().unwrap_or(0)).collect();
    let rig = Rig::started(config(1), program, plain_console());
    rig.wait_result(0, |n| n == 1);
    let start = Instant::now();
    while rig.seen.lock().unwrap().len() < 40 && start.elapsed() < Duration::from_secs(5) {
        thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(written(&rig), bytes);
    rig.quit();
}

/// Low bytes of all writes in the order in which the console saw them.
fn written(rig: &Rig) -> Vec<u8> {
    let byte = |op| if let BusOp::Write(data) = op { Some(data.to_le_bytes()[0]) } else { None };
    rig.seen.lock().unwrap().iter().filter_map(|s| byte(s.access.op)).collect()
}

/// Writes the low byte of a counter to `port`, then counts, for ever.
fn flood(port: u16) -> Program {
    Program::default().load(0x8000, 0x20).out_al(port).count(0).again()
}

fn stop_is_exact(port: u16, coalesce: bool) {
    let mut rig = Rig::bare(config(2), coalesce, load(flood(port)));
    rig.connect_console(plain_console());
    rig.connect_broker();
    rig.ask(Op::Start).0.unwrap();
    for round in 0..40 {
        let before = rig.result(0);
        rig.wait_result(0, |n| n > before);
        assert_eq!(rig.ask(Op::Stop), (Ok(Answer::Done), vec![(Event::Stop, RunState::Paused)]));
        let (count, bytes) = (rig.result(0) as usize, written(&rig));
        // The write before the count may be done; nothing is half done, lost or doubled.
        assert!(bytes.len() == count || bytes.len() == count + 1, "{} writes, {count} counted", bytes.len());
        assert!(bytes.iter().enumerate().all(|(i, b)| *b == i.to_le_bytes()[0]), "round {round}");
        if round % 10 == 0 {
            thread::sleep(Duration::from_millis(20));
            assert_eq!((rig.result(0) as usize, written(&rig).len()), (count, bytes.len()));
        }
        assert_eq!(rig.ask(Op::Cont).1, [(Event::Resume, RunState::Running)]);
    }
    let counters = rig.counters();
    let collects = coalesce && port == 0x3f8;
    assert_eq!(counters.collected > 0, collects, "{counters:?}");
    rig.quit();
}

#[test]
fn stop_is_exact_in_a_flood_of_exits() {
    stop_is_exact(0x70, true);
}

#[test]
fn stop_is_exact_in_a_flood_of_output() {
    stop_is_exact(0x3f8, false);
}

#[test]
fn stop_is_exact_in_a_flood_of_collected_output() {
    stop_is_exact(0x3f8, true);
}

#[test]
fn collected_bytes_arrive_before_the_next_access_and_soon() {
    // Bytes 0 to 255 again and again, a status read after each 16, as a driver does.
    let mut program = Program::default();
    for i in 0..64 {
        program = program.out8(0x3f8, i);
        if i % 16 == 15 {
            program = program.in8(0x3fd, 4);
        }
    }
    let rig = Rig::started(config(1), program.count(0).again(), plain_console());
    rig.wait_result(0, |n| n > 200);
    let seen = rig.seen.lock().unwrap().clone();
    assert!(seen.iter().any(|s| s.collected));
    let order = seen.iter().map(|s| match s.access.op {
        BusOp::Write(data) => data,
        _ => 0xff,
    });
    let expected = (0..64u64).flat_map(|i| [Some(i), (i % 16 == 15).then_some(0xff)]).flatten().cycle();
    assert!(order.zip(expected).all(|(got, want)| got == want));
    rig.quit();
}

#[test]
fn the_last_byte_does_not_wait_for_an_exit() {
    // Plenty of output switches collecting on; then the guest falls silent without another exit.
    let program = Program::default()
        .raw(&[0xb9, 0, 0x40, 0, 0]) // mov ecx, 0x4000
        .raw(&[0x66, 0xba, 0xf8, 0x03, 0xb0, b'.', 0xee, 0xe2, 0xfd]) // mov dx, 0x3f8; mov al, '.'; out; loop
        .count(0)
        .halt();
    let mut rig = Rig::started(config(1), program, plain_console());
    rig.wait_result(0, |n| n == 1);
    let start = Instant::now();
    while written(&rig).len() < 0x4000 {
        assert!(start.elapsed() < Duration::from_secs(1), "{} bytes", written(&rig).len());
        thread::sleep(Duration::from_millis(1));
    }
    assert!(rig.counters().collected > 0);
    rig.quit();
}
