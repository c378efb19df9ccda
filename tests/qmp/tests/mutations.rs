//! Mutated input never breaks a session. BULKHEAD_MUTATIONS sets the number of inputs.

use bulkhead_qmp_tests::drive::{Mutator, drive};

#[test]
fn sessions_survive_mutated_input() {
    let default = if cfg!(debug_assertions) { 50_000 } else { 1_000_000 };
    let count =
        std::env::var("BULKHEAD_MUTATIONS").ok().and_then(|text| text.parse().ok()).unwrap_or(default);
    let mut mutator = Mutator::new(0x5EED);
    let mut replies = 0;
    for _ in 0..count {
        let input = mutator.next_input();
        let answered = std::panic::catch_unwind(|| drive(&input));
        replies += answered.unwrap_or_else(|_| panic!("input: {}", input.escape_ascii()));
    }
    println!("{count} inputs, {replies} replies");
    assert!(replies > count, "{replies} replies to {count} inputs");
}
