//! Compartments that die under Debian's own drivers.

use std::process::Command;
use std::time::Duration;

use bulkhead_framework::Result;

use super::super::Journal;
use super::super::debian::{self, Debian, SOON};

/// Kills the console after a while.
fn kill_console(guest: &Debian, pause: Duration) -> Result<()> {
    std::thread::sleep(pause);
    let processes = guest.vm.processes()?;
    let console = processes.iter().find(|process| process.name == "bulkhead-consol");
    let Some(console) = console else { return Ok(()) };
    // Between one and the next there is none for a moment.
    Command::new("kill").args(["-9", &console.pid.to_string()]).status()?;
    Ok(())
}

pub fn console(journal: &mut Journal) -> Result<()> {
    // While the kernel finds the port and the clock.
    let mut guest = Debian::start(journal, &["-m", "256M"], "")?;
    for _ in 0..12 {
        kill_console(&guest, Duration::from_millis(270))?;
    }
    guest.wait_for_user_space()?;
    // Some hundred bytes a second are what goes over this port here.
    guest.shell("seq 1000 1399; echo end of numbers")?;
    guest.expect("1005")?;
    for _ in 0..8 {
        kill_console(&guest, Duration::from_millis(530))?;
    }
    guest.expect("end of numbers\r\n")?;
    let text = guest.vm.console().text();
    let missing = (1000..=1399).filter(|number| !text.contains(&format!("\n{number}\r\n"))).count();
    // What a FIFO holds is three numbers, and a cut makes neighbours unreadable.
    guest.check(missing <= 8 * 5, &format!("{missing} numbers are missing"))?;
    let answer = guest.ask("echo $((6 * 7)); cat /proc/uptime > /dev/null && echo alive")?;
    guest.check(answer == "42 alive", &format!("the guest says {answer:?}"))?;
    let complaints = guest.ask("dmesg | grep -E 'BUG|WARNING|Call Trace|too much work|LSR safety check'")?;
    guest.check(complaints.is_empty(), &format!("the kernel complains: {complaints}"))?;
    debian::watch_button(&mut guest.vm)?;
    kill_console(&guest, Duration::ZERO)?;
    let pressed = guest.command("system_powerdown");
    if pressed.is_err() {
        // It was under way to the one that died.
        guest.command("system_powerdown")?;
    }
    guest.vm.console().expect("KEY_POWER pressed", SOON)?;
    guest.ends()
}
