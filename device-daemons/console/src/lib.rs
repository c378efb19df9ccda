//! The console of a VM: serial port, platform registers (RTC, power, reset) and character devices.

pub mod bus;
pub mod chardev;
pub mod clock;
pub mod connection;
pub mod device;
pub mod kept;
pub mod machine;
pub mod pump;
pub mod queue;
pub mod server;
pub mod state;
