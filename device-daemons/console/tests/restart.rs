//! A console that takes the place of one that died.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test that cannot go on fails")]

mod common;

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::time::Duration;

use bulkhead_bus_api::main_link::Command;
use bulkhead_bus_api::platform::CONSOLE_PORTS;
use bulkhead_bus_api::{Access, Op, REPLY_LEN, Space};
use bulkhead_console::chardev::Inherited;
use bulkhead_console::state::{Left, State};
use bulkhead_control_api::config::ChardevKind;
use bulkhead_control_api::console::{self, Answer, Client};
use bulkhead_jail::starter::Starter;
use common::{LIFE, LSR, Rig, THRE, Vcpu, chardev, collected, eventually, memfd, socket_server};

const SOON: Duration = Duration::from_secs(2);
const NEVER: Duration = Duration::from_millis(30);

/// Another memfd with the same content: what a console that is killed now leaves.
fn copy(memfd: &OwnedFd) -> OwnedFd {
    let (from, to) = (File::from(memfd.try_clone().unwrap()), File::from(common::memfd()));
    let mut bytes = vec![0; usize::try_from(from.metadata().unwrap().len()).unwrap()];
    from.read_exact_at(&mut bytes, 0).unwrap();
    to.write_all_at(&bytes, 0).unwrap();
    to.into()
}

/// The next console, welcomed, after requests up to `seq`.
fn next(memfd: OwnedFd, seq: u32) -> Rig {
    let mut rig = Rig::with_state(&chardev(ChardevKind::Null), vec![], Inherited::default(), memfd);
    rig.greet();
    rig.welcome_after(1, seq);
    rig
}

fn cmos(vcpu: &mut Vcpu, index: u8, value: u8) {
    vcpu.outb(0x70, index);
    vcpu.outb(0x71, value);
}

#[test]
fn registers_clocks_and_timers_go_on() {
    let mut rig = Rig::null();
    let vcpu = rig.vcpu();
    for (port, value) in
        [(0x3fb, 3), (0x3fa, 1), (0x3ff, 0x5a), (0x3fc, 0x0b), (0x64, 0x60), (0x60, 0x74), (0xcf9, 2)]
    {
        vcpu.outb(port, value);
    }
    cmos(vcpu, 0x40, 0x99);
    // The year 2031, by hand.
    cmos(vcpu, 0x09, 0x31);
    // The update interrupt, and the index for what acknowledges it.
    cmos(vcpu, 0x0b, 0x12);
    vcpu.outb(0x70, 0x0c);
    vcpu.access(&[], 0x602, 2, Op::Write(0x0101));
    let timer = vcpu.access(&[], 0x608, 4, Op::Read).data;
    let seq = vcpu.seq;
    let mut rig = next(copy(&rig.memfd), seq);
    // Without a word from the guest.
    assert!(rig.interrupted(1, SOON), "the clock ticks on");
    let vcpu = rig.vcpu();
    assert_eq!(vcpu.inb(0x71) & 0x90, 0x90);
    assert_eq!([0x3fb, 0x3ff, 0x3fc, 0xcf9].map(|port| vcpu.inb(port)), [3, 0x5a, 0x0b, 2]);
    assert_eq!(vcpu.inb(0x3fa) & 0xc0, 0xc0, "the FIFOs are on");
    vcpu.outb(0x64, 0x20);
    assert_eq!(vcpu.inb(0x60), 0x74);
    for (index, value) in [(0x40, 0x99), (0x09, 0x31)] {
        vcpu.outb(0x70, index);
        assert_eq!(vcpu.inb(0x71), value);
    }
    assert_eq!(vcpu.access(&[], 0x602, 2, Op::Read).data, 0x0101);
    let later = vcpu.access(&[], 0x608, 4, Op::Read).data;
    assert!(later > timer && later - timer < 3_579_545 * 5, "{timer} {later}");
    assert_eq!(rig.end().0, Ok(()));
}

#[test]
fn a_number_that_the_last_one_answered_is_answered_the_same() {
    let mut rig = Rig::null();
    rig.vcpu().outb(0x3f9, 0x02);
    let packet = rig.vcpu().packet(&[collected(0x3ff, 7)], 0x3fa, 1, Op::Read);
    rig.vcpu().send(&packet);
    let reply = rig.vcpu().reply();
    assert_eq!(reply.data, 0x02, "the transmitter's interrupt, which this read acknowledges");
    let seq = rig.vcpu().seq;
    let mut rig = next(copy(&rig.memfd), seq);
    rig.vcpu().send(&packet);
    assert_eq!(rig.vcpu().reply(), reply);
    assert_eq!((rig.vcpu().inb(0x3fa), rig.vcpu().inb(0x3ff)), (0x01, 7));
    assert_eq!(rig.end().0, Ok(()));
}

