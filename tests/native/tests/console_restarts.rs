//! The console is killed again and again while the guest runs on and its serial port is in use.

use std::io::{Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use bulkhead_framework::{Failure, Result, Transcript};
use bulkhead_native_tests::{Guest, SOON, Setup, eventually, slowness};
use serde_json::{Value, json};

/// What the port's FIFO holds: no more may be lost or come twice at a death.
const FIFO: usize = 16;
/// So many bytes that follow tell where the stream goes on.
const ENOUGH: usize = 40;

/// Kills the console `times` times, `pause` apart; the launcher starts ten in a second without a pause.
fn kill_often(guest: &Guest, times: usize, pause: Duration) -> Result<()> {
    let mut former = 0;
    for _ in 0..times {
        let pid = eventually("the next console", SOON, || match guest.trace().find("bulkhead-consol") {
            Some(process) if process.pid != former => Ok(process.pid),
            _ => Err("none".to_owned()),
        })?;
        std::thread::sleep(pause * slowness());
        bulkhead_native_tests::kill_pid(pid)?;
        former = pid;
    }
    // It is there again.
    eventually("the next console", SOON, || match guest.trace().find("bulkhead-consol") {
        Some(process) if process.pid != former => Ok(()),
        _ => Err("none".to_owned()),
    })
}

/// What became of a stream.
#[derive(Debug, Default)]
struct Damage {
    /// Bytes that are missing, by place.
    lost: Vec<usize>,
    /// Bytes that came twice, by place.
    doubled: Vec<usize>,
    /// Bytes of the expected stream that were gone through.
    length: usize,
}

/// Goes through `got` along `expected`.
fn compare(expected: &[u8], got: &[u8]) -> std::result::Result<Damage, String> {
    let mut damage = Damage::default();
    let (mut at, mut place) = (0, 0);
    while place + ENOUGH < got.len() && at + ENOUGH < expected.len() {
        if expected.get(at) == got.get(place) {
            (at, place) = (at + 1, place + 1);
            continue;
        }
        let goes_on = |from: usize| expected.get(from..from + ENOUGH) == got.get(place..place + ENOUGH);
        // The difference shows itself up to a period of the text after it began.
        if let Some(lost) = (1..=FIFO).find(|lost| goes_on(at + lost)) {
            damage.lost.push(lost);
            at += lost;
        } else if let Some(doubled) = (1..=FIFO).find(|doubled| at.checked_sub(*doubled).is_some_and(goes_on))
        {
            damage.doubled.push(doubled);
            at -= doubled;
        } else {
            let shown = |bytes: &[u8], at: usize| {
                let from = at.saturating_sub(60);
                String::from_utf8_lossy(bytes.get(from..(at + 60).min(bytes.len())).unwrap_or_default())
                    .into_owned()
            };
            return Err(format!("{:?} instead of {:?}", shown(got, place), shown(expected, at)));
        }
    }
    damage.length = at;
    Ok(damage)
}

/// `count 1`, `count 2`, ...
fn counted(length: usize) -> Vec<u8> {
    let mut text = Vec::new();
    for n in 1.. {
        if text.len() > length + 1000 {
            break;
        }
        text.extend(format!("count {n}\r\n").bytes());
    }
    text
}

/// By how much less may come on an emulated processor.
fn paced() -> usize {
    if slowness() > 1 { 100 } else { 1 }
}

/// Compares what came from `test=counter` with what it says, within the bounds for so many deaths.
fn check_count(guest: &Guest, text: &str, deaths: usize) -> Result<Damage> {
    let start = text.find("count 1\r\n").unwrap_or_default();
    let got = text.as_bytes().get(start..).unwrap_or_default();
    let damage = compare(&counted(got.len()), got).map_err(|error| guest.explain(Failure::new(error)))?;
    println!(
        "{} bytes, {deaths} deaths: {:?} lost, {:?} doubled",
        damage.length, damage.lost, damage.doubled
    );
    guest.check(damage.length > 1000 / paced(), "too little came")?;
    guest.check(damage.lost.len() + damage.doubled.len() <= deaths, "more damage than deaths")?;
    Ok(damage)
}

fn socket() -> Setup {
    Setup::new("test=counter ms=1", &["-S", "-serial", "unix:s.sock,server=on,wait=off"])
        .with(|vm| vm.without_serial())
}

fn connect(guest: &Guest) -> Result<UnixStream> {
    let path = guest.trace().dir().join("s.sock");
    let stream = eventually("a serial socket", SOON, || {
        UnixStream::connect(&path).map_err(|error| error.to_string())
    })?;
    stream.set_read_timeout(Some(SOON))?;
    Ok(stream)
}

/// Waits until the console talks to its client.
fn is_served(guest: &Guest) -> Result<()> {
    let mut qmp = guest.qmp()?;
    eventually("the client's turn", SOON, || {
        let listed = qmp.execute("query-chardev", json!({})).map_err(|failure| failure.to_string())?;
        if listed.to_string().contains("disconnected") { Err(listed.to_string()) } else { Ok(()) }
    })
}

#[test]
fn a_client_of_the_serial_port_does_not_notice() -> Result<()> {
    let guest = socket().start()?;
    let client = connect(&guest)?;
    let heard = Transcript::of("serial socket", client.try_clone()?);
    is_served(&guest)?;
    let mut qmp = guest.qmp()?;
    qmp.execute("cont", json!({}))?;
    heard.expect("count 20\r\n", SOON)?;
    kill_often(&guest, 40, Duration::from_millis(97))?;
    heard.take_new();
    heard.expect("\r\ncount ", SOON).map_err(|failure| guest.explain(failure))?;
    guest.check(qmp.status()? == "running", "not running")?;
    check_count(&guest, &heard.text(), 40)?;
    drop(client);
    guest.quit()
}

#[test]
fn a_terminals_output_goes_on() -> Result<()> {
    let guest = Guest::boot("test=counter ms=1", &[])?;
    guest.expect("count 20\r\n")?;
    kill_often(&guest, 30, Duration::from_millis(103))?;
    guest.console().take_new();
    guest.expect("\r\ncount ")?;
    check_count(&guest, &guest.console().text(), 30)?;
    guest.quit()
}

/// At full speed, where output is collected and waits.
#[test]
fn a_flood_of_output_loses_no_more_than_a_fifo_at_a_death() -> Result<()> {
    let setup = Setup::new("test=flood n=0", &["-S", "-serial", "unix:s.sock,server=on,wait=off"]);
    let guest = setup.with(|vm| vm.without_serial()).start()?;
    let mut client = connect(&guest)?;
    is_served(&guest)?;
    guest.qmp()?.execute("cont", json!({}))?;
    let killer = std::thread::scope(|scope| -> Result<Vec<u8>> {
        let killed =
            scope.spawn(|| kill_often(&guest, 40, Duration::from_millis(101)).map_err(|f| f.to_string()));
        let mut got = Vec::new();
        let mut buffer = [0; 65536];
        while !killed.is_finished() {
            let count = client.read(&mut buffer)?;
            guest.check(count > 0, "the connection is closed")?;
            got.extend(buffer.iter().take(count));
        }
        killed.join().map_err(|_| "a panic")??;
        Ok(got)
    })?;
    let line = b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ\r\n";
    let start = killer.windows(line.len()).position(|window| window == line).unwrap_or_default();
    let got = killer.get(start..).unwrap_or_default();
    let expected = line.repeat(got.len() / line.len() + 100);
    let damage = compare(&expected, got).map_err(|error| guest.explain(Failure::new(error)))?;
    println!("{} bytes: {:?} lost, {:?} doubled", damage.length, damage.lost, damage.doubled);
    guest.check(damage.length > 100_000 / paced(), "too little came")?;
    guest.check(damage.lost.len() + damage.doubled.len() <= 40, "more damage than deaths")?;
    guest.quit()
}

#[test]
fn input_goes_on() -> Result<()> {
    let setup = Setup::new("test=echo", &["-S", "-serial", "unix:s.sock,server=on,wait=off"]);
    let guest = setup.with(|vm| vm.without_serial()).start()?;
    let mut client = connect(&guest)?;
    is_served(&guest)?;
    guest.qmp()?.execute("cont", json!({}))?;
    let heard = Transcript::of("serial socket", client.try_clone()?);
    heard.expect("ready\r\n", SOON)?;
    let mut sent = Vec::new();
    std::thread::scope(|scope| -> Result<()> {
        let killed =
            scope.spawn(|| kill_often(&guest, 25, Duration::from_millis(99)).map_err(|f| f.to_string()));
        for n in 0.. {
            if killed.is_finished() {
                break;
            }
            let word = format!("word {n}; ");
            client.write_all(word.as_bytes())?;
            sent.extend(word.bytes());
            std::thread::sleep(Duration::from_millis(2));
        }
        killed.join().map_err(|_| "a panic")??;
        Ok(())
    })?;
    let last = "and this is the last of all the words that are said here; none of them comes after it.";
    client.write_all(last.as_bytes())?;
    sent.extend(last.bytes());
    sent.extend([b' '; 2 * ENOUGH]);
    heard.expect("comes after it.", SOON * slowness()).map_err(|failure| guest.explain(failure))?;
    let text = heard.text();
    let got = text.split_once("ready\r\n").map_or("", |(_, rest)| rest);
    let damage = compare(&sent, got.as_bytes()).map_err(|error| guest.explain(Failure::new(error)))?;
    println!("{} bytes: {:?} lost, {:?} doubled", damage.length, damage.lost, damage.doubled);
    // At a death a piece of input may be lost and a piece of the echo come twice.
    guest.check(damage.lost.len() + damage.doubled.len() <= 50, "more damage than deaths")?;
    guest.quit()
}

#[test]
fn stop_cont_and_reset_go_through() -> Result<()> {
    let guest = Guest::boot("test=counter ms=1", &["-smp", "2"])?;
    let mut qmp = guest.running()?;
    guest.expect("count 20\r\n")?;
    std::thread::scope(|scope| -> Result<()> {
        let killed =
            scope.spawn(|| kill_often(&guest, 40, Duration::from_millis(89)).map_err(|f| f.to_string()));
        let mut rounds = 0;
        while !killed.is_finished() {
            qmp.execute("stop", json!({}))?;
            let status = qmp.status()?;
            guest.check(status == "paused", &format!("round {rounds}: {status}"))?;
            qmp.execute("cont", json!({}))?;
            if rounds % 7 == 6 {
                qmp.execute("system_reset", json!({}))?;
            }
            rounds += 1;
            std::thread::sleep(Duration::from_millis(11));
        }
        println!("{rounds} rounds");
        killed.join().map_err(|_| "a panic")??;
        Ok(())
    })?;
    qmp.execute("system_reset", json!({}))?;
    guest.console().take_new();
    guest.expect("count 10\r\n")?;
    guest.check(qmp.status()? == "running", "not running")?;
    // The power button works, too.
    qmp.execute("system_powerdown", json!({}))?;
    guest.event(&mut qmp, "POWERDOWN", &Value::Null)?;
    guest.quit()
}

#[test]
fn a_held_machine_survives_its_console() -> Result<()> {
    let guest = Guest::boot("test=hello", &["-S"])?;
    let mut qmp = guest.qmp()?;
    guest.check(qmp.status()? == "prelaunch", "not held")?;
    kill_often(&guest, 5, Duration::from_millis(20))?;
    guest.check(qmp.status()? == "prelaunch", "not held any more")?;
    qmp.execute("cont", json!({}))?;
    guest.expect("done: hello")?;
    guest.quit()
}

#[test]
fn the_time_until_the_next_console_serves() -> Result<()> {
    let guest = Guest::boot("test=counter ms=1", &[])?;
    guest.expect("count 20\r\n")?;
    for round in 0..9 {
        let former = guest.process("consol")?.pid;
        guest.console().take_new();
        let began = Instant::now();
        bulkhead_native_tests::kill_pid(former)?;
        guest.expect("\r\ncount ")?;
        println!("round {round}: output again after {:.1} ms", began.elapsed().as_secs_f64() * 1e3);
        guest.check(began.elapsed() < Duration::from_secs(2), "slow")?;
        eventually("the next console", SOON, || match guest.trace().find("bulkhead-consol") {
            Some(process) if process.pid != former => Ok(()),
            _ => Err("none".to_owned()),
        })?;
    }
    guest.quit()
}

/// Killed before its first READY the console ends the VM; killed after it, the next one serves.
#[test]
fn a_console_killed_at_the_start_ends_the_vm_or_is_started_again() -> Result<()> {
    for round in 0..10 {
        let mut guest = Guest::boot("test=counter ms=1", &[])?;
        guest.kill("consol")?;
        let served = eventually("an end or output", SOON, || {
            let running = guest.vm().child().is_running();
            match guest.console().text().contains("count 20") {
                true => Ok(true),
                false if !running => Ok(false),
                false => Err("neither".to_owned()),
            }
        })?;
        let ended = if served { guest.quit() } else { guest.ends(1) };
        ended.map_err(|failure| failure.context(format!("round {round}, served: {served}")))?;
    }
    Ok(())
}

#[test]
fn the_power_button_is_not_lost() -> Result<()> {
    for round in 0..12 {
        let guest = Guest::boot("test=powerbutton", &[])?;
        let mut qmp = guest.running()?;
        guest.expect("test=powerbutton")?;
        std::thread::sleep(Duration::from_millis(100));
        let held = round % 2 == 1;
        if held {
            // Its interrupt is held until the machine goes on.
            qmp.execute("stop", json!({}))?;
        } else {
            guest.kill("consol")?;
        }
        // One that was under way to a dying console is not repeated: its client is told.
        eventually("a press of the button", SOON, || {
            qmp.execute("system_powerdown", json!({})).map_err(|failure| failure.to_string())
        })?;
        if held {
            guest.kill("consol")?;
            qmp.execute("cont", json!({}))?;
        }
        guest.ends(0).map_err(|failure| failure.context(format!("round {round}")))?;
    }
    Ok(())
}

#[test]
fn a_guest_that_resets_itself_goes_on() -> Result<()> {
    for by in ["cf9", "i8042", "acpi"] {
        let guest = Guest::boot(&format!("test=reset by={by}"), &[])?;
        guest.expect("resetting by")?;
        kill_often(&guest, 12, Duration::from_millis(97))?;
        for _ in 0..2 {
            guest.console().take_new();
            guest.expect("resetting by").map_err(|failure| failure.context(by))?;
        }
        guest.quit()?;
    }
    Ok(())
}

#[test]
fn broker_and_console_may_die_together() -> Result<()> {
    let guest = Guest::boot("test=counter ms=1", &[])?;
    guest.expect("count 20\r\n")?;
    for round in 0..10 {
        for name in if round % 2 == 0 { ["broker", "consol"] } else { ["consol", "broker"] } {
            guest.kill(name)?;
        }
        let mut qmp = guest.qmp()?;
        let status = qmp.status()?;
        guest.check(status == "running", &format!("round {round}: {status}"))?;
        let chardevs = eventually("the console", SOON, || {
            let answer = qmp.execute("query-chardev", json!({}));
            answer.map_err(|failure| failure.to_string())
        })?;
        guest.check(chardevs.to_string().contains("serial0"), "no serial0")?;
        guest.console().take_new();
        guest.expect("\r\ncount ")?;
        // Ten starts of one compartment in a second are free.
        std::thread::sleep(Duration::from_millis(100));
    }
    guest.quit()
}

#[test]
fn the_first_client_is_waited_for_by_the_next_console_too() -> Result<()> {
    let setup = Setup::new("test=counter ms=1", &["-serial", "unix:s.sock,server=on,wait=on"]);
    let guest = setup.with(|vm| vm.without_serial()).start()?;
    let mut qmp = guest.qmp()?;
    kill_often(&guest, 4, Duration::from_millis(60))?;
    guest.check(qmp.status()? == "prelaunch", "it did not wait")?;
    let client = connect(&guest)?;
    let heard = Transcript::of("serial socket", client.try_clone()?);
    heard.expect("count 20\r\n", SOON).map_err(|failure| guest.explain(failure))?;
    // Nobody is waited for a second time.
    client.shutdown(Shutdown::Both)?;
    kill_often(&guest, 2, Duration::from_millis(60))?;
    let next = Transcript::of("serial socket", connect(&guest)?);
    next.expect("\r\ncount ", SOON).map_err(|failure| guest.explain(failure))?;
    guest.quit()
}
