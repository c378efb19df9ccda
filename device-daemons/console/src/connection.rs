//! Connections that clients of the broker hand over.

use std::os::fd::{AsRawFd, OwnedFd};

use nix::libc::linger;
use nix::sys::socket::{
    AddressFamily, SockType, SockaddrLike, SockaddrStorage, getpeername, getsockname, getsockopt, setsockopt,
    sockopt,
};

/// Closes a descriptor of others without waiting. They share the socket and may have made it linger at any time:
/// closing it would then wait for its peer to take what was sent. Who still holds it when it is closed here gains
/// nothing by that, as only the last close waits; who lets go and sets it between the two calls still does.
pub fn close(fd: impl Into<OwnedFd>) {
    let fd = fd.into();
    // What is no socket does not linger.
    let _ = setsockopt(&fd, sockopt::Linger, &linger { l_onoff: 0, l_linger: 0 });
}

/// A connected stream socket.
#[derive(Debug)]
pub struct Connection {
    /// The socket.
    pub fd: OwnedFd,
    /// QEMU's description of it.
    pub name: String,
}

impl Connection {
    /// Takes a connected stream socket of unix or internet domain; anything else is closed. One that
    /// lingers is not taken, as whoever passed it relies on that.
    #[must_use]
    pub fn judge(fd: OwnedFd, server: bool) -> Option<Self> {
        match Self::describe(&fd, server) {
            Some(name) => Some(Self { fd, name }),
            None => {
                close(fd);
                None
            }
        }
    }

    fn describe(fd: &OwnedFd, server: bool) -> Option<String> {
        let good = getsockopt(fd, sockopt::SockType) == Ok(SockType::Stream)
            && getsockopt(fd, sockopt::AcceptConn) == Ok(false)
            && getsockopt(fd, sockopt::Linger).is_ok_and(|linger| linger.l_onoff == 0);
        if !good {
            return None;
        }
        let peer = getpeername::<SockaddrStorage>(fd.as_raw_fd()).ok()?;
        let local = getsockname::<SockaddrStorage>(fd.as_raw_fd()).ok()?;
        let server = if server { ",server" } else { "" };
        match local.family()? {
            AddressFamily::Unix => {
                let path = local.as_unix_addr().and_then(|address| address.path());
                let path = path.map_or(String::new(), |path| path.display().to_string());
                Some(format!("unix:{path}{server}"))
            }
            AddressFamily::Inet | AddressFamily::Inet6 => Some(format!("tcp:{local}{server} <-> {peer}")),
            _ => None,
        }
    }
}
