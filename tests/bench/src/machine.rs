//! A machine of either side with devices, whose guest measures itself.

use std::ffi::OsStr;
use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use bulkhead_framework::{Child, Failure, Result, descendants};
use nix::sys::signal::Signal;
use nix::unistd::{SysconfVar, sysconf};

use crate::host::Host;

const SOON: Duration = Duration::from_secs(60);
/// Where QEMU writes what it traces.
const TRACE: &str = "trace";

/// Whose machine it is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// Ours, in its jails.
    Ours,
    /// QEMU's `microvm` with PCIe: windows and configuration space are where ours has them.
    Qemu,
}

/// What is started.
pub struct Machine<'a> {
    host: &'a Host,
    side: Side,
    memory: u32,
    args: Vec<String>,
    /// Other processes whose time counts.
    others: Vec<i32>,
}

/// What a program of the guest has measured.
pub struct Outcome {
    line: String,
    /// From its first line to its last one.
    pub seconds: f64,
    /// Processor time of all processes meanwhile, in seconds.
    pub processor: f64,
}

impl<'a> Machine<'a> {
    /// Both sides' with a disk, each its own of that name, and a balloon.
    ///
    /// # Errors
    /// The disk cannot be made.
    pub fn pair(host: &'a Host, name: &str) -> Result<[Self; 2]> {
        let one = |side, whose| -> Result<Self> {
            let disk = host.dir().join(format!("{name}-{whose}"));
            fs::File::create(&disk)?.set_len(16 << 20)?;
            let drive = format!("-drive if=none,id=d0,format=raw,file={}", disk.display());
            let modern = if side == Side::Qemu { ",disable-legacy=on" } else { "" };
            let devices = ["virtio-blk-pci,drive=d0", "virtio-balloon-pci,id=b0"];
            let devices = devices.map(|device| format!("-device {device}{modern}")).join(" ");
            Ok(Self::new(host, side, 256, &format!("{drive} {devices}")))
        };
        Ok([one(Side::Ours, "ours")?, one(Side::Qemu, "qemu")?])
    }

    /// One with so many MiB and these arguments, which are words.
    pub fn new(host: &'a Host, side: Side, memory: u32, args: &str) -> Self {
        let args = args.split_whitespace().map(str::to_owned).collect();
        Self { host, side, memory, args, others: Vec::new() }
    }

    /// Time of this process counts, too.
    pub fn and(mut self, process: i32) -> Self {
        self.others.push(process);
        self
    }

    /// What starts it with that program.
    pub fn command(&self, test: &str) -> Command {
        let mut command = match self.side {
            Side::Ours => self.host.ours(test),
            Side::Qemu => self.host.qemu_with_pci(test, self.memory),
        };
        if self.side == Side::Ours {
            command.args(["-m", &self.memory.to_string()]);
        }
        command.args(&self.args);
        command
    }

    /// Runs a program that says `bench begin` and `bench end`.
    ///
    /// # Errors
    /// It does not.
    pub fn run(&self, test: &str) -> Result<Outcome> {
        let child = Child::start(&mut self.command(test), "console", "stderr")?;
        child.stdout().expect("bench begin", SOON).map_err(|failure| failure.with_logs(&child.logs()))?;
        let (begin, before) = (Instant::now(), self.processor(&child)?);
        let line = child.stdout().expect_line("bench end ", SOON)?;
        let seconds = begin.elapsed().as_secs_f64();
        let processor = self.processor(&child)? - before;
        Ok(Outcome { line, seconds, processor })
    }

    /// How often KVM has returned to user space for an access when such a program has ended: core counts all accesses,
    /// QEMU traces all exits.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub fn exits(&self, test: &str) -> Result<f64> {
        let trace = self.host.dir().join(TRACE);
        let mut command = self.command(test);
        if self.side == Side::Qemu {
            command.args([
                OsStr::new("-trace"),
                OsStr::new("kvm_run_exit"),
                OsStr::new("-D"),
                trace.as_os_str(),
            ]);
        }
        let child = Child::start(command.env("BULKHEAD_LOG", "info"), "console", "stderr")?;
        child.stdout().expect_line("bench end ", SOON)?;
        child.signal(Signal::SIGTERM)?;
        if self.side == Side::Qemu {
            child.wait(SOON)?;
            let lines =
                fs::read_to_string(&trace)?.lines().filter(|line| line.contains("kvm_run_exit")).count();
            return Ok(f64::from(u32::try_from(lines).unwrap_or(u32::MAX)));
        }
        // "accesses: N forwarded, N collected, N unclaimed; N resets".
        let counters = child.stderr().expect_line("accesses: ", SOON)?;
        child.wait(SOON)?;
        let accesses = counters.split(';').next().unwrap_or_default();
        Ok(accesses.split_whitespace().filter_map(|word| word.parse::<f64>().ok()).sum())
    }

    /// Seconds that all processes have used so far.
    fn processor(&self, child: &Child) -> Result<f64> {
        let family = descendants(child.pid())?.into_iter().map(|process| process.pid);
        let all = family.chain([child.pid()]).chain(self.others.iter().copied());
        let hertz = sysconf(SysconfVar::CLK_TCK).ok().flatten().unwrap_or(100);
        let ticks: i64 = all.filter_map(ticks).sum();
        Ok(f64::from(u32::try_from(ticks / hertz).unwrap_or(0)) + remainder(ticks % hertz, hertz))
    }
}

/// A part of a second.
fn remainder(ticks: i64, hertz: i64) -> f64 {
    let number = |value: i64| f64::from(i32::try_from(value).unwrap_or(1));
    number(ticks) / number(hertz)
}

/// User and system time of a process; a process that has ended meanwhile has none.
fn ticks(process: i32) -> Option<i64> {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    let mut fields = stat.rsplit(") ").next()?.split_whitespace().skip(11);
    Some(fields.next()?.parse::<i64>().ok()? + fields.next()?.parse::<i64>().ok()?)
}

impl Outcome {
    /// The number that the guest calls so.
    ///
    /// # Errors
    /// There is none.
    pub fn number(&self, name: &str) -> Result<f64> {
        number(&self.line, name)
    }

    /// Seconds of so many cycles. The program was as long as the wait for its end, within a few hundredths.
    ///
    /// # Errors
    /// The guest names no cycles of this name, or not all of them.
    pub fn time(&self, name: &str) -> Result<f64> {
        Ok(self.number(name)? * self.seconds / self.number("all")?)
    }
}

/// The number behind `name=` in a line.
///
/// # Errors
/// There is none.
pub fn number(line: &str, name: &str) -> Result<f64> {
    let word = line.split_whitespace().find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
    let value = word.and_then(|value| value.parse().ok());
    value.ok_or_else(|| Failure::new(format!("no {name} in {line:?}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_found_by_their_names() {
        assert_eq!(number("all=0010 n=3", "all").unwrap(), 10.0);
        assert_eq!(number("all=0010 n=3", "n").unwrap(), 3.0);
        assert!(number("all=0010", "n").is_err());
        assert!(number("n=many", "n").is_err());
    }

    #[test]
    fn time_of_this_process_is_found() {
        let own = i32::try_from(std::process::id()).unwrap();
        let before = ticks(own).unwrap();
        while ticks(own).unwrap() == before {}
        assert_eq!(ticks(i32::MAX), None);
    }
}
