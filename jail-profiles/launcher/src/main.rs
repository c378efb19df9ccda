//! The bulkhead command: starts and supervises the processes of a VM
fn main() {}