#[test]
fn a_pause_and_its_interrupts_are_remembered() {
    let mut rig = Rig::null();
    rig.command(Command::Pause);
    assert_eq!(rig.ask(console::Op::PowerButton), Answer::Done);
    let timer = rig.vcpu().access(&[], 0x608, 4, Op::Read).data;
    let mut rig = next(copy(&rig.memfd), rig.vcpu().seq);
    assert!(!rig.interrupted(3, NEVER));
    assert_eq!(rig.vcpu().access(&[], 0x608, 4, Op::Read).data, timer);
    rig.command(Command::Resume);
    assert!(rig.interrupted(3, SOON) && !rig.interrupted(3, NEVER));
}

#[test]
fn clients_stay_and_what_waits_for_them_and_for_the_guest_comes() {
    let path = std::env::temp_dir().join(format!("bulkhead-restart-{}", std::process::id()));
    let listener = UnixListener::bind(&path).unwrap();
    let (mut client, far) = UnixStream::pair().unwrap();
    let kind = socket_server(true, &path);
    let inherited = || Inherited { restarted: true, peer: Some(far.try_clone().unwrap().into()), far: None };
    let listening = || vec![("chardev.serial0", OwnedFd::from(listener.try_clone().unwrap()))];
    let mut rig = Rig::with_state(&kind, listening(), inherited(), memfd());
    rig.greet();
    rig.welcome(1);
    rig.vcpu().outb(0x3fa, 1);
    client.write_all(&[b'i'; 100]).unwrap();
    assert!(eventually(|| rig.vcpu().inb(LSR) & 1 != 0));
    assert_eq!(rig.vcpu().inb(0x3f8), u64::from(b'i'));
    // Until the client's queue is full, and much waits.
    let mut sent = 0u32;
    while rig.vcpu().inb(LSR) & THRE != 0 {
        let writes: Vec<_> = (sent..sent + 16).map(|n| collected(0x3f8, n.to_le_bytes()[0])).collect();
        rig.vcpu().access(&writes, 0, 1, Op::Flush);
        sent += 16;
    }
    std::thread::sleep(Duration::from_millis(20));
    let (seq, left) = (rig.vcpu().seq, copy(&rig.memfd));
    // It cannot deliver anything any more.
    assert_eq!(rig.end().0, Ok(()));
    let mut rig = Rig::with_state(&kind, listening(), inherited(), left);
    assert!(rig.greeted(SOON), "nobody is awaited a second time");
    rig.greet();
    rig.welcome_after(1, seq);
    let mut got = vec![0; usize::try_from(sent).unwrap()];
    client.read_exact(&mut got).unwrap();
    assert!(got.iter().zip(0u32..).all(|(byte, n)| *byte == n.to_le_bytes()[0]));
    let mut input = 1;
    assert!(eventually(|| {
        while rig.vcpu().inb(LSR) & 1 != 0 {
            assert_eq!(rig.vcpu().inb(0x3f8), u64::from(b'i'));
            input += 1;
        }
        input == 100
    }));
    rig.vcpu().print(b"done");
    client.read_exact(&mut [0; 4]).unwrap();
    let _ = std::fs::remove_file(&path);
}

#[test]
fn a_machine_goes_on_without_its_listener() {
    let path = std::env::temp_dir().join("bulkhead-no-listener");
    let (mut client, far) = UnixStream::pair().unwrap();
    let mut rig = Rig::null();
    rig.vcpu().outb(0x3ff, 0x5a);
    let (left, seq) = (copy(&rig.memfd), rig.vcpu().seq);
    let inherited = Inherited { restarted: true, peer: Some(far.into()), far: None };
    let mut rig = Rig::with_state(&socket_server(true, &path), vec![], inherited, left);
    rig.greet();
    rig.welcome_after(1, seq);
    assert_eq!(rig.vcpu().inb(0x3ff), 0x5a);
    rig.vcpu().print(b"to the client that was there");
    client.read_exact(&mut [0; 28]).unwrap();
    drop(client);
    let name = format!("disconnected:unix:{},server", path.display());
    assert!(eventually(|| rig.filename() == name));
    let (mut client, far) = UnixStream::pair().unwrap();
    assert_eq!(rig.add_client("serial0", Some(far.into())), Answer::Client(Client::Added));
    rig.vcpu().print(b"x");
    client.read_exact(&mut [0]).unwrap();
    assert_eq!(rig.end().0, Ok(()));
}

