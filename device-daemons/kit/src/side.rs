//! The side link to pci (`control-api::side`).

use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::Arc;

use bulkhead_control_api::VERSION;
use bulkhead_control_api::side::ToPci;
use bulkhead_jail::door::{Arrival, Door};
use bulkhead_jail::link::LinkError;
use bulkhead_jail::warn;
use nix::sys::eventfd::EventFd;
use nix::sys::socket::MsgFlags;

use crate::device::Notices;

/// The link and its listener. Pci may come and go.
#[derive(Debug)]
pub(crate) struct Side {
    door: Door,
    /// Owned by the queue thread.
    thread: Arc<EventFd>,
}

impl Side {
    pub(crate) fn new(listener: OwnedFd, thread: Arc<EventFd>) -> Self {
        Self { door: Door::new("side link", VERSION, listener), thread }
    }

    /// What to wait for: the connection, or the next one.
    pub(crate) fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        self.door.poll_fd()
    }

    /// Something has come.
    pub(crate) fn advance(&mut self, notices: &Notices) {
        let arrival = self.door.advance();
        let Some(link) = self.door.link() else { return };
        if arrival == Arrival::Connected {
            // There is room for one message.
            let _ = link.send_with(&ToPci::Thread, &[self.thread.as_fd()], MsgFlags::MSG_DONTWAIT);
            return self.speak(notices);
        }
        // After the hello only this side speaks.
        match link.recv_with::<()>(MsgFlags::MSG_DONTWAIT).and(Err::<(), _>(LinkError::Malformed)) {
            Ok(()) | Err(LinkError::WouldBlock) => return,
            Err(LinkError::Closed) => {}
            Err(error) => warn!("side link: {error}"),
        }
        self.door.close();
    }

    /// Says what there is to say; what cannot be said now waits for the next time.
    pub(crate) fn speak(&mut self, notices: &Notices) {
        for message in notices.take() {
            let link = self.door.link();
            if link.is_none_or(|link| link.send_with(&message, &[], MsgFlags::MSG_DONTWAIT).is_err()) {
                notices.put_back(message);
            }
        }
    }
}
