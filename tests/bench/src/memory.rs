//! Memory of all processes of a VM beside its guest's, when they have worked: what a process has touched once is in it.

use std::fs;
use std::process::Command;
use std::time::Duration;

use bulkhead_framework::{Child, Failure, Process, Result, descendants, mapped_pss_kib, process};
use bulkhead_jail::topology::PROCESSES;

use crate::host::Host;
use crate::machine::Machine;
use crate::report;
use crate::session::Session;

const SOON: Duration = Duration::from_secs(20);
/// How many others share the files with one.
const OTHERS: u32 = 3;
/// What the guest reads of its disk before.
const READS: u32 = 20_000;
/// What is asked before, so many times.
const COMMANDS: [&str; 4] = ["query-status", "query-cpus-fast", "query-chardev", "query-commands"];
const ROUNDS: u32 = 20;
/// MiB.
const GOAL: f64 = 10.0;
const TARGET: f64 = 5.0;
/// What guest RAM is called in /proc/PID/smaps: ours and QEMU's.
const RAM: [&str; 2] = ["/memfd:ram-", "/memfd:memory-backend-memfd"];

/// Measures and prints.
///
/// # Errors
/// A guest did not start, or its processes are not ours to look at (needs root).
pub fn run(host: &Host) -> Result<()> {
    host.needs_kvm()?;
    println!("  without devices:");
    compare(host, [host.ours("halt"), host.qemu("halt")], "halting")?;
    println!("  with a disk and a balloon:");
    let commands = |name: &str| {
        let read = format!("bench-blk depth=32 n={READS}");
        Result::Ok(Machine::pair(host, name)?.map(|machine| machine.command(&read)))
    };
    compare(host, commands("one")?, "bench end ")?;
    println!("  the same, {OTHERS} more of which run:");
    let others: Vec<_> = (0..OTHERS).map(|n| commands(&format!("other{n}"))).collect::<Result<_>>()?;
    let start = |mut command| Child::start(&mut command, "console", "stderr");
    let others: Vec<_> = others.into_iter().flatten().map(start).collect::<Result<_>>()?;
    others.iter().try_for_each(|child| child.stdout().expect("bench end ", SOON))?;
    compare(host, commands("last")?, "bench end ")
}

/// Looks at both sides once each guest has said `done` and each has answered commands.
fn compare(host: &Host, [ours, qemu]: [Command; 2], done: &str) -> Result<()> {
    let (ours, ours_socket) = host.with_qmp(ours, "ours")?;
    let (qemu, qemu_socket) = host.with_qmp(qemu, "qemu")?;
    for (child, socket) in [(&ours, &ours_socket), (&qemu, &qemu_socket)] {
        child.stdout().expect(done, SOON)?;
        let mut session = Session::open(socket)?;
        (0..ROUNDS).try_for_each(|_| COMMANDS.iter().try_for_each(|name| session.ask(name).map(drop)))?;
    }
    let ours = family(&ours, "ours")?;
    let qemu = family(&qemu, "QEMU's")?;
    report::limit("all of ours", ours, GOAL, "MiB");
    report::limit("all of ours, target", ours, TARGET, "MiB");
    report::ratio("ours / QEMU's", ours, qemu, 1.0);
    Ok(())
}

/// Prints the processes of one side and returns their sum in MiB.
fn family(child: &Child, side: &str) -> Result<f64> {
    let mut sum = 0;
    let mut own = 0;
    let all: Vec<Process> = std::iter::once(process(child.pid())?).chain(descendants(child.pid())?).collect();
    for process in &all {
        let Process { pid, name, .. } = process;
        let ram = mapped_pss_kib(*pid, |name| RAM.iter().any(|ram| name.starts_with(ram)))?;
        let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))
            .map_err(|error| Failure::new(format!("memory of {name}: {error}")))?;
        let total = field(&rollup, "Pss:").saturating_sub(ram);
        let [anonymous, file] = ["Pss_Anon:", "Pss_File:"].map(|name| field(&rollup, name));
        println!(
            "  {side:<7} {name:<38} {total:9} KiB  (anonymous {anonymous}, files {file}; guest RAM {ram}; {})",
            allowed(process)
        );
        sum += total;
        own += anonymous;
    }
    println!("  {side:<7} {:<38} {sum:9} KiB  (a further VM shares the files and adds {own})", "sum");
    Ok(f64::from(u32::try_from(sum).unwrap_or(u32::MAX)) / 1024.0)
}

/// How many system calls the filter of a process lets through.
fn allowed(process: &Process) -> String {
    // The kernel keeps 15 bytes of a name.
    let known = PROCESSES
        .iter()
        .find(|known| known.binary.get(..15) == Some(&process.name) || known.binary == process.name);
    match known {
        _ if process.seccomp == 0 => "all system calls".to_owned(),
        Some(known) => format!("{} system calls", known.syscalls.len()),
        None => "some system calls".to_owned(),
    }
}

/// KiB behind `name` in smaps_rollup.
fn field(rollup: &str, name: &str) -> u64 {
    let line = rollup.lines().find_map(|line| line.strip_prefix(name));
    line.and_then(|line| line.split_whitespace().next()?.parse().ok()).unwrap_or(0)
}
