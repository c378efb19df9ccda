//! Core's links: order, repetition, interrupts, commands, and what a hostile core achieves.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test that cannot go on fails")]

mod common;

use std::os::fd::AsFd;
use std::time::Duration;

use bulkhead_bus_api::main_link::{Command, FromCore};
use bulkhead_bus_api::platform::CONSOLE_GSIS;
use bulkhead_bus_api::{Action, MAX_REQUEST_LEN, Op, Request};
use bulkhead_control_api::config::ChardevKind;
use bulkhead_control_api::console::{self, Answer};
use bulkhead_jail::link::send_packet;
use common::{LSR, Rig, THRE, chardev, collected, pair};
use nix::sys::socket::MsgFlags;

const SOON: Duration = Duration::from_millis(1500);
const NEVER: Duration = Duration::from_millis(30);

#[test]
fn collected_writes_come_before_their_access() {
    let mut rig = Rig::null();
    // Loopback: what is written to the transmitter arrives in the receiver.
    rig.vcpu().outb(0x3fc, 0x10);
    let reply = rig.vcpu().access(&[collected(0x3f8, b'a')], 0x3f8, 1, Op::Read);
    assert_eq!(reply.data, u64::from(b'a'));
    assert_eq!(rig.end().0, Ok(()));
}

#[test]
fn a_repeated_number_is_answered_from_the_last_reply() {
    let mut rig = Rig::null();
    rig.vcpu().outb(0x3f9, 0x02);
    let packet = rig.vcpu().packet(&[], 0x3fa, 1, Op::Read);
    rig.vcpu().send(&packet);
    let first = rig.vcpu().reply();
    assert_eq!(first.data, 0x02, "the transmitter's interrupt, which this read acknowledges");
    rig.vcpu().send(&packet);
    assert_eq!(rig.vcpu().reply(), first);
    assert_eq!(rig.vcpu().inb(0x3fa), 0x01);
}

#[test]
fn sixty_four_vcpus_and_the_drainer_are_served() {
    let mut rig = Rig::up(&chardev(ChardevKind::Null), vec![], 64);
    assert_eq!(rig.vcpus.len(), 65);
    for round in 0..20u8 {
        for (i, vcpu) in rig.vcpus.iter_mut().enumerate() {
            let packet = vcpu.packet(&[], 0x3ff, 1, Op::Write(u64::from(round) + i as u64));
            vcpu.send(&packet);
        }
        for vcpu in &rig.vcpus {
            assert_eq!(vcpu.reply().seq, vcpu.seq);
        }
    }
    assert_eq!(rig.end().0, Ok(()));
}

#[test]
fn interrupts_are_held_while_paused() {
    let mut rig = Rig::null();
    rig.vcpu().outb(0x3f9, 0x02);
    assert!(rig.interrupted(0, SOON));
    rig.vcpu().inb(0x3fa);
    rig.command(Command::Pause);
    assert_eq!(rig.ask(console::Op::PowerButton), Answer::Done);
    assert!(!rig.interrupted(3, NEVER));
    rig.command(Command::Resume);
    assert!(rig.interrupted(3, SOON));
    assert!(!rig.interrupted(3, NEVER), "once");
}

#[test]
fn the_timer_stands_still_while_paused() {
    let mut rig = Rig::null();
    rig.command(Command::Pause);
    let timer = |rig: &mut Rig| rig.vcpu().access(&[], 0x608, 4, Op::Read).data;
    let before = timer(&mut rig);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(timer(&mut rig), before);
    rig.command(Command::Resume);
    std::thread::sleep(Duration::from_millis(20));
    let passed = timer(&mut rig) - before;
    assert!((71_590..71_590 * 20).contains(&passed), "{passed} ticks in 20 ms");
}

