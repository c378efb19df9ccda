//! The PCI bus: configuration space, virtio-pci transport, front end of vhost-user back ends.

pub mod device;
pub mod frontend;
pub mod memory;
