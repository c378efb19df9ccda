//! virtio-pci transport: any play of a driver and a back end; only rings in memory are started, a successor answers the
//! same.
#![no_main]

#[path = "../../../device-daemons/pci/tests/common/mod.rs"]
mod common;
#[path = "../../../device-daemons/pci/tests/transport/mod.rs"]
mod transport;

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    transport::play::play(input);
});
