//! virtio-balloon device daemon.

pub mod broker;
pub mod device;
pub mod kept;
pub mod pages;
pub mod transport;
