//! The process's loop with core, the broker and the opener around it.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

mod guest;
mod rig;

use std::collections::BTreeMap;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener, UnixStream};
use std::time::{Duration, Instant};

use bulkhead_bus_api::main_link::Command;
use bulkhead_bus_api::pci::{FromCore, ToCore};
use bulkhead_control_api::opener::{FromOpener, ToOpener};
use bulkhead_control_api::pci::{Answer, Event, FromPci, Function, Op, Refusal, Request};
use bulkhead_jail::starter::Starter;
use guest::{Seen, config, device, port};
use nix::sys::socket::{self, AddressFamily, Backlog, MsgFlags, SockFlag, SockType, UnixAddr};
use rig::{Given, Rig, memfd, pair};

fn ready_at_once(_: &mut Seen) {}

fn without_back_end(seen: &mut Seen) {
    seen.known = false;
    seen.missing = vec!["vhost.d".to_owned()];
}

fn restless(seen: &mut Seen) {
    seen.quiet = false;
}

fn stubborn(seen: &mut Seen) {
    restless(seen);
    seen.stubborn = true;
    seen.missing = vec!["vhost.d".to_owned()];
}

fn ask(rig: &mut Rig, id: u32, op: Op) -> (Vec<Event>, Result<Answer, Refusal>) {
    rig.broker.send(&Request { id, op }).unwrap();
    let mut events = Vec::new();
    loop {
        match rig.broker.recv::<FromPci>().unwrap() {
            FromPci::Event(event) => events.push(event),
            FromPci::Reply { id: answered, result } => {
                assert_eq!(answered, id);
                return (events, result);
            }
        }
    }
}