#[test]
fn a_client_is_kept_as_soon_as_the_starter_has_room() {
    let path = std::env::temp_dir().join(format!("bulkhead-unkept-{}", std::process::id()));
    let listener = UnixListener::bind(&path).unwrap();
    let (starter, words) = UnixDatagram::pair().unwrap();
    starter.set_nonblocking(true).unwrap();
    let mut full = 0;
    while starter.send(b"READY=1").is_ok() {
        full += 1;
    }
    let parts = (Inherited::default(), memfd(), Starter::new(Some(starter.into())));
    let mut rig =
        Rig::with_starter(&socket_server(true, &path), vec![("chardev.serial0", listener.into())], parts);
    let mut client = UnixStream::connect(&path).unwrap();
    rig.greet();
    rig.welcome(1);
    rig.vcpu().print(b"served");
    client.read_exact(&mut [0; 6]).unwrap();
    for _ in 0..full {
        words.recv(&mut [0; 64]).unwrap();
    }
    assert!(common::readable(words.as_fd(), SOON));
    let mut word = [0; 64];
    let len = words.recv(&mut word).unwrap();
    assert_eq!(&word[..len], b"FDSTORE=1\nFDPOLL=0\nFDNAME=kept.0");
    let names = |memfd: &OwnedFd| State::open(copy(memfd), LIFE, 1, true).unwrap().0.names(0);
    assert!(eventually(|| names(&rig.memfd).peer == Some(0)));
    assert!(!common::readable(words.as_fd(), NEVER), "once");
    let _ = std::fs::remove_file(&path);
}

#[test]
fn a_state_of_another_life_or_another_machine_is_dropped() {
    let mut rig = Rig::null();
    rig.vcpu().outb(0x3ff, 0x5a);
    let open = |life, chardevs, serial| State::open(copy(&rig.memfd), life, chardevs, serial).unwrap().1;
    assert!(open(LIFE, 1, true).is_some());
    assert!(open(LIFE + 1, 1, true).is_none());
    assert!(open(LIFE, 2, true).is_none());
    assert!(open(LIFE, 1, false).is_none());
    assert!(State::open(memfd(), LIFE, 1, true).unwrap().1.is_none());
}

/// Does what a server does: accesses to every port, input and output, with all that is committed for them.
fn go_on(left: &mut Left, state: &mut State) {
    let machine = &mut left.machine;
    machine.pause();
    machine.resume().unwrap();
    machine.press_power_button().unwrap();
    for port in CONSOLE_PORTS.iter().flat_map(|range| range.base..range.base + range.len) {
        for op in [Op::Read, Op::Write(0x5a)] {
            let access = Access { space: Space::Pio, addr: port, size: 1, op };
            machine.access(&[collected(0x3f8, b'o')], &access).unwrap();
            state.set_reply(0, (1, [0; REPLY_LEN]));
            state.commit(machine, Some(&left.input)).unwrap();
        }
        machine.with_serial(|serial| serial.consume(2)).unwrap();
        state.count_output(machine).unwrap();
        left.input.push(b'i');
        state.count_input(&left.input).unwrap();
        let room = machine.serial().unwrap().room();
        machine.with_serial(|serial| serial.receive(left.input.take(room))).unwrap();
        machine.update().unwrap();
        machine.take_next_event();
        state.commit(machine, Some(&left.input)).unwrap();
    }
}

#[test]
fn a_damaged_state_is_dropped_or_used_in_order() {
    let mut rig = Rig::null();
    rig.vcpu().print(b"some output");
    let (mut used, mut random) = (0, 0x2545_f491_u32);
    let mut next_random = move || {
        random ^= random << 13;
        random ^= random >> 17;
        random ^= random << 5;
        random
    };
    for round in 0..600 {
        let damaged = copy(&rig.memfd);
        let file = File::from(damaged.try_clone().unwrap());
        for _ in 0..=next_random() % 6 {
            // In the header, the record, the counts.
            let at = match next_random() % 4 {
                0 => next_random() % 24,
                1 => 4096 + next_random() % 16,
                _ => 24 + next_random() % 300,
            };
            file.write_all_at(&next_random().to_le_bytes()[..1], at.into()).unwrap();
        }
        if round % 50 == 0 {
            file.set_len(u64::from(next_random() % 5000)).unwrap();
        }
        let (state, left) = State::open(damaged, LIFE, 1, true).unwrap();
        if let Some(mut left) = left {
            used += 1;
            // Whatever was read, the machine works.
            left.machine.update().unwrap();
            left.machine.take_next_event();
            let mut state = state;
            state.begin(2);
            go_on(&mut left, &mut state);
            left.machine.reset();
            state.commit(&left.machine, Some(&left.input)).unwrap();
        }
    }
    assert!(used > 50, "{used}");
}