#[test]
fn the_power_button_shows_in_pm1_and_raises_both_interrupts() {
    let mut rig = Rig::null();
    rig.vcpu().access(&[], 0x602, 2, Op::Write(0x0100));
    assert_eq!(rig.ask(console::Op::PowerButton), Answer::Done);
    assert!(rig.interrupted(3, SOON) && rig.interrupted(2, SOON));
    assert_eq!(rig.vcpu().access(&[], 0x600, 2, Op::Read).data, 0x0100);
    rig.command(Command::Reset);
    assert_eq!(rig.vcpu().access(&[], 0x600, 4, Op::Read).data, 0);
}

#[test]
fn actions_ride_on_the_reply() {
    let mut rig = Rig::null();
    assert_eq!(rig.vcpu().outb(0xcf9, 0x06), Action::Reset);
    assert_eq!(rig.vcpu().outb(0x64, 0xfe), Action::Reset);
    assert_eq!(rig.vcpu().access(&[], 0x604, 2, Op::Write(0x3400)).action, Action::PowerOff);
    let reply = rig.vcpu().access(&[collected(0xcf9, 6)], LSR, 1, Op::Read);
    assert_eq!((reply.action, reply.data), (Action::Reset, THRE));
}

#[test]
fn the_rtc_ticks_by_itself() {
    let mut rig = Rig::null();
    rig.vcpu().outb(0x70, 0x0b);
    rig.vcpu().outb(0x71, 0x12);
    for _ in 0..2 {
        assert!(rig.interrupted(1, SOON), "the update interrupt comes each second");
        rig.vcpu().outb(0x70, 0x0c);
        assert_eq!(rig.vcpu().inb(0x71) & 0x90, 0x90);
    }
    // 1024 Hz: some interrupts in a moment, each after the last was acknowledged.
    rig.vcpu().outb(0x70, 0x0b);
    rig.vcpu().outb(0x71, 0x42);
    rig.vcpu().outb(0x70, 0x0c);
    for _ in 0..20 {
        assert!(rig.interrupted(1, SOON));
        rig.vcpu().inb(0x71);
    }
}

#[test]
fn a_malformed_request_ends_the_process_with_one_line() {
    let good = {
        let mut rig = Rig::null();
        rig.vcpu().seq = 100;
        rig.vcpu().packet(&[collected(0x3f8, 0)], LSR, 1, Op::Read)
    };
    let mut bad_write = good.clone();
    bad_write[24] = 9;
    let mut bad_op = good.clone();
    bad_op[5] = 3;
    let long = [&good[..24], &[0; MAX_REQUEST_LEN]].concat();
    for packet in [&good[..23], &good[..40], &bad_write, &bad_op, &long] {
        let mut rig = Rig::null();
        assert_eq!(rig.vcpu().inb(LSR), THRE);
        rig.vcpu().send(packet);
        let text = rig.failure();
        assert!(text.contains("malformed bus packet") && !text.contains('\n'), "{text}");
    }
}

#[test]
fn mutated_requests_are_answered_or_end_the_process_in_order() {
    let mut random: u32 = 0x2545_f491;
    let mut next = move || {
        random ^= random << 13;
        random ^= random >> 17;
        random ^= random << 5;
        random
    };
    for _ in 0..300 {
        let mut rig = Rig::null();
        let mut packet = rig.vcpu().packet(&[collected(0x3f8, 1), collected(0x3fc, 0)], LSR, 1, Op::Read);
        for _ in 0..=next() % 4 {
            let at = next() as usize % packet.len();
            packet[at] = next().to_le_bytes()[0];
        }
        packet.truncate(packet.len() - if next() % 4 == 0 { next() as usize % packet.len() } else { 0 });
        rig.vcpu().send(&packet);
        if Request::decode(&packet).is_ok_and(|request| request.writes().all(|write| write.is_ok())) {
            rig.vcpu().reply();
            assert_eq!(rig.end().0, Ok(()));
        } else {
            assert!(rig.failure().contains("malformed"));
        }
    }
}

