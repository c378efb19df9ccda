//! Serial port, platform registers and character devices
fn main() {}
