//! Random plays of a driver with a ring.

mod play;

#[test]
fn whatever_a_driver_does_a_device_gets_requests_inside_of_memory() {
    let mut state = 0x1234_5678_9abc_def0u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state.to_be_bytes()[1]
    };
    let (mut taken, mut with) = (0, 0);
    for _ in 0..5000 {
        let input: Vec<u8> = (0..251).map(|_| next()).collect();
        let played = play::play(&input);
        taken += played;
        with += usize::from(played > 0);
    }
    println!("{taken} requests in {with} of 5,000 plays");
    assert!(with > 1000, "{with} plays had a request");
}
