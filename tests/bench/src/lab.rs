//! What Debian's guest does in the lab, beside QEMU's there: `bulkhead-lab figures` measures, this reads its samples.

use std::process::Command;
use std::time::Duration;

use bulkhead_framework::{Child, Failure, Result, target_dir};

use crate::host::Host;
use crate::report::{self, Samples};

/// Both L1s, with all rounds, under software emulation.
const LONG: Duration = Duration::from_secs(3600);

/// A figure's name, what it is, its unit, and the least that it may be beside QEMU's.
const FIGURES: [(&str, &str, &str, f64); 4] = [
    ("tcp-from-guest", "TCP from the guest over a TAP interface", "Gbit/s", 1.0),
    ("tcp-to-guest", "TCP to the guest", "Gbit/s", 1.0),
    ("balloon-given", "touched memory that the guest gives", "GiB/s", 1.0),
    ("balloon-taken-back", "memory that it takes back", "GiB/s", 1.0),
];

/// Measures and prints.
///
/// # Errors
/// The lab cannot run, or one of its figures cannot be measured.
pub fn run(_host: &Host) -> Result<()> {
    // `make bench` has built it.
    let mut command = Command::new(target_dir().join("debug/bulkhead-lab"));
    let child = Child::start(command.arg("figures"), "lab", "the lab's errors")?;
    if !child.wait(LONG)?.success() {
        return Err(Failure::new("the lab fails").with_logs(&child.logs()));
    }
    let text = child.stdout().text();
    println!("  all of it under software emulation: only the ratios say something");
    for (name, what, unit, least) in FIGURES {
        let [ours, qemu] = ["ours", "qemu"].map(|side| samples(&text, name, side));
        println!("  {what}:");
        ours.print("ours", unit, 1.0);
        qemu.print("QEMU's (q35, no vhost)", unit, 1.0);
        report::at_least("ours / QEMU's", ours.median(), qemu.median(), least);
    }
    Ok(())
}

/// The samples of this name and side: lines `sample NAME SIDE VALUE`.
fn samples(text: &str, name: &str, side: &str) -> Samples {
    let mut samples = Samples::default();
    let prefix = format!("sample {name} {side} ");
    let values = text.lines().filter_map(|line| line.strip_prefix(&prefix)?.trim().parse().ok());
    values.for_each(|value| samples.value(value));
    samples
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_told_apart() {
        let text = "lab: L1 is up\nsample a ours 1.5\nsample a qemu 3\nsample ab ours 7\nsample a ours 2.5\n";
        let ours = samples(text, "a", "ours");
        assert_eq!((ours.percentile(1), ours.percentile(99)), (1.5, 2.5));
        assert!(samples(text, "b", "ours").median().is_nan());
    }
}
