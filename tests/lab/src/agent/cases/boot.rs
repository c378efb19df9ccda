//! The guest comes up and sees the machine that was asked for.

use std::time::{SystemTime, UNIX_EPOCH};

use bulkhead_framework::{Result, Vm};

use super::super::Journal;
use super::super::debian::Debian;

/// User and group of L1's ordinary user; the group is that of /dev/kvm.
const TESTER: (u32, u32) = (1000, 100);

/// `-uuid` of a guest.
const UUID: &str = "8d8b4d8e-5ac4-4ee1-8d3c-a4a9f0c4b9f2";

/// What an ACPI table holds behind its header.
const OWN_TABLE: &str = "a table of the user";

/// Seconds by which the guest's clock may differ: reading it takes a moment, and both sides count whole ones.
const CLOCK_SKEW: u64 = 2;

pub fn one_cpu(journal: &mut Journal) -> Result<()> {
    // The later "loglevel" wins over "quiet": the whole boot log goes over the serial port.
    let mark = "loglevel=7 lab.mark=\"two words\"";
    std::fs::write("/tmp/own-table", OWN_TABLE)?;
    let table = "sig=OWNT,oem_id=LAB,data=/tmp/own-table";
    let args = ["-m", "256M", "-smp", "1", "-uuid", UUID, "-acpitable", table];
    let mut guest = Debian::boot(journal, &args, mark)?;
    guest.check(guest.vm.console().text().contains("Linux version"), "the boot log is not on the console")?;
    let cpus = guest.ask_number("nproc")?;
    guest.check(cpus == 1, &format!("{cpus} processors instead of 1"))?;
    check_memory(&mut guest, 256)?;
    let line = guest.ask("cat /proc/cmdline")?;
    guest.check(line == format!("console=ttyS0 quiet {mark}"), &format!("the command line is {line:?}"))?;
    check_clock(&mut guest)?;
    let source = guest.ask("cat /sys/devices/system/clocksource/clocksource0/available_clocksource")?;
    guest.check(source.contains("kvm-clock"), &format!("clock sources without kvm-clock: {source}"))?;
    let uuid = guest.ask("cat /sys/class/dmi/id/product_uuid")?;
    guest.check(uuid == UUID, &format!("the guest's UUID is {uuid:?}"))?;
    let names = guest.ask("cat /sys/class/dmi/id/sys_vendor /sys/class/dmi/id/product_name")?;
    guest.check(names == "Bulkhead Bulkhead virtual machine", &format!("the machine is {names:?}"))?;
    let table = guest.ask("tail -c +37 /sys/firmware/acpi/tables/OWNT")?;
    guest.check(table == OWN_TABLE, &format!("the table of the user is {table:?}"))?;
    let complaints = guest.ask("dmesg | grep -E 'BUG|WARNING|Call Trace|ACPI Error|ACPI BIOS Error'")?;
    guest.check(complaints.is_empty(), &format!("the kernel complains: {complaints}"))?;
    guest.shell("poweroff -f")?;
    guest.ends()
}

pub fn four_cpus(journal: &mut Journal) -> Result<()> {
    // A guest sees threads only on hosts that have them, and L1 has none.
    let smp = "4,sockets=2,cores=2,threads=1";
    let mut guest = Debian::boot(journal, &["-m", "4G", "-smp", smp], "")?;
    let cpus = guest.ask_number("nproc")?;
    guest.check(cpus == 4, &format!("{cpus} processors instead of 4"))?;
    check_memory(&mut guest, 4096)?;
    let high = guest.ask("grep -c '^1[0-9a-f]*-.*System RAM' /proc/iomem")?;
    guest.check(high == "1", "no memory above 4 GiB in /proc/iomem")?;
    let topology = "cd /sys/devices/system/cpu; cat cpu*/topology/";
    let cores = guest.ask(&format!("{topology}core_cpus_list | sort -u"))?;
    guest.check(cores == "0 1 2 3", &format!("cores are made of the threads {cores}"))?;
    let sockets = guest.ask(&format!("{topology}package_cpus_list | sort -u"))?;
    guest.check(sockets == "0-1 2-3", &format!("sockets are made of the threads {sockets}"))?;
    // Every processor takes work and timer interrupts.
    let busy = guest.ask("for c in 0 1 2 3; do taskset -c $c sh -c 'usleep 10000; echo $((6 * 7))'; done")?;
    guest.check(busy == "42 42 42 42", &format!("the processors say {busy:?}"))?;
    let reported = guest.qmp.execute("query-cpus-fast", serde_json::json!({}))?;
    let count = reported.as_array().map_or(0, Vec::len);
    guest.check(count == 4, &format!("query-cpus-fast lists {count} processors"))?;
    guest.command("quit")?;
    guest.ends()
}

pub fn console(journal: &mut Journal) -> Result<()> {
    let mut guest = Debian::boot(journal, &["-m", "256M"], "")?;
    // Shorter than the 4,096 bytes that a terminal takes as one line.
    let long: String = (100..1000_u32).map(|number| format!("{number}.")).collect();
    guest.shell(&format!("long={long}"))?;
    let returned = guest.ask("echo $long")?;
    guest.check(returned == long, &format!("a line of {} bytes comes back as {returned:?}", long.len()))?;
    guest.shell("seq 1 400; echo end of numbers")?;
    guest.expect("end of numbers")?;
    let text = guest.vm.console().text();
    let expected: String = (1..=400).map(|number| format!("{number}\r\n")).collect();
    guest.check(text.contains(&expected), "400 numbers do not come out as they went in")?;
    guest.command("quit")?;
    guest.ends()
}

pub fn ordinary_user(journal: &mut Journal) -> Result<()> {
    let (uid, gid) = TESTER;
    let mut guest = Debian::start_from(Vm::builder().owner(uid, gid), journal, &["-m", "256M"], "")?;
    guest.wait_for_user_space()?;
    // The guard belongs to the launcher: no input reaches either.
    for process in guest.vm.processes()?.iter().filter(|process| process.name != "bulkhead-guard") {
        let name = &process.name;
        guest.check(process.uid != 0, &format!("{name} runs as root"))?;
        guest.check(!process.has_capabilities(), &format!("{name} has capabilities"))?;
        guest.check(process.seccomp == 2, &format!("{name} has no seccomp filter"))?;
        guest.check(process.no_new_privs, &format!("{name} may gain privileges"))?;
    }
    guest.shell("poweroff -f")?;
    guest.ends()
}

/// The kernel keeps up to 64 MiB of `mib` for its image and tables, and 1/32 for the memory map and bounce buffers.
fn check_memory(guest: &mut Debian, mib: u64) -> Result<()> {
    let total = guest.ask_number("grep MemTotal /proc/meminfo | tr -dc 0-9")? >> 10;
    let least = mib - 64 - mib / 32;
    guest.check((least..=mib).contains(&total), &format!("{total} MiB of memory, not {least} to {mib}"))
}

/// The RTC has L1's time, and the guest took its own from it.
fn check_clock(guest: &mut Debian) -> Result<()> {
    for code in ["cat /sys/class/rtc/rtc0/since_epoch", "date +%s"] {
        let theirs = guest.ask_number(code)?;
        let ours = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        guest.check(theirs.abs_diff(ours) <= CLOCK_SKEW, &format!("{code}: {theirs}, but it is {ours}"))?;
    }
    Ok(())
}
