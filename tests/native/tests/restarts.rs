//! Compartments that are started again while the guest runs on.

use std::time::{Duration, Instant};

use bulkhead_framework::{Qmp, Result};
use bulkhead_native_tests::{Guest, SOON, eventually};
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
