//! Tests on the native guest: the release binaries as a user starts them, looked at from outside.
//!
//! Each test owns a [`Guest`]: a VM with a name of its own, by which its processes are found in /proc whoever
//! their parent is by now, and a directory of its own, in which nothing may be left.

mod enter;
mod guest;
mod pty;
mod trace;

pub use enter::{Enter, Step, as_user, limit_descriptors};
pub use guest::{Guest, Setup, install, kill_pid};
pub use pty::Pty;
pub use trace::{Trace, eventually};

use std::sync::OnceLock;
use std::time::Duration;

/// How much longer everything may take here: 1, and 5 on a processor that is emulated (the lab).
pub fn slowness() -> u32 {
    static FACTOR: OnceLock<u32> = OnceLock::new();
    *FACTOR.get_or_init(|| {
        let model = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        if model.contains("QEMU TCG") { 5 } else { 1 }
    })
}

/// Bound on everything that should take milliseconds; generous because tests share the machine.
pub const SOON: Duration = Duration::from_secs(20);

/// Within this after the end of a launcher, however it ended, nothing of its VM is left.
pub const CLEAN: Duration = Duration::from_secs(2);
