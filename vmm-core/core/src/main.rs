//! The microkernel of a VM: vCPUs, memory slots and exits on KVM
fn main() {}
