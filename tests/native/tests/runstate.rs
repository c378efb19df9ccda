//! Run states: what leads where, with which events, and what the guest sees of it.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bulkhead_framework::{Failure, Qmp, Result};
use bulkhead_native_tests::{Guest, SOON, Setup, slowness};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

const RESET_REQUIRED: &str = "Resetting the Virtual Machine is required";

/// Within this what the guest wrote before `stop` has passed the pipe and its reader.
const UNDER_WAY: Duration = Duration::from_millis(50);

/// The guest on the way in a session that sees all events.
fn held(append: &str, args: &[&str]) -> Result<(Guest, Qmp)> {
    let guest = Guest::boot(append, &[&["-S"], args].concat())?;
    let mut qmp = guest.qmp()?;
    qmp.execute("cont", json!({}))?;
    guest.event(&mut qmp, "RESUME", &Value::Null)?;
    Ok((guest, qmp))
}

/// The whole lines of `text` must count on from `after`; returns the last number.
fn counts_on(guest: &Guest, text: &str, after: u64) -> Result<u64> {
    let whole = text.rsplit_once("\r\n").map_or("", |(whole, _)| whole);
    let mut last = after;
    for line in whole.split("\r\n").filter(|line| line.starts_with("count ")) {
        last += 1;
        guest.check(line == format!("count {last}"), &format!("{line:?} instead of count {last}"))?;
    }
    Ok(last)
}

/// What the guest has written once nothing more comes: when `stop` has answered, bytes may still be on
/// their way from the console to here, but the guest, which writes every millisecond, makes no more.
fn quiet(guest: &Guest) -> Result<String> {
    let limit = UNDER_WAY * 20 * slowness();
    let end = Instant::now() + limit;
    let mut before = guest.console().text();
    loop {
        std::thread::sleep(UNDER_WAY * 2);
        let now = guest.console().text();
        if now == before {
            return Ok(now);
        }
        if Instant::now() > end {
            return Err(Failure::new("the guest writes while it is stopped"));
        }
        before = now;
    }
}

#[test]
fn stop_freezes_and_cont_goes_on_without_a_gap() -> Result<()> {
    let (guest, mut qmp) = held("test=counter ms=1", &["-smp", "2"])?;
    guest.expect("count 20\r\n")?;
    for round in 0..20 {
        qmp.execute("stop", json!({}))?;
        guest.check(qmp.status()? == "paused", "not paused")?;
        let frozen = quiet(&guest).map_err(|e| Failure::new(format!("round {round}: {e}")))?;
        let last = counts_on(&guest, &frozen, 0)?;
        qmp.execute("cont", json!({}))?;
        guest.expect(&format!("count {}\r\n", last + 10))?;
    }
    let events = qmp.pending_events();
    let names: Vec<&str> = events.iter().filter_map(|event| event["event"].as_str()).collect();
    guest.check(names == ["STOP", "RESUME"].repeat(20), &format!("events {names:?}"))?;
    counts_on(&guest, &guest.console().text(), 0)?;
    guest.quit()
}

#[test]
fn stop_and_cont_under_a_flood_lose_no_byte() -> Result<()> {
    let (guest, mut qmp) = held("test=flood n=0", &["-smp", "2"])?;
    guest.expect("0123456789")?;
    for _ in 0..200 {
        qmp.execute("stop", json!({}))?;
        qmp.execute("cont", json!({}))?;
    }
    qmp.execute("quit", json!({}))?;
    guest.ends(0)?;
    let text = guest.console().text();
    let mut lines: Vec<&str> = text.split("\r\n").skip(1).collect();
    lines.pop();
    let torn = lines.iter().find(|line| line.len() != 62 || !line.starts_with("0123456789abcdef"));
    guest.check(torn.is_none(), &format!("of {} lines one is torn: {torn:?}", lines.len()))
}

#[test]
fn stop_and_cont_that_change_nothing_say_nothing() -> Result<()> {
    let (guest, mut qmp) = held("test=counter", &[])?;
    for command in ["cont", "stop", "stop", "cont", "cont"] {
        qmp.execute(command, json!({}))?;
    }
    let names: Vec<Value> = qmp.pending_events().iter().map(|event| event["event"].clone()).collect();
    guest.check(names == ["STOP", "RESUME"], &format!("{names:?}"))?;
    guest.quit()
}

#[test]
fn thirty_resets() -> Result<()> {
    let (guest, mut qmp) = held("test=counter ms=1", &["-smp", "2"])?;
    for _ in 0..30 {
        guest.expect("native guest: test=counter")?;
        guest.expect("count 1\r\n")?;
        qmp.execute("system_reset", json!({}))?;
        guest.event(&mut qmp, "RESET", &json!({"guest": false, "reason": "host-qmp-system-reset"}))?;
    }
    guest.expect("native guest: test=counter")?;
    guest.expect("count 3\r\n")?;
    guest.check(qmp.status()? == "running", "not running")?;
    guest.quit()
}