#[test]
fn a_core_that_reads_no_reply_ends_the_process() {
    let mut rig = Rig::null();
    let packet = rig.vcpu().packet(&[], LSR, 1, Op::Read);
    while nix::sys::socket::send(
        std::os::fd::AsRawFd::as_raw_fd(&rig.vcpu().fd),
        &packet,
        MsgFlags::MSG_NOSIGNAL,
    )
    .is_ok()
    {}
    assert!(rig.failure().contains("does not read the replies"));
}

#[test]
fn a_closed_access_link_ends_nothing() {
    let mut rig = Rig::up(&chardev(ChardevKind::Null), vec![], 2);
    rig.vcpus.pop();
    assert_eq!(rig.vcpu().inb(LSR), THRE);
    assert_eq!(rig.end().0, Ok(()));
}

#[test]
fn a_welcome_must_fit_the_machine() {
    let cases: [(u16, Vec<u32>, usize); 6] = [
        (0, CONSOLE_GSIS.to_vec(), 5),
        (65, CONSOLE_GSIS.to_vec(), 70),
        (1, CONSOLE_GSIS.to_vec(), 5),
        (1, CONSOLE_GSIS.to_vec(), 7),
        (1, vec![4, 8, 9], 5),
        (u16::MAX, vec![], 0),
    ];
    for (vcpus, irqs, fds) in cases {
        let mut rig = Rig::silent(&chardev(ChardevKind::Null), vec![]);
        rig.greet();
        let sockets: Vec<_> = (0..fds).map(|_| pair().0).collect();
        let sockets: Vec<_> = sockets.iter().map(AsFd::as_fd).collect();
        let message = FromCore::Welcome { vcpus, irqs };
        rig.main.as_ref().unwrap().send_with(&message, &sockets, MsgFlags::empty()).unwrap();
        assert!(rig.failure().contains("core's welcome names"));
    }
}

#[test]
fn the_main_link_has_an_order() {
    let early = FromCore::Command { id: 1, what: Command::Pause };
    let mut rig = Rig::silent(&chardev(ChardevKind::Null), vec![]);
    rig.greet();
    rig.main.as_ref().unwrap().send(&early).unwrap();
    assert!(rig.failure().contains("malformed"));

    let rig = Rig::null();
    let again = FromCore::Welcome { vcpus: 1, irqs: CONSOLE_GSIS.to_vec() };
    rig.main.as_ref().unwrap().send(&again).unwrap();
    assert!(rig.failure().contains("malformed"));

    let rig = Rig::null();
    send_packet(rig.main.as_ref().unwrap().as_fd(), &[0xff; 32], &[], MsgFlags::empty()).unwrap();
    assert!(rig.failure().contains("malformed"));
}

#[test]
fn the_machine_goes_on_without_a_broker() {
    for garbage in [false, true] {
        let mut rig = Rig::null();
        if garbage {
            send_packet(rig.broker.as_ref().unwrap().as_fd(), &[0xff; 9], &[], MsgFlags::empty()).unwrap();
        } else {
            rig.broker = None;
        }
        assert!(common::eventually(|| rig.vcpu().inb(LSR) == THRE));
        rig.command(Command::Reset);
        assert_eq!(rig.end().0, Ok(()));
    }
}

#[test]
fn a_broker_that_does_not_read_is_cut_off() {
    let mut rig = Rig::null();
    let request = console::Request { id: 1, op: console::Op::Chardevs };
    while rig.broker.as_ref().unwrap().send(&request).is_ok() {}
    assert_eq!(rig.vcpu().inb(LSR), THRE);
    assert_eq!(rig.end().0, Ok(()));
}

#[test]
fn a_console_that_is_sent_away_ends() {
    let rig = Rig::null();
    rig.main.as_ref().unwrap().send(&FromCore::Leave).unwrap();
    assert!(rig.failure().contains("core has cut this process off"));
}
