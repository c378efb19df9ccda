//! stop, cont, -S and quit.

use std::time::{Duration, Instant};

use bulkhead_framework::{Result, descendants};
use serde_json::json;

use super::super::Journal;
use super::super::debian::{Debian, SOON};

/// How long the guest stays stopped.
const PAUSE: Duration = Duration::from_secs(3);

/// How much of what the guest wrote before `stop` may come later: all that comes within this time.
const UNDER_WAY: Duration = Duration::from_millis(500);

/// Reads the guest's monotonic clock in hundredths of a second.
const UPTIME: &str = "cut -d' ' -f1 /proc/uptime | tr -d .";

pub fn stop_cont(journal: &mut Journal) -> Result<()> {
    let mut guest = Debian::boot(journal, &["-m", "256M"], "")?;
    guest.shell("(n=0; while usleep 20000; do n=$((n + 1)); echo tick $n; done) &")?;
    guest.expect("tick 3")?;
    let start = Instant::now();
    let before = guest.ask_number(UPTIME)?;
    guest.command("stop")?;
    guest.qmp.event("STOP", SOON)?;
    guest.check_status("paused")?;
    // A guest that is not frozen would tick every 20 ms.
    std::thread::sleep(UNDER_WAY);
    guest.vm.console().take_new();
    std::thread::sleep(PAUSE - UNDER_WAY);
    let late = guest.vm.console().take_new();
    guest.check(late.is_empty(), &format!("the guest goes on while it is stopped: {late:?}"))?;
    guest.command("cont")?;
    guest.qmp.event("RESUME", SOON)?;
    guest.check_status("running")?;
    guest.expect("tick")?;
    // As under QEMU with kvm-clock, a pause does not count for the guest.
    let seen = Duration::from_millis(10 * guest.ask_number(UPTIME)?.saturating_sub(before));
    let passed = start.elapsed();
    let source = guest.ask("cat /sys/devices/system/clocksource/clocksource0/current_clocksource")?;
    let message = format!("of {passed:?} with a pause of {PAUSE:?} the guest's {source} counts {seen:?}");
    guest.check(seen + PAUSE <= passed + Duration::from_millis(20), &message)?;
    guest.command("quit")?;
    guest.ends()
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