#[test]
fn resets_as_fast_as_they_are_asked_for() -> Result<()> {
    let (guest, mut qmp) = held("test=counter ms=1", &[])?;
    for _ in 0..30 {
        qmp.execute("system_reset", json!({}))?;
    }
    guest.check(qmp.status()? == "running", "not running")?;
    guest.console().take_new();
    guest.expect("count 5\r\n")?;
    guest.quit()
}

#[test]
fn a_reset_while_stopped_leads_to_prelaunch() -> Result<()> {
    let (guest, mut qmp) = held("test=counter ms=1", &[])?;
    guest.expect("count 10\r\n")?;
    qmp.execute("stop", json!({}))?;
    qmp.execute("system_reset", json!({}))?;
    guest.event(&mut qmp, "RESET", &json!({"guest": false, "reason": "host-qmp-system-reset"}))?;
    guest.check(qmp.status()? == "prelaunch", "not in run state prelaunch")?;
    std::thread::sleep(UNDER_WAY);
    guest.console().take_new();
    std::thread::sleep(UNDER_WAY);
    guest.check(guest.console().take_new().is_empty(), "the guest boots while it is stopped")?;
    qmp.execute("cont", json!({}))?;
    guest.expect("native guest: test=counter")?;
    guest.expect("count 1\r\n")?;
    guest.quit()
}

#[test]
fn a_reset_before_the_first_cont() -> Result<()> {
    let guest = Guest::boot("test=hello", &["-S"])?;
    let mut qmp = guest.qmp()?;
    for _ in 0..3 {
        qmp.execute("system_reset", json!({}))?;
    }
    guest.check(qmp.status()? == "prelaunch", "not in run state prelaunch")?;
    qmp.execute("cont", json!({}))?;
    guest.expect("done: hello")?;
    guest.check(guest.console().text().matches("native guest").count() == 1, "it booted more than once")?;
    guest.quit()
}

/// The guest resets itself by this route, three times.
fn resets_itself(by: &str) -> Result<()> {
    let (guest, mut qmp) = held(&format!("test=reset by={by}"), &["-smp", "2"])?;
    for _ in 0..3 {
        guest.expect(&format!("resetting by {by}"))?;
        guest.event(&mut qmp, "RESET", &json!({"guest": true, "reason": "guest-reset"}))?;
    }
    guest.expect("native guest: test=reset")?;
    guest.quit()
}

#[test]
fn the_guest_resets_by_port_cf9() -> Result<()> {
    resets_itself("cf9")
}

#[test]
fn the_guest_resets_by_the_keyboard_controller() -> Result<()> {
    resets_itself("i8042")
}

#[test]
fn the_guest_resets_by_the_acpi_register() -> Result<()> {
    resets_itself("acpi")
}

#[test]
fn the_guest_resets_by_a_triple_fault() -> Result<()> {
    resets_itself("triple")
}

#[test]
fn memory_survives_a_reset() -> Result<()> {
    let (guest, mut qmp) = held("test=keep", &[])?;
    guest.expect("mark found: false")?;
    guest.event(&mut qmp, "RESET", &json!({"guest": true, "reason": "guest-reset"}))?;
    guest.expect("mark found: true")?;
    guest.quit()
}

#[test]
fn power_off_ends_the_vm() -> Result<()> {
    let (guest, mut qmp) = held("test=poweroff", &[])?;
    guest.event(&mut qmp, "SHUTDOWN", &json!({"guest": true, "reason": "guest-shutdown"}))?;
    guest.ends(0)?;
    guest.check(guest.console().text().ends_with("powering off\r\n"), "its last words are not the last")
}

/// A service manager presses the power button by a signal to core, without QMP.
#[test]
fn sigpwr_presses_the_power_button() -> Result<()> {
    let (guest, mut qmp) = held("test=powerbutton", &[])?;
    let core = nix::unistd::Pid::from_raw(guest.process("core")?.pid);
    guest.expect("press the button")?;
    nix::sys::signal::kill(core, Signal::SIGPWR).map_err(|error| error.to_string())?;
    guest.event(&mut qmp, "POWERDOWN", &Value::Null)?;
    guest.expect("pressed, status=")?;
    guest.event(&mut qmp, "SHUTDOWN", &json!({"guest": true, "reason": "guest-shutdown"}))?;
    guest.ends(0)
}

#[test]
fn the_power_button_reaches_the_guest() -> Result<()> {
    let (guest, mut qmp) = held("test=powerbutton", &[])?;
    guest.expect("press the button")?;
    qmp.execute("system_powerdown", json!({}))?;
    guest.event(&mut qmp, "POWERDOWN", &Value::Null)?;
    guest.expect("pressed, status=")?;
    guest.event(&mut qmp, "SHUTDOWN", &json!({"guest": true, "reason": "guest-shutdown"}))?;
    guest.ends(0)
}

#[test]
fn an_nmi_reaches_the_guest() -> Result<()> {
    let (guest, mut qmp) = held("test=nmi n=3", &[])?;
    guest.expect("waiting for an NMI")?;
    for count in 1..=3 {
        qmp.execute("inject-nmi", json!({}))?;
        guest.expect(&format!("NMI {count}"))?;
    }
    guest.expect("done: nmi")?;
    guest.quit()
}

