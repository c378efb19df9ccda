//! Random plays of front end and back end; the fuzz target `vhost_user` runs the same.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

const PLAYS: u64 = 10_000;

#[test]
fn whatever_happens_the_front_end_keeps_its_promises() {
    let mut seed = 0x2545_f491_4f6c_dd1d_u64;
    let (mut lost, mut done) = (0, 0);
    for play in 0..PLAYS {
        let mut byte = || {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            seed.to_le_bytes()[4]
        };
        let len = 8 + usize::from(byte());
        // Half of the plays are mostly honest, so that they get far.
        let honest = play % 2 == 0;
        let mut input: Vec<u8> = (0..len)
            .map(|_| match byte() {
                0..100 if honest => 0,
                _ => byte(),
            })
            .collect();
        if honest && let Some(first) = input.first_mut() {
            *first = 0x29;
        }
        let result = std::panic::catch_unwind(|| common::drive::drive(&input));
        let (a, b) = result.unwrap_or_else(|_| panic!("play {play}: {input:?}"));
        lost += a;
        done += b;
    }
    assert!(lost > 5_000 && done > 5_000, "{lost} lost, {done} done");
}
