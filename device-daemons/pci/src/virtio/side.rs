//! The side link of a device daemon of ours (`control-api::side`).

use std::os::fd::{AsFd as _, OwnedFd};
use std::rc::Rc;

use bulkhead_control_api::VERSION;
use bulkhead_control_api::side::{FromPci, ToPci};
use bulkhead_jail::link::{Link, LinkError};
use nix::poll::{PollFd, PollFlags};
use nix::sys::socket::MsgFlags;

/// What the daemon has said, with what came along.
pub type Said = (ToPci, Option<OwnedFd>);

/// Messages in one call of [`Side::advance`].
const TURNS: usize = 16;

/// The link.
pub struct Side {
    link: Link,
    greeted: bool,
    /// Owned by the daemon's queue thread.
    pub thread: Option<Rc<OwnedFd>>,
}

impl Side {
    /// Greets the daemon.
    ///
    /// # Errors
    /// It is gone.
    pub fn new(fd: OwnedFd) -> Result<Self, LinkError> {
        Ok(Self { link: Link::begin(fd, VERSION)?, greeted: false, thread: None })
    }

    /// What to wait for.
    pub fn watch(&self) -> PollFd<'_> {
        PollFd::new(self.link.as_fd(), PollFlags::POLLIN)
    }

    /// Tells the daemon something, if its hello has come.
    ///
    /// # Errors
    /// The link is over, or the daemon does not read.
    pub fn tell(&self, message: &FromPci) -> Result<bool, LinkError> {
        if self.greeted {
            self.link.send_with(message, &[], MsgFlags::MSG_DONTWAIT)?;
        }
        Ok(self.greeted)
    }

    /// What the daemon has said since the last call, with what came along; nothing is its hello.
    ///
    /// # Errors
    /// The link is over.
    pub fn advance(&mut self) -> Result<Vec<Option<Said>>, LinkError> {
        let mut said = Vec::new();
        for _ in 0..TURNS {
            let result = if self.greeted {
                self.link.recv_with::<ToPci>(MsgFlags::MSG_DONTWAIT).map(|(message, fds)| {
                    let mut fd = fds.into_iter().next();
                    if message == ToPci::Thread {
                        self.thread = fd.take().map(Rc::new);
                    }
                    said.push(Some((message, fd)));
                })
            } else {
                self.link.finish(VERSION, MsgFlags::MSG_DONTWAIT).map(|()| {
                    self.greeted = true;
                    said.push(None);
                })
            };
            match result {
                Ok(()) => {}
                Err(LinkError::WouldBlock) => break,
                // What was said before the end still counts; the end is found again by the next call.
                Err(_) if !said.is_empty() => break,
                Err(error) => return Err(error),
            }
        }
        Ok(said)
    }
}
