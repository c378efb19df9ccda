//! Side link of a device daemon: what vhost-user cannot carry.
//!
//! The daemon listens (descriptor `side`), pci connects; after the hello each way only the daemon speaks.

use serde::{Deserialize, Serialize};

/// Daemon to pci.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToPci {
    /// The device's configuration space has changed: read it again and tell the guest.
    ConfigChanged,
    /// The device cannot go on until the guest resets it (virtio 1.2, 2.1 "Device Status Field").
    NeedsReset,
    /// The queue thread owns the attached descriptor (`bulkhead-jail`'s `owner`). Said first.
    Thread,
}
