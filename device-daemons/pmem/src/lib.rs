//! The parts of the virtio-pmem device daemon.

pub mod device;
pub mod transport;
