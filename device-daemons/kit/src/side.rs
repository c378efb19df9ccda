//! The side link to pci (`control-api::side`).

use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::Arc;

use bulkhead_control_api::VERSION;
use bulkhead_control_api::side::{FromPci, ToPci};
use bulkhead_jail::door::{Arrival, Door};
use bulkhead_jail::link::{Link, LinkError};
use bulkhead_jail::warn;
use nix::sys::eventfd::EventFd;
use nix::sys::socket::MsgFlags;

use crate::device::{Notices, Told};
use crate::pieces::Pieces;

/// Messages that are read in one turn.
const TURN: usize = 64;

/// The link and its listener. Pci may come and go.
#[derive(Debug)]
pub(crate) struct Side {
    door: Door,
    /// Owned by the queue thread.
    thread: Arc<EventFd>,
    pieces: Option<Pieces>,
}

impl Side {
    pub(crate) fn new(listener: OwnedFd, thread: Arc<EventFd>, pieces: Option<Pieces>) -> Self {
        Self { door: Door::new("side link", VERSION, listener), thread, pieces }
    }

    /// What to wait for: the connection, or the next one.
    pub(crate) fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        self.door.poll_fd()
    }

    /// Something has come; `tell` has the device told.
    pub(crate) fn advance(&mut self, notices: &Notices, tell: impl Fn(Told)) {
        let arrival = self.door.advance();
        let Some(link) = self.door.link() else { return };
        if arrival == Arrival::Connected {
            // There is room for one message.
            let _ = link.send_with(&ToPci::Thread, &[self.thread.as_fd()], MsgFlags::MSG_DONTWAIT);
            self.pieces.iter().for_each(Pieces::begin);
            return self.speak(notices);
        }
        match hear(link, self.pieces.as_ref(), tell) {
            Ok(()) => return self.speak(notices),
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
        let (Some(link), Some(pieces)) = (self.door.link(), &self.pieces) else { return };
        while let Some(message) = pieces.next() {
            let file = [pieces.file()];
            let fds = if matches!(message, ToPci::Piece { .. }) { file.as_slice() } else { &[] };
            // There is room for as many as may wait for their answer.
            if let Err(error) = link.send_with(&message, fds, MsgFlags::MSG_DONTWAIT) {
                warn!("side link: {error}");
                return self.door.close();
            }
        }
    }
}

/// Takes what pci says.
fn hear(link: &mut Link, pieces: Option<&Pieces>, tell: impl Fn(Told)) -> Result<(), LinkError> {
    for _ in 0..TURN {
        let message = match link.recv_with::<FromPci>(MsgFlags::MSG_DONTWAIT) {
            Ok((message, fds)) if fds.is_empty() => message,
            Ok(_) => return Err(LinkError::Malformed),
            Err(LinkError::WouldBlock) => return Ok(()),
            Err(error) => return Err(error),
        };
        match (message, pieces) {
            (FromPci::Resets(count), _) => tell(Told::Resets(count)),
            (FromPci::Request { bytes }, _) => tell(Told::Request(bytes)),
            (FromPci::Pieces, Some(pieces)) => pieces.restated(),
            (FromPci::Settled { number, result }, Some(pieces)) => {
                if !pieces.settled(number, result) {
                    return Err(LinkError::Malformed);
                }
            }
            _ => return Err(LinkError::Malformed),
        }
    }
    Ok(())
}
