//! A client of virtio sockets, for guests: busybox has none.

use std::io::{self, Read as _, Write as _};
use std::net::TcpStream;
use std::os::fd::AsRawFd as _;

use bulkhead_framework::{Failure, Result};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, VsockAddr, connect, socket};

/// Connects, sends standard input and passes on what comes back, which is as much. It does not wait for an end:
/// vhost-device-vsock tells a peer only once both directions have ended.
///
/// # Errors
/// There is no connection, or it breaks.
pub fn pass(cid: &str, port: &str) -> Result<()> {
    let number = |text: &str| text.parse::<u32>().map_err(|_| Failure::new(format!("{text:?} is no number")));
    let address = VsockAddr::new(number(cid)?, number(port)?);
    let mut sent = Vec::new();
    io::stdin().lock().read_to_end(&mut sent)?;
    let socket = socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)
        .map_err(|error| format!("socket: {error}"))?;
    connect(socket.as_raw_fd(), &address).map_err(|error| format!("connect: {error}"))?;
    // A stream socket is read and written like any other.
    let mut stream = TcpStream::from(socket);
    let mut back = vec![0; sent.len()];
    let mut receiver = stream.try_clone()?;
    let sender = std::thread::spawn(move || stream.write_all(&sent));
    receiver.read_exact(&mut back)?;
    sender.join().map_err(|_| "the sender is gone")??;
    io::stdout().lock().write_all(&back)?;
    Ok(())
}
