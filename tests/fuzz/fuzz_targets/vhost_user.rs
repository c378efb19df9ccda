//! vhost-user front end: any play of device and back end; no panic, each call one event, loss with a reason.
#![no_main]

#[path = "../../../device-daemons/pci/tests/common/mod.rs"]
mod common;

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    common::drive::drive(input);
});
