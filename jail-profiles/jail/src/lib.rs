//! The start contract of every process: named fds, jail, readiness, links, logs.
//!
//! A process calls [`start::Start::begin`] first thing in `main`, takes its descriptors by name,
//! makes its threads, then calls [`start::Start::enter`]; from there on the seccomp filter holds.
//! See `docs/decisions/0001-start-contract.md`.

pub mod alarm;
pub mod door;
pub mod footprint;
pub mod keeper;
pub mod link;
pub mod log;
pub mod owner;
pub mod pace;
mod sandbox;
pub mod start;
pub mod starter;
pub mod surroundings;
pub mod topology;
