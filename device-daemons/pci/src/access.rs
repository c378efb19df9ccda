//! The links on which core hands over the accesses of vCPUs.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use bulkhead_bus_api::{CollectedWrite, MAX_REQUEST_LEN, Malformed, REPLY_LEN, Request};
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv, send};

/// Core broke the protocol, or the host failed; the process cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum AccessError {
    /// A packet that is no request.
    #[error("bus link: {0} from core: install matching binaries")]
    Malformed(#[from] Malformed),
    /// A socket failed.
    #[error("bus link: {0}")]
    Io(#[from] Errno),
    /// A reply did not fit into the socket.
    #[error("bus link: core sends requests but does not read the replies")]
    Flooded,
}

/// What a link has for us.
#[derive(Debug)]
pub enum Received {
    /// An access after the writes that were collected before it.
    Request(u32, Vec<CollectedWrite>, bulkhead_bus_api::Access),
    /// Nothing now.
    Nothing,
    /// The peer has closed it.
    Closed,
}

/// The link of one vCPU.
#[derive(Debug)]
pub struct AccessLink {
    fd: OwnedFd,
}

impl AsFd for AccessLink {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AccessLink {
    /// A link over a connected socket.
    #[must_use]
    pub const fn new(fd: OwnedFd) -> Self {
        Self { fd }
    }

    /// Takes the next request, if there is one. All of it has been checked. Never blocks.
    ///
    /// # Errors
    /// [`AccessError`].
    pub fn receive(&self) -> Result<Received, AccessError> {
        // One byte more than the longest request: a longer packet shows itself.
        let mut buffer = [0; MAX_REQUEST_LEN + 1];
        let len = match recv(self.fd.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
            Ok(0) | Err(Errno::ECONNRESET) => return Ok(Received::Closed),
            Ok(len) => len,
            Err(Errno::EAGAIN | Errno::EINTR) => return Ok(Received::Nothing),
            Err(errno) => return Err(errno.into()),
        };
        let request = Request::decode(buffer.get(..len).ok_or(Malformed)?)?;
        let writes = request.writes().collect::<Result<Vec<CollectedWrite>, Malformed>>()?;
        Ok(Received::Request(request.seq, writes, request.access))
    }

    /// Sends a reply; false if the peer has closed the link.
    ///
    /// # Errors
    /// [`AccessError`].
    pub fn reply(&self, reply: &[u8; REPLY_LEN]) -> Result<bool, AccessError> {
        match send(self.fd.as_raw_fd(), reply, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL) {
            Ok(_) => Ok(true),
            Err(Errno::EPIPE | Errno::ECONNRESET) => Ok(false),
            Err(Errno::EAGAIN) => Err(AccessError::Flooded),
            Err(errno) => Err(errno.into()),
        }
    }
}
