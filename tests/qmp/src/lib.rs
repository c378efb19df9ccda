//! QMP conformance: one table of cases for our broker and for Debian's QEMU, the fake peers that our
//! broker is tested with, and a mutator.

pub mod add_client;
pub mod broker;
pub mod cases;
pub mod commands;
pub mod descriptors;
pub mod devices;
pub mod drive;
pub mod dump;
pub mod fake;
pub mod fake_bus;
pub mod fake_dump;
pub mod human;
pub mod memory;
pub mod qemu;
pub mod runner;
pub mod started;
pub mod wire;

/// Bytes on the wire and what they are answered with, one entry per line.
pub use cases::Case;

use std::process::Command;

use bulkhead_framework::launcher_path;

/// Whether a whole VM can run here: there is a release build, and doctor's class is full (0) or limited (3). Says so
/// if not.
#[must_use]
pub fn vms_run_here() -> bool {
    let doctor = Command::new(launcher_path()).arg("doctor").output();
    let run = doctor.is_ok_and(|output| matches!(output.status.code(), Some(0 | 3)));
    if !run {
        println!("not run: no release build of the launcher, or it cannot run VMs here (bulkhead doctor)");
    }
    run
}
