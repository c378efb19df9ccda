//! Unix sockets by path.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt as _};
use std::path::Path;

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect as nix_connect, listen as nix_listen,
    socket,
};
use nix::unistd::Uid;

use super::{Created, Error};

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 128;
/// How often a stale socket is removed before we give up.
const TRIES: u32 = 4;

fn address(path: &str) -> Result<UnixAddr, Error> {
    match UnixAddr::new(path) {
        // The kernel takes 108 bytes without a NUL, other programs do not.
        Ok(address) if path.len() < 108 => Ok(address),
        _ => Err(Error::PathTooLong(path.to_owned())),
    }
}

fn stream(flags: SockFlag) -> Result<OwnedFd, Error> {
    socket(AddressFamily::Unix, SockType::Stream, flags | SockFlag::SOCK_CLOEXEC, None)
        .map_err(|e| Error::Io(e.into()))
}

/// Connects.
pub fn connect(path: &str) -> Result<OwnedFd, Error> {
    let address = address(path)?;
    let fd = stream(SockFlag::empty())?;
    nix_connect(fd.as_raw_fd(), &address).map_err(|e| Error::Connect(path.to_owned(), e.into()))?;
    Ok(fd)
}

/// Connects at once, or not at all: also where a listener does not accept.
///
/// # Errors
/// The kernel's.
pub fn connect_now(path: &str) -> Result<OwnedFd, Errno> {
    let address = UnixAddr::new(path)?;
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    nix_connect(fd.as_raw_fd(), &address)?;
    Ok(fd)
}

/// Listens. A socket that nobody listens on is replaced; anything else that is there is an error.
pub fn listen(path: &str) -> Result<(OwnedFd, Created), Error> {
    let address = address(path)?;
    let fd = stream(SockFlag::empty())?;
    let failed = |e: Errno| Error::Bind(path.to_owned(), e.into());
    let mut tries = 0;
    loop {
        match bind(fd.as_raw_fd(), &address) {
            Ok(()) => break,
            Err(Errno::EADDRINUSE) if tries < TRIES => remove_stale(path, &address)?,
            Err(Errno::EADDRINUSE) => return Err(Error::InUse(path.to_owned())),
            Err(errno) => return Err(failed(errno)),
        }
        tries += 1;
    }
    let created = Created::at(Path::new(path)).map_err(|e| Error::Bind(path.to_owned(), e.into()))?;
    let backlog = Backlog::new(BACKLOG).map_err(failed)?;
    if let Err(errno) = nix_listen(&fd, backlog) {
        created.remove();
        return Err(failed(errno));
    }
    Ok((fd, created))
}

/// Removes a socket of this user's that nobody listens on: what a kill between bind and report leaves.
pub fn abandon(path: &str) {
    let own = fs::symlink_metadata(path).is_ok_and(|found| found.uid() == Uid::effective().as_raw());
    if let (true, Ok(address)) = (own, address(path)) {
        // Whatever else is there stays.
        let _ = remove_stale(path, &address);
    }
}

fn remove_stale(path: &str, address: &UnixAddr) -> Result<(), Error> {
    let failed = |e: io::Error| Error::Bind(path.to_owned(), e.into());
    let metadata = match fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(failed(e)),
    };
    if !metadata.file_type().is_socket() {
        return Err(Error::NotASocket(path.to_owned()));
    }
    let stale = Created::at(Path::new(path)).map_err(failed)?;
    let probe = stream(SockFlag::SOCK_NONBLOCK)?;
    match nix_connect(probe.as_raw_fd(), address) {
        // Only if it is still the one that refused.
        Err(Errno::ECONNREFUSED) => stale.remove(),
        Err(Errno::ENOENT) => {}
        Err(errno @ (Errno::EACCES | Errno::EPERM)) => {
            return Err(Error::Bind(path.to_owned(), errno.into()));
        }
        // Connected, or its queue is full, or it is of another type: somebody is there.
        Ok(()) | Err(_) => return Err(Error::InUse(path.to_owned())),
    }
    Ok(())
}