fn functions(rig: &mut Rig, from: u16) -> (Vec<Function>, bool) {
    match ask(rig, 1, Op::Functions { from }).1 {
        Ok(Answer::Functions { functions, more }) => (functions, more),
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_machine_starts_when_every_back_end_is_known() {
    let mut rig = Rig::new(vec![device("d", "pcie.0", None)], without_back_end);
    let asked = |rig: &mut Rig| {
        let ToOpener::Connect { name } = rig.opener.recv().unwrap() else { panic!("not pci's to ask") };
        assert_eq!(name, "vhost.d");
    };
    for _ in 0..3 {
        asked(&mut rig);
        rig.opener.send(&FromOpener::NotGiven { name: "vhost.d".into(), errno: 2 }).unwrap();
    }
    assert_eq!(rig.vcpu.read(config(0, 1, 0, 0), 4), 0x1042_1af4, "accesses are answered");
    rig.silence();
    assert!(!functions(&mut rig, 1).0.first().unwrap().back_end.as_ref().unwrap().connected);
    asked(&mut rig);
    let (ours, _theirs) = pair();
    let given = FromOpener::Given { name: "vhost.d".into() };
    rig.opener.send_with(&given, &[ours.as_fd()], MsgFlags::empty()).unwrap();
    assert_eq!(rig.next(), ToCore::Ready);
    assert!(functions(&mut rig, 1).0.first().unwrap().back_end.as_ref().unwrap().connected);
    rig.silence();
}

#[test]
fn a_pause_is_done_when_the_devices_are_at_rest() {
    let rig = Rig::new(vec![device("d", "pcie.0", None)], ready_at_once);
    assert_eq!(rig.next(), ToCore::Ready);
    for (id, what) in
        [Command::Pause, Command::Reset, Command::Resume, Command::PressPowerButton].into_iter().enumerate()
    {
        let id = u32::try_from(id).unwrap();
        rig.command(id, what);
        assert_eq!(rig.next(), ToCore::Done { id });
    }
}

#[test]
fn a_back_end_that_does_not_stop_holds_a_pause_up_for_four_seconds() {
    let mut rig = Rig::new(vec![device("d", "pcie.0", None)], restless);
    assert_eq!(rig.next(), ToCore::Ready);
    let start = Instant::now();
    rig.command(1, Command::Pause);
    rig.command(2, Command::Resume);
    assert_eq!(rig.vcpu.read(config(0, 1, 0, 0), 4), 0x1042_1af4, "accesses are answered meanwhile");
    assert_eq!(rig.next(), ToCore::Done { id: 1 });
    let waited = start.elapsed();
    // Core gives up after 5 s.
    assert!((Duration::from_millis(3900)..Duration::from_secs(5)).contains(&waited), "{waited:?}");
    assert_eq!(rig.next(), ToCore::Done { id: 2 });
}

#[test]
fn a_reset_waits_for_a_back_end_and_the_machine_is_not_ready_meanwhile() {
    let mut rig = Rig::new(vec![device("d", "pcie.0", None)], stubborn);
    assert_eq!(rig.next(), ToCore::Ready);
    rig.vcpu.write(config(0, 1, 0, 4), 2, 6);
    rig.command(1, Command::Reset);
    assert_eq!(rig.next(), ToCore::NotReady);
    assert_eq!(rig.next(), ToCore::Done { id: 1 });
    rig.silence();
    assert_eq!(rig.vcpu.read(config(0, 1, 0, 4), 2), 6, "the reset is not over");
    // The next one waits no longer.
    let start = Instant::now();
    rig.command(2, Command::Reset);
    assert_eq!(rig.next(), ToCore::NotReady);
    assert_eq!(rig.next(), ToCore::Done { id: 2 });
    assert!(start.elapsed() < Duration::from_secs(3), "{:?}", start.elapsed());
    // A command that comes meanwhile is answered.
    rig.command(3, Command::PressPowerButton);
    assert_eq!(rig.next(), ToCore::Done { id: 3 });
    let (ours, _theirs) = pair();
    let given = FromOpener::Given { name: "vhost.d".into() };
    rig.opener.send_with(&given, &[ours.as_fd()], MsgFlags::empty()).unwrap();
    assert_eq!(rig.next(), ToCore::Ready);
    assert_eq!(rig.vcpu.read(config(0, 1, 0, 4), 2), 0);
    rig.command(4, Command::Reset);
    assert_eq!(rig.next(), ToCore::Done { id: 4 });
    rig.silence();
}

#[test]
fn a_reset_takes_back_what_the_guest_has_set() {
    let mut rig = Rig::new(vec![device("d", "pcie.0", None)], ready_at_once);
    assert_eq!(rig.next(), ToCore::Ready);
    rig.vcpu.write(config(0, 1, 0, 0x10), 4, 0xd000_0000);
    rig.vcpu.write(config(0, 1, 0, 4), 2, 6);
    rig.vcpu.write(0xd000_0010, 4, 9);
    assert_eq!(rig.vcpu.read(0xd000_0010, 4), 9);
    assert_eq!(rig.host.lock().unwrap().core.bells.len(), 2);
    rig.command(1, Command::Reset);
    assert_eq!(rig.next(), ToCore::Done { id: 1 });
    assert!(rig.host.lock().unwrap().core.bells.is_empty());
    assert_eq!(rig.vcpu.read(0xd000_0010, 4), 0xffff_ffff);
    rig.vcpu.write(config(0, 1, 0, 0x10), 4, 0xd000_0000);
    rig.vcpu.write(config(0, 1, 0, 4), 2, 6);
    assert_eq!(rig.vcpu.read(0xd000_0010, 4), 0);
}

#[test]
fn the_broker_sees_the_bus_as_the_guest_has_set_it() {
    let mut devices = vec![device("d", "pcie.0", Some((5, 0))), port("p", 1), device("n", "p", None)];
    devices.extend((0..40).map(|n| device(&format!("x{n}"), "pcie.0", Some((6 + n / 4, n % 4)))));
    devices.iter_mut().for_each(|device| device.place.multifunction = true);
    let mut rig = Rig::new(devices, ready_at_once);
    assert_eq!(rig.next(), ToCore::Ready);
    let (list, more) = functions(&mut rig, 0);
    let places: Vec<(u8, u8)> = list.iter().take(4).map(|f| (f.slot, f.function)).collect();
    assert_eq!((list.len(), more, places), (32, true, vec![(0, 0), (1, 0), (5, 0), (6, 0)]));
    let (rest, more) = functions(&mut rig, 32);
    assert_eq!((rest.len(), more), (12, false));
    let (last, host, bridge) = (rest.last().unwrap(), list.first().unwrap(), list.get(1).unwrap());
    assert_eq!((last.qdev_id.as_str(), last.parent, last.bus), ("n", Some(1), None));
    assert_eq!(
        (host.vendor, host.device, host.class, host.subsystem),
        (0x1b36, 8, 0x600, Some((0x1af4, 0x1100)))
    );
    assert_eq!((bridge.driver.as_str(), bridge.class, bridge.subsystem), ("pcie-root-port", 0x604, None));
    rig.vcpu.write(config(0, 1, 0, 0x18), 4, 0x0002_0200);
    rig.vcpu.write(config(0, 1, 0, 0x20), 4, 0xd000_d000);
    rig.vcpu.write(config(0, 1, 0, 4), 2, 6);
    rig.vcpu.write(config(2, 0, 0, 0x18), 4, 0xd000_0000);
    rig.vcpu.write(config(2, 0, 0, 4), 2, 2);
    let last = functions(&mut rig, 43).0.pop().unwrap();
    let regions: Vec<_> =
        last.regions.iter().map(|r| (r.bar, r.address, r.size, r.wide, r.prefetch)).collect();
    assert_eq!(regions, [(0, None, 0x4000, true, true), (2, Some(0xd000_0000), 0x2000, false, false)]);
    assert_eq!(last.bus, Some(2));
    let bridge = functions(&mut rig, 1).0.first().unwrap().bridge.unwrap();
    assert_eq!((bridge.secondary, bridge.subordinate, bridge.memory), (2, 2, (0xd000_0000, 0xd00f_ffff)));
    assert_eq!(functions(&mut rig, u16::MAX), (vec![], false));
}

#[test]
fn devices_come_and_go_at_the_brokers_request() {
    let mut rig = Rig::new(vec![port("p", 1)], ready_at_once);
    assert_eq!(rig.next(), ToCore::Ready);
    let add = |device| Op::Add(Box::new(device));
    let refused = |rig: &mut Rig, op| ask(rig, 2, op).1.unwrap_err();
    assert_eq!(ask(&mut rig, 1, add(device("n", "p", None))), (vec![], Ok(Answer::Done)));
    assert_eq!(functions(&mut rig, 0).0.len(), 3);
    assert_eq!(refused(&mut rig, add(device("n", "p", None))), Refusal::IdTaken);
    assert_eq!(refused(&mut rig, add(device("m", "p", None))), Refusal::SlotTaken("n".into()));
    assert_eq!(refused(&mut rig, add(device("m", "q", None))), Refusal::NoBus);
    assert_eq!(refused(&mut rig, add(device("m", "pcie.0", None))), Refusal::NoHotplug);
    assert_eq!(refused(&mut rig, add(port("q", 2))), Refusal::NoHotplug);
    assert!(matches!(refused(&mut rig, add(device("m", "p", Some((1, 0))))), Refusal::NoRoom(_)));
    let mut long = device("m", "q", None);
    long.driver = "x".repeat(10_000);
    assert_eq!(refused(&mut rig, add(long)), Refusal::NoBus);
    assert_eq!(refused(&mut rig, Op::Remove { id: "m".into() }), Refusal::NoDevice);
    assert_eq!(refused(&mut rig, Op::Remove { id: "p".into() }), Refusal::NoHotplug);
    // The slot has no power yet.
    let deleted = vec![Event::Deleted { id: "n".into() }];
    assert_eq!(ask(&mut rig, 3, Op::Remove { id: "n".into() }), (deleted.clone(), Ok(Answer::Done)));
    // Once it has, the guest is asked.
    ask(&mut rig, 4, add(device("n", "p", None))).1.unwrap();
    rig.vcpu.write(config(0, 1, 0, 0x58), 2, 0x11c0);
    assert_eq!(ask(&mut rig, 5, Op::Remove { id: "n".into() }), (vec![], Ok(Answer::Done)));
    assert_eq!(refused(&mut rig, Op::Remove { id: "n".into() }), Refusal::Pending);
    assert_eq!(rig.vcpu.read(config(0, 1, 0, 0x5a), 2) & 1, 1, "the button");
    rig.vcpu.write(config(0, 1, 0, 0x58), 2, 0x17c0);
    assert_eq!(rig.broker.recv::<FromPci>().unwrap(), FromPci::Event(deleted.first().unwrap().clone()));
    assert_eq!(functions(&mut rig, 0).0.len(), 2);
}

#[test]
fn a_device_whose_back_end_does_not_answer_is_not_added() {
    let mut rig = Rig::new(vec![port("p", 1)], without_back_end);
    assert_eq!(rig.next(), ToCore::Ready);
    rig.broker.send(&Request { id: 1, op: Op::Add(Box::new(device("d", "p", None))) }).unwrap();
    let ToOpener::Connect { name } = rig.opener.recv().unwrap() else { panic!("not pci's to ask") };
    assert_eq!(name, "vhost.d");
    assert_eq!(functions(&mut rig, 0).0.len(), 2, "nobody sees it yet");
    let text = "its back end did not answer".to_owned();
    let reply = FromPci::Reply { id: 1, result: Err(Refusal::BackEnd(text)) };
    assert_eq!(rig.broker.recv::<FromPci>().unwrap(), reply);
    assert_eq!(functions(&mut rig, 0).0.len(), 2);
    assert_eq!(rig.vcpu.read(config(0, 1, 0, 0x5a), 2) & 0x40, 0);
}

#[test]
fn a_new_broker_takes_the_place_of_one_that_died_and_hears_what_happened() {
    let mut rig = Rig::new(vec![port("p", 1), device("n", "p", None)], ready_at_once);
    assert_eq!(rig.next(), ToCore::Ready);
    ask(&mut rig, 5, Op::Remove { id: "n".into() }).1.unwrap();
    let (ours, theirs) = pair();
    let given = FromOpener::Given { name: "broker".into() };
    // It dies; then the guest lets go.
    let old = std::mem::replace(&mut rig.broker, {
        let (one, other) = pair();
        let greeting = std::thread::spawn(move || bulkhead_jail::link::Link::connect(one, 1));
        let link = bulkhead_jail::link::Link::accept(other, 1).unwrap();
        greeting.join().unwrap().unwrap();
        link
    });
    drop(old);
    rig.vcpu.write(config(0, 1, 0, 0x58), 2, 0x17c0);
    rig.opener.send_with(&given, &[theirs.as_fd()], MsgFlags::empty()).unwrap();
    drop(theirs);
    rig.broker = bulkhead_jail::link::Link::accept(ours, bulkhead_control_api::VERSION).unwrap();
    let deleted = FromPci::Event(Event::Deleted { id: "n".into() });
    assert_eq!(rig.broker.recv::<FromPci>().unwrap(), deleted);
    assert_eq!(functions(&mut rig, 0).0.len(), 2);
}

/// Its successor knows nothing of it: it is not told, and has the device's daemon ended.
#[test]
fn a_device_of_a_broker_that_is_gone_is_not_added() {
    let mut rig = Rig::new(vec![port("p", 1)], without_back_end);
    assert_eq!(rig.next(), ToCore::Ready);
    rig.broker.send(&Request { id: 1, op: Op::Add(Box::new(device("d", "p", None))) }).unwrap();
    assert!(matches!(rig.opener.recv().unwrap(), ToOpener::Connect { .. }));
    let give = |rig: &mut Rig, name: &str, fd: std::os::fd::OwnedFd| {
        let given = FromOpener::Given { name: name.to_owned() };
        rig.opener.send_with(&given, &[fd.as_fd()], MsgFlags::empty()).unwrap();
    };
    let (ours, theirs) = pair();
    give(&mut rig, "broker", theirs);
    rig.broker = bulkhead_jail::link::Link::accept(ours, bulkhead_control_api::VERSION).unwrap();
    // Its ids begin where those of its predecessor did.
    assert_eq!(functions(&mut rig, 0).0.len(), 2);
    let (late, _other) = pair();
    give(&mut rig, "vhost.d", late);
    assert_eq!(functions(&mut rig, 0).0.len(), 2);
    // Neither its id nor its back end is taken.
    rig.broker.send(&Request { id: 1, op: Op::Add(Box::new(device("d", "p", None))) }).unwrap();
    assert!(matches!(rig.opener.recv().unwrap(), ToOpener::Connect { .. }));
    let (back_end, _other) = pair();
    give(&mut rig, "vhost.d", back_end);
    assert_eq!(rig.broker.recv::<FromPci>().unwrap(), FromPci::Reply { id: 1, result: Ok(Answer::Done) });
    assert_eq!(functions(&mut rig, 0).0.len(), 3);
}

#[test]
fn a_broker_that_sends_what_is_no_request_is_left() {
    let mut rig = Rig::new(vec![port("p", 1)], ready_at_once);
    assert_eq!(rig.next(), ToCore::Ready);
    rig.broker.send(&vec![0xff_u8; 40]).unwrap();
    assert!(rig.broker.recv::<FromPci>().is_err());
    assert_eq!(rig.vcpu.read(config(0, 1, 0, 0), 4), 0x000c_1b36);
}

#[test]
fn the_end_of_the_main_link_is_the_end() {
    let rig = Rig::new(vec![device("d", "pcie.0", None)], ready_at_once);
    assert_eq!(rig.next(), ToCore::Ready);
    let Rig { server, commands, .. } = rig;
    drop(commands);
    assert_eq!(server.join().unwrap(), Ok(()));
}

#[test]
fn a_pci_that_is_sent_away_fails() {
    let rig = Rig::new(vec![device("d", "pcie.0", None)], ready_at_once);
    assert_eq!(rig.next(), ToCore::Ready);
    rig.commands.send(FromCore::Leave).unwrap();
    let error = rig.server.join().unwrap().unwrap_err();
    assert_eq!(error, "core has cut this process off: see its log");
}

#[test]
fn a_device_that_has_no_place_ends_the_start() {
    let rig = Rig::new(vec![device("d", "pcie.0", Some((0, 0)))], ready_at_once);
    let error = rig.server.join().unwrap().unwrap_err();
    let expected =
        "device \"d\": PCI: slot 0 function 0 not available for virtio-blk-pci, in use by gpex-root";
    assert_eq!(error, expected);
}

#[test]
fn connections_come_from_the_start_or_from_who_connects() {
    let devices = || vec![device("d", "pcie.0", None)];
    let connections = BTreeMap::from([("vhost.d".to_owned(), pair().0)]);
    let rig = Rig::with(devices(), without_back_end, Given { connections, ..Given::default() });
    assert_eq!(rig.next(), ToCore::Ready);

    let address = SocketAddr::from_abstract_name(format!("bulkhead-pci-{}", std::process::id())).unwrap();
    let listener = UnixListener::bind_addr(&address).unwrap();
    listener.set_nonblocking(true).unwrap();
    let listeners = BTreeMap::from([("vhost.d".to_owned(), listener)]);
    let rig = Rig::with(devices(), without_back_end, Given { listeners, ..Given::default() });
    rig.silence();
    let _back_end = UnixStream::connect_addr(&address).unwrap();
    assert_eq!(rig.next(), ToCore::Ready);
}

#[test]
fn a_listener_that_cannot_accept_is_tried_again() {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket::socket(AddressFamily::Unix, SockType::Stream, flags, None).unwrap();
    let name = format!("bulkhead-pci-late-{}", std::process::id());
    socket::bind(fd.as_raw_fd(), &UnixAddr::new_abstract(name.as_bytes()).unwrap()).unwrap();
    let copy = fd.try_clone().unwrap();
    // It does not listen yet: each attempt fails.
    let listeners = BTreeMap::from([("vhost.d".to_owned(), UnixListener::from(fd))]);
    let devices = vec![device("d", "pcie.0", None)];
    let rig = Rig::with(devices, without_back_end, Given { listeners, ..Given::default() });
    rig.silence();
    socket::listen(&copy, Backlog::new(1).unwrap()).unwrap();
    let address = SocketAddr::from_abstract_name(name).unwrap();
    let _back_end = UnixStream::connect_addr(&address).unwrap();
    assert_eq!(rig.next(), ToCore::Ready);
}

/// A device that has something to be kept, or has inherited it.
fn keeping(seen: &mut Seen) {
    (seen.known, seen.inherits) = (false, true);
    (seen.missing, seen.kept) = (vec!["vhost.d".to_owned()], Some(memfd().into()));
}

/// A guest that resets its device in a loop does not keep the starter busy.
#[test]
fn what_does_not_last_is_not_kept() {
    let (starter, words) = UnixDatagram::pair().unwrap();
    let connections = BTreeMap::from([("vhost.d".to_owned(), pair().0)]);
    let starter = Starter::new(Some(starter.into()));
    let given = Given { connections, starter, ..Given::default() };
    let rig = Rig::with(vec![device("d", "pcie.0", None)], keeping, given);
    assert_eq!(rig.next(), ToCore::Ready);
    let begun = Instant::now();
    for id in 0..100 {
        rig.command(id, Command::Reset);
        assert_eq!(rig.next(), ToCore::Done { id });
    }
    let most = 1 + begun.elapsed().as_secs();
    let mut word = [0; 64];
    words.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    let heard = std::iter::from_fn(|| words.recv(&mut word).ok()).count();
    // Each is also forgotten, but for the last one.
    assert!((1..2 * most).contains(&u64::try_from(heard).unwrap()), "{heard} words");
}

#[test]
fn what_a_device_wants_kept_comes_back_to_it() {
    let (starter, words) = UnixDatagram::pair().unwrap();
    let state = memfd();
    let connections = BTreeMap::from([("vhost.d".to_owned(), pair().0)]);
    let starter = Starter::new(Some(starter.into()));
    let given = Given { state: Some(state.try_clone().unwrap()), connections, starter, ..Given::default() };
    let rig = Rig::with(vec![device("d", "pcie.0", None)], keeping, given);
    assert_eq!(rig.next(), ToCore::Ready);
    let mut word = [0; 64];
    let len = words.recv(&mut word).unwrap();
    assert_eq!(word.get(..len).unwrap(), b"FDSTORE=1\nFDPOLL=0\nFDNAME=kept.0");
    // When it has answered this, it has noted the number.
    rig.command(1, Command::Resume);
    assert_eq!(rig.next(), ToCore::Done { id: 1 });
    let Rig { server, commands, .. } = rig;
    drop(commands);
    server.join().unwrap().unwrap();

    let kept = BTreeMap::from([("kept.0".to_owned(), memfd()), ("kept.9".to_owned(), memfd())]);
    let (starter, words) = UnixDatagram::pair().unwrap();
    let starter = Starter::new(Some(starter.into()));
    let given = Given { state: Some(state), kept, starter, ..Given::default() };
    let rig = Rig::with(vec![device("d", "pcie.0", None)], keeping, given);
    assert_eq!(rig.next(), ToCore::Ready);
    let len = words.recv(&mut word).unwrap();
    assert_eq!(word.get(..len).unwrap(), b"FDSTOREREMOVE=1\nFDNAME=kept.9", "nobody's");
    rig.command(1, Command::Resume);
    assert_eq!(rig.next(), ToCore::Done { id: 1 });
    words.set_nonblocking(true).unwrap();
    assert!(words.recv(&mut word).is_err(), "it is kept already, under its name");
}
