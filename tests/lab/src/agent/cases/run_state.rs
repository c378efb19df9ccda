//! stop, cont, -S and quit.

use std::time::{Duration, Instant};

use bulkhead_framework::{Result, descendants};
use serde_json::json;

use super::super::Journal;
use super::super::debian::{Debian, SOON};

/// How long the guest stays stopped.
const PAUSE: Duration = Duration::from_secs(2);

/// How much of the pause the guest may see: the time between the readings and the commands.
const SEEN: Duration = Duration::from_secs(1);

pub fn stop_cont(journal: &mut Journal) -> Result<()> {
    let mut guest = Debian::boot(journal, &["-m", "256M"], "")?;
    guest.shell("(n=0; while usleep 20000; do n=$((n + 1)); echo tick $n; done) &")?;
    guest.expect("tick 3")?;
    guest.command("stop")?;
    guest.qmp.event("STOP", SOON)?;
    guest.check_status("paused")?;
    // What the guest wrote before `stop` may still be on its way here; the ticks would go on for good.
    let start = Instant::now();
    let mut frozen = guest.vm.console().take_new();
    std::thread::sleep(PAUSE / 4);
    frozen.push_str(&guest.vm.console().take_new());
    std::thread::sleep(PAUSE * 3 / 4);
    let late = guest.vm.console().take_new();
    guest.check(
        late.is_empty(),
        &format!("the guest goes on while it is stopped: {late:?} after {frozen:?}"),
    )?;
    guest.command("cont")?;
    guest.qmp.event("RESUME", SOON)?;
    guest.check_status("running")?;
    guest.expect("tick")?;
    guest.shell("kill %1 2>/dev/null || kill $!")?;
    check_clock_stands(&mut guest)?;
    guest.check(start.elapsed() > PAUSE, "the pause was too short to show anything")?;
    guest.command("quit")?;
    guest.ends()
}

/// The guest's monotonic clock does not count a pause, as under QEMU with kvm-clock.
fn check_clock_stands(guest: &mut Debian) -> Result<()> {
    let uptime = "cut -d. -f1 /proc/uptime";
    let before = guest.ask_number(uptime)?;
    let start = Instant::now();
    guest.command("stop")?;
    std::thread::sleep(PAUSE * 2);
    guest.command("cont")?;
    let seen = guest.ask_number(uptime)?.saturating_sub(before);
    let source = guest.ask("cat /sys/devices/system/clocksource/clocksource0/current_clocksource")?;
    let passed = start.elapsed();
    let message = format!("a pause of {:?} in {passed:?} is {seen} s to the guest with {source}", PAUSE * 2);
    guest.check(Duration::from_secs(seen) <= passed.saturating_sub(PAUSE * 2) + SEEN, &message)
}

pub fn start_paused(journal: &mut Journal) -> Result<()> {
    let mut guest = Debian::start(journal, &["-m", "256M", "-S"], "")?;
    guest.check_status("prelaunch")?;
    let early = guest.vm.console().text();
    guest.check(early.is_empty(), &format!("the guest runs before cont: {early:?}"))?;
    guest.command("cont")?;
    guest.qmp.event("RESUME", SOON)?;
    guest.wait_for_user_space()?;
    guest.check_status("running")?;
    guest.command("quit")?;
    guest.ends()
}

pub fn quit(journal: &mut Journal) -> Result<()> {
    let mut guest = Debian::boot(journal, &["-m", "256M"], "")?;
    let processes = guest.vm.processes()?;
    guest.check(!processes.is_empty(), "the VM has no processes")?;
    guest.command("quit")?;
    guest.event("SHUTDOWN", &json!({"guest": false, "reason": "host-qmp-quit"}))?;
    guest.ends()?;
    let own = i32::try_from(std::process::id()).unwrap_or(0);
    let left: Vec<String> = descendants(own)?.into_iter().map(|process| process.name).collect();
    guest.check(left.is_empty(), &format!("processes outlive the VM: {left:?}"))?;
    for process in processes {
        let path = format!("/proc/{}", process.pid);
        guest.check(!std::path::Path::new(&path).exists(), &format!("{} outlives the VM", process.name))?;
    }
    guest.check(!guest.vm.dir().join("q.sock").exists(), "the QMP socket outlives the VM")
}
