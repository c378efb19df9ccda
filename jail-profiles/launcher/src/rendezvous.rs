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

/// A listening socket that only its holder can connect to: its name is gone, a
/// descriptor of the inode is left.
#[derive(Debug)]
pub struct Rendezvous {
    kind: SockType,
    listener: OwnedFd,
    inode: OwnedFd,
}

/// A socket that never makes whoever accepts, or connects, wait.
fn unix(kind: SockType) -> Result<OwnedFd, Errno> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    socket::socket(AddressFamily::Unix, kind, flags, None)
}

/// Listens at `path`.
///
/// # Errors
/// The kernel's.
pub fn listen(kind: SockType, path: &Path) -> Result<OwnedFd, Errno> {
    let listener = unix(kind)?;
    socket::bind(listener.as_raw_fd(), &UnixAddr::new(path)?)?;
    socket::listen(&listener, Backlog::new(BACKLOG)?)?;
    Ok(listener)
}

/// A new connection, the only one that waits: others in the queue are of a former life of the peer, or are replaced by
/// this one. They leave the queue, which a listener that is frozen would let fill up.
///
/// # Errors
/// The kernel's.
pub fn connect(kind: SockType, listener: BorrowedFd<'_>, path: &Path) -> Result<OwnedFd, Errno> {
    for _ in 0..=BACKLOG {
        let Ok(former) = socket::accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC) else { break };
        let _ = nix::unistd::close(former);
    }
    let socket = unix(kind)?;
    socket::connect(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    fcntl(&socket, FcntlArg::F_SETFL(OFlag::empty()))?;
    Ok(socket)
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
    /// Makes one for packets, see [`Self::of`].
    ///
    /// # Errors
    /// As there.
    pub fn new(register: impl FnOnce(&Path) -> Result<(), String>) -> Result<Self, String> {
        Self::of(SockType::SeqPacket, register)
    }

    /// Makes one; `register` learns of the directory that it uses for a moment, before that is made.
    ///
    /// # Errors
    /// The directory for temporary files cannot be written.
    pub fn of(kind: SockType, register: impl FnOnce(&Path) -> Result<(), String>) -> Result<Self, String> {
        let base = base();
        let fail = |e: Errno| format!("cannot make a socket in {}: {e}", base.display());
        // Keyed at random by the standard library: not to be guessed.
        let name = format!("bulkhead-{:016x}", RandomState::new().hash_one(std::process::id()));
        let directory = base.join(name);
        register(&directory)?;
        mkdir(&directory, Mode::S_IRWXU).map_err(fail)?;
        let made = (|| {
            let path = directory.join(SOCKET);
            let listener = listen(kind, &path)?;
            let inode = open(&path, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())?;
            Ok(Self { kind, listener, inode })
        })();
        remove(&directory);
        made.map_err(fail)
    }

    /// The listening end.
    #[must_use]
    pub fn listener(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }

    /// A new connection to it, see [`connect`].
    ///
    /// # Errors
    /// The listener is gone.
    pub fn connect(&self) -> Result<OwnedFd, String> {
        self.try_connect().map_err(|e| format!("cannot connect two compartments: {e} (is /proc mounted?)"))
    }

    /// The same.
    ///
    /// # Errors
    /// The kernel's.
    pub fn try_connect(&self) -> Result<OwnedFd, Errno> {
        let path = format!("/proc/self/fd/{}", self.inode.as_raw_fd());
        connect(self.kind, self.listener(), path.as_ref())
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
    fn a_listener_that_does_not_accept_has_one_connection() {
        let rendezvous = Rendezvous::new(|_| Ok(())).unwrap();
        let former: Vec<_> = (0..100).map(|_| rendezvous.connect().unwrap()).collect();
        let accept = || socket::accept(rendezvous.listener().as_raw_fd());
        let last = rendezvous.connect().unwrap();
        socket::send(last.as_raw_fd(), b"last", socket::MsgFlags::empty()).unwrap();
        let mut word = [0; 8];
        let length = socket::recv(accept().unwrap(), &mut word, socket::MsgFlags::empty()).unwrap();
        assert_eq!(&word[..length], b"last");
        assert_eq!(accept(), Err(Errno::EAGAIN));
        for end in former {
            assert_eq!(socket::recv(end.as_raw_fd(), &mut word, socket::MsgFlags::empty()), Ok(0));
        }
    }
}
