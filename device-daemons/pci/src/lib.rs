//! The PCI bus: configuration space, virtio-pci transport, front end of vhost-user back ends.

pub mod access;
pub mod broker;
pub mod bus;
pub mod connector;
pub mod core_link;
pub mod device;
pub mod event;
pub mod frontend;
pub mod function;
pub mod listing;
pub mod machine;
pub mod memory;
pub mod msix;
pub mod pieces;
pub mod place;
pub mod port;
pub mod server;
pub mod space;
pub mod state;
pub mod virtio;
