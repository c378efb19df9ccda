//! The links to core: accesses of vCPUs, and the main link that sets them up.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use bulkhead_bus_api::main_link::FromCore;
use bulkhead_bus_api::platform::CONSOLE_GSIS;
use bulkhead_bus_api::{CollectedWrite, MAX_REQUEST_LEN, Malformed, Reply, Request};
use bulkhead_control_api::config::CpuTopology;
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv, send};

use crate::machine::Machine;
use crate::queue::Queue;
use crate::state::State;

/// Core broke the protocol, or the host failed; the process cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum BusError {
    /// A packet that is no request.
    #[error("bus link: {0} from core: install matching binaries")]
    Malformed(#[from] Malformed),
    /// A socket or eventfd failed.
    #[error("bus link: {0}")]
    Io(#[from] Errno),
    /// A reply did not fit into the socket.
    #[error("bus link: core sends requests but does not read the replies")]
    Flooded,
    /// The welcome does not describe this machine.
    #[error("bus link: core's welcome names {vcpus} vCPUs, interrupts {irqs:?} and {fds} descriptors")]
    Welcome {
        /// vCPUs.
        vcpus: u16,
        /// Interrupts.
        irqs: Vec<u32>,
        /// Descriptors.
        fds: usize,
    },
}

/// Whether a link lives on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Served {
    /// It does.
    Open,
    /// The peer has closed it.
    Closed,
}

/// The link of one vCPU, or of core's drainer.
#[derive(Debug)]
pub struct AccessLink {
    fd: OwnedFd,
    index: usize,
}

impl AsFd for AccessLink {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AccessLink {
    /// A link over a connected socket.
    #[must_use]
    pub const fn new(index: usize, fd: OwnedFd) -> Self {
        Self { fd, index }
    }

    /// Serves the next request, if there is one. Never blocks. What it changes is committed before the reply
    /// leaves; `input` is the serial port's.
    ///
    /// # Errors
    /// [`BusError`].
    pub fn serve(
        &mut self,
        machine: &mut Machine,
        state: &mut State,
        input: Option<&Queue>,
    ) -> Result<Served, BusError> {
        // One byte more than the longest request: a longer packet shows itself.
        let mut buffer = [0; MAX_REQUEST_LEN + 1];
        let len = match recv(self.fd.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
            Ok(0) | Err(Errno::ECONNRESET) => return Ok(Served::Closed),
            Ok(len) => len,
            Err(Errno::EAGAIN | Errno::EINTR) => return Ok(Served::Open),
            Err(errno) => return Err(errno.into()),
        };
        let request = Request::decode(buffer.get(..len).ok_or(Malformed)?)?;
        let reply = match state.reply_to(self.index, request.seq) {
            Some(reply) => reply,
            None => {
                // All of a request is checked before any of it is done.
                let writes = request.writes().collect::<Result<Vec<CollectedWrite>, Malformed>>()?;
                let (data, action) = machine.access(&writes, &request.access)?;
                let reply = Reply { seq: request.seq, action, data }.encode();
                state.set_reply(self.index, (request.seq, reply));
                state.commit(machine, input)?;
                reply
            }
        };
        match send(self.fd.as_raw_fd(), &reply, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL) {
            Ok(_) => Ok(Served::Open),
            Err(Errno::EPIPE | Errno::ECONNRESET) => Ok(Served::Closed),
            Err(Errno::EAGAIN) => Err(BusError::Flooded),
            Err(errno) => Err(errno.into()),
        }
    }
}

/// Takes core's first message apart: access links, and the eventfds for [`CONSOLE_GSIS`].
///
/// # Errors
/// [`BusError`] for anything but a welcome to this machine.
pub fn welcome(
    message: FromCore,
    mut fds: Vec<OwnedFd>,
) -> Result<(Vec<AccessLink>, Vec<OwnedFd>), BusError> {
    let FromCore::Welcome { vcpus, irqs } = message else { return Err(Malformed.into()) };
    // One link per vCPU and one for the drainer.
    let links = usize::from(vcpus) + 1;
    let possible = (1..=CpuTopology::MAX_CPUS).contains(&u32::from(vcpus));
    if !possible || irqs != CONSOLE_GSIS || fds.len() != links + irqs.len() {
        return Err(BusError::Welcome { vcpus, irqs, fds: fds.len() });
    }
    let eventfds = fds.split_off(links);
    let links = fds.into_iter().enumerate().map(|(index, fd)| AccessLink::new(index, fd));
    Ok((links.collect(), eventfds))
}
