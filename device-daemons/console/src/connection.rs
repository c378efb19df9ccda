//! Connections that clients of the broker hand over.

use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{
    AddressFamily, SockType, SockaddrLike, SockaddrStorage, getpeername, getsockname, getsockopt, sockopt,
};

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
    /// lingers is not taken, as closing it might wait for its peer.
    #[must_use]
    pub fn judge(fd: OwnedFd, server: bool) -> Option<Self> {
        let good = getsockopt(&fd, sockopt::SockType) == Ok(SockType::Stream)
            && getsockopt(&fd, sockopt::AcceptConn) == Ok(false)
            && getsockopt(&fd, sockopt::Linger).is_ok_and(|linger| linger.l_onoff == 0);
        if !good {
            return None;
        }
        let peer = getpeername::<SockaddrStorage>(fd.as_raw_fd()).ok()?;
        let local = getsockname::<SockaddrStorage>(fd.as_raw_fd()).ok()?;
        let server = if server { ",server" } else { "" };
        let name = match local.family()? {
            AddressFamily::Unix => {
                let path = local.as_unix_addr().and_then(|address| address.path());
                format!("unix:{}{server}", path.map_or(String::new(), |path| path.display().to_string()))
            }
            AddressFamily::Inet | AddressFamily::Inet6 => format!("tcp:{local}{server} <-> {peer}"),
            _ => return None,
        };
        Some(Self { fd, name })
    }
}
