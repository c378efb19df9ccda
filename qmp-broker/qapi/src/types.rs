//! Types of QEMU 5.1's QAPI schema: one module per schema module, as far as commands use them.

pub mod balloon;
pub mod char;
pub mod control;
pub mod introspect;
pub mod machine;
pub mod memory;
pub mod misc;
pub mod pci;
pub mod qdev;
pub mod qom;
pub mod run_state;
