//! Clients that pass descriptors: of every kind, too many, and without using them.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use bulkhead_control_api::core::{Event, RunState};
use bulkhead_framework::{Result, Vm};
use bulkhead_qmp_tests::broker::{Broker, Kind};
use bulkhead_qmp_tests::vms_run_here;
use bulkhead_qmp_tests::wire::Wire;
use nix::sys::epoll::{Epoll, EpollCreateFlags};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serde_json::{Value, json};

const VERSION: &str = "{'execute': 'query-version'}";
const QUERY: &str = "{'execute': 'query-fdsets'}";
const ADD: &str = "{'execute': 'add-fd'}";
/// What one message may carry (`SCM_MAX_FD` of Linux).
const BOMB: usize = 253;

fn negotiated(broker: &Broker, monitor: usize) -> Result<Wire> {
    let mut wire = Wire::connect(&broker.path(monitor))?;
    wire.negotiate(false)?;
    Ok(wire)
}

fn getfd(name: &str) -> String {
    format!("{{'execute': 'getfd', 'arguments': {{'fdname': '{name}'}}}}")
}

fn closefd(name: &str) -> String {
    format!("{{'execute': 'closefd', 'arguments': {{'fdname': '{name}'}}}}")
}

/// Waits until the other end of a connection is closed everywhere.
fn assert_closed(mut end: &UnixStream) -> Result<()> {
    end.set_read_timeout(Some(bulkhead_qmp_tests::wire::LIMIT))?;
    assert_eq!(end.read(&mut [0; 1])?, 0);
    Ok(())
}

#[test]
fn descriptors_that_nothing_takes_are_closed() -> Result<()> {
    let broker = Broker::start(&[Kind::Server], false)?;
    let mut wire = negotiated(&broker, 0)?;
    let (mut last, mut end) = UnixStream::pair()?;
    for _ in 0..3000 {
        wire.send_fds(VERSION.as_bytes(), &[last.as_fd(); BOMB])?;
        assert!(wire.line()?.get("return").is_some());
        let (next, next_end) = UnixStream::pair()?;
        drop(std::mem::replace(&mut last, next));
        // A newer message closes what waits.
        wire.send_fds(b" ", &[last.as_fd()])?;
        assert_closed(&end)?;
        end = next_end;
    }
    drop(last);
    drop(wire);
    assert_closed(&end)
}

#[test]
fn names_survive_their_client_and_belong_to_their_monitor() -> Result<()> {
    let broker = Broker::start(&[Kind::Server, Kind::Server], false)?;
    let (passed, end) = UnixStream::pair()?;
    let mut wire = negotiated(&broker, 0)?;
    assert_eq!(wire.ask_with(&getfd("a"), &[passed.as_fd()])?, json!({"return": {}}));
    drop((wire, passed));
    let unknown = negotiated(&broker, 1)?.ask(&closefd("a"))?;
    assert_eq!(unknown.pointer("/error/desc"), Some(&json!("File descriptor named 'a' not found")));
    assert_eq!(negotiated(&broker, 0)?.ask(&closefd("a"))?, json!({"return": {}}));
    assert_closed(&end)
}

#[test]
fn sets_belong_to_all_monitors_and_go_with_the_last_client() -> Result<()> {
    let broker = Broker::start(&[Kind::Server, Kind::Server], false)?;
    let (passed, end) = UnixStream::pair()?;
    let mut first = negotiated(&broker, 0)?;
    first.ask("{'execute': 'cont'}")?;
    first.ask_with(ADD, &[passed.as_fd()])?;
    // One that has not negotiated counts.
    let silent = Wire::connect(&broker.path(1))?;
    drop((first, passed));
    let listed = negotiated(&broker, 1)?.ask(QUERY)?;
    assert_eq!(listed.pointer("/return/0/fdset-id"), Some(&json!(0)));
    drop(silent);
    assert_closed(&end)?;
    assert_eq!(negotiated(&broker, 0)?.ask(QUERY)?, json!({"return": []}));
    Ok(())
}

#[test]
fn sets_of_a_stopped_machine_wait_for_the_next_client() -> Result<()> {
    let broker = Broker::start(&[Kind::Server], false)?;
    let (passed, end) = UnixStream::pair()?;
    negotiated(&broker, 0)?.ask_with(ADD, &[passed.as_fd()])?;
    drop(passed);
    let mut next = negotiated(&broker, 0)?;
    assert_eq!(next.ask(QUERY)?.pointer("/return/0/fdset-id"), Some(&json!(0)));
    broker.core.event(Event::Resume, RunState::Running);
    next.event("RESUME")?;
    drop(next);
    assert_closed(&end)
}

/// A member of each kind that a process can have.
fn kinds(broker: &Path) -> Result<Vec<OwnedFd>> {
    let io = std::io::Error::from;
    let (pipe, _) = nix::unistd::pipe().map_err(io)?;
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(io)?;
    Ok(vec![
        UnixStream::pair()?.0.into(),
        memfd_create(c"passed", MFdFlags::MFD_CLOEXEC).map_err(io)?,
        epoll.0,
        pipe,
        File::open("/dev/null")?.into(),
        File::open("/proc/self/mem")?.into(),
        File::open("/proc")?.into(),
        std::net::TcpListener::bind("127.0.0.1:0")?.into(),
        UnixStream::connect(broker)?.into(),
    ])
}

