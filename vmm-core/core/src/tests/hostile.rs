//! Peers that break the rules.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use bulkhead_bus_api::Action;
use bulkhead_bus_api::main_link::{FromCore as FromBus, ToCore};
use bulkhead_control_api::core::{Answer, Cause, Event, FromCore, Op, Refusal, Request, RunState};
use bulkhead_jail::link::{Link, LinkError};
use nix::sys::socket::{MsgFlags, recv, send};
use std::os::fd::AsRawFd;

use super::program::Program;
use super::rig::{Answerer, Rig, config, connect_to, good_reply, plain_console};

/// Starts a guest that talks to such a console; the VM must stop with an internal error within
/// `patience`, and core must stay in command.
fn survives(console: Answerer, patience: Duration) {
    let start = Instant::now();
    let mut rig = Rig::started(config(2), Program::default().in8(0x3fd, 0).again(), console);
    assert_eq!(rig.event(), (Event::Stop, RunState::InternalError));
    assert!(start.elapsed() < patience, "{:?}", start.elapsed());
    assert_eq!(rig.ask(Op::Cont).0, Err(Refusal::ResetRequired));
    assert_eq!(rig.ask(Op::Stop).0, Ok(Answer::Done));
    // A reset does not bring the console back.
    assert_eq!(rig.ask(Op::Reset).1, [(Event::Reset(Cause::HostQmpSystemReset), RunState::Prelaunch)]);
    let told = [(Event::Resume, RunState::Running), (Event::Stop, RunState::InternalError)];
    assert_eq!(rig.ask(Op::Cont), (Ok(Answer::Done), told.to_vec()));
    rig.quit();
}

/// Consoles come and break the protocol; each is sent away, and after the tenth none is let in.
#[test]
fn consoles_that_reply_garbage_are_sent_away_and_given_up() {
    let garbage: [Answerer; 4] = [
        Arc::new(|_| Some(vec![0xff; 16])),
        Arc::new(|_| Some(vec![0; 15])),
        Arc::new(|_| Some(vec![0; 4000])),
        Arc::new(|request| good_reply(request.seq.wrapping_add(1), Action::None, 0)),
    ];
    for console in garbage {
        let mut rig = Rig::started(config(2), Program::default().in8(0x3fd, 0).again(), Arc::clone(&console));
        for _ in 1..10 {
            assert_eq!(rig.status(), RunState::Running);
            rig.connect_console(Arc::clone(&console));
        }
        assert_eq!(rig.event(), (Event::Stop, RunState::InternalError));
        assert_eq!(rig.ask(Op::Cont).0, Err(Refusal::ResetRequired));
        rig.quit();
    }
}

#[test]
fn a_good_console_makes_up_for_bad_ones() {
    let program = Program::default().count(0).in8(0x3fd, 4).again();
    let mut rig = Rig::bare(config(1), true, super::rig::load(program));
    rig.connect_broker();
    for round in 0..5 {
        let mut main = Link::connect(connect_to(&rig.console), bulkhead_bus_api::VERSION).unwrap();
        let (_, fds) = main.recv_with::<FromBus>(MsgFlags::empty()).unwrap();
        if round == 0 {
            assert_eq!(rig.ask(Op::Start).0, Ok(Answer::Done));
        } else {
            let FromBus::Command { id, .. } = main.recv().unwrap() else { panic!("no command") };
            main.send(&ToCore::Done { id }).unwrap();
        }
        let mut packet = [0; 64];
        assert!(recv(fds[0].as_raw_fd(), &mut packet, MsgFlags::empty()).unwrap() > 0);
        send(fds[0].as_raw_fd(), &[0xff; 16], MsgFlags::empty()).unwrap();
        assert_eq!(main.recv::<FromBus>().unwrap(), FromBus::Leave);
    }
    rig.connect_console(plain_console());
    rig.wait_result(0, |count| count > 100);
    assert_eq!(rig.status(), RunState::Running);
    rig.quit();
}

#[test]
fn a_console_that_never_replies_is_given_up() {
    survives(Arc::new(|_| None), Duration::from_secs(9));
}

#[test]
fn a_silent_console_holds_up_neither_stop_nor_quit() {
    let silent: Answerer = Arc::new(|_| None);
    let mut rig = Rig::started(config(1), Program::default().in8(0x3fd, 0).again(), Arc::clone(&silent));
    thread::sleep(Duration::from_millis(100));
    let start = Instant::now();
    let (answer, _) = rig.ask(Op::Stop);
    assert_eq!(answer, Ok(Answer::Done));
    assert!(start.elapsed() < Duration::from_secs(8), "{:?}", start.elapsed());
    assert_eq!(rig.status(), RunState::InternalError);
    rig.quit();

    let mut rig = Rig::started(config(1), Program::default().in8(0x3fd, 0).again(), silent);
    thread::sleep(Duration::from_millis(100));
    let start = Instant::now();
    assert_eq!(rig.ask(Op::Quit).0, Ok(Answer::Done));
    rig.expect_end(&[]);
    assert!(start.elapsed() < Duration::from_secs(3), "{:?}", start.elapsed());
}

