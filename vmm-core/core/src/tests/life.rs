//! The life of a machine: start, stop, reset, shutdown, errors.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use bulkhead_bus_api::main_link::Command;
use bulkhead_bus_api::{Action, Op as BusOp};
use bulkhead_control_api::config::Core;
use bulkhead_control_api::core::{Answer, Cause, Event, Op, Refusal, RunState};

use super::program::Program;
use super::rig::{Answerer, Rig, config, good_reply, load, plain_console};
use crate::error::Error;

/// A console whose port 0xcf9 resets and 0x604 switches off.
fn power_console() -> Answerer {
    Arc::new(|request| {
        let action = match (request.access.addr, request.access.op) {
            (0xcf9, BusOp::Write(6)) => Action::Reset,
            (0x604, BusOp::Write(_)) => Action::PowerOff,
            _ => Action::None,
        };
        good_reply(request.seq, action, 0)
    })
}

#[test]
fn start_waits_for_the_console() {
    let mut rig = Rig::bare(config(1), true, load(Program::default().count(0).halt()));
    rig.connect_broker();
    let link = rig.broker.as_mut().unwrap();
    link.send(&bulkhead_control_api::core::Request { id: 99, op: Op::Start }).unwrap();
    assert_eq!(rig.status(), RunState::Prelaunch);
    thread::sleep(Duration::from_millis(50));
    assert_eq!(rig.result(0), 0);
    rig.connect_console(plain_console());
    assert_eq!(rig.event(), (Event::Resume, RunState::Running));
    rig.wait_result(0, |n| n == 1);
    use bulkhead_control_api::core::FromCore;
    let reply = rig.broker.as_mut().unwrap().recv::<FromCore>().unwrap();
    assert_eq!(reply, FromCore::Reply { id: 99, result: Ok(Answer::Done) });
    rig.quit();
}

#[test]
fn without_autostart_only_cont_starts() {
    let config = Core { autostart: false, ..config(1) };
    let mut rig = Rig::bare(config, true, load(Program::default().count(0).halt()));
    rig.connect_console(plain_console());
    rig.connect_broker();
    assert_eq!(rig.ask(Op::Start), (Ok(Answer::Done), vec![]));
    assert_eq!(rig.ask(Op::Reset).1, [(Event::Reset(Cause::HostQmpSystemReset), RunState::Prelaunch)]);
    assert_eq!(rig.status(), RunState::Prelaunch);
    assert_eq!(rig.ask(Op::Cont), (Ok(Answer::Done), vec![(Event::Resume, RunState::Running)]));
    rig.wait_result(0, |n| n == 1);
    // The result of the first loader run was not lost, nor was a second one needed.
    assert_eq!(rig.loads.load(Ordering::SeqCst), 1);
    rig.quit();
}

#[test]
fn twenty_resets_boot_twenty_times() {
    let program = Program::default().count(0).out8(0x3f8, b'x').in8(0x3fd, 8).halt();
    let mut rig = Rig::started(config(2), program, plain_console());
    for n in 1..=20 {
        rig.wait_result(0, |count| count == n);
        let (answer, events) = rig.ask(Op::Reset);
        assert_eq!(answer, Ok(Answer::Done));
        assert_eq!(events, [(Event::Reset(Cause::HostQmpSystemReset), RunState::Running)]);
    }
    rig.wait_result(0, |count| count == 21);
    assert_eq!(rig.counters().resets, 20);
    let resets = rig.commands.lock().unwrap().iter().filter(|c| **c == Command::Reset).count();
    assert_eq!(resets, 20);
    rig.quit();
}

