//! The PCI bus: configuration space, virtio-pci transport, front end of vhost-user back ends.

pub mod bus;
pub mod device;
pub mod frontend;
pub mod function;
pub mod memory;
pub mod msix;
pub mod place;
pub mod port;
pub mod space;
