//! The front end with virtiofsd behind it.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test that cannot go on fails"
)]

mod common;

use std::path::Path;
use std::process::Command;

use bulkhead_framework::{Child, Scratch};
use bulkhead_pci::frontend::{Event, Frontend, Spec};
use common::{Ram, VERSION_1, connect, eventually, next};

/// Debian 13's, in Rust, and Debian 12's, in C.
const PLACES: [&str; 2] = ["/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd"];
/// `struct fuse_in_header` and `struct fuse_init_in` of the kernel's `linux/fuse.h`.
const INIT: u32 = 26;
const UNIQUE: u64 = 77;

fn init() -> Vec<u8> {
    let mut request = [56u32, INIT].map(u32::to_le_bytes).concat();
    request.extend([UNIQUE, 0].map(u64::to_le_bytes).concat());
    // Of user and group 0, no process; version 7.31, no readahead, no flags.
    request.extend([0u32, 0, 0, 0, 7, 31, 0, 0].map(u32::to_le_bytes).concat());
    request
}

#[test]
fn a_file_system_answers() {
    let scratch = Scratch::new().unwrap();
    let (shared, socket) = (scratch.path().join("shared"), scratch.path().join("vhost"));
    std::fs::create_dir(&shared).unwrap();
    let program = PLACES.into_iter().find(|path| Path::new(path).exists()).unwrap();
    // It wants to be root, if only among its own.
    let mut command = Command::new("unshare");
    command.args(["--user", "--map-root-user", program, &format!("--socket-path={}", socket.display())]);
    command.args(["-o", &format!("source={}", shared.display()), "-o", "sandbox=chroot"]);
    let child = Child::start(&mut command, "stdout", "stderr").unwrap();

    let mut front = Frontend::new(Spec { id: "fs0".into(), queues: 2, queue_size: 256, config_len: 44 });
    front.connect(connect(&socket));
    let events = next(&mut front);
    let [Event::Ready { features, config, .. }] = &events[..] else {
        panic!("{events:?} {:?}", child.stderr().text())
    };
    assert_ne!(features & VERSION_1, 0);
    // It leaves its configuration space to the front end.
    assert!(config.is_empty(), "{config:?}");

    let mut ram = Ram::new();
    for life in 0..2u16 {
        front.start(VERSION_1, &ram.memory, vec![ram.ring(0, life), ram.ring(1, 0)]).unwrap();
        assert_eq!(next(&mut front), [Event::Started { ring: None }]);
        ram.write(0x7000, &init());
        ram.write(0x8000, &[0; 80]);
        ram.offer(&[(0x7000, 56, false), (0x8000, 80, true)]);
        nix::unistd::write(&ram.kick, &1u64.to_ne_bytes()).unwrap();
        eventually(|| ram.used() == life + 1);
        // `struct fuse_out_header`: length, error, the request's number; then the version.
        let answer = ram.read(0x8000, 20);
        let expected = [[80u32, 0].map(u32::to_le_bytes).concat(), UNIQUE.to_le_bytes().to_vec()].concat();
        assert_eq!((&answer[..16], &answer[16..]), (&expected[..], &7u32.to_le_bytes()[..]));
        front.stop();
        let bases = vec![(0, life + 1), (1, 0)];
        assert_eq!(next(&mut front), [Event::Stopped { ring: None, bases }]);
    }
}
