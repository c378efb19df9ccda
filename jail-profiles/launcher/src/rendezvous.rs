//! Listening sockets between compartments: bound nowhere that anybody else could reach.

use std::hash::{BuildHasher as _, RandomState};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl, open};
use nix::sys::socket::{self, AddressFamily, Backlog, SockFlag, SockType, UnixAddr};
use nix::sys::stat::Mode;
use nix::unistd::{Uid, mkdir, unlink};

/// Connections that may wait: at most one peer at a time has business on such a socket.
const BACKLOG: i32 = 4;
/// Name of the socket for the moment in which it has one.
const SOCKET: &str = "s";

/// A listening `SOCK_SEQPACKET` socket that only its holder can connect to: its name is gone, a
/// descriptor of the inode is left.
#[derive(Debug)]
pub struct Rendezvous {
    listener: OwnedFd,
    inode: OwnedFd,
}

fn seqpacket(flags: SockFlag) -> Result<OwnedFd, Errno> {
    socket::socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC | flags, None)
}

/// Where to bind for a moment: a directory that only this user can change, or /tmp with its sticky bit.
fn base() -> PathBuf {
    let own = |path: &PathBuf| {
        std::fs::metadata(path).is_ok_and(|m| m.is_dir() && m.uid() == Uid::effective().as_raw())
    };
    std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(own).unwrap_or_else(|| "/tmp".into())
}

/// Removes what [`Rendezvous::new`] makes, at whichever point it was interrupted.
pub fn remove(directory: &Path) {
    let _ = unlink(&directory.join(SOCKET));
    let _ = std::fs::remove_dir(directory);
}

impl Rendezvous {
    /// Makes one; `register` learns of the directory that it uses for a moment, before that is made.
    ///
    /// # Errors
    /// The directory for temporary files cannot be written.
    pub fn new(register: impl FnOnce(&Path) -> Result<(), String>) -> Result<Self, String> {
        let base = base();
        let fail = |e: Errno| format!("cannot make a socket in {}: {e}", base.display());
        // Keyed at random by the standard library: not to be guessed.
        let name = format!("bulkhead-{:016x}", RandomState::new().hash_one(std::process::id()));
        let directory = base.join(name);
        register(&directory)?;
        mkdir(&directory, Mode::S_IRWXU).map_err(fail)?;
        let made = (|| {
            let path = directory.join(SOCKET);
            let listener = seqpacket(SockFlag::empty())?;
            socket::bind(listener.as_raw_fd(), &UnixAddr::new(&path)?)?;
            socket::listen(&listener, Backlog::new(BACKLOG)?)?;
            let inode = open(&path, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())?;
            Ok(Self { listener, inode })
        })();
        remove(&directory);
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
        // A full queue is an error here, not a wait.
        let connected = seqpacket(SockFlag::SOCK_NONBLOCK).and_then(|socket| {
            socket::connect(socket.as_raw_fd(), &UnixAddr::new(path.as_str())?)?;
            fcntl(&socket, FcntlArg::F_SETFL(OFlag::empty()))?;
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
        let mut directory = PathBuf::new();
        let register = |path: &Path| {
            directory = path.to_owned();
            Ok(())
        };
        let rendezvous = Rendezvous::new(register).unwrap();
        assert!(directory.starts_with(base()) && !directory.exists());
        for _ in 0..2 {
            let _end = rendezvous.connect().unwrap();
            socket::accept(rendezvous.listener().as_raw_fd()).unwrap();
        }
    }

    #[test]
    fn a_full_queue_is_an_error() {
        let rendezvous = Rendezvous::new(|_| Ok(())).unwrap();
        let ends: Vec<_> = (0..=BACKLOG).map(|_| rendezvous.connect().unwrap()).collect();
        assert!(rendezvous.connect().is_err());
        drop(ends);
    }
}
