//! Character devices: where the serial port's bytes come from and go to.
//!
//! Whatever the back end, the process holds at most one connected stream socket per device, which it
//! reads and writes without waiting: a client's, or the near end of a [`crate::pump`].

use std::collections::VecDeque;
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use bulkhead_control_api::config::{Chardev as Config, ChardevKind};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, recv, send};

use crate::connection::Connection;
use crate::pump;

/// The most bytes of input that are read ahead of the guest. More than its FIFO takes, so that a
/// client that sends a command and leaves is not cut short.
const INPUT_LIMIT: usize = 4096;

/// A character device.
#[derive(Debug)]
pub struct Chardev {
    label: String,
    /// QEMU's description while there is a peer, and while there is none.
    connected: String,
    disconnected: String,
    /// QEMU's description of a peer that was handed over, while it is there.
    adopted: Option<String>,
    is_socket: bool,
    is_server: bool,
    listener: Option<UnixListener>,
    peer: Option<UnixStream>,
    /// The peer is a pump's near end.
    pumped: bool,
    /// The machine does not start before a client has connected.
    awaited: bool,
    input: VecDeque<u8>,
    blocked: bool,
}

/// What became of a read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Input {
    /// There may be more, now or later.
    Open,
    /// The peer is gone.
    Gone,
}

impl Chardev {
    /// Opens the back end over descriptors that `take` finds by name.
    ///
    /// # Errors
    /// `take` failed, or the host has no thread or socket left.
    pub fn new<E: From<io::Error>>(
        config: &Config,
        mut take: impl FnMut(&str) -> Result<OwnedFd, E>,
    ) -> Result<Self, E> {
        let mut device = Self {
            label: config.id.clone(),
            connected: String::new(),
            disconnected: String::new(),
            adopted: None,
            is_socket: matches!(config.kind, ChardevKind::Socket { .. }),
            is_server: matches!(config.kind, ChardevKind::Socket { server: true, .. }),
            listener: None,
            peer: None,
            pumped: false,
            awaited: false,
            input: VecDeque::new(),
            blocked: false,
        };
        let name = match &config.kind {
            ChardevKind::Null => "null",
            ChardevKind::Stdio => {
                device.pump(Some(take("stdio.in")?), take("stdio.out")?)?;
                "stdio"
            }
            ChardevKind::File { fd } => {
                device.pump(None, take(fd)?)?;
                "file"
            }
            ChardevKind::Socket { fd, address, server, wait } => {
                device.socket(take(fd)?, address, *server)?;
                device.awaited = *server && *wait;
                return Ok(device);
            }
        };
        name.clone_into(&mut device.connected);
        name.clone_into(&mut device.disconnected);
        Ok(device)
    }

    fn pump(&mut self, source: Option<OwnedFd>, sink: OwnedFd) -> io::Result<()> {
        self.peer = Some(pump::start(&self.label, source, sink)?);
        self.pumped = true;
        Ok(())
    }

    /// Names are those of QEMU 5.1: by the local address once there is one, as it was given before.
    fn socket(&mut self, fd: OwnedFd, address: &str, server: bool) -> io::Result<()> {
        let inherited = address.starts_with("fd:");
        let local = |path: Option<&std::path::Path>| path.map_or(String::new(), |p| p.display().to_string());
        if server {
            let listener = UnixListener::from(fd);
            // Another holder of an inherited one may be faster: then `accept` must not wait.
            listener.set_nonblocking(true)?;
            let path = match listener.local_addr() {
                Ok(bound) if inherited => local(bound.as_pathname()),
                _ => address.to_owned(),
            };
            self.connected = format!("unix:{path},server");
            self.disconnected = format!("disconnected:{}", self.connected);
            self.listener = Some(listener);
        } else {
            let peer = UnixStream::from(fd);
            let path = peer.local_addr().map_or(String::new(), |bound| local(bound.as_pathname()));
            self.connected = format!("unix:{path}");
            let kind = if inherited { "" } else { "unix:" };
            self.disconnected = format!("disconnected:{kind}{address}");
            self.peer = Some(peer);
        }
        Ok(())
    }

    /// Its id.
    #[must_use]
    pub fn label(&self) -> &str {
        &self.label
    }

    /// QEMU's description of the back end as it is now.
    #[must_use]
    pub fn filename(&self) -> &str {
        match &self.adopted {
            _ if self.peer.is_none() => &self.disconnected,
            Some(name) => name,
            None => &self.connected,
        }
    }

    /// Whether the machine has to wait for a client.
    #[must_use]
    pub const fn awaits_client(&self) -> bool {
        self.awaited
    }

    /// The connected socket.
    #[must_use]
    pub const fn peer(&self) -> Option<&UnixStream> {
        self.peer.as_ref()
    }

    /// The listening socket. One client is served at a time; the next wait in its queue.
    #[must_use]
    pub const fn listener(&self) -> Option<&UnixListener> {
        self.listener.as_ref()
    }

    /// Whether input is read at the moment.
    #[must_use]
    pub fn wants_input(&self) -> bool {
        self.input.len() < INPUT_LIMIT
    }

