//! Ringing a guest's doorbell in its stead.

use std::os::fd::{AsFd, OwnedFd};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::write;

/// Rings it. One whose counter is full is ringing already, and a write to it would wait.
pub fn ring(bell: &OwnedFd) {
    let mut polled = [PollFd::new(bell.as_fd(), PollFlags::POLLOUT)];
    if poll(&mut polled, PollTimeout::ZERO) == Ok(1) {
        // An eventfd takes eight bytes or nothing.
        let _taken = write(bell, &1u64.to_ne_bytes());
    }
}
