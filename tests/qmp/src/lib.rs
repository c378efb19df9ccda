//! QMP conformance: one table of cases for our broker and for Debian's QEMU, the fake peers that our
//! broker is tested with, and a mutator.

pub mod broker;
pub mod cases;
pub mod commands;
pub mod descriptors;
pub mod drive;
pub mod fake;
pub mod qemu;
pub mod runner;
pub mod wire;

/// Bytes on the wire and what they are answered with, one entry per line.
pub use cases::Case;
