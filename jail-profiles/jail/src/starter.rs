//! What a process says to its starter, in the words of `sd_notify(3)`: that it is ready, and which
//! descriptors are to outlive it.
//!
//! The launcher understands the same words as systemd. A descriptor that is kept comes back under its name
//! when the process is started anew. systemd does not keep one file description twice: whoever may hold it
//! under two names must find that out.

use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, connect, send, socket};

use crate::link::send_packet;

/// The way to the starter, if there is one that listens.
#[derive(Debug, Default)]
pub struct Starter {
    fd: Option<OwnedFd>,
    /// How long the process may be silent (`WatchdogSec=`), if that is watched.
    pub watchdog: Option<Duration>,
}

impl Starter {
    /// Talks through this descriptor.
    #[must_use]
    pub const fn new(fd: Option<OwnedFd>) -> Self {
        Self { fd, watchdog: None }
    }

    /// Connects to the service manager's socket, as `NOTIFY_SOCKET` names it.
    ///
    /// # Errors
    /// The kernel's.
    pub fn connect(address: &str) -> Result<Self, Errno> {
        let flags = SockFlag::SOCK_CLOEXEC;
        let fd = socket(AddressFamily::Unix, SockType::Datagram, flags, None)?;
        let address = match address.strip_prefix('@') {
            Some(name) => UnixAddr::new_abstract(name.as_bytes())?,
            None => UnixAddr::new(address)?,
        };
        connect(fd.as_raw_fd(), &address)?;
        Ok(Self { fd: Some(fd), watchdog: None })
    }

    /// What to wait for when a call gave `EAGAIN`.
    #[must_use]
    pub fn socket(&self) -> Option<BorrowedFd<'_>> {
        self.fd.as_ref().map(AsFd::as_fd)
    }

    /// The process serves.
    ///
    /// # Errors
    /// As [`Self::keep`].
    pub fn ready(&self) -> Result<(), Errno> {
        self.say("READY=1", &[])
    }

    /// The process is alive (`WatchdogSec=`).
    ///
    /// # Errors
    /// As [`Self::keep`].
    pub fn alive(&self) -> Result<(), Errno> {
        self.say("WATCHDOG=1", &[])
    }

    /// Keeps a copy of a descriptor under a name that the topology lets the process keep and that is not
    /// in use. Also a descriptor that hung up is kept.
    ///
    /// # Errors
    /// `EAGAIN`: the starter has much to read; the kernel's. Never waits.
    pub fn keep(&self, name: &str, fd: BorrowedFd<'_>) -> Result<(), Errno> {
        self.say(&format!("FDSTORE=1\nFDPOLL=0\nFDNAME={name}"), &[fd])
    }

    /// Keeps the descriptor of that name no longer. One that is not kept is none of its concern.
    ///
    /// # Errors
    /// As [`Self::keep`].
    pub fn forget(&self, name: &str) -> Result<(), Errno> {
        self.say(&format!("FDSTOREREMOVE=1\nFDNAME={name}"), &[])
    }

    fn say(&self, words: &str, fds: &[BorrowedFd<'_>]) -> Result<(), Errno> {
        match &self.fd {
            None => Ok(()),
            Some(fd) if fds.is_empty() => {
                let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
                send(fd.as_raw_fd(), words.as_bytes(), flags).map(drop)
            }
            Some(fd) => send_packet(fd.as_fd(), words.as_bytes(), fds, MsgFlags::MSG_DONTWAIT),
        }
    }
}
