//! Round trip of commands that the server answers itself, ours and QEMU's in one run.
//! usage: cargo run --release -p bulkhead-qmp-tests --example latency [SOCKET]
//! SOCKET is a running VM's; without one the broker runs in this process, unjailed, with a fake core.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::path::Path;
use std::time::{Duration, Instant};

use bulkhead_framework::Result;
use bulkhead_qmp_tests::broker::{Broker, Kind};
use bulkhead_qmp_tests::qemu::Qemu;
use bulkhead_qmp_tests::wire::Wire;

const ROUNDS: u32 = 5000;

fn measure(path: &Path, request: &[u8]) -> Result<(Duration, Duration)> {
    let mut wire = Wire::connect(path)?;
    wire.negotiate(false)?;
    let mut stream = wire.stream();
    let mut times = Vec::new();
    let mut buffer = vec![0; 1 << 20];
    for _ in 0..ROUNDS {
        let began = Instant::now();
        stream.write_all(request)?;
        let mut last = 0;
        while last != b'\n' {
            let count = stream.read(&mut buffer)?;
            last = count.checked_sub(1).and_then(|end| buffer.get(end).copied()).ok_or("closed")?;
        }
        times.push(began.elapsed());
    }
    times.sort();
    let at = |part: usize| times.get(times.len() * part / 100).copied().unwrap_or_default();
    Ok((at(50), at(99)))
}

/// How often a descriptor is added to a set and removed again in a second, one after the other.
fn passes(path: &Path) -> Result<f64> {
    let mut wire = Wire::connect(path)?;
    wire.negotiate(false)?;
    wire.ask("{'execute': 'cont'}")?;
    let null = std::fs::File::open("/dev/null")?;
    let began = Instant::now();
    for _ in 0..ROUNDS {
        wire.ask_with("{'execute': 'add-fd', 'arguments': {'fdset-id': 1}}", &[null.as_fd()])?;
        let removed = wire.ask("{'execute': 'remove-fd', 'arguments': {'fdset-id': 1}}")?;
        removed.get("return").ok_or("not removed")?;
    }
    Ok(f64::from(ROUNDS) / began.elapsed().as_secs_f64())
}

fn main() -> Result<()> {
    let broker = Broker::start(&[Kind::Server], false)?;
    let qemu = Qemu::start()?;
    let path = std::env::args_os().nth(1).map_or_else(|| broker.path(0), Into::into);
    for command in ["query-version", "query-status", "query-name", "stop"] {
        let request = format!("{{\"execute\":\"{command}\"}}\n");
        let (ours, theirs) =
            (measure(&path, request.as_bytes())?, measure(&qemu.path(), request.as_bytes())?);
        println!(
            "{command:14} ours p50 {:?} p99 {:?}; QEMU p50 {:?} p99 {:?}",
            ours.0, ours.1, theirs.0, theirs.1
        );
    }
    let (ours, theirs) = (passes(&path)?, passes(&qemu.path())?);
    println!("add-fd, remove-fd per second: ours {ours:.0}, QEMU {theirs:.0}");
    Ok(())
}
