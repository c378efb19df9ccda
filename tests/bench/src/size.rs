//! Lines of code of each process, and what its jail allows.

use std::fs;
use std::path::Path;

use bulkhead_framework::Result;
use bulkhead_jail::topology::PROCESSES;

use crate::host::Host;
use crate::report;

/// Where the sources are, from the top. The jail is part of every process, the kit of the five device daemons above it.
const CRATES: [(&str, &str); 14] = [
    ("core", "vmm-core/core"),
    ("loader", "vmm-core/loader"),
    ("dump", "vmm-core/dump"),
    ("console", "device-daemons/console"),
    ("pci", "device-daemons/pci"),
    ("block", "device-daemons/block"),
    ("net", "device-daemons/net"),
    ("balloon", "device-daemons/balloon"),
    ("mem", "device-daemons/mem"),
    ("pmem", "device-daemons/pmem"),
    ("kit", "device-daemons/kit"),
    ("broker", "qmp-broker/broker"),
    ("jail", "jail-profiles/jail"),
    ("launcher", "jail-profiles/launcher"),
];
const CORE_LINES: f64 = 3_000.0;
const CORE_CALLS: f64 = 25.0;

/// Counts and prints.
///
/// # Errors
/// A source cannot be read.
pub fn run(_: &Host) -> Result<()> {
    let top = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    println!("  {:<10} {:>10} {:>10} {:>14}", "", "code", "all lines", "system calls");
    let mut core = (0, 0);
    for (name, dir) in CRATES {
        let mut lines = Lines::default();
        lines.add_dir(&top.join(dir).join("src"))?;
        let calls = PROCESSES.iter().find(|process| process.name == name).map(|p| p.syscalls.len());
        let shown = calls.map_or("-".to_owned(), |calls| calls.to_string());
        println!("  {name:<10} {:>10} {:>10} {shown:>14}", lines.code, lines.all);
        if name == "core" {
            core = (lines.code, calls.unwrap_or(0));
        }
    }
    let number = |count: usize| f64::from(u32::try_from(count).unwrap_or(u32::MAX));
    report::limit("core, lines of code", number(core.0), CORE_LINES, "");
    report::limit("core, system calls", number(core.1), CORE_CALLS, "");
    Ok(())
}

/// Lines outside of tests.
#[derive(Default)]
struct Lines {
    all: usize,
    /// Neither blank nor only comment.
    code: usize,
}

impl Lines {
    fn add_dir(&mut self, dir: &Path) -> Result<()> {
        for entry in fs::read_dir(dir)? {
            let path = entry?.path();
            let is_test = path.file_stem().is_some_and(|stem| stem == "tests");
            if is_test {
                continue;
            }
            if path.is_dir() {
                self.add_dir(&path)?;
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                self.add(&fs::read_to_string(path)?);
            }
        }
        Ok(())
    }

    /// Counts up to the unit tests, which rustfmt's order puts last.
    fn add(&mut self, source: &str) {
        let product = source.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default();
        for line in product.lines() {
            self.all += 1;
            let line = line.trim();
            self.code += usize::from(!line.is_empty() && !line.starts_with("//"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tests_comments_and_blank_lines_are_told_apart() {
        let mut lines = Lines::default();
        lines.add(
            "//! doc\n\nfn a() {\n    // why\n    b();\n}\n\n#[cfg(test)]\nmod tests {\n    fn c() {}\n}\n",
        );
        assert_eq!((lines.all, lines.code), (7, 3));
    }
}
