//! A guest against the PCI bus.
#![no_main]

#[path = "../../../device-daemons/pci/tests/guest/mod.rs"]
mod guest;

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    guest::drive::drive(input);
});
