//! The main link to core: what this process asks, and the commands that come meanwhile.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use bulkhead_bus_api::main_link::Command;
use bulkhead_bus_api::pci::{Ask, Change, FromCore, MAX_CHANGES, MAX_EVENTFDS, Refusal, ToCore};
use bulkhead_jail::error;
use bulkhead_jail::link::{Link, LinkError};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::MsgFlags;

/// Commands that wait for their turn: core sends one at a time.
const MAX_COMMANDS: usize = 16;

/// Why the link is of no more use.
#[derive(Debug, thiserror::Error)]
pub enum CoreError {
    /// Core has closed it: the machine is over.
    #[error("core is gone")]
    Gone,
    /// Core says that this process broke the protocol.
    #[error("core has cut this process off: see its log")]
    SentAway,
    /// The link failed.
    #[error("main link to core: {0}")]
    Link(LinkError),
}

impl From<LinkError> for CoreError {
    fn from(error: LinkError) -> Self {
        match error {
            LinkError::Closed => Self::Gone,
            other => Self::Link(other),
        }
    }
}

/// The link in use.
#[derive(Debug)]
pub struct CoreLink {
    link: Link,
    last_id: u32,
    commands: VecDeque<(u32, Command)>,
}

impl AsFd for CoreLink {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.link.as_fd()
    }
}

/// Waits until the link is ready for something.
fn wait(link: &Link, what: PollFlags) -> Result<(), CoreError> {
    match poll(&mut [PollFd::new(link.as_fd(), what)], PollTimeout::NONE) {
        Ok(_) | Err(Errno::EINTR) => Ok(()),
        Err(errno) => Err(LinkError::Io(errno).into()),
    }
}

impl CoreLink {
    /// A link that has been greeted and welcomed.
    #[must_use]
    pub const fn new(link: Link) -> Self {
        Self { link, last_id: 0, commands: VecDeque::new() }
    }

    /// Sends a message; waits while core has no room for it.
    ///
    /// # Errors
    /// [`CoreError`].
    pub fn send(&self, message: &ToCore) -> Result<(), CoreError> {
        self.send_with(message, &[])
    }

