//! Memory that the guest gives through the balloon is the host's again, over deaths of the processes on the way.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::time::{Duration, Instant};

use bulkhead_framework::{Failure, Result};
use bulkhead_native_tests::{Guest, SOON, eventually, slowness};
use serde_json::{Value, json};

const RAM: u64 = 256 << 20;
const PAGE: u64 = 4096;
/// How long one death in a hundred may stall the guest.
const STALL: Duration = Duration::from_secs(1);
const ARGS: [&str; 4] = ["-m", "256M", "-device", "virtio-balloon-pci,id=b0"];

/// Pages of guest RAM that take up room on the host.
fn held(guest: &Guest) -> Result<u64> {
    let core = guest.process("core")?.pid;
    for entry in fs::read_dir(format!("/proc/{core}/fd"))? {
        let path = entry?.path();
        if fs::read_link(&path).is_ok_and(|to| to.to_string_lossy().starts_with("/memfd:ram-low")) {
            return Ok(fs::metadata(path)?.blocks() * 512 / PAGE);
        }
    }
    Err(Failure::new("core has no guest RAM"))
}

/// A number in front of this word, in a line of the guest's.
fn number(line: &str, word: &str) -> Result<u64> {
    let before = line.split(word).next().unwrap_or_default();
    let number = before.split_whitespace().last().and_then(|text| text.parse().ok());
    number.ok_or_else(|| Failure::new(format!("no number before {word:?} in {line:?}")))
}

#[test]
fn given_memory_is_the_hosts_again() -> Result<()> {
    let guest = Guest::boot("test=balloon-hold", &[&ARGS[..], &["-S"]].concat())?;
    let mut qmp = guest.qmp()?;
    let all = qmp.execute("query-balloon", json!({}))?;
    guest.check(all == json!({"actual": RAM}), &format!("{all}"))?;
    qmp.execute("cont", json!({}))?;
    let touched = number(&guest.line("touched ")?, "pages")?;
    let gave = number(&guest.line("gave ")?, "pages")?;
    guest.check(gave == touched / 2 && gave > 10_000, &format!("gave {gave} of {touched} pages"))?;
    let held = held(&guest)?;
    // The program and its rings take up less than the rest of memory, below what is touched.
    let most = (64 << 20) / PAGE + touched - gave;
    guest.check(
        held >= touched - gave && held <= most,
        &format!("{held} pages are held, at most {most} are in use"),
    )?;
    let actual = RAM - gave * PAGE;
    let event = qmp.event("BALLOON_CHANGE", SOON)?;
    // At most one a second: the first one may be of a part of it.
    guest.check(event["data"]["actual"].as_u64().is_some_and(|now| now >= actual), &format!("{event}"))?;
    eventually("what the guest has", SOON, || {
        let now = qmp.execute("query-balloon", json!({})).map_err(|failure| failure.to_string())?;
        if now == json!({"actual": actual}) { Ok(()) } else { Err(now.to_string()) }
    })?;
    guest.quit()
}

/// The balloon is killed again and again, now and then pci or the broker, while the guest gives memory and takes it back.
#[test]
fn deaths_on_the_way_lose_no_page() -> Result<()> {
    let guest = Guest::boot("test=balloon", &ARGS)?;
    let mut qmp = guest.running()?;
    qmp.execute("balloon", json!({"value": RAM / 2}))?;
    guest.expect("round 1:")?;
    let mut stalls = Vec::new();
    for round in 0..120 / slowness() {
        let part = match round % 12 {
            10 => "pci",
            11 => "broker",
            _ => "balloon",
        };
        guest.kill(part)?;
        let began = Instant::now();
        guest.console().take_new();
        guest.expect("took back ")?;
        stalls.push(began.elapsed());
        // No faster than processes are started again.
        std::thread::sleep(Duration::from_millis(80));
    }
    stalls.sort_unstable();
    let count = stalls.len();
    let [p50, p99, longest] =
        [count / 2, count * 99 / 100 - 1, count - 1].map(|at| stalls.get(at).copied().unwrap_or_default());
    println!(
        "{count} deaths: the next round ends after: p50 {p50:.0?}, p99 {p99:.0?}, longest {longest:.0?}"
    );
    // Half of them say how fast the machine is.
    let most = STALL.max(10 * p50);
    guest.check(p99 < most, &format!("a death in a hundred takes {p99:?}"))?;
    let text = guest.console().text();
    let wrong: Vec<&str> = text
        .lines()
        .filter(|line| line.contains("took back") && !line.ends_with(" 0 of the others lost, 0 lost"))
        .collect();
    guest.check(wrong.is_empty(), &format!("{wrong:?}"))?;
    drop(qmp);
    let mut qmp = guest.qmp()?;
    let status = qmp.status()?;
    guest.check(status == "running", &status)?;
    let actual = qmp.execute("query-balloon", json!({}))?;
    guest.check(actual.get("actual").and_then(Value::as_u64).is_some(), &format!("{actual}"))?;
    guest.quit()
}
