//! Sockets that the launcher inherited and that the user names by number (`fd=N`).
#![expect(unsafe_code, reason = "taking ownership of a descriptor by its number")]

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::socket::{
    AddressFamily, SockType, SockaddrLike, SockaddrStorage, getsockname, getsockopt, sockopt,
};

use super::Error;

/// Numbers of the descriptors that were open when the launcher started, but for the standard streams.
#[derive(Debug, Default)]
pub struct Inherited(BTreeSet<RawFd>);

impl Inherited {
    /// Looks at what is open; to be called once and before the launcher opens anything.
    ///
    /// # Errors
    /// If /proc/self/fd cannot be read.
    pub fn at_start() -> io::Result<Self> {
        let mut numbers = BTreeSet::new();
        for entry in fs::read_dir("/proc/self/fd")? {
            let number = entry?.file_name().to_string_lossy().parse::<RawFd>().ok();
            numbers.extend(number.filter(|number| *number > 2));
        }
        // The directory itself was among them and is closed by now.
        numbers.retain(|number| fs::symlink_metadata(format!("/proc/self/fd/{number}")).is_ok());
        Ok(Self(numbers))
    }

    /// Takes the unix stream socket of that number.
    ///
    /// # Errors
    /// If it is not one, or not in the state that is expected, or was taken before.
    pub fn claim(&mut self, number: u32, listening: bool) -> Result<OwnedFd, Error> {
        if number <= 2 {
            return Err(Error::StandardStream(number));
        }
        let raw = RawFd::try_from(number).map_err(|_| Error::NotOpen(number))?;
        if !self.0.remove(&raw) {
            return Err(Error::NotOpen(number));
        }
        // SAFETY: `raw` was open before this program opened anything, so nothing else in it owns the
        // number, and it is removed from the set, so it is claimed at most once.
        let fd = unsafe { OwnedFd::from_raw_fd(raw) };
        match getsockopt(&fd, sockopt::SockType) {
            Ok(SockType::Stream) if family(&fd) == Some(AddressFamily::Unix) => {}
            Err(Errno::ENOTSOCK) => return Err(Error::FdNotASocket(number)),
            Err(Errno::EBADF) => return Err(Error::NotOpen(number)),
            Ok(_) | Err(_) => return Err(Error::NotUnixStream(number)),
        }
        match (getsockopt(&fd, sockopt::AcceptConn).unwrap_or(false), listening) {
            (false, true) => return Err(Error::NotListening(number)),
            (true, false) => return Err(Error::Listening(number)),
            (true, true) | (false, false) => {}
        }
        // A flag of the descriptor, not of what it shares with others.
        fcntl(&fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).map_err(|e| Error::Io(e.into()))?;
        Ok(fd)
    }
}

fn family(fd: &OwnedFd) -> Option<AddressFamily> {
    getsockname::<SockaddrStorage>(fd.as_raw_fd()).ok().and_then(|address| address.family())
}
