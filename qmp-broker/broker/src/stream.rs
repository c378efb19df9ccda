//! What a client is connected through: a unix socket, or the two descriptors of stdio.

use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::UnixStream;

use crate::fd::watch;
use crate::passed::{self, Passed};
use crate::policy::Credentials;

/// Bytes written at once to a descriptor that may block: a pipe that polls writable takes so many.
const PIPE_BUF: usize = 4096;

/// A connection to a client.
#[derive(Debug)]
pub enum Stream {
    /// A connected unix stream socket.
    Socket(UnixStream),
    /// Standard input and output. Their file descriptions are shared with the user's shell, so they
    /// stay in blocking mode.
    Stdio(Shared, Shared),
}

impl Stream {
    /// Who is at the other end, where the kernel knows.
    #[must_use]
    pub fn credentials(&self) -> Option<Credentials> {
        match self {
            Self::Socket(socket) => Credentials::of(socket),
            Self::Stdio(Shared::Polled(input), _) => Credentials::of(input.get_ref()),
            Self::Stdio(Shared::File(_), _) => None,
        }
    }

    /// What is written to.
    fn output(&self) -> BorrowedFd<'_> {
        match self {
            Self::Socket(socket) => socket.as_fd(),
            Self::Stdio(_, Shared::Polled(output)) => output.as_fd(),
            Self::Stdio(_, Shared::File(output)) => output.as_fd(),
        }
    }

    /// Whether nobody can read any more what is written.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        let mut polled = [PollFd::new(self.output(), PollFlags::empty())];
        poll(&mut polled, PollTimeout::ZERO) == Ok(1)
    }

    /// Writes to a client that is not served, at once or not at all.
    pub fn say(&self, bytes: &[u8]) {
        let fd = self.output();
        // Nothing has told the runtime yet whether it may be written to.
        let mut polled = [PollFd::new(fd, PollFlags::POLLOUT)];
        if poll(&mut polled, PollTimeout::ZERO) == Ok(1) {
            // A client that does not take it finds the connection closed.
            let _ = nix::unistd::write(fd, bytes);
        }
    }

    /// Waits until there may be something to read.
    ///
    /// # Errors
    /// The descriptor failed.
    pub async fn readable(&self) -> io::Result<()> {
        match self {
            Self::Socket(socket) => socket.readable().await,
            Self::Stdio(input, _) => input.ready(PollFlags::POLLIN).await,
        }
    }

    /// Reads what is there, 0 bytes at the end, and the descriptors that come with it.
    ///
    /// # Errors
    /// `WouldBlock` if there is nothing, or the descriptor failed.
    pub fn try_read(&self, buffer: &mut [u8]) -> io::Result<(usize, Passed)> {
        match self {
            Self::Socket(socket) => {
                let receive = || Ok(passed::receive(socket.as_fd(), buffer)?);
                socket.try_io(Interest::READABLE, receive)
            }
            Self::Stdio(input, _) => {
                let read = |fd: &OwnedFd| Ok((nix::unistd::read(fd, buffer)?, Passed::Nothing));
                input.when(PollFlags::POLLIN, read)
            }
        }
    }

    /// Waits until there may be room to write.
    ///
    /// # Errors
    /// The descriptor failed.
    pub async fn writable(&self) -> io::Result<()> {
        match self {
            Self::Socket(socket) => socket.writable().await,
            Self::Stdio(_, output) => output.ready(PollFlags::POLLOUT).await,
        }
    }

    /// Writes what fits.
    ///
    /// # Errors
    /// `WouldBlock` if nothing fits, or the descriptor failed.
    pub fn try_write(&self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Socket(socket) => socket.try_write(bytes),
            Self::Stdio(_, output) => {
                let some = bytes.get(..PIPE_BUF).unwrap_or(bytes);
                output.when(PollFlags::POLLOUT, |fd| Ok(nix::unistd::write(fd, some)?))
            }
        }
    }
}

/// A descriptor in blocking mode that is used only when it polls ready.
#[derive(Debug)]
pub enum Shared {
    /// A pipe, socket or terminal.
    Polled(AsyncFd<OwnedFd>),
    /// A regular file: always ready, and epoll refuses it.
    File(OwnedFd),
}

impl Shared {
    /// Takes over a descriptor.
    ///
    /// # Errors
    /// epoll refuses it for another reason than that it is a file.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        match watch(fd) {
            Ok(polled) => Ok(Self::Polled(polled)),
            Err((fd, error)) if error.raw_os_error() == Some(Errno::EPERM as i32) => Ok(Self::File(fd)),
            Err((_, error)) => Err(error),
        }
    }

    async fn ready(&self, events: PollFlags) -> io::Result<()> {
        match self {
            Self::Polled(fd) if events == PollFlags::POLLIN => fd.readable().await.map(drop),
            Self::Polled(fd) => fd.writable().await.map(drop),
            Self::File(_) => Ok(()),
        }
    }

    fn when<T>(&self, events: PollFlags, act: impl FnOnce(&OwnedFd) -> io::Result<T>) -> io::Result<T> {
        let fd = match self {
            Self::Polled(fd) => fd,
            Self::File(fd) => return act(fd),
        };
        let interest = match events {
            PollFlags::POLLIN => Interest::READABLE,
            _ => Interest::WRITABLE,
        };
        fd.try_io(interest, |fd| {
            let mut polled = [PollFd::new(fd.as_fd(), events)];
            match poll(&mut polled, PollTimeout::ZERO)? {
                0 => Err(ErrorKind::WouldBlock.into()),
                _ => act(fd),
            }
        })
    }
}
