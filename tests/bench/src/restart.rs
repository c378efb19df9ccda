//! A compartment that is killed, and the next one that serves.
//!
//! There is no reference: QEMU is one process, and its death is the guest's.

use std::fs;
use std::io::{ErrorKind, Read as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use bulkhead_framework::{Child, Failure, Result, descendants};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::host::Host;
use crate::report::{self, Samples};
use crate::session::Session;

const DEATHS: usize = 100;
/// The launcher starts ten in a second without a pause.
const APART: Duration = Duration::from_millis(120);
/// Milliseconds.
const GOAL: f64 = 50.0;
const SOON: Duration = Duration::from_secs(20);

/// Measures and prints.
///
/// # Errors
/// A guest did not start, or a compartment did not.
pub fn run(host: &Host) -> Result<()> {
    host.needs_kvm()?;
    let serial = host.dir().join("serial");
    let device = format!("unix:{},server=on,wait=off", serial.display());
    let (vm, path) = host.with_qmp(host.ours_on(&device, "counter ms=1"), "ours")?;
    drop(Session::open(&path)?);
    let serial = UnixStream::connect(serial)?;
    serial.set_read_timeout(Some(SOON))?;
    let broker = deaths(&vm, "bulkhead-broker", |_| broker(&path))?;
    let console = deaths(&vm, "bulkhead-console", |former| console(&serial, former))?;
    broker.print("broker: a waiting client has its query-status", "ms", 1e-3);
    report::limit("broker, p50", broker.median() / 1e3, GOAL, "ms");
    report::limit("broker, p99", broker.percentile(99) / 1e3, GOAL, "ms");
    console.print("console: the guest's output goes on", "ms", 1e-3);
    Ok(())
}

/// How long it takes `served` after each of many deaths of the process of that name.
fn deaths(vm: &Child, name: &str, served: impl Fn(i32) -> Result<()>) -> Result<Samples> {
    let mut times = Samples::default();
    let mut former = 0;
    for _ in 0..DEATHS {
        std::thread::sleep(APART);
        let pid = find(vm, name)?;
        if pid == former {
            return Err(format!("{name} was not started anew").into());
        }
        let start = Instant::now();
        kill(Pid::from_raw(pid), Signal::SIGKILL).map_err(|errno| format!("kill {name}: {errno}"))?;
        served(pid)?;
        times.time(start.elapsed());
        former = pid;
    }
    Ok(times)
}

/// The kernel keeps 15 bytes of a name.
fn find(vm: &Child, name: &str) -> Result<i32> {
    let all = descendants(vm.pid())?;
    let found = all.iter().find(|process| process.name.len() == 15 && name.starts_with(&process.name));
    found.map(|process| process.pid).ok_or_else(|| Failure::new(format!("no {name}")))
}

/// A client that connects at once is served: nobody refuses it, and nothing is asked twice. The dying broker, which
/// sleeps, does nothing any more.
fn broker(path: &Path) -> Result<()> {
    Session::connect(path)?.ask("query-status").map(drop)
}

/// What comes when the console is dead, and what it left has been read, comes from the next one.
fn console(mut serial: &UnixStream, former: i32) -> Result<()> {
    wait_for_death(former);
    serial.set_nonblocking(true)?;
    let mut buffer = [0; 4096];
    loop {
        match serial.read(&mut buffer) {
            Ok(0) => return Err("the console's client is lost".into()),
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            Err(error) => return Err(error.into()),
        }
    }
    serial.set_nonblocking(false)?;
    Ok(serial.read_exact(&mut [0])?)
}

/// Until the process runs no more, with a processor left for its end.
fn wait_for_death(pid: i32) {
    let lives = || {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        stat.rsplit(") ").next().map(|state| !state.starts_with(['Z', 'X']))
    };
    while lives() == Some(true) {
        std::thread::sleep(Duration::from_micros(200));
    }
}
