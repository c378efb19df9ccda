//! Rings of device daemons: a driver that does anything; a device gets requests inside of memory.
#![no_main]

#[path = "../../../device-daemons/kit/tests/play/mod.rs"]
mod play;

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    play::play(input);
});
