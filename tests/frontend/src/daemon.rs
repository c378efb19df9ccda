//! Where a daemon is reached, and its lives as another process.

use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use bulkhead_framework::Scratch;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, listen, socket, socketpair,
};

/// Listeners in a directory of their own, which outlive daemons as those of a starter do.
pub struct Sockets {
    scratch: Scratch,
    /// `vhost`.
    pub vhost: UnixListener,
    /// `side`.
    pub side: OwnedFd,
}

fn packets() -> OwnedFd {
    socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).unwrap()
}

impl Default for Sockets {
    fn default() -> Self {
        Self::new()
    }
}

impl Sockets {
    /// Makes them.
    #[must_use]
    pub fn new() -> Self {
        let scratch = Scratch::new().unwrap();
        let vhost = UnixListener::bind(scratch.path().join("vhost")).unwrap();
        let side = packets();
        bind(side.as_raw_fd(), &UnixAddr::new(&scratch.path().join("side")).unwrap()).unwrap();
        listen(&side, Backlog::new(8).unwrap()).unwrap();
        Self { scratch, vhost, side }
    }

    /// A file beside them.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.scratch.path().join(name)
    }

    /// Connects to `vhost`.
    #[must_use]
    pub fn connect(&self) -> UnixStream {
        UnixStream::connect(self.path("vhost")).unwrap()
    }

    /// Connects to `side`.
    #[must_use]
    pub fn connect_side(&self) -> OwnedFd {
        let fd = packets();
        connect(fd.as_raw_fd(), &UnixAddr::new(&self.path("side")).unwrap()).unwrap();
        fd
    }
}

/// A life of a daemon in a process of its own; it ends by SIGKILL with the value.
pub struct Life(Child);

impl Life {
    /// Starts this executable anew, with `vhost` as standard input, `side` as standard output and one environment
    /// variable by which it knows that it is the daemon.
    #[must_use]
    pub fn begin(sockets: &Sockets, (variable, value): (&str, &Path)) -> Self {
        let child = Command::new(std::env::current_exe().unwrap())
            .env(variable, value)
            .stdin(Stdio::from(OwnedFd::from(sockets.vhost.try_clone().unwrap())))
            .stdout(Stdio::from(sockets.side.try_clone().unwrap()))
            .spawn();
        Self(child.unwrap())
    }

    /// Its process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for Life {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

/// A connected pair of packet sockets.
#[must_use]
pub fn pair_of_packets() -> (OwnedFd, OwnedFd) {
    socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap()
}
