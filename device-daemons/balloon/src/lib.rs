//! virtio-balloon device daemon.

pub mod device;
pub mod pages;
