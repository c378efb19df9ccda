//! Random plays of a driver and a back end; the fuzz target `virtio_pci` runs the same.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;
mod transport;

const PLAYS: u64 = 1_500;

#[test]
fn whatever_a_driver_does_only_rings_in_memory_are_started() {
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    let (mut started, mut broken) = (0, 0);
    for play in 0..PLAYS {
        let mut byte = || {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            seed.to_le_bytes()[4]
        };
        let len = 8 + usize::from(byte());
        let input: Vec<u8> = (0..len).map(|_| byte()).collect();
        let result = std::panic::catch_unwind(|| transport::play::play(&input));
        let (a, b) = result.unwrap_or_else(|_| panic!("play {play}: {input:?}"));
        started += a;
        broken += b;
    }
    assert!(started > 500 && broken > 500, "{started} started, {broken} broken");
}
