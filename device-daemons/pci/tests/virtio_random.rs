//! Random plays of a driver and a back end; the fuzz target `virtio_pci` runs the same.

mod common;
mod transport;

const PLAYS: u64 = 1_500;

#[test]
fn whatever_a_driver_does_only_rings_in_memory_are_started() {
    let (started, broken) = common::play_all(PLAYS, |_, random| random.script(), transport::play::play);
    assert!(started > 500 && broken > 500, "{started} started, {broken} broken");
}
