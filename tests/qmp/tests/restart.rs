//! A broker that is killed: what clients passed is there as before.

#![expect(clippy::indexing_slicing, reason = "what is missing in a reply fails the test")]

use std::fs::File;
use std::io::Read as _;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use bulkhead_framework::{Failure, Result, Vm};
use bulkhead_qmp_tests::vms_run_here;
use bulkhead_qmp_tests::wire::Wire;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

/// How long the next broker may take to serve on a loaded host.
const SOON: Duration = Duration::from_secs(20);

fn broker(vm: &Vm) -> Result<i32> {
    let all = bulkhead_framework::descendants(vm.pid())?;
    let found = all.iter().find(|process| process.name.starts_with("bulkhead-broke"));
    found.map(|process| process.pid).ok_or_else(|| Failure::new("no broker"))
}

/// Kills the broker and waits for the next one's greeting.
fn again(vm: &Vm, path: &Path) -> Result<Wire> {
    let former = broker(vm)?;
    kill(Pid::from_raw(former), Signal::SIGKILL).map_err(|error| error.to_string())?;
    let end = Instant::now() + SOON;
    loop {
        // A connection that the dying broker had accepted ends; the next one is served.
        if let Ok(mut wire) = Wire::connect(path) {
            if wire.negotiate(false).is_ok() && broker(vm).is_ok_and(|pid| pid != former) {
                return Ok(wire);
            }
        }
        if Instant::now() > end {
            return Err(Failure::new("no other broker serves"));
        }
        thread::sleep(Duration::from_millis(1));
    }
}

fn pass(wire: &mut Wire, request: &str, fd: BorrowedFd<'_>) -> Result<Value> {
    wire.ask_with(request, &[fd])
}

/// Names, sets, numbers and `opaque` are as before; a description that was passed twice, too, and one that has hung up.
#[test]
fn descriptors_survive_a_killed_broker() -> Result<()> {
    let Some(vm) = vm()? else { return Ok(()) };
    survive(&vm).map_err(|failure| failure.with_logs(&[vm.stderr().clone()]))
}

fn vm() -> Result<Option<Vm>> {
    if vms_run_here() { Vm::builder().args(["-S", "-m", "64M"]).start().map(Some) } else { Ok(None) }
}

fn survive(vm: &Vm) -> Result<()> {
    let path = vm.dir().join("q.sock");
    let mut wire = Wire::connect(&path)?;
    wire.negotiate(false)?;
    let (twice, mut twice_end) = UnixStream::pair()?;
    let (dead, dead_end) = UnixStream::pair()?;
    drop(dead_end);
    let null = File::open("/dev/null")?;
    for request in ["{'execute':'getfd','arguments':{'fdname':'odd: name\\u00e4'}}", "{'execute':'add-fd'}"] {
        pass(&mut wire, request, twice.as_fd())?;
    }
    pass(&mut wire, "{'execute':'add-fd','arguments':{'fdset-id':7,'opaque':'o'}}", dead.as_fd())?;
    pass(&mut wire, "{'execute':'add-fd','arguments':{'fdset-id':7}}", null.as_fd())?;
    pass(&mut wire, "{'execute':'add-fd','arguments':{'fdset-id':9}}", null.as_fd())?;
    wire.ask("{'execute':'remove-fd','arguments':{'fdset-id':9}}")?;
    drop((twice, dead));
    let before = wire.ask("{'execute':'query-fdsets'}")?;
    for _ in 0..3 {
        wire = again(vm, &path)?;
        assert_eq!(wire.ask("{'execute':'query-fdsets'}")?, before);
    }
    let added = pass(&mut wire, "{'execute':'add-fd','arguments':{'fdset-id':9}}", null.as_fd())?;
    assert_eq!(added, json!({"return": {"fdset-id": 9, "fd": 7}}), "no number is given again");
    twice_end.set_nonblocking(true)?;
    assert!(twice_end.read(&mut [0]).is_err(), "open");
    wire.ask("{'execute':'remove-fd','arguments':{'fdset-id':0}}")?;
    wire = again(vm, &path)?;
    assert!(twice_end.read(&mut [0]).is_err(), "the name has it");
    let closed = wire.ask("{'execute':'closefd','arguments':{'fdname':'odd: name\\u00e4'}}")?;
    assert_eq!(closed, json!({"return": {}}));
    twice_end.set_nonblocking(false)?;
    twice_end.set_read_timeout(Some(SOON))?;
    assert_eq!(twice_end.read(&mut [0])?, 0, "the starter has closed its copy, too");
    Ok(())
}

