//! virtio-net device daemon: packets between virtqueues and TAP interfaces.

pub mod device;
pub mod tap;
pub mod transport;
