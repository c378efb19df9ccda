//! The device: configuration space and the one request that there is (virtio 1.3, 5.19).

/// Length of the configuration space in bytes: `start`, `size`.
pub const CONFIG_LEN: usize = 16;
/// Length of a request in bytes: its type.
pub const REQUEST_LEN: usize = 4;
/// Length of an answer in bytes.
pub const RESPONSE_LEN: usize = 4;
/// `VIRTIO_PMEM_REQ_TYPE_FLUSH`.
const FLUSH: [u8; REQUEST_LEN] = [0; REQUEST_LEN];

/// The configuration space of a device at this guest physical address, of so many bytes.
#[must_use]
pub fn config(addr: u64, size: u64) -> [u8; CONFIG_LEN] {
    let mut space = [0; CONFIG_LEN];
    for (slot, field) in space.chunks_exact_mut(8).zip([addr, size]) {
        slot.copy_from_slice(&field.to_le_bytes());
    }
    space
}

/// Whether a request is one to write everything back to the file.
#[must_use]
pub fn is_flush(request: &[u8]) -> bool {
    request == FLUSH
}

/// The answer: 0 if everything is in the file for good, 1 if not.
#[must_use]
pub fn response(done: bool) -> [u8; RESPONSE_LEN] {
    u32::from(!done).to_le_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_one_request() {
        assert!(is_flush(&[0; 4]));
        for other in [&[1, 0, 0, 0][..], &[0, 0, 0, 1], &[0; 3], &[]] {
            assert!(!is_flush(other));
        }
        assert_eq!((response(true), response(false)), ([0; 4], [1, 0, 0, 0]));
        assert_eq!(config(1 << 32, 2), [0, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
    }
}
