//! Terminates QMP: sessions, authorization, events
fn main() {}
