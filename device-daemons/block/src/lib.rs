//! virtio-blk device daemon: raw files and block devices.

pub mod device;
pub mod transport;
