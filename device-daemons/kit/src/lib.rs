//! What the device daemons share: listener, queues, side link, start and end.
//!
//! A daemon has two threads. The *control* thread ([`serve`]) talks to the starter, to the vhost-user front end and
//! on the side link. The *queue* thread ([`worker`]) owns the device and its rings and takes commands from the
//! control thread, so nothing on the data path is shared or locked. Both exist before the seccomp filter does.

pub mod chain;
pub mod device;
pub mod inflight;
pub mod io;
pub mod memory;
pub mod pieces;
pub mod polling;
pub mod ring;
pub mod serve;
pub mod vhost;
pub mod worker;

mod side;
