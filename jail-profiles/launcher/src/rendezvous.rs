//! Listening sockets between compartments: bound nowhere that anybody else could reach.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::socket::{self, AddressFamily, Backlog, SockFlag, SockType, UnixAddr};
use nix::sys::stat::Mode;
use nix::unistd::{mkdtemp, unlink};

/// Connections that may wait: at most one peer at a time has business on such a socket.
const BACKLOG: i32 = 4;

/// A listening `SOCK_SEQPACKET` socket that only its holder can connect to: its name is gone, a
/// descriptor of the inode is left.
#[derive(Debug)]
pub struct Rendezvous {
    listener: OwnedFd,
    inode: OwnedFd,
}

fn seqpacket() -> Result<OwnedFd, Errno> {
    socket::socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)
}

impl Rendezvous {
    /// Makes one.
    ///
    /// # Errors
    /// The directory for temporary files cannot be written.
    pub fn new() -> Result<Self, String> {
        let base =
            std::env::var_os("XDG_RUNTIME_DIR").map_or_else(|| "/tmp".into(), std::path::PathBuf::from);
        let base = if base.is_dir() { base } else { "/tmp".into() };
        let fail = |e: Errno| format!("cannot make a socket in {}: {e}", base.display());
        let directory = mkdtemp(&base.join("bulkhead-XXXXXX")).map_err(fail)?;
        let path = directory.join("s");
        let made = (|| {
            let listener = seqpacket()?;
            socket::bind(listener.as_raw_fd(), &UnixAddr::new(&path)?)?;
            socket::listen(&listener, Backlog::new(BACKLOG)?)?;
            let inode = open(&path, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())?;
            Ok(Self { listener, inode })
        })();
        let _ = unlink(&path);
        let _ = std::fs::remove_dir(&directory);
        made.map_err(fail)
    }

    /// The listening end.
    #[must_use]
    pub fn listener(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }

    /// A new connection to it.
    ///
    /// # Errors
    /// The listener is gone or its queue is full.
    pub fn connect(&self) -> Result<OwnedFd, String> {
        let path = format!("/proc/self/fd/{}", self.inode.as_raw_fd());
        let connected = seqpacket().and_then(|socket| {
            socket::connect(socket.as_raw_fd(), &UnixAddr::new(path.as_str())?)?;
            Ok(socket)
        });
        connected.map_err(|e| format!("cannot connect two compartments: {e} (is /proc mounted?)"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_nameless_listener_takes_connections() {
        let rendezvous = Rendezvous::new().unwrap();
        for _ in 0..2 {
            let _end = rendezvous.connect().unwrap();
            socket::accept(rendezvous.listener().as_raw_fd()).unwrap();
        }
    }
}
