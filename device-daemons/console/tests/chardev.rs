//! Character devices: delivery, slow and vanishing peers, names, the end of the machine.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test that cannot go on fails")]

mod common;

use std::fs::{self, File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use bulkhead_bus_api::Op;
use bulkhead_control_api::config::ChardevKind;
use bulkhead_control_api::console::{self, Answer};
use common::{LSR, Rig, THRE, chardev, collected, eventually, socket_server};

const SOON: Duration = Duration::from_secs(2);

/// A directory that goes with its test.
struct Dir(PathBuf);

impl Dir {
    fn new(test: &str) -> Self {
        let path = std::env::temp_dir().join(format!("bulkhead-console-{test}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn stdio() -> (Rig, File, File) {
    let (input, keyboard) = nix::unistd::pipe().unwrap();
    let (screen, output) = nix::unistd::pipe().unwrap();
    let fds = vec![("stdio.in", input), ("stdio.out", output)];
    (Rig::up(&chardev(ChardevKind::Stdio), fds, 1), keyboard.into(), screen.into())
}

fn text(len: usize) -> Vec<u8> {
    (0..=250).cycle().take(len).collect()
}

/// Reads the whole input as a driver would.
fn receive(rig: &mut Rig, len: usize) -> Vec<u8> {
    let mut got = Vec::new();
    assert!(eventually(|| {
        while rig.vcpu().inb(LSR) & 1 != 0 {
            got.push(rig.vcpu().inb(0x3f8).to_le_bytes()[0]);
        }
        got.len() >= len
    }));
    got
}

#[test]
fn stdio_carries_both_ways() {
    let (mut rig, mut keyboard, mut screen) = stdio();
    assert_eq!(rig.filename(), "stdio");
    rig.vcpu().outb(0x3fa, 0x01);
    rig.vcpu().outb(0x3f9, 0x01);
    keyboard.write_all(b"root\n").unwrap();
    assert!(rig.interrupted(0, SOON));
    assert_eq!(receive(&mut rig, 5), b"root\n");
    let long = text(3000);
    keyboard.write_all(&long).unwrap();
    drop(keyboard);
    assert_eq!(receive(&mut rig, long.len()), long);
    rig.vcpu().print(b"login: ");
    let mut got = [0; 7];
    screen.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"login: ");
    rig.vcpu().print(&long);
    assert_eq!(rig.end().0, Ok(()));
    let mut rest = Vec::new();
    screen.read_to_end(&mut rest).unwrap();
    assert_eq!(rest, long, "the last output is delivered before the end");
}

#[test]
fn a_blocked_terminal_stops_neither_the_bus_nor_the_end() {
    let (mut rig, _keyboard, _screen) = stdio();
    // A driver that does not look, until pipe and queues are full.
    assert!(eventually(|| {
        rig.vcpu().access(&[collected(0x3f8, b'x'); 170], 0, 1, Op::Flush);
        rig.vcpu().inb(LSR) & THRE == 0
    }));
    thread::sleep(Duration::from_millis(50));
    let (result, time) = rig.end();
    assert_eq!(result, Ok(()));
    assert!((Duration::from_millis(900)..Duration::from_secs(3)).contains(&time), "{time:?}");
}

#[test]
fn a_slow_reader_loses_nothing() {
    let (mut rig, _keyboard, mut screen) = stdio();
    let all = text(600_000);
    let expected = all.clone();
    let reader = thread::spawn(move || {
        thread::sleep(Duration::from_millis(200));
        let mut got = vec![0; expected.len()];
        screen.read_exact(&mut got).unwrap();
        assert!(got == expected);
    });
    rig.vcpu().print(&all);
    reader.join().unwrap();
    assert_eq!(rig.end().0, Ok(()));
}

#[test]
fn a_file_gets_everything_and_a_full_disk_ends_nothing() {
    let dir = Dir::new("file");
    let path = dir.0.join("log");
    let kind = || chardev(ChardevKind::File { fd: "chardev.serial0".into() });
    let mut rig = Rig::up(&kind(), vec![("chardev.serial0", File::create(&path).unwrap().into())], 1);
    assert_eq!(rig.filename(), "file");
    let all = text(100_000);
    rig.vcpu().print(&all);
    assert_eq!(rig.end().0, Ok(()));
    assert!(fs::read(&path).unwrap() == all);

    let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
    let mut rig = Rig::up(&kind(), vec![("chardev.serial0", full.into())], 1);
    rig.vcpu().print(&all);
    assert_eq!(rig.vcpu().inb(LSR) & THRE, THRE);
    assert_eq!(rig.end().0, Ok(()));
}

#[test]
fn clients_come_and_go() {
    let dir = Dir::new("clients");
    let path = dir.0.join("s");
    let listener = UnixListener::bind(&path).unwrap();
    let mut rig = Rig::up(&socket_server(false, &path), vec![("chardev.serial0", listener.into())], 1);
    let (there, away) =
        (format!("unix:{},server", path.display()), format!("disconnected:unix:{},server", path.display()));
    assert_eq!(rig.filename(), away);
    // Nobody listens: output is dropped, the driver never waits.
    rig.vcpu().print(&text(200_000));
    for round in 0..3u8 {
        let mut client = UnixStream::connect(&path).unwrap();
        assert!(eventually(|| rig.filename() == there));
        let second = UnixStream::connect(&path).unwrap();
        rig.vcpu().print(&[b'0' + round]);
        let mut got = [0];
        client.read_exact(&mut got).unwrap();
        assert_eq!(got, [b'0' + round], "nothing from before the client came");
        client.write_all(b"ok").unwrap();
        assert_eq!(receive(&mut rig, 2), b"ok");
        drop(client);
        // The second one waited in the queue and is next.
        drop(second);
        assert!(eventually(|| rig.filename() == away));
    }
    assert_eq!(rig.end().0, Ok(()));
}

#[test]
fn a_client_that_never_reads_holds_the_driver_until_it_leaves() {
    let dir = Dir::new("slow");
    let path = dir.0.join("s");
    let listener = UnixListener::bind(&path).unwrap();
    let mut rig = Rig::up(&socket_server(false, &path), vec![("chardev.serial0", listener.into())], 1);
    let client = UnixStream::connect(&path).unwrap();
    assert!(eventually(|| rig.filename().starts_with("unix:")));
    assert!(eventually(|| {
        rig.vcpu().access(&[collected(0x3f8, b'x'); 170], 0, 1, Op::Flush);
        rig.vcpu().inb(LSR) & THRE == 0
    }));
    rig.vcpu().outb(0x3f9, 0x02);
    drop(client);
    assert!(rig.interrupted(0, SOON), "the transmitter is empty again");
    assert_eq!(rig.vcpu().inb(LSR) & THRE, THRE);
}

#[test]
fn a_client_that_floods_an_idle_guest_and_dies_makes_room_for_the_next() {
    let dir = Dir::new("flood");
    let path = dir.0.join("s");
    let listener = UnixListener::bind(&path).unwrap();
    let mut rig = Rig::up(&socket_server(false, &path), vec![("chardev.serial0", listener.into())], 1);
    let mut client = UnixStream::connect(&path).unwrap();
    client.write_all(&text(50_000)).unwrap();
    drop(client);
    assert!(eventually(|| rig.filename().starts_with("disconnected:")));
    let _next = UnixStream::connect(&path).unwrap();
    assert!(eventually(|| rig.filename().starts_with("unix:")));
    assert_eq!(receive(&mut rig, 4000)[..4000], text(4000), "what was read ahead is kept");
}

#[test]
fn the_machine_waits_for_its_first_client() {
    let dir = Dir::new("wait");
    let path = dir.0.join("s");
    let listener = UnixListener::bind(&path).unwrap();
    let mut rig = Rig::silent(&socket_server(true, &path), vec![("chardev.serial0", listener.into())]);
    assert!(!rig.greeted(Duration::from_millis(100)));
    assert!(rig.filename().starts_with("disconnected:"), "the broker is served meanwhile");
    let client = UnixStream::connect(&path).unwrap();
    assert!(rig.greeted(SOON));
    rig.greet();
    rig.welcome(1);
    drop(client);
    assert_eq!(rig.vcpu().inb(LSR) & THRE, THRE);
    assert_eq!(rig.end().0, Ok(()));
}

#[test]
fn a_core_that_dies_while_the_console_waits_ends_it() {
    let dir = Dir::new("dies");
    let path = dir.0.join("s");
    let listener = UnixListener::bind(&path).unwrap();
    let rig = Rig::silent(&socket_server(true, &path), vec![("chardev.serial0", listener.into())]);
    assert_eq!(rig.end().0, Ok(()));
}

#[test]
fn names_of_inherited_and_outgoing_sockets_are_qemus() {
    let dir = Dir::new("names");
    let path = dir.0.join("s");
    let listener = UnixListener::bind(&path).unwrap();
    let connected = UnixStream::connect(&path).unwrap();
    let (far, _) = listener.accept().unwrap();
    let kind = |address: &str, server| {
        let address = address.to_owned();
        chardev(ChardevKind::Socket { fd: "chardev.serial0".into(), address, server, wait: false })
    };
    let mut rig = Rig::up(&kind("fd:7", true), vec![("chardev.serial0", listener.into())], 1);
    assert_eq!(rig.filename(), format!("disconnected:unix:{},server", path.display()));

    let mut rig = Rig::up(&kind("/far/end", false), vec![("chardev.serial0", connected.into())], 1);
    assert_eq!(rig.filename(), "unix:");
    drop(far);
    assert!(eventually(|| rig.filename() == "disconnected:unix:/far/end"));
}

#[test]
fn the_front_end_is_open_where_the_port_is() {
    let mut rig = Rig::null();
    let Answer::Chardevs(list) = rig.ask(console::Op::Chardevs) else { panic!("no list") };
    assert_eq!(
        list,
        [console::Chardev { label: "serial0".into(), filename: "null".into(), frontend_open: true }]
    );
}
