//! virtio-balloon device daemon.
