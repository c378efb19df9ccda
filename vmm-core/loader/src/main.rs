//! One-shot loader: kernel, initrd, command line and ACPI tables into guest memory
fn main() {}
