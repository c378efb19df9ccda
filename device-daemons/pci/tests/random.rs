//! Random plays of front end and back end; the fuzz target `vhost_user` runs the same.

mod common;

use common::Random;

const PLAYS: u64 = 10_000;

/// Half of the plays are mostly honest, so that they get far.
fn script(play: u64, random: &mut Random) -> Vec<u8> {
    let mut script = random.script();
    if play.is_multiple_of(2) {
        script.iter_mut().for_each(|byte| *byte = if random.byte() < 100 { 0 } else { *byte });
        if let Some(first) = script.first_mut() {
            *first = 0x29;
        }
    }
    script
}

#[test]
fn whatever_happens_the_front_end_keeps_its_promises() {
    let (lost, done) = common::play_all(PLAYS, script, common::drive::drive);
    assert!(lost > 5_000 && done > 5_000, "{lost} lost, {done} done");
}