    fn send_with(&self, message: &ToCore, fds: &[BorrowedFd<'_>]) -> Result<(), CoreError> {
        loop {
            match self.link.send_with(message, fds, MsgFlags::MSG_DONTWAIT) {
                Err(LinkError::WouldBlock) => wait(&self.link, PollFlags::POLLOUT)?,
                result => return Ok(result?),
            }
        }
    }

    /// Takes what core has sent without being asked.
    ///
    /// # Errors
    /// [`CoreError`].
    pub fn receive(&mut self) -> Result<(), CoreError> {
        match self.next() {
            Err(CoreError::Link(LinkError::WouldBlock)) | Ok(None) => Ok(()),
            // Nothing was asked.
            Ok(Some(_)) => Err(LinkError::Malformed.into()),
            Err(error) => Err(error),
        }
    }

    /// The next command that waits.
    pub fn take_command(&mut self) -> Option<(u32, Command)> {
        self.commands.pop_front()
    }

    /// One message: an answer with its id, or a command, which waits then.
    #[expect(clippy::type_complexity, reason = "it is taken apart at once")]
    fn next(&mut self) -> Result<Option<(u32, Result<(), Refusal>, Vec<OwnedFd>)>, CoreError> {
        match self.link.recv_with::<FromCore>(MsgFlags::MSG_DONTWAIT)? {
            (FromCore::Leave, _) => Err(CoreError::SentAway),
            (FromCore::Command { id, what }, fds) if fds.is_empty() => {
                if self.commands.len() >= MAX_COMMANDS {
                    return Err(LinkError::Malformed.into());
                }
                self.commands.push_back((id, what));
                Ok(None)
            }
            (FromCore::Answer { id, result }, fds) => Ok(Some((id, result, fds))),
            _ => Err(LinkError::Malformed.into()),
        }
    }

    /// Asks and waits for the answer. Commands that come meanwhile wait: core answers while it waits for them.
    fn ask(&mut self, what: Ask, fds: &[BorrowedFd<'_>]) -> Result<Result<Vec<OwnedFd>, Refusal>, CoreError> {
        self.last_id = self.last_id.wrapping_add(1);
        let id = self.last_id;
        self.send_with(&ToCore::Ask { id, what }, fds)?;
        loop {
            match self.next() {
                Err(CoreError::Link(LinkError::WouldBlock)) => wait(&self.link, PollFlags::POLLIN)?,
                Err(error) => return Err(error),
                Ok(None) => {}
                Ok(Some((answered, result, fds))) if answered == id => return Ok(result.map(|()| fds)),
                Ok(Some(_)) => return Err(LinkError::Malformed.into()),
            }
        }
    }

    /// The eventfds of vectors and doorbells.
    ///
    /// # Errors
    /// [`CoreError`]; the inner error is core's.
    #[expect(clippy::type_complexity, reason = "eventfds of vectors, and of doorbells")]
    pub fn eventfds(
        &mut self,
        vectors: &[u16],
        bells: &[u16],
    ) -> Result<Result<(Vec<OwnedFd>, Vec<OwnedFd>), Refusal>, CoreError> {
        let vectors = vectors.chunks(MAX_EVENTFDS).map(|part| (part.to_vec(), Vec::new()));
        let bells = bells.chunks(MAX_EVENTFDS).map(|part| (Vec::new(), part.to_vec()));
        let mut all = (Vec::new(), Vec::new());
        for (vectors, bells) in vectors.chain(bells) {
            let (of_bells, count) = (vectors.is_empty(), vectors.len() + bells.len());
            match self.ask(Ask::Eventfds { vectors, bells }, &[])? {
                Err(refusal) => return Ok(Err(refusal)),
                Ok(fds) if fds.len() != count => return Err(LinkError::Malformed.into()),
                Ok(fds) if of_bells => all.1.extend(fds),
                Ok(fds) => all.0.extend(fds),
            }
        }
        Ok(Ok(all))
    }

    /// Has core make changes; `file` has the descriptor of each window. What core cannot do is logged: the guest's
    /// accesses exit then, or its interrupt is lost. Returns the windows that it refused.
    ///
    /// # Errors
    /// [`CoreError`].
    pub fn apply<'a>(
        &mut self,
        changes: &[Change],
        file: &dyn Fn(u16) -> BorrowedFd<'a>,
    ) -> Result<Vec<u16>, CoreError> {
        let mut refused = Vec::new();
        for part in changes.chunks(MAX_CHANGES) {
            if self.change(part, file)?.is_ok() {
                continue;
            }
            // Which one it was, and the others nevertheless.
            for change in part {
                match self.change(&[*change], file)? {
                    Ok(()) => {}
                    Err(_) if matches!(change, Change::Window { to: Some(_), .. }) => refused.push(*change),
                    Err(refusal) => error!("core: {refusal}: {change:?}"),
                }
            }
        }
        self.place_again(&refused, file)
    }

    /// Windows that core has refused: what a predecessor has left may be in their way, as they may be in each other's.
    fn place_again<'a>(
        &mut self,
        windows: &[Change],
        file: &dyn Fn(u16) -> BorrowedFd<'a>,
    ) -> Result<Vec<u16>, CoreError> {
        let mut refused = Vec::new();
        let number = |change: &Change| if let Change::Window { window, .. } = change { *window } else { 0 };
        for window in windows.iter().map(number) {
            // There is nothing to refuse in that.
            self.change(&[Change::Window { window, to: None }], file)?.ok();
        }
        for change in windows {
            if let Err(refusal) = self.change(&[*change], file)? {
                error!("core: {refusal}: {change:?}");
                refused.push(number(change));
            }
        }
        Ok(refused)
    }

    fn change<'a>(
        &mut self,
        changes: &[Change],
        file: &dyn Fn(u16) -> BorrowedFd<'a>,
    ) -> Result<Result<(), Refusal>, CoreError> {
        let placed = |change: &Change| match change {
            Change::Window { window, to: Some(_) } => Some(file(*window)),
            _ => None,
        };
        let fds: Vec<BorrowedFd<'_>> = changes.iter().filter_map(placed).collect();
        Ok(self.ask(Ask::Apply(changes.to_vec()), &fds)?.map(drop))
    }
}
