//! A listener and the one peer that is connected through it.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, SockFlag, accept4};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::link::{self, Link, LinkError};
use crate::warn;

/// A peer that has connected says hello within this time. The starter connects before it starts the
/// process, which on a loaded host takes seconds to get to its hello.
const GREETING: Duration = Duration::from_secs(10);

#[derive(Debug)]
enum Peer {
    Nobody,
    /// Connected; its hello is not there yet.
    Greeting(OwnedFd, Instant),
    Linked(Link),
    /// Nobody is let in any more.
    Shut,
}

/// One listener. While a peer is connected no other is accepted; a later one waits in the queue.
#[derive(Debug)]
pub struct Door {
    name: &'static str,
    version: u16,
    listener: OwnedFd,
    peer: Peer,
}

/// What a readable door means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrival {
    /// Nothing that concerns anybody.
    Nothing,
    /// A peer has connected and said hello.
    Connected,
    /// The link has a message, or its end.
    Message,
}

impl Door {
    /// A door with nobody in it.
    #[must_use]
    pub fn new(name: &'static str, version: u16, listener: OwnedFd) -> Self {
        Self { name, version, listener, peer: Peer::Nobody }
    }

    /// What to poll.
    #[must_use]
    pub fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        match &self.peer {
            Peer::Nobody => Some(self.listener.as_fd()),
            Peer::Greeting(fd, _) => Some(fd.as_fd()),
            Peer::Linked(link) => Some(link.as_fd()),
            Peer::Shut => None,
        }
    }

    /// Whether [`Self::advance`] would do something now.
    #[must_use]
    pub fn is_readable(&self) -> bool {
        let Some(fd) = self.poll_fd() else { return false };
        poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], PollTimeout::ZERO).is_ok_and(|count| count > 0)
    }

    /// The link, if a peer is there.
    pub fn link(&mut self) -> Option<&mut Link> {
        match &mut self.peer {
            Peer::Linked(link) => Some(link),
            _ => None,
        }
    }

    /// Whether a peer is there.
    #[must_use]
    pub fn is_linked(&self) -> bool {
        matches!(self.peer, Peer::Linked(_))
    }

    /// Whether a peer has connected and not yet said hello.
    #[must_use]
    pub fn is_greeting(&self) -> bool {
        matches!(self.peer, Peer::Greeting(..))
    }

    /// Ends the link with the present peer; the next one may come.
    pub fn close(&mut self) {
        self.peer = Peer::Nobody;
    }

    /// Ends the link and lets nobody in any more.
    pub fn shut(&mut self) {
        self.peer = Peer::Shut;
    }

    /// Goes on after `poll_fd` became readable.
    pub fn advance(&mut self) -> Arrival {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        match std::mem::replace(&mut self.peer, Peer::Nobody) {
            Peer::Nobody => match accept4(self.listener.as_raw_fd(), flags) {
                Ok(fd) => self.peer = Peer::Greeting(link::own(fd), Instant::now()),
                // The starter has taken the connection back: its owner has died.
                Err(Errno::EAGAIN) => {}
                Err(errno) => warn!("{}: accept: {errno}", self.name),
            },
            Peer::Greeting(fd, _) => match self.greet(fd) {
                Ok(link) => {
                    self.peer = Peer::Linked(link);
                    return Arrival::Connected;
                }
                Err(LinkError::Closed) => {}
                Err(error) => warn!("{}: {error}", self.name),
            },
            linked @ Peer::Linked(_) => {
                self.peer = linked;
                return Arrival::Message;
            }
            Peer::Shut => self.peer = Peer::Shut,
        }
        Arrival::Nothing
    }

    /// The peer's hello is there. Ours goes out whatever it says, so that the other side can say what is wrong, too.
    fn greet(&self, fd: OwnedFd) -> Result<Link, LinkError> {
        let mut link = Link::begin(fd, self.version)?;
        link.finish(self.version, MsgFlags::MSG_DONTWAIT)?;
        Ok(link)
    }

    /// The next message, once the door is readable. `welcome` is for a peer that has just said hello.
    pub fn receive<T: DeserializeOwned>(&mut self, welcome: impl FnOnce(&mut Self)) -> Option<T> {
        match self.advance() {
            Arrival::Nothing => return None,
            Arrival::Connected => welcome(self),
            Arrival::Message => {}
        }
        match self.link()?.recv() {
            Ok(message) => return Some(message),
            Err(LinkError::WouldBlock) => {}
            Err(error) => self.end(&error),
        }
        None
    }

    /// Sends without waiting: a peer that does not read loses its link, not this process its time.
    pub fn send(&mut self, message: &impl Serialize, fds: &[BorrowedFd<'_>]) {
        let Some(link) = self.link() else { return };
        if let Err(error) = link.send_with(message, fds, MsgFlags::MSG_DONTWAIT) {
            self.end(&error);
        }
    }

    fn end(&mut self, error: &LinkError) {
        match error {
            LinkError::Closed => {}
            LinkError::WouldBlock => warn!("{}: it does not read; the link is closed", self.name),
            error => warn!("{}: {error}; the link is closed", self.name),
        }
        self.close();
    }

    /// Drops a peer that does not say hello.
    pub fn expire(&mut self) {
        if matches!(&self.peer, Peer::Greeting(_, since) if since.elapsed() > GREETING) {
            warn!("{}: a peer connected and said nothing", self.name);
            self.peer = Peer::Nobody;
        }
    }
}

#[cfg(test)]
mod tests {
    use nix::sys::socket::{
        AddressFamily, Backlog, SockType, UnixAddr, bind, connect, getsockname, listen, socket,
    };

    use super::*;

    fn packets() -> OwnedFd {
        socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).unwrap()
    }

    #[test]
    fn a_peer_that_is_slow_to_start_is_let_in() {
        let (fd, peer) = (packets(), packets());
        bind(fd.as_raw_fd(), &UnixAddr::new_unnamed()).unwrap();
        let addr = getsockname::<UnixAddr>(fd.as_raw_fd()).unwrap();
        listen(&fd, Backlog::new(1).unwrap()).unwrap();
        let mut door = Door::new("test", 1, fd);
        connect(peer.as_raw_fd(), &addr).unwrap();
        assert_eq!(door.advance(), Arrival::Nothing);
        std::thread::sleep(Duration::from_millis(2500));
        door.expire();
        let peer = Link::begin(peer, 1).unwrap();
        assert_eq!(door.advance(), Arrival::Connected);
        drop(peer);
    }
}
