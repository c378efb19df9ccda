//! The job as core hands it out: over a link, with memfds.
#![expect(clippy::unwrap_used, reason = "helpers of tests: a failure is a failed test")]

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::thread;

use bulkhead_control_api::VERSION;
use bulkhead_control_api::config::{CpuTopology, Loader};
use bulkhead_control_api::loader::{Job, MAX_FAILURE, Mode, Outcome, Region, Start};
use bulkhead_jail::link::Link;
use bulkhead_loader::job::{Files, serve};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, socketpair};

const LOW: u64 = 16 << 20;

fn memfd(len: u64) -> File {
    let file = File::from(memfd_create(c"test", MFdFlags::MFD_CLOEXEC).unwrap());
    file.set_len(len).unwrap();
    file
}

fn kernel(image: &[u8]) -> Files {
    let kernel = memfd(0);
    kernel.write_all_at(image, 0).unwrap();
    Files { kernel, initrd: None, tables: Vec::new() }
}

/// One loader run against a core that sends `job`.
fn run(files: &Files, name: &str, job: &Job, fds: &[BorrowedFd<'_>]) -> Outcome {
    let (ours, theirs): (OwnedFd, OwnedFd) =
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap();
    let cpus = CpuTopology { cpus: 1, sockets: 1, cores: 1, threads: 1 };
    let config = Loader {
        kernel: name.into(),
        initrd: None,
        cmdline: "test=hello".into(),
        cpus,
        uuid: [0; 16],
        tables: Vec::new(),
    };
    thread::scope(|scope| {
        let loader = scope.spawn(|| serve(files, &config, theirs));
        let mut core = Link::accept(ours, VERSION).unwrap();
        core.send_with(job, fds, MsgFlags::empty()).unwrap();
        let outcome = core.recv().unwrap();
        loader.join().unwrap().unwrap();
        outcome
    })
}

fn regions(list: &[(u64, u64)]) -> Vec<Region> {
    list.iter().map(|&(gpa, len)| Region { gpa, len }).collect()
}

#[test]
fn every_boot_writes_everything_again() {
    let (low, high) = (memfd(LOW), memfd(1 << 30));
    let files = kernel(bulkhead_guest::ELF);
    let job = Job { mode: Mode::Boot, regions: regions(&[(0, LOW), (4 << 30, 1 << 30)]) };
    for _ in 0..3 {
        let outcome = run(&files, "k", &job, &[low.as_fd(), high.as_fd()]);
        let Ok(Start::Pvh32 { eip, ebx }) = outcome else { panic!("{outcome:?}") };
        let mut magic = [0; 4];
        low.read_exact_at(&mut magic, ebx.into()).unwrap();
        assert_eq!(u32::from_le_bytes(magic), 0x336e_c578);
        // The guest damages its own code and tables, then resets.
        low.write_all_at(&[0xff; 4096], ebx.into()).unwrap();
        low.write_all_at(&[0xff; 4096], u64::from(eip)).unwrap();
    }
}

#[test]
fn failures_are_answered_with_one_line() {
    let ram = memfd(LOW);
    let good = regions(&[(0, LOW)]);
    let boot = |regions| Job { mode: Mode::Boot, regions };
    let refused = |files: &Files, name: &str, job: &Job, fds: &[BorrowedFd<'_>]| {
        let line = run(files, name, job, fds).unwrap_err();
        assert!(!line.contains('\n') && line.len() <= MAX_FAILURE, "{line}");
        line
    };
    let guest = kernel(bulkhead_guest::ELF);
    let wake = Job { mode: Mode::Wake, regions: good.clone() };
    assert!(refused(&guest, "k", &wake, &[ram.as_fd()]).contains("not implemented"));
    assert!(refused(&guest, "k", &boot(Vec::new()), &[]).starts_with("boot: guest memory"));
    assert!(refused(&guest, "k", &boot(good.clone()), &[]).contains("differ in number"));
    let too_long = boot(regions(&[(0, LOW * 2)]));
    assert!(refused(&guest, "k", &too_long, &[ram.as_fd()]).starts_with("boot: guest memory"));
    let text = refused(&kernel(&[b'x'; 8192]), "a\nb", &boot(good.clone()), &[ram.as_fd()]);
    assert!(text.starts_with("kernel a?b: not a kernel"), "{text}");
    let long = refused(&kernel(&[b'x'; 8192]), &"ü".repeat(4000), &boot(good), &[ram.as_fd()]);
    assert!(long.ends_with("with a PVH note"), "{long}");
}
