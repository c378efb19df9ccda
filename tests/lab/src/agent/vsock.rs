//! A client of virtio sockets, for guests: busybox has none.

use std::io;
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsRawFd as _;

use bulkhead_framework::{Failure, Result};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, VsockAddr, connect, socket};

/// Connects, sends standard input and passes on what comes back, to its end.
///
/// # Errors
/// There is no connection, or it breaks.
pub fn pass(cid: &str, port: &str) -> Result<()> {
    let number = |text: &str| text.parse::<u32>().map_err(|_| Failure::new(format!("{text:?} is no number")));
    let address = VsockAddr::new(number(cid)?, number(port)?);
    let socket = socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)
        .map_err(|error| format!("socket: {error}"))?;
    connect(socket.as_raw_fd(), &address).map_err(|error| format!("connect: {error}"))?;
    // A stream socket is read, written and shut down like any other.
    let mut stream = TcpStream::from(socket);
    let mut back = stream.try_clone()?;
    let receiver = std::thread::spawn(move || io::copy(&mut back, &mut io::stdout().lock()));
    io::copy(&mut io::stdin().lock(), &mut stream)?;
    stream.shutdown(Shutdown::Write)?;
    receiver.join().map_err(|_| "the receiver is gone")??;
    Ok(())
}
