//! QEMU's QAPI schema as Rust types, and the one table of commands
