//! Character devices: where the serial port's bytes come from and go to.
//!
//! Whatever the back end, the process holds at most one connected stream socket per device, which it
//! reads and writes without waiting: a client's, or the near end of a [`crate::pump`].

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::time::{Duration, Instant};

use bulkhead_control_api::config::{Chardev as Config, ChardevKind};
use bulkhead_jail::warn;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, recv, send};

use crate::connection::{self, Connection};
use crate::pump;
use crate::queue::Queue;
use crate::state::PIECE;

/// The most bytes of input that are read ahead of the guest. More than its FIFO takes, so that a
/// client that sends a command and leaves is not cut short.
pub const INPUT_LIMIT: usize = 4096;

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
    input: Queue,
    blocked: bool,
}

/// What a predecessor has left of a character device.
#[derive(Debug, Default)]
pub struct Inherited {
    /// There was one: a connection that the configuration names was its, and may be gone.
    pub restarted: bool,
    /// Its client's connection, or the near end of its pump's pair.
    pub peer: Option<OwnedFd>,
    /// The far end of its pump's pair.
    pub far: Option<OwnedFd>,
}

/// Whether a character device copies through a pair that must be given.
#[must_use]
pub const fn needs_pair(config: &Config) -> bool {
    matches!(config.kind, ChardevKind::Stdio | ChardevKind::File { .. })
}

fn path_of(address: &SocketAddr) -> String {
    address.as_pathname().map_or(String::new(), |path| path.display().to_string())
}

impl Drop for Chardev {
    fn drop(&mut self) {
        self.disconnect();
    }
}

/// What became of a read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Input {
    /// There was some; there may be more.
    Some,
    /// There is none at the moment, or no room for it.
    Nothing,
    /// The peer is gone.
    Gone,
}