#[test]
fn descriptors_of_every_kind_are_kept_and_closed() -> Result<()> {
    let broker = Broker::start(&[Kind::Server], false)?;
    let mut wire = negotiated(&broker, 0)?;
    let mut fds = kinds(&broker.path(0))?;
    // The connection itself, too.
    fds.push(wire.stream().as_fd().try_clone_to_owned()?);
    for fd in &fds {
        assert_eq!(wire.ask_with(&getfd("a"), &[fd.as_fd()])?, json!({"return": {}}));
        assert_eq!(wire.ask_with(ADD, &[fd.as_fd()])?.pointer("/return/fdset-id"), Some(&json!(0)));
        wire.ask("{'execute': 'remove-fd', 'arguments': {'fdset-id': 0}}")?;
        wire.send_fds(b" ", &[fd.as_fd()])?;
    }
    assert_eq!(wire.ask(&closefd("a"))?, json!({"return": {}}));
    assert!(wire.ask(VERSION)?.get("return").is_some());
    Ok(())
}

#[test]
fn clients_that_close_in_the_middle_leave_nothing() -> Result<()> {
    let broker = Broker::start(&[Kind::Server], false)?;
    for length in 1..getfd("a").len() {
        let (passed, end) = UnixStream::pair()?;
        let mut wire = negotiated(&broker, 0)?;
        wire.send_fds(getfd("a").get(..length).unwrap_or_default().as_bytes(), &[passed.as_fd(); BOMB])?;
        drop((wire, passed));
        assert_closed(&end)?;
    }
    Ok(())
}

#[test]
fn pipelined_requests_each_get_their_own() -> Result<()> {
    let broker = Broker::start(&[Kind::Server], false)?;
    // With out-of-band execution, too, where requests are read while earlier ones wait.
    for oob in [false, true] {
        let mut wire = Wire::connect(&broker.path(0))?;
        wire.negotiate(oob)?;
        pipeline(&mut wire)?;
    }
    Ok(())
}

fn pipeline(wire: &mut Wire) -> Result<()> {
    let mut ends = Vec::new();
    // As a library does that sends the descriptor ahead of its command.
    for number in 0..100 {
        let (passed, end) = UnixStream::pair()?;
        wire.send_fds(b" ", &[passed.as_fd()])?;
        wire.send(getfd(&format!("n{number}")).as_bytes())?;
        ends.push(end);
    }
    for _ in &ends {
        assert_eq!(wire.line()?, json!({"return": {}}));
    }
    for (number, end) in ends.iter().enumerate() {
        assert_eq!(wire.ask(&closefd(&format!("n{number}")))?, json!({"return": {}}));
        assert_closed(end)?;
    }
    Ok(())
}

/// Fills a broker: what is kept, and one that waits for each client.
fn fill(path: &Path) -> Result<()> {
    let mut wire = Wire::connect(path)?;
    wire.negotiate(false)?;
    let null = File::open("/dev/null")?;
    let null: BorrowedFd<'_> = null.as_fd();
    let mut refused = Value::Null;
    for _ in 0..1100 {
        let answer = wire.ask_with(ADD, &[null; BOMB])?;
        if answer.get("error").is_some() {
            refused = answer;
        }
    }
    assert_eq!(refused.pointer("/error/desc"), Some(&json!("Too many file descriptors: 1024 are kept")));
    let mut others = Vec::new();
    for _ in 0..99 {
        let mut other = Wire::connect(path)?;
        other.send_fds(b" ", &[null; BOMB])?;
        others.push(other);
    }
    let sets = wire.ask(QUERY)?;
    assert_eq!(sets.get("return").and_then(Value::as_array).map(Vec::len), Some(1024));
    wire.ask("{'execute': 'remove-fd', 'arguments': {'fdset-id': 1000}}")?;
    assert_eq!(wire.ask_with(ADD, &[null; BOMB])?.pointer("/return/fdset-id"), Some(&json!(1000)));
    // What each of the others sent is there.
    for (number, other) in others.iter_mut().enumerate() {
        other.negotiate(false)?;
        wire.ask(&format!("{{'execute': 'remove-fd', 'arguments': {{'fdset-id': {number}}}}}"))?;
        assert_eq!(other.ask(&getfd(&format!("n{number}")))?, json!({"return": {}}));
    }
    for number in 99..1024 {
        wire.ask(&format!("{{'execute': 'remove-fd', 'arguments': {{'fdset-id': {number}}}}}"))?;
    }
    assert_eq!(wire.ask(QUERY)?, json!({"return": []}));
    Ok(())
}

#[test]
fn a_broker_full_of_descriptors_goes_on() -> Result<()> {
    // Broker and clients are one process here.
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).map_err(std::io::Error::from)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).map_err(std::io::Error::from)?;
    fill(&Broker::start(&[Kind::Server], false)?.path(0))
}

/// The same within the jail's limits. It needs the release build and a KVM; the other tests do not.
#[test]
fn a_vm_full_of_descriptors_goes_on() -> Result<()> {
    if !vms_run_here() {
        return Ok(());
    }
    let vm = Vm::builder().args(["-S", "-m", "256M"]).start()?;
    fill(&vm.dir().join("q.sock"))
        .map_err(|failure| failure.with_logs(&[vm.console().clone(), vm.stderr().clone()]))
}
