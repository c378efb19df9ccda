//! Descriptors watched by the runtime.
#![expect(
    unsafe_code,
    reason = "registering and accepting descriptors, whose validity the types cannot show"
)]

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{SockFlag, accept4};
use tokio::io::unix::AsyncFd;

/// Watches a descriptor, or gives it back with the reason why epoll refuses it.
///
/// # Errors
/// The descriptor and epoll's error.
pub fn watch(fd: OwnedFd) -> Result<AsyncFd<OwnedFd>, (OwnedFd, io::Error)> {
    // SAFETY: an OwnedFd is open, always gives the same number, and AsyncFd owns it from here on, so
    // it stays open while it is registered.
    let registered = unsafe { AsyncFd::register(fd) };
    registered.map_err(|refused| refused.into_parts())
}

/// Accepts a connection.
///
/// # Errors
/// The kernel's error; `EAGAIN` is waited for.
pub async fn accept(listener: &AsyncFd<OwnedFd>) -> Result<OwnedFd, Errno> {
    loop {
        let mut guard = listener.readable().await.map_err(|_| Errno::EIO)?;
        match accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC) {
            // SAFETY: the kernel has just made this descriptor for us; nobody else knows its number.
            Ok(fd) => return Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
            Err(Errno::EAGAIN) => guard.clear_ready(),
            Err(Errno::EINTR | Errno::ECONNABORTED) => {}
            Err(error) => return Err(error),
        }
    }
}
