//! Reset, power-off, the power button and panics.

use bulkhead_framework::Result;
use serde_json::json;

use super::super::Journal;
use super::super::debian::Debian;

/// Reads the next event of every input device and powers off when it is KEY_POWER pressed: 24 bytes, at the end
/// type 1, code 116 (hexadecimal 74), value 1.
const WAIT_FOR_BUTTON: &str = "for e in /dev/input/event*; do \
    (dd if=$e bs=24 count=1 2>/dev/null | hexdump -v -e '12/2 \"%04x \"' | grep -q '0001 0074 0001 0000' && \
    echo KEY_POWER pressed && poweroff -f) & done";

/// Waits until all input devices are being read.
const BUTTON_IS_WATCHED: &str = "until [ $(ls -l /proc/[0-9]*/fd 2>/dev/null | grep -c /dev/input/event) = \
    $(ls /dev/input/event* | wc -l) ]; do usleep 10000; done; echo yes";

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
    guest.shell(WAIT_FOR_BUTTON)?;
    let devices = guest.ask_number("ls /dev/input/event* | wc -l")?;
    guest.check(devices > 0, "the guest has no input device")?;
    guest.ask(BUTTON_IS_WATCHED)?;
    guest.command("system_powerdown")?;
    guest.qmp.event("POWERDOWN", super::super::debian::SOON)?;
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
