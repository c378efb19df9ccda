//! The parts of the virtio-mem device daemon.

pub mod blocks;
pub mod device;
pub mod kept;
pub mod transport;
