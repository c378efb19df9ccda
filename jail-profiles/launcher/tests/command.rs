//! The command as a user calls it, as far as no VM is started: one line, exit status, nothing left.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;
use std::process::{Command, Output};

use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};

fn bulkhead(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_bulkhead")).args(args).output().unwrap()
}

/// The one line on standard error of a call that must fail with status 1 and say nothing else.
fn refused(args: &[&str]) -> String {
    let output = bulkhead(args);
    assert_eq!((output.status.code(), output.stdout.len()), (Some(1), 0), "{args:?}");
    let text = String::from_utf8(output.stderr).unwrap();
    let line = text.strip_suffix('\n').unwrap();
    assert!(!line.contains('\n'), "{line}");
    line.to_owned()
}

#[test]
fn help_and_version_go_to_standard_output() {
    for args in
        [&["--help"][..], &["run", "-h"], &["run", "-S", "--help"], &["--version"], &["run", "-version"]]
    {
        let output = bulkhead(args);
        assert_eq!((output.status.code(), output.stderr.len()), (Some(0), 0), "{args:?}");
        assert!(output.stdout.ends_with(b"\n"));
    }
}

#[test]
fn what_is_wrong_is_one_line() {
    assert_eq!(refused(&["run", "-foo"]), "bulkhead: -foo: invalid option");
    assert_eq!(
        refused(&["run", "-kernel", "/nowhere/k"]),
        "bulkhead: -kernel /nowhere/k: No such file or directory"
    );
    assert_eq!(
        refused(&["run", "-smp", "4,maxcpus=2"]),
        "bulkhead: -smp 4,maxcpus=2: maxcpus must be equal to or greater than smp"
    );
    assert!(refused(&[]).starts_with("bulkhead: command line: a command is missing"));
}

#[test]
fn a_socket_is_removed_when_something_later_fails() {
    let dir = std::env::temp_dir().join(format!("bulkhead-command-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let path = dir.join("q").into_os_string().into_string().unwrap();
    let first = format!("unix:{path},server=on,wait=off");
    let line = refused(&["run", "-kernel", "/proc/self/exe", "-qmp", &first, "-qmp", "unix:/nowhere/q"]);
    // Where there is no /dev/kvm, that is what comes first.
    assert!(line.contains("Failed to connect to '/nowhere/q'") || line.contains("/dev/kvm"), "{line}");
    assert!(!std::fs::exists(&path).unwrap());
    std::fs::remove_dir(&dir).unwrap();
}

#[test]
fn an_inherited_socket_keeps_its_flags() {
    let path = std::env::temp_dir().join(format!("bulkhead-inherited-{}", std::process::id()));
    let listener = UnixListener::bind(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    fcntl(&listener, FcntlArg::F_SETFD(FdFlag::empty())).unwrap();
    let fd = listener.as_raw_fd();
    let chardev = format!("socket,id=m,fd={fd}");
    let line = refused(&["run", "-nodefaults", "-chardev", &chardev, "-mon", "m,mode=control"]);
    assert_eq!(line, format!("bulkhead: -chardev {chardev}: File descriptor '{fd}' listens: use server=on"));
    let flags = OFlag::from_bits_retain(fcntl(&listener, FcntlArg::F_GETFL).unwrap());
    assert!(!flags.contains(OFlag::O_NONBLOCK));
}

#[test]
fn the_doctor_ends_with_the_class() {
    let output = bulkhead(&["doctor"]);
    let text = String::from_utf8(output.stdout).unwrap();
    let class = text.lines().last().unwrap();
    let status = [("class: full", 0), ("class: limited", 3), ("class: none", 4)];
    assert!(status.contains(&(class, output.status.code().unwrap())), "{text}");
}
