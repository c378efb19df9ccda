//! virtio-blk device daemon.
