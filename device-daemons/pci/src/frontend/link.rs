//! The sockets of a front end.

use std::collections::VecDeque;
use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use bulkhead_jail::link::{receive, receive_bytes};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{self, ControlMessage, MsgFlags};

use super::wire::{HEADER, MAX_PAYLOAD, Message, Packet, Reader};

/// Requests that a back end may have in a second.
const REQUESTS: u32 = 256;

/// What came.
#[derive(Debug)]
pub enum Got {
    /// Nothing for now.
    Nothing,
    /// Some bytes of a message.
    Part,
    /// A message.
    Message(Message),
    /// The peer has closed the connection.
    Closed,
    /// Something else; says what the back end has done.
    Wrong(String),
    /// Descriptors that are no memory. To look at them, or to close them, may wait for whoever serves their file system.
    Foreign(Vec<OwnedFd>),
}

/// A connected stream.
#[derive(Debug)]
pub struct Stream {
    fd: OwnedFd,
    reader: Reader,
}

impl Stream {
    /// Takes at most so many descriptors with a message.
    pub fn new(fd: OwnedFd, max_fds: usize) -> Self {
        Self { fd, reader: Reader::new(max_fds) }
    }

    /// To be watched.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Tells the peer that nothing more comes.
    ///
    /// # Errors
    /// The socket's.
    pub fn end(&self) -> Result<(), Errno> {
        socket::shutdown(self.fd.as_raw_fd(), socket::Shutdown::Write)
    }

    /// Whether the peer, which has been told that, has closed its side, too.
    pub fn is_ended(&self) -> bool {
        poll(&mut [PollFd::new(self.fd.as_fd(), PollFlags::empty())], PollTimeout::ZERO) == Ok(1)
    }

    /// Receives at most one message. Descriptors that come unasked never become this process's: the kernel drops them
    /// without a word to the file system that they are of.
    pub fn receive(&mut self, takes_fds: bool) -> Got {
        let mut buffer = [0; HEADER + MAX_PAYLOAD];
        let Some(room) = buffer.get_mut(..self.reader.wants()) else { return Got::Nothing };
        let receive = if takes_fds { receive } else { receive_bytes };
        let received = match receive(self.fd.as_fd(), room, MsgFlags::MSG_DONTWAIT) {
            Ok(received) => received,
            Err(Errno::EAGAIN) => return Got::Nothing,
            Err(Errno::ECONNRESET) => return Got::Closed,
            Err(errno) => return Got::Wrong(format!("cannot be heard: {errno}")),
        };
        let foreign = received.fds.iter().any(|fd| fcntl(fd, FcntlArg::F_GET_SEALS).is_err());
        if foreign {
            return Got::Foreign(received.fds);
        }
        if received.cut {
            return Got::Wrong("sent descriptors that there is no room for".to_owned());
        }
        if received.len == 0 {
            return Got::Closed;
        }
        let bytes = room.get(..received.len).unwrap_or_default();
        match self.reader.push(bytes, received.fds) {
            Ok(None) => Got::Part,
            Ok(Some(message)) => Got::Message(message),
            Err(malformed) => Got::Wrong(malformed.to_string()),
        }
    }

    /// Sends what the socket takes of a packet; returns how many bytes that is.
    ///
    /// # Errors
    /// The socket's; `EAGAIN` if it takes nothing.
    pub fn send(&self, packet: &Packet) -> Result<usize, Errno> {
        let fds: Vec<RawFd> = packet.fds.iter().map(|fd| fd.as_raw_fd()).collect();
        let rights = [ControlMessage::ScmRights(&fds)];
        let control: &[ControlMessage<'_>] = if fds.is_empty() { &[] } else { &rights };
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        loop {
            let bytes = [IoSlice::new(&packet.bytes)];
            match socket::sendmsg::<()>(self.fd.as_raw_fd(), &bytes, control, flags, None) {
                Err(Errno::EINTR) => {}
                result => return result,
            }
        }
    }
}

/// The channel for requests of the back end.
#[derive(Debug)]
pub struct Channel {
    stream: Stream,
    /// Answers that it has not taken; while there is one nothing more is read.
    answers: VecDeque<Packet>,
    since: Instant,
    requests: u32,
}

impl Channel {
    /// On this side of a pair of sockets.
    pub fn new(fd: OwnedFd, now: Instant) -> Self {
        Self { stream: Stream::new(fd, 1), answers: VecDeque::new(), since: now, requests: 0 }
    }

    /// To be watched.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.stream.fd()
    }

    /// Whether it waits for the back end to read.
    pub fn is_full(&self) -> bool {
        !self.answers.is_empty()
    }

    /// Queues an answer.
    pub fn answer(&mut self, packet: Packet) {
        self.answers.push_back(packet);
    }

    /// Sends answers, then receives at most one request.
    pub fn turn(&mut self, now: Instant, takes_fds: bool) -> Got {
        while let Some(packet) = self.answers.front_mut() {
            match self.stream.send(packet) {
                Ok(len) => drop(packet.bytes.drain(..len.min(packet.bytes.len()))),
                Err(Errno::EAGAIN) => return Got::Nothing,
                Err(_) => return Got::Closed,
            }
            if packet.bytes.is_empty() {
                self.answers.pop_front();
            }
        }
        let got = self.stream.receive(takes_fds);
        if let Got::Message(message) = &got {
            if now.duration_since(self.since) >= Duration::from_secs(1) {
                (self.since, self.requests) = (now, 0);
            }
            self.requests += 1;
            if self.requests > REQUESTS {
                return Got::Wrong(format!("sent more than {REQUESTS} requests in a second"));
            }
            if message.reply {
                return Got::Wrong("answered a request that nobody had".to_owned());
            }
        }
        got
    }
}
