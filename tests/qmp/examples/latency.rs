//! Round trip of commands that the server answers itself, ours and QEMU's in one run.
//! usage: cargo run --release -p bulkhead-qmp-tests --example latency [SOCKET]
//! SOCKET is a running VM's; without one the broker runs in this process, unjailed, with a fake core.

use std::io::{Read, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use bulkhead_framework::Result;
use bulkhead_qmp_tests::broker::{Broker, Kind};
use bulkhead_qmp_tests::qemu::Qemu;
use bulkhead_qmp_tests::wire::Wire;

const ROUNDS: usize = 5000;

fn measure(path: &Path, request: &[u8]) -> Result<(Duration, Duration)> {
    let mut wire = Wire::connect(path)?;
    wire.negotiate(false)?;
    let mut stream = wire.stream();
    let mut times = Vec::with_capacity(ROUNDS);
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
    let at = |part: usize| times.get(ROUNDS * part / 100).copied().unwrap_or_default();
    Ok((at(50), at(99)))
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
    Ok(())
}
