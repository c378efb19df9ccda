//! A guest that uses memory that it has given to the balloon: the limit of its slice holds, and nobody else notices.

use std::fs;
use std::time::Duration;

use bulkhead_framework::Result;

use super::super::Journal;
use super::super::debian::{BOOT, SOON};
use super::super::units::{UnitVm, check, tool, wait_for};

/// What the slice of the guest that cheats may use, in bytes. It has more memory than that.
const LIMIT: u64 = 130 << 20;
const LIMITS: &str = "MemoryMax = \"130M\"\nMemorySwapMax = 0\n";
/// The native guest, with a balloon.
const CHEAT: &str = "m = \"224M\"\nappend = \"test=balloon-cheat\"\n\
    device = [{ driver = \"virtio-balloon-pci\", id = \"b0\" }]\n[limits]\n";

/// A number that the kernel keeps for a VM's slice.
fn counted(name: &str, file: &str, key: &str) -> Option<u64> {
    let path = format!("/sys/fs/cgroup/bulkhead.slice/bulkhead-{name}.slice/{file}");
    let text = fs::read_to_string(path).ok()?;
    let line = text.lines().find(|line| line.starts_with(key))?;
    line.split_whitespace().last()?.parse().ok()
}

pub fn run(journal: &mut Journal) -> Result<()> {
    let mut neighbour = UnitVm::install("vm2", "")?;
    let mut cheat = UnitVm::install("vm1", "")?;
    fs::write("/etc/bulkhead/vm1.toml", format!("{CHEAT}{LIMITS}"))?;
    tool(&["systemctl", "daemon-reload"])?;
    tool(&["systemctl", "start", &neighbour.target()])?;
    neighbour.attach(journal)?;
    neighbour.wait_for_user_space()?;
    tool(&["systemctl", "start", &cheat.target()])?;
    cheat.attach(journal)?;
    cheat.serial.expect("gave ", BOOT)?;
    let core = cheat.service("core");
    let mut peak = 0;
    let result = wait_for("the limit", BOOT, || {
        // Gone with the last process of the slice.
        peak = counted("vm1", "memory.peak", "").unwrap_or_default().max(peak);
        let result = tool(&["systemctl", "show", "--value", "--property=Result", &core]).ok()?;
        (result != "success").then_some(result)
    })?;
    check(result == "oom-kill", || format!("core ended with {result}"))?;
    check(peak > LIMIT / 2 && peak <= LIMIT, || format!("the slice has used up to {peak} bytes of {LIMIT}"))?;
    check(neighbour.ask("echo still here", SOON)? == "still here", || "the neighbour is gone".to_owned())?;
    let hit = counted("vm2", "memory.events", "oom_kill");
    check(hit == Some(0), || format!("{hit:?} processes of the neighbour were killed"))?;
    let stalled = counted("vm2", "memory.pressure", "full").unwrap_or_default();
    check(Duration::from_micros(stalled) < SOON, || format!("the neighbour waited {stalled} us for memory"))
}
