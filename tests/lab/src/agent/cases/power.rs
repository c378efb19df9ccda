//! Reset, power-off, the power button and panics.

use bulkhead_framework::Result;
use serde_json::json;

use super::super::Journal;
use super::super::debian::{Debian, SOON, watch_button};

pub fn reset(journal: &mut Journal) -> Result<()> {
    let mut guest = Debian::boot(journal, &["-m", "256M"], "")?;
    guest.command("system_reset")?;
    guest.event("RESET", &json!({"guest": false, "reason": "host-qmp-system-reset"}))?;
    guest.wait_for_user_space()?;
    guest.check_status("running")?;
    guest.shell("reboot -f")?;
    guest.event("RESET", &json!({"guest": true, "reason": "guest-reset"}))?;
    guest.wait_for_user_space()?;
    let answer = guest.ask("echo $((6 * 7))")?;
    guest.check(answer == "42", "no shell after the second reset")?;
    guest.command("quit")?;
    guest.ends()
}

pub fn panic(journal: &mut Journal) -> Result<()> {
    let mut guest = Debian::boot(journal, &["-m", "256M"], "panic=-1")?;
    guest.shell("echo c > /proc/sysrq-trigger")?;
    guest.event("RESET", &json!({"guest": true, "reason": "guest-reset"}))?;
    guest.wait_for_user_space()?;
    guest.shell("echo 0 > /proc/sys/kernel/panic; echo c > /proc/sysrq-trigger")?;
    guest.expect("end Kernel panic")?;
    // The processor spins in the panic handler: nothing more happens, and the VM still obeys.
    guest.check_status("running")?;
    guest.command("system_reset")?;
    guest.event("RESET", &json!({"guest": false, "reason": "host-qmp-system-reset"}))?;
    guest.wait_for_user_space()?;
    guest.command("quit")?;
    guest.ends()
}

pub fn button(journal: &mut Journal) -> Result<()> {
    let mut guest = Debian::boot(journal, &["-m", "256M"], "")?;
    let devices = guest.ask_number("ls /dev/input/event* | wc -l")?;
    guest.check(devices > 0, "the guest has no input device")?;
    watch_button(&mut guest.vm)?;
    guest.command("system_powerdown")?;
    guest.qmp.event("POWERDOWN", SOON)?;
    guest.expect("KEY_POWER pressed")?;
    guest.event("SHUTDOWN", &json!({"guest": true, "reason": "guest-shutdown"}))?;
    guest.ends()
}

pub fn off(journal: &mut Journal) -> Result<()> {
    let mut guest = Debian::boot(journal, &["-m", "256M"], "")?;
    guest.shell("poweroff -f")?;
    guest.event("SHUTDOWN", &json!({"guest": true, "reason": "guest-shutdown"}))?;
    guest.ends()
}

pub fn no_reboot(journal: &mut Journal) -> Result<()> {
    let mut guest = Debian::boot(journal, &["-m", "256M", "-no-reboot"], "")?;
    guest.shell("reboot -f")?;
    guest.event("SHUTDOWN", &json!({"guest": true, "reason": "guest-reset"}))?;
    guest.ends()
}