impl Chardev {
    /// Opens the back end over descriptors that `take` finds by name, or that a predecessor has left.
    ///
    /// # Errors
    /// `take` failed for anything but a listener, or the host has no thread or socket left.
    pub fn new<E: From<io::Error>>(
        config: &Config,
        mut inherited: Inherited,
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
            input: Queue::default(),
            blocked: false,
        };
        let name = match &config.kind {
            ChardevKind::Null => "null",
            ChardevKind::Stdio => {
                device.pump(inherited, Some(take("stdio.in")?), take("stdio.out")?)?;
                "stdio"
            }
            ChardevKind::File { fd } => {
                device.pump(inherited, None, take(fd)?)?;
                "file"
            }
            ChardevKind::Socket { fd, address, server, wait } => {
                let peer = inherited.peer.take();
                if *server {
                    // systemd gives a service no socket of a unit that was restarted alone until the service
                    // itself was. A machine goes on without one as after a failed `accept`.
                    let listener = take(fd).ok();
                    if listener.is_none() {
                        warn!("chardev {}: descriptor {fd:?} is missing: nobody can connect", config.id);
                    }
                    device.listen(listener, address)?;
                    device.peer = peer.map(UnixStream::from);
                    device.awaited = *wait && device.peer.is_none();
                } else {
                    // It was kept, or it is gone.
                    let fresh = if inherited.restarted { None } else { Some(take(fd)?) };
                    device.connect(peer.or(fresh), address);
                }
                return Ok(device);
            }
        };
        name.clone_into(&mut device.connected);
        name.clone_into(&mut device.disconnected);
        Ok(device)
    }

    fn pump(&mut self, pair: Inherited, source: Option<OwnedFd>, sink: OwnedFd) -> io::Result<()> {
        let (near, far) = match (pair.peer, pair.far) {
            (Some(near), Some(far)) => (near, far),
            _ => UnixStream::pair().map(|(near, far)| (near.into(), far.into()))?,
        };
        pump::start(&self.label, far, source, sink)?;
        self.peer = Some(UnixStream::from(near));
        self.pumped = true;
        Ok(())
    }

    /// Names are those of QEMU 5.1: by the local address once there is one, as it was given before.
    fn listen(&mut self, fd: Option<OwnedFd>, address: &str) -> io::Result<()> {
        let listener = fd.map(UnixListener::from);
        // Another holder of an inherited one may be faster: then `accept` must not wait.
        listener.iter().try_for_each(|listener| listener.set_nonblocking(true))?;
        let bound = listener.as_ref().and_then(|listener| listener.local_addr().ok());
        let path = match address.strip_prefix("fd:") {
            Some(_) => bound.as_ref().map_or(String::new(), path_of),
            None => address.to_owned(),
        };
        self.connected = format!("unix:{path},server");
        self.disconnected = format!("disconnected:{}", self.connected);
        self.listener = listener;
        Ok(())
    }

    fn connect(&mut self, fd: Option<OwnedFd>, address: &str) {
        self.peer = fd.map(UnixStream::from);
        let bound = self.peer.as_ref().and_then(|peer| peer.local_addr().ok());
        self.connected = format!("unix:{}", bound.map_or(String::new(), |bound| path_of(&bound)));
        let kind = if address.starts_with("fd:") { "" } else { "unix:" };
        self.disconnected = format!("disconnected:{kind}{address}");
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
        if self.is_socket && self.peer.is_none() {
            return Connection::judge(fd, self.is_server);
        }
        connection::close(fd);
        None
    }

    /// Takes a client that was handed over. Its file status flags are left alone: nothing here relies on them.
    pub fn adopt(&mut self, connection: Connection) {
        self.adopted = Some(connection.name);
        self.peer = Some(UnixStream::from(connection.fd));
        self.awaited = false;
    }

    /// Forgets the peer. Input that it sent before stays.
    pub fn disconnect(&mut self) {
        self.peer.take().into_iter().for_each(connection::close);
        self.adopted = None;
        self.blocked = false;
    }

    /// Reads a piece of what is there, within the limit. Whether it may be lost with this process is the
    /// caller's to say.
    pub fn read(&mut self) -> Input {
        let mut buffer = [0; PIECE];
        let room = INPUT_LIMIT.saturating_sub(self.input.len());
        let (Some(peer), Some(buffer)) =
            (&self.peer, buffer.get_mut(..room.min(PIECE)).filter(|b| !b.is_empty()))
        else {
            return Input::Nothing;
        };
        match recv(peer.as_raw_fd(), buffer, MsgFlags::MSG_DONTWAIT) {
            Ok(0) => Input::Gone,
            Ok(len) => {
                buffer.iter().take(len).for_each(|byte| self.input.push(*byte));
                Input::Some
            }
            Err(Errno::EAGAIN | Errno::EINTR) => Input::Nothing,
            Err(_) => Input::Gone,
        }
    }

    /// The input that waits.
    #[must_use]
    pub const fn input(&self) -> &Queue {
        &self.input
    }

    /// Goes on with the input that a predecessor has left. Its machine has begun, so no client is awaited.
    pub fn resume(&mut self, input: Queue) {
        self.input = input;
    }

    /// The machine has begun already: it waits for no client.
    pub const fn await_nobody(&mut self) {
        self.awaited = false;
    }

    /// Takes at most `count` bytes of input.
    pub fn take_input(&mut self, count: usize) -> impl Iterator<Item = u8> + '_ {
        self.input.take(count)
    }

    /// Whether input waits.
    #[must_use]
    pub fn has_input(&self) -> bool {
        !self.input.is_empty()
    }

    /// Hands a piece of output to the peer; returns how much is done with. Without a peer that is all of it.
    pub fn write(&mut self, first: &[u8], second: &[u8]) -> usize {
        if self.peer.is_none() {
            return first.len() + second.len();
        }
        let part = if first.is_empty() { second } else { first };
        let piece = part.get(..PIECE).unwrap_or(part);
        let sent = self.send(piece);
        self.blocked = sent < piece.len();
        sent
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
        loop {
            drop(self.input.take(INPUT_LIMIT));
            if !self.wait(PollFlags::POLLIN, deadline) || self.read() == Input::Gone {
                return;
            }
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
