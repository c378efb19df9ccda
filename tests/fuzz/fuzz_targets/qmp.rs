//! QMP sessions: any input, no panic, bounded memory, every reply valid JSON.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    bulkhead_qmp_tests::drive::drive(input);
});
