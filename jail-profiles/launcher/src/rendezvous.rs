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

/// Where to bind for a moment, best first: a directory that only this user can change, or one with a sticky bit; a file system
/// in memory makes and removes a name at a hundredth of a disk's price.
fn bases() -> impl Iterator<Item = PathBuf> {
    let own = |path: &PathBuf| {
        std::fs::metadata(path).is_ok_and(|m| m.is_dir() && m.uid() == Uid::effective().as_raw())
    };
    let sticky = |path: &&str| {
        std::fs::metadata(path).is_ok_and(|m| m.is_dir() && m.mode() & Mode::S_ISVTX.bits() != 0)
    };
    let runtime = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(own);
    runtime.into_iter().chain(["/dev/shm", "/tmp"].into_iter().filter(sticky).map(PathBuf::from))
}

/// Removes what a [`Place`] is, at whichever point it was interrupted.
pub fn remove(directory: &Path) {
    let _ = unlink(&directory.join(SOCKET));
    let _ = std::fs::remove_dir(directory);
}

/// A directory that is there while sockets are made.
#[derive(Debug)]
pub struct Place(PathBuf);

impl Drop for Place {
    fn drop(&mut self) {
        remove(&self.0);
    }
}

impl Place {
    /// Makes it; `register` learns of it before.
    ///
    /// # Errors
    /// No directory for temporary files can be written.
    pub fn new(register: impl Fn(&Path) -> Result<(), String>) -> Result<Self, String> {
        let mut last = "no directory for temporary files has a sticky bit".to_owned();
        for base in bases() {
            // Keyed at random by the standard library: not to be guessed.
            let name = format!("bulkhead-{:016x}", RandomState::new().hash_one(std::process::id()));
            let directory = base.join(name);
            register(&directory)?;
            match mkdir(&directory, Mode::S_IRWXU) {
                Ok(()) => return Ok(Self(directory)),
                Err(e) => last = format!("{}: {e}", base.display()),
            }
        }
        Err(format!("cannot make a socket: {last}"))
    }

    /// Makes a socket that listens; its name is gone afterwards.
    ///
    /// # Errors
    /// The kernel's, in one line.
    pub fn listen(&self, kind: SockType) -> Result<Rendezvous, String> {
        let path = self.0.join(SOCKET);
        let made = (|| {
            let listener = listen(kind, &path)?;
            let inode = open(&path, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())?;
            unlink(&path)?;
            Ok(Rendezvous { kind, listener, inode })
        })();
        made.map_err(|e: Errno| format!("cannot make a socket in {}: {e}", self.0.display()))
    }
}

impl Rendezvous {
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
    use std::cell::RefCell;

    use super::*;

    #[test]
    fn a_nameless_listener_takes_connections() {
        let directory = RefCell::new(PathBuf::new());
        let register = |path: &Path| {
            directory.replace(path.to_owned());
            Ok(())
        };
        let place = Place::new(register).unwrap();
        let directory = directory.into_inner();
        assert!(bases().any(|base| directory.starts_with(base)));
        let made = [SockType::SeqPacket, SockType::Stream].map(|kind| place.listen(kind).unwrap());
        assert_eq!(directory.read_dir().unwrap().count(), 0);
        drop(place);
        assert!(!directory.exists());
        for rendezvous in made {
            for _ in 0..2 {
                let _end = rendezvous.connect().unwrap();
                socket::accept(rendezvous.listener().as_raw_fd()).unwrap();
            }
        }
    }

    #[test]
    fn a_listener_that_does_not_accept_has_one_connection() {
        let rendezvous = Place::new(|_| Ok(())).unwrap().listen(SockType::SeqPacket).unwrap();
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
