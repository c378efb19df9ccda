//! Compartments that are started again while the guest runs on.

use std::time::{Duration, Instant};

use bulkhead_framework::{Failure, Qmp, Result};
use bulkhead_native_tests::{Guest, SOON, eventually, limit_descriptors};
use nix::sys::ptrace;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::Pid;
use serde_json::json;

/// The broker is killed under a client's eyes, many times.
#[test]
fn a_killed_broker_is_started_again() -> Result<()> {
    let mut guest = Guest::boot("test=counter ms=1", &[])?;
    let mut qmp = guest.running()?;
    for round in 0..30 {
        let former = guest.process("broker")?.pid;
        guest.kill("broker")?;
        let began = Instant::now();
        // Nobody is refused: a client that connects meanwhile waits for the next broker.
        qmp = guest.qmp()?;
        let status = qmp.status()?;
        guest.check(status == "running", &format!("round {round}: {status}"))?;
        println!("round {round}: served again after {:.1} ms", began.elapsed().as_secs_f64() * 1e3);
        let next = guest.process("broker")?.pid;
        guest.check(next != former, "the same broker")?;
        guest.console().take_new();
        guest.expect("count ")?;
        // The console's link to the broker is there again, too.
        let chardevs = eventually("the console", SOON, || {
            let answer = qmp.execute("query-chardev", json!({}));
            answer.map_err(|failure| failure.to_string())
        })?;
        guest.check(chardevs.to_string().contains("serial0"), "no serial0")?;
        if round % 10 == 9 {
            // Past the burst, the next start would wait.
            std::thread::sleep(Duration::from_secs(1));
        }
    }
    drop(qmp);
    let said = guest.vm().stderr().text();
    let lines = said.matches("bulkhead-broker was killed by SIGKILL: it is started again\n").count();
    guest.check(lines == 30, &format!("{lines} lines"))?;
    guest.quit()
}

#[test]
fn held_machines_survive_their_broker() -> Result<()> {
    let guest = Guest::boot("test=hello", &["-S"])?;
    guest.check(guest.qmp()?.status()? == "prelaunch", "not held")?;
    guest.kill("broker")?;
    let mut qmp = guest.qmp()?;
    guest.check(qmp.status()? == "prelaunch", "not held any more")?;
    qmp.execute("cont", json!({}))?;
    guest.expect("done: hello")?;
    guest.quit()
}

/// Killed before its first READY the broker ends the VM; killed after it, the next one serves.
#[test]
fn a_broker_killed_at_the_start_ends_the_vm_or_is_started_again() -> Result<()> {
    for round in 0..10 {
        let guest = Guest::boot("test=counter ms=1", &[])?;
        guest.kill("broker")?;
        let path = guest.trace().dir().join("q.sock");
        let served = eventually("an end or a session", SOON, || match Qmp::connect(&path, SOON) {
            Ok(_) => Ok(true),
            Err(_) if guest.trace().find("bulkhead-core").is_none() => Ok(false),
            Err(failure) => Err(failure.to_string()),
        })?;
        let ended = if served { guest.quit() } else { guest.ends(1) };
        ended.map_err(|failure| failure.context(format!("round {round}, served: {served}")))?;
    }
    Ok(())
}

/// Waits for a console with another process id.
fn next_console(guest: &Guest, former: i32) -> Result<i32> {
    let found = eventually("the next console", SOON, || match guest.trace().find("bulkhead-consol") {
        Some(process) if process.pid != former => Ok(process.pid),
        _ => Err("none".to_owned()),
    });
    found.map_err(|failure| guest.explain(failure))
}

/// A broker that takes no connection hinders nobody from being started again.
#[test]
fn a_frozen_broker_does_not_stop_the_consoles_restart() -> Result<()> {
    let guest = Guest::boot("test=counter ms=1", &[])?;
    drop(guest.running()?);
    let broker = Pid::from_raw(guest.process("broker")?.pid);
    let signal = |signal| kill(broker, signal).map_err(|error| Failure::new(error.to_string()));
    signal(Signal::SIGSTOP)?;
    for _ in 0..20 {
        let former = guest.process("console")?.pid;
        guest.kill("console")?;
        next_console(&guest, former)?;
        guest.console().take_new();
        guest.expect("count ")?;
    }
    signal(Signal::SIGCONT)?;
    let mut qmp = guest.qmp()?;
    eventually("the console", SOON, || {
        qmp.execute("query-chardev", json!({})).map_err(|failure| failure.to_string())
    })?;
    drop(qmp);
    guest.quit()
}

/// Makes a process that waits in a system call call exit_group(0).
fn let_exit(pid: i32) -> Result<()> {
    let pid = Pid::from_raw(pid);
    let change = || {
        ptrace::attach(pid)?;
        waitpid(pid, None)?;
        let mut registers = ptrace::getregs(pid)?;
        // The instruction `syscall`, once more and with another number.
        registers.rip -= 2;
        (registers.rax, registers.rdi) = (231, 0);
        registers.orig_rax = u64::MAX;
        ptrace::setregs(pid, registers)?;
        ptrace::detach(pid, None)
    };
    change().map_err(|error| Failure::new(format!("ptrace: {error}")))
}

/// An end without an error is an end all the same.
#[test]
fn a_console_that_exits_with_status_0_is_started_again() -> Result<()> {
    let guest = Guest::boot("test=counter ms=1", &[])?;
    drop(guest.running()?);
    // A guest that is stopped asks nothing of the console, which waits.
    let former = guest.process("console")?.pid;
    guest.qmp()?.execute("stop", json!({}))?;
    let_exit(former)?;
    next_console(&guest, former)?;
    guest.qmp()?.execute("cont", json!({}))?;
    guest.console().take_new();
    guest.expect("count ")?;
    guest.check(guest.stderr().contains("bulkhead-console is not there and is started again"), "not told")?;
    guest.quit()
}

/// What hinders a start may pass, be it in the launcher or in its child.
#[test]
fn a_start_that_fails_is_tried_again() -> Result<()> {
    let guest = Guest::boot("test=counter ms=1", &[])?;
    drop(guest.running()?);
    let launcher = guest.process("core")?.parent;
    let limit = |limit: usize| -> Result<()> { Ok(limit_descriptors(launcher, limit as u64, 8192)?) };
    let open = std::fs::read_dir(format!("/proc/{launcher}/fd"))?.count();
    limit(open)?;
    guest.kill("broker")?;
    // More and more lets the launcher open what a start needs, but not the child copy its own.
    let steps = ["it is tried again in a second", "bulkhead-broker could not be started: dup: "];
    let (mut allowed, mut told) = (open, 0);
    while let Some(said) = steps.get(told) {
        guest.check(allowed < open + 40, &format!("{said:?} was not said"))?;
        let heard = eventually("a failed start", Duration::from_millis(1500), || {
            if guest.stderr().contains(said) { Ok(()) } else { Err("not yet".to_owned()) }
        });
        match heard {
            Ok(()) => told += 1,
            Err(_) => {
                allowed += 3;
                limit(allowed)?;
            }
        }
    }
    limit(8192)?;
    guest.check(guest.qmp()?.status()? == "running", "not running")?;
    guest.quit()
}
