//! Descriptors that the launcher inherited and that the user names by number (`fd=N`).
#![expect(unsafe_code, reason = "taking ownership of a descriptor by its number")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use bulkhead_jail::start::listen_fds;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::socket::{
    AddressFamily, SockType, SockaddrLike, SockaddrStorage, getsockname, getsockopt, sockopt,
};

use super::Error;

/// The descriptors that were open when the launcher started, but for the standard streams.
#[derive(Debug, Default)]
pub struct Inherited {
    /// Numbers of those that nothing has taken.
    open: BTreeSet<RawFd>,
    /// Those that were duplicated, by number. They are closed when nothing can name them any more.
    duplicated: BTreeMap<RawFd, OwnedFd>,
}

/// The descriptors that the service manager gave, with their names (`sd_listen_fds(3)`); call it once, before
/// anything is opened.
///
/// # Errors
/// One line: there are none, or they are not for this process.
pub fn from_service_manager() -> Result<Vec<(String, OwnedFd)>, String> {
    let given = listen_fds().map_err(|e| e.to_string())?;
    let adopt = |(number, name): (RawFd, String)| {
        // SAFETY: the service manager has opened this number for us, and nothing in this program has taken
        // it: it is called once, before anything is opened.
        (name, unsafe { OwnedFd::from_raw_fd(number) })
    };
    let fds: Vec<(String, OwnedFd)> = given.into_iter().map(adopt).collect();
    for (_, fd) in &fds {
        fcntl(fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).map_err(|e| e.to_string())?;
    }
    Ok(fds)
}

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
        Ok(Self { open: numbers, duplicated: BTreeMap::new() })
    }

    fn take(&mut self, number: RawFd) -> Option<OwnedFd> {
        // SAFETY: the number was open before this program opened anything, so nothing else in it owns it, and it is
        // removed from the set, so it is taken at most once.
        self.open.remove(&number).then(|| unsafe { OwnedFd::from_raw_fd(number) })
    }

    /// Duplicates the descriptor of that number, which may be of any kind. It cannot be claimed then, but duplicated again.
    ///
    /// # Errors
    /// It was not open, or is claimed, or the kernel refuses.
    pub fn duplicate(&mut self, number: RawFd) -> Result<OwnedFd, Error> {
        if let Some(fd) = self.take(number) {
            self.duplicated.insert(number, fd);
        }
        let fd = self.duplicated.get(&number).ok_or(Error::MemberNotValid)?;
        fd.try_clone().map_err(|e| Error::MemberNotDuplicated(e.into()))
    }

    /// Takes the descriptor of that number, which may be of any kind.
    ///
    /// # Errors
    /// It is a standard stream, or not open, or was taken before.
    pub fn any(&mut self, number: u32) -> Result<OwnedFd, Error> {
        if number <= 2 {
            return Err(Error::StandardStream(number));
        }
        let raw = RawFd::try_from(number).map_err(|_| Error::NotOpen(number))?;
        let fd = self.take(raw).ok_or(Error::NotOpen(number))?;
        // A flag of the descriptor, not of what it shares with others.
        fcntl(&fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).map_err(|e| Error::Io(e.into()))?;
        Ok(fd)
    }

    /// Takes the unix stream socket of that number.
    ///
    /// # Errors
    /// If it is not one, or not in the state that is expected, or was taken before.
    pub fn claim(&mut self, number: u32, listening: bool) -> Result<OwnedFd, Error> {
        let fd = self.any(number)?;
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
        Ok(fd)
    }
}

fn family(fd: &OwnedFd) -> Option<AddressFamily> {
    getsockname::<SockaddrStorage>(fd.as_raw_fd()).ok().and_then(|address| address.family())
}
