//! The bus link as the guest sees it, beside a bare ping-pong over the same kind of socket.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use bulkhead_bus_api::{REPLY_LEN, REQUEST_LEN};
use bulkhead_framework::{Child, Result};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::sys::signal::Signal;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair};
use nix::unistd::{Pid, read, write};

use crate::host::Host;
use crate::machine::number;
use crate::report::{self, Samples};

/// Argument of the process at the other end of the ping-pong.
pub const PONG: &str = "--pong";

const ROUNDS: usize = 7;
const ACCESSES: u32 = 1_000;
const FLOOD_LINES: u32 = 1_000;
const LINE: u32 = 64;
const SOON: Duration = Duration::from_secs(30);
/// The line status register, which the console answers.
const CONSOLE_PORT: u16 = 0x3fd;
/// The data port of the clock: a read changes what the console saves, so it is committed before the reply.
const COMMITTED_PORT: u16 = 0x71;

/// Measures and prints.
///
/// # Errors
/// A guest did not start or finish.
pub fn run(host: &Host) -> Result<()> {
    host.needs_kvm()?;
    println!("  all on one processor:");
    let free = sched_getaffinity(Pid::from_raw(0)).map_err(|errno| format!("sched_getaffinity: {errno}"))?;
    pin(&one_of(&free))?;
    let pinned = link(host);
    pin(&free)?;
    pinned?;
    println!("  where the scheduler puts them (an idle processor must be woken):");
    link(host)?;
    flood(host)
}

/// Compares the link with the ping-pong.
fn link(host: &Host) -> Result<()> {
    let mut samples: [Samples; 6] = Default::default();
    for _ in 0..ROUNDS {
        let (nobody, console) = port_reads(host, CONSOLE_PORT)?;
        let (other, committed) = port_reads(host, COMMITTED_PORT)?;
        let bare = ping_pong(Duration::ZERO)?;
        // As far apart as the guest's accesses are: the peer has gone to sleep meanwhile.
        let apart = ping_pong(Duration::from_secs_f64(nobody * 2e-6))?;
        let values = [console, nobody, console - nobody, bare, apart, committed - other];
        for (samples, value) in samples.iter_mut().zip(values) {
            samples.value(value);
        }
    }
    let [whole, exit, link, reference, apart, committed] = &samples;
    whole.print("port read that the console answers", "us", 1.0);
    exit.print("port read that nobody claims (the exit alone)", "us", 1.0);
    link.print("the bus link: their difference", "us", 1.0);
    committed.print("the same of a read whose effect is committed", "us", 1.0);
    reference.print("bare SOCK_SEQPACKET ping-pong, back to back", "us", 1.0);
    apart.print("the same, with the guest's pauses", "us", 1.0);
    report::ratio("bus link / ping-pong with pauses", link.median(), apart.median(), 1.3);
    Ok(())
}

/// The last processor of a set.
fn one_of(set: &CpuSet) -> CpuSet {
    let mut one = CpuSet::new();
    if let Some(last) = (0..CpuSet::count()).rev().find(|cpu| set.is_set(*cpu).unwrap_or(false)) {
        // The number came from such a set.
        let _ = one.set(last);
    }
    one
}

/// Puts this process and all that it starts on the processors of a set.
fn pin(set: &CpuSet) -> Result<()> {
    sched_setaffinity(Pid::from_raw(0), set).map_err(|errno| format!("sched_setaffinity: {errno}").into())
}

/// Microseconds that the guest sees for a read of a port that nobody claims, and of one that the console
/// answers: the medians of many that take turns.
fn port_reads(host: &Host, port: u16) -> Result<(f64, f64)> {
    let test = format!("bench-link port={port:#x} n={ACCESSES}");
    let child = Child::start(&mut host.ours(&test), "console", "stderr")?;
    child.stdout().expect("test=bench-link", SOON)?;
    let start = Instant::now();
    let line = child.stdout().expect_line("bench link ", SOON)?;
    let micros = start.elapsed().as_secs_f64() * 1e6;
    let number = |name: &str| number(&line, name);
    // The loop is as long as the wait for its result, within a few hundredths: that gives the clock's rate.
    let cycle = micros / number("cycles")?;
    Ok((number("nobody")? * cycle, number("claimed")? * cycle))
}

/// Microseconds of a round trip between this process and another over a connected pair, blocking on both
/// sides, `pause` after the last: the median of many.
fn ping_pong(pause: Duration) -> Result<f64> {
    let pair = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC);
    let (ours, theirs): (OwnedFd, OwnedFd) = pair.map_err(|errno| format!("socketpair: {errno}"))?;
    let mut child = Command::new(std::env::current_exe()?).arg(PONG).stdin(Stdio::from(theirs)).spawn()?;
    let mut reply = [0; REPLY_LEN];
    let mut times = Samples::default();
    let done = (0..ACCESSES).try_for_each(|_| {
        let last = Instant::now();
        while last.elapsed() < pause {}
        let start = Instant::now();
        write(&ours, &[0; REQUEST_LEN])?;
        read(&ours, &mut reply)?;
        times.time(start.elapsed());
        nix::Result::Ok(())
    });
    drop(ours);
    child.wait()?;
    done.map_err(|errno| format!("ping-pong: {errno}"))?;
    Ok(times.median())
}

/// Answers each packet on standard input until its end.
///
/// # Errors
/// The socket failed.
pub fn pong() -> Result<()> {
    let socket = std::io::stdin();
    let fd = socket.as_fd().as_raw_fd();
    let mut request = [0; REQUEST_LEN];
    loop {
        match recv(fd, &mut request, MsgFlags::empty()) {
            Ok(0) => return Ok(()),
            Ok(_) => send(fd, &[0; REPLY_LEN], MsgFlags::MSG_NOSIGNAL),
            Err(errno) => Err(errno),
        }
        .map_err(|errno| format!("pong: {errno}"))?;
    }
}

/// Console output at full speed, and what it costs in exits.
fn flood(host: &Host) -> Result<()> {
    let bytes = f64::from(FLOOD_LINES * LINE);
    let mut rate = Samples::default();
    let mut per_exit = Samples::default();
    for _ in 0..ROUNDS {
        let mut command = host.ours(&format!("flood n={FLOOD_LINES}"));
        let child = Child::start(command.env("BULKHEAD_LOG", "info"), "console", "stderr")?;
        child.stdout().expect("test=flood", SOON)?;
        let start = Instant::now();
        child.stdout().expect("flood bytes=", SOON)?;
        rate.value(bytes / 1024.0 / start.elapsed().as_secs_f64());
        child.signal(Signal::SIGTERM)?;
        // Core's last words: "accesses: N forwarded, ...".
        let counters = child.stderr().expect_line("accesses: ", SOON)?;
        let forwarded = counters.split_whitespace().next().and_then(|word| word.parse::<f64>().ok());
        per_exit.value(bytes / forwarded.ok_or("no count of forwarded accesses")?);
        child.wait(SOON)?;
    }
    rate.print("console output", "KiB/s", 1.0);
    per_exit.print("console output, bytes per exit", "", 1.0);
    Ok(())
}
