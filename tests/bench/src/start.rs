//! Spawn to first serial byte.

use std::io::Read as _;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use bulkhead_framework::{Failure, Result};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::host::Host;
use crate::machine::Machine;
use crate::report::{self, Samples};

const ROUNDS: usize = 25;
/// Microseconds: what an unjailed microVM monitor takes on the reference host.
const TARGET: f64 = 15_000.0;

/// Measures and prints.
///
/// # Errors
/// A guest did not start.
pub fn run(host: &Host) -> Result<()> {
    host.needs_kvm()?;
    println!("  without devices:");
    compare(|| host.ours("halt"), || host.qemu("halt"))?;
    println!("  with a disk and a balloon:");
    let [ours, qemu] = Machine::pair(host, "start")?;
    compare(|| ours.command("halt"), || qemu.command("halt"))
}

fn compare(our_command: impl Fn() -> Command, qemu_command: impl Fn() -> Command) -> Result<()> {
    let mut ours = Side::default();
    let mut qemu = Side::default();
    for _ in 0..ROUNDS {
        ours.measure(our_command())?;
        qemu.measure(qemu_command())?;
    }
    ours.first_byte.print("bulkhead run, all processes jailed", "ms", 1e-3);
    qemu.first_byte.print("QEMU, one process, no jail", "ms", 1e-3);
    report::ratio("ours / QEMU's", ours.first_byte.median(), qemu.first_byte.median(), 1.0);
    report::limit("ours", ours.first_byte.median() / 1e3, TARGET / 1e3, "ms");
    ours.processor.print("processor time from exec to the end, ours", "ms", 1e-3);
    qemu.processor.print("processor time from exec to the end, QEMU's", "ms", 1e-3);
    Ok(())
}

#[derive(Default)]
struct Side {
    first_byte: Samples,
    processor: Samples,
}

impl Side {
    fn measure(&mut self, mut command: Command) -> Result<()> {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let before = children_time()?;
        let start = Instant::now();
        let mut child = command
            .spawn()
            .map_err(|error| Failure::new(format!("cannot start {:?}: {error}", command.get_program())))?;
        let mut byte = [0];
        let read = child.stdout.as_mut().map(|out| out.read_exact(&mut byte));
        let elapsed = start.elapsed();
        let pid = i32::try_from(child.id()).map_err(|_| "a pid beyond i32")?;
        let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
        child.wait()?;
        if !matches!(read, Some(Ok(()))) || byte != *b"B" {
            return Err(format!("{command:?} did not start the native guest").into());
        }
        self.first_byte.time(elapsed);
        self.processor.time(children_time()?.saturating_sub(before));
        Ok(())
    }
}

/// Processor time of all children that have ended, and of theirs.
fn children_time() -> Result<Duration> {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN).map_err(|errno| format!("getrusage: {errno}"))?;
    let micros = |time: nix::sys::time::TimeVal| {
        u64::try_from(time.tv_sec() * 1_000_000 + time.tv_usec()).unwrap_or(0)
    };
    Ok(Duration::from_micros(micros(usage.user_time()) + micros(usage.system_time())))
}
