//! What a VM leaves in the system: processes and files.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bulkhead_framework::{Failure, Process, Result, process};

use crate::slowness;

/// Waits until `probe` has something; what it says in between goes into the failure.
///
/// # Errors
/// `limit` times [`slowness`] passed.
pub fn eventually<T>(
    what: &str,
    limit: Duration,
    mut probe: impl FnMut() -> std::result::Result<T, String>,
) -> Result<T> {
    let limit = limit * slowness();
    let end = Instant::now() + limit;
    loop {
        match probe() {
            Ok(value) => return Ok(value),
            Err(last) if Instant::now() > end => {
                return Err(Failure::new(format!("{what}: not within {limit:?}: {last}")));
            }
            // /proc and directories of other users' sockets tell of no change.
            Err(_) => std::thread::sleep(Duration::from_micros(200)),
        }
    }
}

/// Finds a VM's processes and files.
#[derive(Debug, Clone)]
pub struct Trace {
    name: String,
    dir: PathBuf,
}

impl Trace {
    /// Of the VM with this `-name`, which works in `dir`.
    pub fn new(name: impl Into<String>, dir: impl Into<PathBuf>) -> Self {
        Self { name: name.into(), dir: dir.into() }
    }

    /// The VM's directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The VM's living processes, launcher and guard included. Each has the VM's name as an argument.
    pub fn processes(&self) -> Vec<Process> {
        let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
        let pids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
        pids.filter(|pid| self.owns(*pid)).filter_map(|pid| process(pid).ok()).collect()
    }

    fn owns(&self, pid: i32) -> bool {
        let Ok(line) = fs::read(format!("/proc/{pid}/cmdline")) else { return false };
        line.split(|&byte| byte == 0).any(|argument| argument == self.name.as_bytes())
    }

    /// The VM's process whose name, as `ps` shows it, begins with `name`.
    pub fn find(&self, name: &str) -> Option<Process> {
        self.processes().into_iter().find(|process| process.name == short(name))
    }

    /// Waits until there is such a process.
    ///
    /// # Errors
    /// None within `limit`.
    pub fn wait_for(&self, name: &str, limit: Duration) -> Result<Process> {
        eventually(&format!("process {name}"), limit, || {
            self.find(name).ok_or_else(|| format!("there are {:?}", self.names()))
        })
    }

    fn names(&self) -> Vec<String> {
        self.processes().into_iter().map(|process| process.name).collect()
    }

    /// Files of the VM's directory, but for `expected`.
    pub fn files(&self, expected: &[&str]) -> Vec<String> {
        let Ok(entries) = fs::read_dir(&self.dir) else { return Vec::new() };
        let names = entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
        names.filter(|name| !expected.contains(&name.as_str())).collect()
    }

    /// Waits until no process and, beside `expected`, no file is left.
    ///
    /// # Errors
    /// Something is left after `limit`.
    pub fn nothing_left(&self, expected: &[&str], limit: Duration) -> Result<()> {
        eventually("nothing of the VM is left", limit, || {
            let (processes, files) = (self.names(), self.files(expected));
            match (processes.is_empty(), files.is_empty()) {
                (true, true) => Ok(()),
                _ => Err(format!("processes {processes:?}, files {files:?}")),
            }
        })
    }
}

/// What the kernel keeps of a process's name.
fn short(name: &str) -> &str {
    name.get(..15).unwrap_or(name)
}
