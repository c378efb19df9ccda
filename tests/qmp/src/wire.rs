//! A raw QMP connection: bytes out, JSON lines in.

use std::io::{BufRead, BufReader, ErrorKind, IoSlice, Write};
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use bulkhead_framework::{Failure, Result};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde_json::Value;

/// How long a line may take.
pub const LIMIT: Duration = Duration::from_secs(10);

/// A connection.
pub struct Wire {
    stream: UnixStream,
    reader: BufReader<UnixStream>,
}

impl Wire {
    /// Connects and reads the greeting.
    ///
    /// # Errors
    /// No server, or no greeting.
    pub fn connect(path: &Path) -> Result<Self> {
        let end = Instant::now() + LIMIT;
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(error) if Instant::now() > end => return Err(error.into()),
                // A server that has bound but does not listen yet announces nothing.
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        };
        let mut wire = Self::over(stream)?;
        let greeting = wire.line()?;
        match greeting.get("QMP") {
            Some(_) => Ok(wire),
            None => Err(Failure::new(format!("not a greeting: {greeting}"))),
        }
    }

    /// Uses a connected stream; the greeting is still to come.
    ///
    /// # Errors
    /// The stream cannot be duplicated.
    pub fn over(stream: UnixStream) -> Result<Self> {
        stream.set_read_timeout(Some(LIMIT))?;
        Ok(Self { reader: BufReader::new(stream.try_clone()?), stream })
    }

    /// The stream.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Sends bytes.
    ///
    /// # Errors
    /// The server closed the connection.
    pub fn send(&mut self, bytes: &[u8]) -> Result<()> {
        Ok(self.stream.write_all(bytes)?)
    }

    /// Sends bytes in one message with descriptors.
    ///
    /// # Errors
    /// The server closed the connection.
    pub fn send_fds(&mut self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<()> {
        let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let control: &[ControlMessage<'_>] = if raw.is_empty() { &[] } else { &rights };
        let part = [IoSlice::new(bytes)];
        let sent = sendmsg::<()>(self.stream.as_raw_fd(), &part, control, MsgFlags::MSG_NOSIGNAL, None);
        let sent = sent.map_err(std::io::Error::from)?;
        self.send(bytes.get(sent..).unwrap_or_default())
    }

    /// Receives one line, which must be strict JSON in ASCII and end in CRLF.
    ///
    /// # Errors
    /// Nothing in time, the end, or something else.
    pub fn line(&mut self) -> Result<Value> {
        let mut line = Vec::new();
        match self.reader.read_until(b'\n', &mut line) {
            Ok(0) => return Err("the connection is closed".into()),
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Err("nothing came in time".into()),
            Err(error) => return Err(error.into()),
        }
        let text = String::from_utf8_lossy(&line).into_owned();
        if !line.is_ascii() || !text.ends_with("\r\n") {
            return Err(Failure::new(format!("not a line of ASCII with CRLF: {text:?}")));
        }
        serde_json::from_str(&text).map_err(|error| Failure::new(format!("{error}: {text}")))
    }

    /// Sends a request and returns its reply; events on the way are dropped.
    ///
    /// # Errors
    /// As [`Self::send`] and [`Self::line`].
    pub fn ask(&mut self, request: &str) -> Result<Value> {
        self.ask_with(request, &[])
    }

    /// The same with descriptors.
    ///
    /// # Errors
    /// As [`Self::ask`].
    pub fn ask_with(&mut self, request: &str, fds: &[BorrowedFd<'_>]) -> Result<Value> {
        self.send_fds(request.as_bytes(), fds)?;
        loop {
            let line = self.line()?;
            if line.get("event").is_none() {
                return Ok(line);
            }
        }
    }

    /// Waits for an event; what comes before it is dropped.
    ///
    /// # Errors
    /// As [`Self::line`].
    pub fn event(&mut self, name: &str) -> Result<Value> {
        loop {
            let line = self.line()?;
            if line.get("event").and_then(Value::as_str) == Some(name) {
                return Ok(line);
            }
        }
    }

    /// Ends negotiation.
    ///
    /// # Errors
    /// It is refused.
    pub fn negotiate(&mut self, oob: bool) -> Result<()> {
        let reply = self.ask(if oob {
            "{'execute': 'qmp_capabilities', 'arguments': {'enable': ['oob']}}"
        } else {
            "{'execute': 'qmp_capabilities'}"
        })?;
        match reply.get("return") {
            Some(_) => Ok(()),
            None => Err(Failure::new(format!("negotiation: {reply}"))),
        }
    }
}
