//! virtio-net device daemon.