#[test]
fn a_stopped_machine_resets_to_prelaunch() {
    let mut rig = Rig::started(config(1), Program::default().count(0).halt(), plain_console());
    rig.wait_result(0, |count| count == 1);
    assert_eq!(rig.ask(Op::Stop).1, [(Event::Stop, RunState::Paused)]);
    assert_eq!(rig.ask(Op::Reset).1, [(Event::Reset(Cause::HostQmpSystemReset), RunState::Prelaunch)]);
    thread::sleep(Duration::from_millis(50));
    assert_eq!(rig.result(0), 1);
    assert_eq!(rig.ask(Op::Cont).1, [(Event::Resume, RunState::Running)]);
    rig.wait_result(0, |count| count == 2);
    rig.quit();
}

#[test]
fn the_guest_resets_itself() {
    for program in [
        Program::default().count(0).load(0x8000, 4).raw(&[0x83, 0xf8, 3, 0x73, 6]).triple_fault().halt(),
        Program::default()
            .count(0)
            .load(0x8000, 4)
            // cmp eax, 3; jae over the next seven bytes
            .raw(&[0x83, 0xf8, 3, 0x73, 7])
            .out8(0xcf9, 6)
            .halt(),
    ] {
        let mut rig = Rig::started(config(1), program, power_console());
        for _ in 0..2 {
            assert_eq!(rig.event(), (Event::Reset(Cause::GuestReset), RunState::Running));
        }
        rig.wait_result(4, |count| count == 3);
        assert_eq!(rig.status(), RunState::Running);
        rig.quit();
    }
}

#[test]
fn an_nmi_reaches_the_first_processor_only() {
    // Without an interrupt table an NMI is a triple fault. It wakes a halted processor.
    let mut rig = Rig::started(config(2), Program::default().count(0).halt(), plain_console());
    rig.wait_result(0, |count| count == 1);
    assert_eq!(rig.ask(Op::InjectNmi), (Ok(Answer::Done), vec![]));
    assert_eq!(rig.event(), (Event::Reset(Cause::GuestReset), RunState::Running));
    rig.wait_result(0, |count| count == 2);
    // A stopped machine takes it when it goes on.
    rig.ask(Op::Stop).0.unwrap();
    rig.ask(Op::InjectNmi).0.unwrap();
    assert_eq!(rig.status(), RunState::Paused);
    rig.ask(Op::Cont).0.unwrap();
    assert_eq!(rig.event(), (Event::Reset(Cause::GuestReset), RunState::Running));
    rig.quit();
}

#[test]
fn the_dirty_log_goes_on_and_off_under_a_running_guest_and_over_a_reset() {
    let mut rig = Rig::started(config(1), Program::default().count(0).again(), plain_console());
    for on in [true, true, false, false, true] {
        assert_eq!(rig.ask(Op::LogDirty(on)), (Ok(Answer::Done), vec![]));
        let before = rig.result(0);
        rig.wait_result(0, |count| count != before);
    }
    rig.ask(Op::Reset).0.unwrap();
    rig.ask(Op::LogDirty(false)).0.unwrap();
    rig.quit();
}

#[test]
fn no_reboot_turns_a_reset_into_a_shutdown() {
    let config = Core { no_reboot: true, ..config(1) };
    let rig = Rig::started(config, Program::default().triple_fault(), plain_console());
    rig.expect_end(&[(Event::Shutdown(Cause::GuestReset), RunState::Running)]);
}

#[test]
fn the_guest_switches_itself_off() {
    let off = Program::default().out8(0x604, 0x34).halt();
    let rig = Rig::started(config(1), off.clone(), power_console());
    rig.expect_end(&[(Event::Shutdown(Cause::GuestShutdown), RunState::Running)]);

    let config = Core { no_shutdown: true, ..config(1) };
    let mut rig = Rig::started(config, off, power_console());
    assert_eq!(rig.event(), (Event::Shutdown(Cause::GuestShutdown), RunState::Shutdown));
    assert_eq!(rig.event(), (Event::Stop, RunState::Shutdown));
    assert_eq!(rig.ask(Op::Cont).0, Err(Refusal::ResetRequired));
    rig.quit();
}

