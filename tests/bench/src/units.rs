//! What systemd's own tool says of the units.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;
use std::process::Command;

use bulkhead_framework::{Failure, Result};

use crate::host::Host;
use crate::report;

const TOOL: &str = "systemd-analyze";
/// The most that a unit may have of systemd's 10 points.
const MOST: f64 = 1.0;
const TARGET: f64 = 0.5;

/// Judges all services and prints.
///
/// # Errors
/// The tool fails.
pub fn run(_: &Host) -> Result<()> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../jail-profiles/systemd");
    let mut units = Vec::new();
    for entry in fs::read_dir(&dir)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        // A template is judged as what comes of one instance.
        units.extend(name.ends_with(".service").then_some(name));
    }
    units.sort();
    let mut highest = 0.0;
    for unit in units {
        let mut command = Command::new(TOOL);
        command.args(["security", "--offline=yes", "--no-pager"]).arg(dir.join(&unit)).env("LC_ALL", "C");
        let output = match command.output() {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                println!("  not measured: {TOOL} is not installed");
                return Ok(());
            }
            output => output?,
        };
        let text = String::from_utf8_lossy(&output.stdout);
        let exposure = exposure(&text).ok_or_else(|| {
            let why = String::from_utf8_lossy(&output.stderr).into_owned();
            Failure::new(why).context(format!("{TOOL} of {unit}"))
        })?;
        report::limit(&unit, exposure, MOST, "");
        highest = f64::max(highest, exposure);
    }
    report::limit("the highest, target", highest, TARGET, "");
    Ok(())
}

/// The number in the last line.
fn exposure(text: &str) -> Option<f64> {
    let line = text.lines().rfind(|line| line.contains("Overall exposure level"))?;
    line.rsplit_once(": ")?.1.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exposure_is_the_number_in_the_last_line() {
        let text = "  PrivateNetwork=  ok\n\n→ Overall exposure level for a@i.service: 0.7 SAFE\n";
        assert_eq!(exposure(text), Some(0.7));
        assert_eq!(exposure("Failed to load"), None);
    }
}