    /// Whether the peer took less than it was given.
    #[must_use]
    pub const fn is_blocked(&self) -> bool {
        self.blocked
    }

    /// The peer has room again.
    pub const fn unblock(&mut self) {
        self.blocked = false;
    }

    /// Takes the next client, which must have announced itself.
    ///
    /// # Errors
    /// The accept failed. The listener is closed then, so that the failure does not repeat for ever.
    pub fn accept(&mut self) -> io::Result<()> {
        let (Some(listener), None) = (&self.listener, &self.peer) else { return Ok(()) };
        match listener.accept() {
            Ok((client, _)) => {
                self.peer = Some(client);
                self.awaited = false;
            }
            // Somebody else holds the listener, too, and was faster.
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(error) => {
                self.listener = None;
                return Err(error);
            }
        }
        Ok(())
    }

    /// What a descriptor that was handed over is, if this device can talk to it now.
    #[must_use]
    pub fn judge(&self, fd: OwnedFd) -> Option<Connection> {
        let free = self.is_socket && self.peer.is_none();
        if free { Connection::judge(fd, self.is_server) } else { None }
    }

    /// Takes a client that was handed over. Its file status flags are left alone: nothing here relies on them.
    pub fn adopt(&mut self, connection: Connection) {
        self.adopted = Some(connection.name);
        self.peer = Some(UnixStream::from(connection.fd));
        self.awaited = false;
    }

    /// Forgets the peer. Input that it sent before stays.
    pub fn disconnect(&mut self) {
        self.peer = None;
        self.adopted = None;
        self.blocked = false;
    }

    /// Reads what is there, within the limit.
    pub fn read(&mut self) -> Input {
        let mut buffer = [0; INPUT_LIMIT];
        let room = INPUT_LIMIT.saturating_sub(self.input.len());
        let (Some(peer), Some(buffer)) = (&self.peer, buffer.get_mut(..room).filter(|b| !b.is_empty()))
        else {
            return Input::Open;
        };
        match recv(peer.as_raw_fd(), buffer, MsgFlags::MSG_DONTWAIT) {
            Ok(0) => Input::Gone,
            Ok(len) => {
                self.input.extend(buffer.iter().take(len));
                Input::Open
            }
            Err(Errno::EAGAIN | Errno::EINTR) => Input::Open,
            Err(_) => Input::Gone,
        }
    }

    /// Takes at most `count` bytes of input.
    pub fn take_input(&mut self, count: usize) -> impl Iterator<Item = u8> + '_ {
        self.input.drain(..count.min(self.input.len()))
    }

    /// Whether input waits.
    #[must_use]
    pub fn has_input(&self) -> bool {
        !self.input.is_empty()
    }

    /// Hands output to the peer; returns how much is done with. Without a peer that is all of it.
    pub fn write(&mut self, first: &[u8], second: &[u8]) -> usize {
        let mut done = 0;
        for part in [first, second] {
            let sent = self.send(part);
            done += sent;
            if sent < part.len() {
                self.blocked = true;
                break;
            }
        }
        done
    }

    fn send(&self, bytes: &[u8]) -> usize {
        let Some(peer) = self.peer.as_ref().filter(|_| !bytes.is_empty()) else { return bytes.len() };
        match send(peer.as_raw_fd(), bytes, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL) {
            Ok(sent) => sent,
            Err(Errno::EAGAIN | Errno::EINTR | Errno::ENOBUFS | Errno::ENOMEM) => 0,
            // The peer is gone, as reading will tell.
            Err(_) => bytes.len(),
        }
    }

    /// Delivers the last output, until `deadline`. Nothing can be written afterwards.
    pub fn finish(&mut self, mut output: &[u8], deadline: Instant) {
        while !output.is_empty() {
            let sent = self.send(output);
            output = output.get(sent..).unwrap_or_default();
            if sent == 0 && !self.wait(PollFlags::POLLOUT, deadline) {
                return;
            }
        }
        let Some(peer) = self.peer.as_ref().filter(|_| self.pumped) else { return };
        // The pump answers the end of output with an end of input when all is written.
        if peer.shutdown(Shutdown::Write).is_err() {
            return;
        }
        self.input.clear();
        while self.wait(PollFlags::POLLIN, deadline) && self.read() == Input::Open {
            self.input.clear();
        }
    }

    /// Waits for the peer; false at the deadline.
    fn wait(&self, events: PollFlags, deadline: Instant) -> bool {
        let left = deadline.saturating_duration_since(Instant::now());
        let Some(peer) = self.peer.as_ref().filter(|_| left > Duration::ZERO) else { return false };
        // Rounded up, so that the last round does not spin.
        let millis = u16::try_from(left.as_millis() + 1).unwrap_or(u16::MAX);
        match poll(&mut [PollFd::new(peer.as_fd(), events)], PollTimeout::from(millis)) {
            Ok(0) => false,
            Ok(_) | Err(Errno::EINTR) => true,
            Err(_) => false,
        }
    }
}
