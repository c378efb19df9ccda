//! QMP round trips.

use bulkhead_framework::Result;

use crate::host::Host;
use crate::report::{self, Samples};
use crate::session::Both;

const BLOCKS: usize = 16;
/// Requests before the other side's turn: so many that the first, which finds a server that has been asleep
/// meanwhile, is not all that p99 shows.
const BLOCK: usize = 250;

/// Command, who answers it, and the most that ours may take of QEMU's time.
const COMMANDS: [(&str, &str, f64); 4] = [
    ("query-version", "broker", 0.5),
    ("query-status", "broker", 0.5),
    ("query-cpus-fast", "core", 1.0),
    ("query-chardev", "console", 1.0),
];

/// Measures and prints.
///
/// # Errors
/// A guest did not start, or an answer is none.
pub fn run(host: &Host) -> Result<()> {
    let Both { mut ours, mut qemu, vms: _vms } = Both::start(host)?;
    for (command, who, most) in COMMANDS {
        let mut times: [Samples; 2] = Default::default();
        for _ in 0..BLOCKS {
            for (session, samples) in [&mut ours, &mut qemu].into_iter().zip(&mut times) {
                for _ in 0..BLOCK {
                    samples.time(session.ask(command)?);
                }
            }
        }
        let [ours, qemu] = &times;
        ours.print(&format!("{command}, ours ({who} answers)"), "us", 1.0);
        qemu.print(&format!("{command}, QEMU's"), "us", 1.0);
        report::ratio("ours / QEMU's, p50", ours.median(), qemu.median(), most);
        report::ratio("ours / QEMU's, p99", ours.percentile(99), qemu.percentile(99), most);
    }
    Ok(())
}
