//! The side link to pci (`control-api::side`).

use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::sync::Arc;

use bulkhead_control_api::VERSION;
use bulkhead_control_api::side::ToPci;
use bulkhead_jail::link::{Link, LinkError};
use bulkhead_jail::warn;
use nix::sys::eventfd::EventFd;
use nix::sys::socket::MsgFlags;

use crate::device::Notices;

/// The link and its listener. Pci may come and go.
#[derive(Debug)]
pub(crate) struct Side {
    listener: UnixListener,
    link: Option<(Link, bool)>,
    /// Owned by the queue thread.
    thread: Arc<EventFd>,
}

impl Side {
    pub(crate) fn new(listener: OwnedFd, thread: Arc<EventFd>) -> Self {
        // Of packets, which makes no difference for accepting.
        Self { listener: UnixListener::from(listener), link: None, thread }
    }

    /// What to wait for: the connection, or the next one.
    pub(crate) fn poll_fd(&self) -> BorrowedFd<'_> {
        self.link.as_ref().map_or_else(|| self.listener.as_fd(), |(link, _)| link.as_fd())
    }

    /// Something has come.
    pub(crate) fn advance(&mut self, notices: &Notices) {
        let Some((link, up)) = &mut self.link else {
            // Ours goes out first: pci waits for nothing from us.
            let accepted = self.listener.accept().ok();
            let begun = accepted.and_then(|(fd, _)| Link::begin(fd.into(), VERSION).ok());
            self.link = begun.map(|link| (link, false));
            return;
        };
        let result = if *up {
            // After the hello only this side speaks.
            link.recv_with::<()>(MsgFlags::MSG_DONTWAIT).and(Err(LinkError::Malformed))
        } else {
            link.finish(VERSION, MsgFlags::MSG_DONTWAIT)
        };
        match result {
            Ok(()) => {
                *up = true;
                // There is room for one message.
                let _ = link.send_with(&ToPci::Thread, &[self.thread.as_fd()], MsgFlags::MSG_DONTWAIT);
                self.speak(notices);
            }
            Err(LinkError::WouldBlock) => {}
            Err(LinkError::Closed) => self.link = None,
            Err(error) => {
                warn!("side link: {error}");
                self.link = None;
            }
        }
    }

    /// Says what there is to say; what cannot be said now waits for the next time.
    pub(crate) fn speak(&mut self, notices: &Notices) {
        for message in notices.take() {
            let said = match &self.link {
                Some((link, true)) => link.send_with(&message, &[], MsgFlags::MSG_DONTWAIT).is_ok(),
                _ => false,
            };
            if !said {
                notices.put_back(message);
            }
        }
    }
}
