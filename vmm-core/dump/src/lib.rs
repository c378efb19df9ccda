//! Guest memory to one file: `memsave` and `pmemsave`.
//!
//! [`job`] is what a process does from its first message to its last, [`memory`] says where an address is in core's memfds,
//! [`output`] writes, with a hole where the memfd has one.

pub mod job;
pub mod memory;
pub mod output;
