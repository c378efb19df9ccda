//! `pmemsave` of a guest's whole memory to a new file, beside QEMU's.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use bulkhead_framework::{Child, Qmp, Result};
use serde_json::json;

use crate::host::Host;
use crate::machine::{Machine, Side};
use crate::report::{self, Samples};

const ROUNDS: usize = 5;
/// MiB that the guest has.
const MEMORY: u32 = 1024;
/// First page that it fills: the image is before it.
const FIRST: u32 = 0x4000;
const SOON: Duration = Duration::from_secs(60);
/// Where files are only memory.
const TMPFS: &str = "/dev/shm";

/// Measures and prints.
///
/// # Errors
/// A guest did not start, or could not be saved.
pub fn run(host: &Host) -> Result<()> {
    host.needs_kvm()?;
    let all = MEMORY * 256;
    for (pages, what, least) in [(all - FIRST, "dense", 1.0), (all / 20, "95 % empty", 10.0)] {
        let mut sides = [start(host, Side::Ours, "ours", pages)?, start(host, Side::Qemu, "qemu", pages)?];
        for (dir, place) in [(host.dir(), "a disk"), (Path::new(TMPFS), "tmpfs")] {
            println!("  {what}, to {place}:");
            let file = dir.join(format!("bulkhead-bench-{}", std::process::id()));
            let mut rates: [Samples; 2] = Default::default();
            for _ in 0..ROUNDS {
                for ((_, qmp), rate) in sides.iter_mut().zip(&mut rates) {
                    rate.value(f64::from(MEMORY) / 1024.0 / save(qmp, &file)?.as_secs_f64());
                }
            }
            let [ours, qemu] = &rates;
            ours.print("ours", "GiB/s", 1.0);
            qemu.print("QEMU's", "GiB/s", 1.0);
            report::at_least("ours / QEMU's", ours.median(), qemu.median(), least);
        }
    }
    Ok(())
}

/// A guest that has filled so many pages.
fn start(host: &Host, side: Side, name: &str, pages: u32) -> Result<(Child, Qmp)> {
    let machine = Machine::new(host, side, MEMORY, "");
    let command = machine.command(&format!("fill first={FIRST} pages={pages}"));
    let (child, path) = host.with_qmp(command, &format!("{name}-{pages}"))?;
    child.stdout().expect("filled", SOON)?;
    Ok((child, Qmp::connect(&path, SOON)?))
}

/// How long it takes. The file is gone then.
fn save(qmp: &mut Qmp, file: &Path) -> Result<Duration> {
    let size = u64::from(MEMORY) << 20;
    let begin = Instant::now();
    qmp.execute("pmemsave", json!({ "val": 0, "size": size, "filename": file }))?;
    let time = begin.elapsed();
    let length = fs::metadata(file)?.len();
    fs::remove_file(file)?;
    if length == size { Ok(time) } else { Err(format!("a file of {length} bytes").into()) }
}