#[test]
fn an_internal_error_stops_until_a_reset() {
    // Fetching code from where nothing is: KVM cannot emulate it.
    let program = Program::default().count(0).jump(0xd000_0000);
    let mut rig = Rig::started(config(1), program, plain_console());
    assert_eq!(rig.event(), (Event::Stop, RunState::InternalError));
    assert_eq!(rig.status(), RunState::InternalError);
    assert_eq!(rig.ask(Op::Cont).0, Err(Refusal::ResetRequired));
    assert_eq!(rig.ask(Op::Stop), (Ok(Answer::Done), vec![]));
    assert_eq!(rig.ask(Op::Reset).1, [(Event::Reset(Cause::HostQmpSystemReset), RunState::Prelaunch)]);
    assert_eq!(rig.ask(Op::Cont).1, [(Event::Resume, RunState::Running)]);
    assert_eq!(rig.event(), (Event::Stop, RunState::InternalError));
    rig.wait_result(0, |count| count == 2);
    rig.quit();
}

#[test]
fn a_failed_first_load_is_the_end() {
    let mut rig = Rig::bare(config(1), true, |_, _| Err("kernel: not an image".into()));
    match rig.end() {
        Err(Error::Loader(text)) => assert_eq!(text, "kernel: not an image"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_failed_later_load_is_an_internal_error() {
    let good = load(Program::default().count(0).halt());
    let mut rig = Rig::bare(
        config(1),
        true,
        move |n, ram| {
            if n == 1 { Err("initrd: gone".into()) } else { good(n, ram) }
        },
    );
    rig.connect_console(plain_console());
    rig.connect_broker();
    assert_eq!(rig.ask(Op::Start).0, Ok(Answer::Done));
    rig.wait_result(0, |count| count == 1);
    assert_eq!(rig.ask(Op::Reset).1, [(Event::Reset(Cause::HostQmpSystemReset), RunState::Running)]);
    assert_eq!(rig.event(), (Event::Stop, RunState::InternalError));
    assert_eq!(rig.ask(Op::Reset).1, [(Event::Reset(Cause::HostQmpSystemReset), RunState::Prelaunch)]);
    assert_eq!(rig.ask(Op::Cont).1, [(Event::Resume, RunState::Running)]);
    rig.wait_result(0, |count| count == 2);
    rig.quit();
}

#[test]
fn sixty_four_vcpus_come_up() {
    let mut rig = Rig::started(config(64), Program::default().count(0).halt(), plain_console());
    let (Ok(Answer::Cpus(cpus)), _) = rig.ask(Op::Cpus) else { panic!() };
    assert_eq!(cpus.len(), 64);
    assert_eq!(cpus.iter().map(|c| c.thread_id).collect::<BTreeSet<_>>().len(), 64);
    assert_eq!(cpus[63].core, 63);
    rig.wait_result(0, |count| count == 1);
    let start = Instant::now();
    rig.ask(Op::Stop).0.unwrap();
    rig.ask(Op::Cont).0.unwrap();
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
    rig.quit();
}

#[test]
fn the_other_processors_start_at_every_boot() {
    /// Interrupt command register of the local APIC.
    const ICR: u32 = 0xfee0_0300;
    // INIT, then start-up at 0x2000, to all but the sender.
    let program = Program::default().poke(ICR, 0x000c_4500).poke(ICR, 0x000c_4602).halt();
    // In real mode: lock inc word [0x8000]; hlt; jump back.
    let started = [0xf0, 0xff, 0x06, 0x00, 0x80, 0xf4, 0xeb, 0xfd];
    let first = load(program);
    let mut rig = Rig::bare(config(4), true, move |n, ram| {
        use std::os::unix::fs::FileExt;
        ram.write_all_at(&started, 0x2000).unwrap();
        first(n, ram)
    });
    rig.connect_console(plain_console());
    rig.connect_broker();
    rig.ask(Op::Start).0.unwrap();
    for boots in 1..=5 {
        rig.wait_result(0, |count| count == boots * 3);
        rig.ask(Op::Reset).0.unwrap();
    }
    rig.quit();
}
