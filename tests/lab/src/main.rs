//! Boots a Debian system with nested KVM under software emulation and runs test cases there
fn main() {}
