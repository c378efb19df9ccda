//! Starts VMs, speaks QMP and reads consoles for the tests.
//!
//! A test owns a [`Vm`] (one `bulkhead run` in a directory of its own), reads its console through a
//! [`Transcript`] and talks to it through a [`Qmp`] client. Every wait has a limit, and every error is a
//! [`Failure`] that carries what the VM wrote so far, so a failed test explains itself.

mod child;
mod failure;
mod proc;
mod qmp;
mod scratch;
mod transcript;
mod vm;

pub use child::{Child, Stdin};
pub use failure::{Failure, Result};
pub use proc::{Process, descendants, mapped_pss_kib, process, pss_kib};
pub use qmp::{Qmp, QmpError};
pub use scratch::Scratch;
pub use transcript::Transcript;
pub use vm::{Vm, VmBuilder, launcher_path, target_dir};
