//! Tests on the native guest: the release binaries as a user starts them, looked at from outside.
//!
//! Each test owns a [`Guest`]: a VM with a name of its own, by which its processes are found in /proc whoever
//! their parent is by now, and a directory of its own, in which nothing may be left.

mod enter;
mod guest;
mod pty;
mod trace;

pub use enter::{Enter, Step};
pub use guest::{Guest, Setup, install, kill_pid};
pub use pty::Pty;
pub use trace::{Trace, eventually};

use std::time::Duration;

/// Bound on everything that should take milliseconds; generous because tests share the machine.
pub const SOON: Duration = Duration::from_secs(20);

/// Within this after the end of a launcher, however it ended, nothing of its VM is left.
pub const CLEAN: Duration = Duration::from_secs(2);