#[test]
fn an_internal_error_stops_until_a_reset() -> Result<()> {
    let (guest, mut qmp) = held("test=internal-error", &["-smp", "2"])?;
    for _ in 0..2 {
        guest.expect("derailing")?;
        guest.event(&mut qmp, "STOP", &Value::Null)?;
        let status = qmp.execute("query-status", json!({}))?;
        guest
            .check(status["status"] == "internal-error" && status["running"] == false, &status.to_string())?;
        let refused = qmp.try_execute("cont", json!({}))?.expect_err("cont out of an internal error");
        let expected = (refused.class.as_str(), refused.desc.as_str()) == ("GenericError", RESET_REQUIRED);
        guest.check(expected, &refused.to_string())?;
        qmp.execute("system_reset", json!({}))?;
        guest.check(qmp.status()? == "prelaunch", "a reset does not lead out")?;
        qmp.execute("cont", json!({}))?;
        guest.expect("native guest: test=internal-error")?;
    }
    guest.quit()
}

#[test]
fn quit_says_so() -> Result<()> {
    let (guest, mut qmp) = held("test=counter", &[])?;
    qmp.execute("quit", json!({}))?;
    guest.event(&mut qmp, "SHUTDOWN", &json!({"guest": false, "reason": "host-qmp-quit"}))?;
    guest.ends(0)
}

#[test]
fn quit_of_a_held_and_of_a_stopped_vm() -> Result<()> {
    Guest::boot("test=hello", &["-S"])?.quit()?;
    let (guest, mut qmp) = held("test=counter", &[])?;
    qmp.execute("stop", json!({}))?;
    qmp.execute("quit", json!({}))?;
    guest.ends(0)
}

/// The launcher gets `signal` in full run and, another one, while the guest is stopped.
fn signalled(signal: Signal) -> Result<()> {
    for stopped in [false, true] {
        let (mut guest, mut qmp) = held("test=counter", &[])?;
        guest.expect("count 2")?;
        if stopped {
            qmp.execute("stop", json!({}))?;
        }
        guest.vm().signal(signal)?;
        guest.event(&mut qmp, "SHUTDOWN", &json!({"guest": false, "reason": "host-signal"}))?;
        guest.ends(0)?;
        guest.said(&["terminating on signal", &format!("{}", std::process::id())])?;
    }
    Ok(())
}

#[test]
fn sigterm_ends_the_vm_well() -> Result<()> {
    signalled(Signal::SIGTERM)
}

#[test]
fn sigint_ends_the_vm_well() -> Result<()> {
    signalled(Signal::SIGINT)
}

/// Seconds since 1970 of a civil time in UTC (days by Fliegel and Van Flandern).
fn seconds(text: &str) -> Option<i64> {
    let numbers: Vec<i64> = text.trim().split(['-', ' ', ':']).filter_map(|part| part.parse().ok()).collect();
    let [year, month, day, hour, minute, second] = numbers[..] else { return None };
    let shift = (month - 14) / 12;
    let julian = day - 32075 + 1461 * (year + 4800 + shift) / 4 + 367 * (month - 2 - shift * 12) / 12
        - 3 * ((year + 4900 + shift) / 100) / 4;
    Some((julian - 2_440_588) * 86400 + hour * 3600 + minute * 60 + second)
}

#[test]
fn the_clock_is_right() -> Result<()> {
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs());
    let now = || i64::try_from(now()).unwrap_or(0);
    let before = now();
    let guest = Guest::boot("test=rtc seconds=1", &[])?;
    let first = seconds(&guest.line("rtc ")?);
    let second = seconds(&guest.line("rtc ")?);
    let after = now();
    let right = |time: Option<i64>| time.is_some_and(|time| (before - 1..=after + 1).contains(&time));
    guest.check(right(first) && right(second), &format!("{first:?}, {second:?} not in {before}..{after}"))?;
    guest.quit()
}

#[test]
fn the_pm_timer_runs() -> Result<()> {
    let guest = Guest::boot("test=pmtimer", &[])?;
    let line = guest.line("pmtimer port=")?;
    guest.check(line.contains("monotonic=true"), &line)?;
    guest.quit()
}

#[test]
fn what_nobody_claims_reads_all_ones() -> Result<()> {
    for port in [0x5658, 0xfff8, 0x1f0, 0xcf8] {
        let guest = Guest::boot(&format!("test=unclaimed port={port}"), &[])?;
        guest.expect(&format!("port {port:#x}: 0xff 0xffff 0xffffffff\r\n"))?;
        guest.expect("mmio 0xd0000000: 0xffffffff\r\n")?;
        guest.expect("done: unclaimed")?;
        guest.quit()?;
    }
    Ok(())
}

#[test]
fn the_serial_port_interrupts() -> Result<()> {
    let mut guest = Setup::new("test=irq", &[]).start()?;
    guest.expect("transmitter interrupt: true")?;
    guest.expect("send a line")?;
    guest.vm().type_in("a line\r")?;
    guest.console().expect("received 7 bytes", SOON)?;
    guest.quit()
}