/// So many that they do not fit below the numbers that a start needs for itself.
#[test]
fn a_broker_full_of_descriptors_is_started_again() -> Result<()> {
    let Some(vm) = vm()? else { return Ok(()) };
    fill(&vm).map_err(|failure| failure.with_logs(&[vm.stderr().clone()]))
}

fn fill(vm: &Vm) -> Result<()> {
    let path = vm.dir().join("q.sock");
    let mut wire = Wire::connect(&path)?;
    wire.negotiate(false)?;
    for _ in 0..1000 {
        let null = File::open("/dev/null")?;
        pass(&mut wire, "{'execute':'add-fd'}", null.as_fd())?;
    }
    let before = wire.ask("{'execute':'query-fdsets'}")?;
    assert_eq!(before["return"].as_array().map(Vec::len), Some(1000));
    for _ in 0..2 {
        wire = again(vm, &path)?;
        assert_eq!(wire.ask("{'execute':'query-fdsets'}")?, before);
    }
    Ok(())
}

/// A machine that has left `preconfig` does not go back there.
#[test]
fn preconfig_is_left_for_good() -> Result<()> {
    if !vms_run_here() {
        return Ok(());
    }
    let vm = Vm::builder().args(["-S", "--preconfig", "-m", "64M"]).start()?;
    let path = vm.dir().join("q.sock");
    let mut wire = Wire::connect(&path)?;
    wire.negotiate(false)?;
    let status = "{'execute':'query-status'}";
    wire = again(&vm, &path)?;
    assert_eq!(wire.ask(status)?["return"]["status"], "preconfig");
    wire.ask("{'execute':'x-exit-preconfig'}")?;
    wire = again(&vm, &path)?;
    assert_eq!(wire.ask(status)?["return"]["status"], "prelaunch");
    Ok(())
}

/// Killed under load, thirty times: what a reply has promised holds, what was under way is not done twice.
#[test]
fn replies_hold_over_kills_under_load() -> Result<()> {
    let Some(vm) = vm()? else { return Ok(()) };
    promise(&vm).map_err(|failure| failure.with_logs(&[vm.stderr().clone()]))
}

fn promise(vm: &Vm) -> Result<()> {
    let path = vm.dir().join("q.sock");
    let null = File::open("/dev/null")?;
    let stop = AtomicBool::new(false);
    let mut promised: Vec<Value> = Vec::new();
    /// Ends the other client however the test ends.
    struct Stop<'a>(&'a AtomicBool);
    impl Drop for Stop<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    thread::scope(|scope| -> Result<()> {
        // Another client's requests keep it busy.
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                if let Ok(mut wire) = Wire::connect(&path) {
                    let _ = wire.negotiate(false);
                    let mut asks = || wire.ask("{'execute':'query-chardev'}").is_ok();
                    while !stop.load(Ordering::Relaxed) && asks() {
                        std::hint::spin_loop();
                    }
                }
            }
        });
        let _stop = Stop(&stop);
        let mut wire = Wire::connect(&path)?;
        wire.negotiate(false)?;
        for round in 0..30 {
            let killer = scope.spawn({
                let pid = broker(vm)?;
                move || {
                    thread::sleep(Duration::from_micros(500 + 137 * round));
                    kill(Pid::from_raw(pid), Signal::SIGKILL)
                }
            });
            // Without a number of its own a set is made anew each time: doing it twice would show.
            while let Ok(reply) = wire.ask_with("{'execute':'add-fd'}", &[null.as_fd()]) {
                promised.push(reply["return"].clone());
            }
            killer.join().map_err(|_| "the killer")?.map_err(|error| error.to_string())?;
            wire = Wire::connect(&path)?;
            wire.negotiate(false)?;
            let listed = wire.ask("{'execute':'query-fdsets'}")?;
            let listed = listed["return"].as_array().cloned().unwrap_or_default();
            for info in &promised {
                let there = listed
                    .iter()
                    .any(|set| set["fdset-id"] == info["fdset-id"] && set["fds"][0]["fd"] == info["fd"]);
                assert!(there, "round {round}: {info} is lost; there are {}", listed.len());
            }
            // One may have been done without a reply.
            assert!(
                listed.len() <= promised.len() + 1,
                "round {round}: {} of {}",
                listed.len(),
                promised.len()
            );
            for set in &listed {
                let remove =
                    format!("{{'execute':'remove-fd','arguments':{{'fdset-id':{}}}}}", set["fdset-id"]);
                wire.ask(&remove)?;
            }
            promised.clear();
            if round % 10 == 9 {
                // Past the burst, the next start would wait for a second.
                thread::sleep(Duration::from_secs(1));
            }
        }
        Ok(())
    })
}