#[test]
fn a_console_that_says_what_nobody_asked_is_sent_away() {
    let mut rig = Rig::bare(config(1), true, super::rig::load(Program::default().count(0).again()));
    rig.connect_broker();
    for garbage in [&[0u8, 7][..], &[0xff; 100], &[0; 65537]] {
        let mut main = Link::connect(connect_to(&rig.console), bulkhead_bus_api::VERSION).unwrap();
        main.recv_with::<FromBus>(MsgFlags::empty()).unwrap();
        send(main.as_raw_fd(), garbage, MsgFlags::empty()).unwrap();
        let sent_away = loop {
            match main.recv::<FromBus>() {
                Ok(FromBus::Leave) => break true,
                Ok(FromBus::Command { .. }) => {}
                _ => break false,
            }
        };
        assert!(sent_away, "{garbage:?}");
        assert!(matches!(main.recv::<FromBus>(), Err(LinkError::Closed)));
    }
    rig.connect_console(plain_console());
    assert_eq!(rig.ask(Op::Start).0, Ok(Answer::Done));
    rig.wait_result(0, |n| n > 10);
    rig.quit();
}

#[test]
fn a_broker_that_sends_garbage_loses_its_link_and_nothing_else() {
    let mut rig = Rig::started(config(1), Program::default().count(0).again(), plain_console());
    for garbage in [&[0xffu8; 3][..], &[], &[0; 65537], &[1, 99], &[1, 0, 0]] {
        let link = rig.broker.as_mut().unwrap();
        send(link.as_raw_fd(), garbage, MsgFlags::empty()).unwrap();
        assert!(matches!(link.recv::<FromCore>(), Err(LinkError::Closed)), "{garbage:?}");
        rig.connect_broker();
        assert_eq!(rig.status(), RunState::Running);
    }
    // Descriptors are not welcome either.
    let link = rig.broker.as_mut().unwrap();
    let request = Request { id: 1, op: Op::Stop };
    link.send_with(&request, &[std::os::fd::AsFd::as_fd(&std::io::stdin())], MsgFlags::empty()).unwrap();
    assert!(matches!(link.recv::<FromCore>(), Err(LinkError::Closed)));
    rig.connect_broker();
    let before = rig.result(0);
    rig.wait_result(0, |n| n != before);
    rig.quit();
}

#[test]
fn a_broker_that_floods_and_does_not_read_loses_its_link() {
    let mut rig = Rig::started(config(1), Program::default().count(0).again(), plain_console());
    let link = rig.broker.take().unwrap();
    let start = Instant::now();
    while link.send(&Request { id: 7, op: Op::Cpus }).is_ok() {
        assert!(start.elapsed() < Duration::from_secs(20));
    }
    let before = rig.result(0);
    rig.wait_result(0, |n| n != before);
    rig.connect_broker();
    assert_eq!(rig.status(), RunState::Running);
    rig.quit();
}

#[test]
fn a_held_start_dies_with_its_broker() {
    let mut rig = Rig::bare(config(1), true, super::rig::load(Program::default().count(0).halt()));
    rig.connect_broker();
    rig.broker.as_mut().unwrap().send(&Request { id: 99, op: Op::Start }).unwrap();
    assert_eq!(rig.status(), RunState::Prelaunch);
    rig.connect_broker_again();
    assert_eq!(rig.status(), RunState::Prelaunch);
    rig.connect_console(plain_console());
    assert_eq!(rig.ask(Op::Start), (Ok(Answer::Done), vec![(Event::Resume, RunState::Running)]));
    rig.wait_result(0, |n| n == 1);
    rig.quit();
}

#[test]
fn a_second_broker_waits_and_one_of_another_version_is_sent_away() {
    let mut rig = Rig::started(config(1), Program::default().halt(), plain_console());
    let addr = rig.broker_addr;
    let second = thread::spawn(move || Link::connect(connect_to(&addr), bulkhead_control_api::VERSION));
    thread::sleep(Duration::from_millis(50));
    assert!(!second.is_finished());
    assert_eq!(rig.status(), RunState::Running);
    rig.broker = None;
    rig.broker = Some(second.join().unwrap().unwrap());
    assert_eq!(rig.status(), RunState::Running);
    rig.broker = None;
    let other = Link::connect(connect_to(&rig.broker_addr), bulkhead_control_api::VERSION + 1);
    assert!(matches!(other, Err(LinkError::Version { .. })));
    // One that says nothing at all does not block the next one for long.
    let _mute = connect_to(&rig.broker_addr);
    rig.connect_broker();
    assert_eq!(rig.ask(Op::Reset).1, [(Event::Reset(Cause::HostQmpSystemReset), RunState::Running)]);
    rig.quit();
}
