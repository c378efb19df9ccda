//! A small synchronous QMP client.

use std::collections::VecDeque;
use std::fmt;
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::{Failure, Result, Transcript};

/// How long a reply may take.
const REPLY: Duration = Duration::from_secs(30);

/// A negotiated QMP session over a unix socket.
pub struct Qmp {
    stream: UnixStream,
    reader: BufReader<UnixStream>,
    line: Vec<u8>,
    events: VecDeque<Value>,
    greeting: Value,
    next_id: u64,
    wire: Transcript,
    logs: Vec<Transcript>,
}

/// An error reply.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QmpError {
    /// QEMU's error class.
    pub class: String,
    /// QEMU's wording.
    pub desc: String,
}

impl fmt::Display for QmpError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.class, self.desc)
    }
}

impl Qmp {
    /// Connects to the server at `path`, which may still be starting, and negotiates.
    ///
    /// # Errors
    /// No server within `limit`, or it does not speak QMP.
    pub fn connect(path: &Path, limit: Duration) -> Result<Self> {
        let end = Instant::now() + limit;
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(error) if Instant::now() > end => {
                    return Err(Failure::new(format!("cannot connect to {}: {error}", path.display())));
                }
                // Between bind and listen a server refuses, and no event says when that is over.
                Err(_) => std::thread::sleep(Duration::from_millis(2)),
            }
        };
        Self::negotiate(stream)
    }

    /// Negotiates on a connected stream.
    ///
    /// # Errors
    /// The peer does not speak QMP.
    pub fn negotiate(stream: UnixStream) -> Result<Self> {
        let reader = BufReader::new(stream.try_clone()?);
        let mut qmp = Self {
            stream,
            reader,
            line: Vec::new(),
            events: VecDeque::new(),
            greeting: Value::Null,
            next_id: 0,
            wire: Transcript::new("QMP session"),
            logs: Vec::new(),
        };
        let greeting = qmp.receive(Instant::now() + REPLY)?;
        if greeting.get("QMP").is_none() {
            return Err(qmp.failure(format!("not a QMP greeting: {greeting}")));
        }
        qmp.greeting = greeting;
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Adds the logs that a failure of this session shows.
    #[must_use]
    pub fn with_logs(mut self, logs: &[Transcript]) -> Self {
        self.logs.extend_from_slice(logs);
        self
    }

    /// The greeting.
    pub fn greeting(&self) -> &Value {
        &self.greeting
    }

    /// All lines in both directions so far.
    pub fn wire(&self) -> &Transcript {
        &self.wire
    }

    /// Runs a command that must succeed.
    ///
    /// # Errors
    /// An error reply, or none.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        self.try_execute(command, arguments)?
            .map_err(|error| self.failure(format!("QMP command {command} failed: {error}")))
    }

    /// Runs a command and returns its reply of either kind. Events that come first are kept.
    ///
    /// # Errors
    /// No reply, or one that is not QMP.
    pub fn try_execute(
        &mut self,
        command: &str,
        arguments: Value,
    ) -> Result<std::result::Result<Value, QmpError>> {
        self.next_id += 1;
        let id = json!(self.next_id);
        self.send(&json!({"execute": command, "arguments": arguments, "id": id}))?;
        let end = Instant::now() + REPLY;
        loop {
            let mut message = self.receive(end).map_err(|failure| failure.context(command))?;
            if message.get("event").is_some() {
                self.events.push_back(message);
                continue;
            }
            if message.get("id") != Some(&id) {
                return Err(self.failure(format!("{command}: a reply with another id: {message}")));
            }
            if let Some(value) = message.get_mut("return") {
                return Ok(Ok(value.take()));
            }
            let error = message.get("error").unwrap_or(&Value::Null);
            return match (
                error.get("class").and_then(Value::as_str),
                error.get("desc").and_then(Value::as_str),
            ) {
                (Some(class), Some(desc)) => Ok(Err(QmpError { class: class.into(), desc: desc.into() })),
                _ => Err(self.failure(format!("{command}: neither a return nor an error: {message}"))),
            };
        }
    }

    /// Returns the next event `name`. Others that come first are kept: only those of one peer have an order.
    ///
    /// # Errors
    /// None within `limit`.
    pub fn event(&mut self, name: &str, limit: Duration) -> Result<Value> {
        let end = Instant::now() + limit;
        let is_wanted = |event: &Value| event.get("event").and_then(Value::as_str) == Some(name);
        if let Some(event) =
            self.events.iter().position(is_wanted).and_then(|position| self.events.remove(position))
        {
            return Ok(event);
        }
        loop {
            let message = self.receive(end).map_err(|failure| failure.context(format!("event {name}")))?;
            if is_wanted(&message) {
                return Ok(message);
            }
            self.events.push_back(message);
        }
    }

    /// Takes the events that came before the last reply and were not asked for yet.
    pub fn pending_events(&mut self) -> Vec<Value> {
        self.events.drain(..).collect()
    }

    /// The run state that `query-status` names.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub fn status(&mut self) -> Result<String> {
        let reply = self.execute("query-status", json!({}))?;
        match reply.get("status").and_then(Value::as_str) {
            Some(status) => Ok(status.to_owned()),
            None => Err(self.failure(format!("query-status without a status: {reply}"))),
        }
    }

    /// Sends one request as it is.
    ///
    /// # Errors
    /// The server closed the connection.
    pub fn send(&mut self, request: &Value) -> Result<()> {
        let line = format!("{request}\n");
        self.wire.push(format!("-> {line}").as_bytes());
        let sent = self.stream.write_all(line.as_bytes());
        sent.map_err(|error| self.failure(format!("cannot send {request}: {error}")))
    }

    /// Reads one message of any kind.
    ///
    /// # Errors
    /// `end` passed, the server closed the connection, or the line is not JSON.
    pub fn receive(&mut self, end: Instant) -> Result<Value> {
        while self.line.last() != Some(&b'\n') {
            let left = end.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
            self.stream.set_read_timeout(Some(left))?;
            match self.reader.read_until(b'\n', &mut self.line) {
                Ok(0) => return Err(self.failure("the QMP server closed the connection".to_owned())),
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    return Err(self.failure("nothing came on the QMP session in time".to_owned()));
                }
                Err(error) => return Err(self.failure(format!("QMP session: {error}"))),
            }
        }
        let line = std::mem::take(&mut self.line);
        self.wire.push(&[b"<- ", line.as_slice()].concat());
        serde_json::from_slice(&line).map_err(|error| self.failure(format!("QMP line is not JSON: {error}")))
    }

    fn failure(&self, message: String) -> Failure {
        Failure::new(message).with_logs(std::slice::from_ref(&self.wire)).with_logs(&self.logs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_secs(10);

    /// A server that answers each line with the next of `answers`.
    fn server(answers: &'static [&'static str]) -> UnixStream {
        let (client, server) = UnixStream::pair().unwrap();
        std::thread::spawn(move || {
            let mut writer = server.try_clone().unwrap();
            let mut lines = BufReader::new(server).lines();
            for answer in answers {
                writer.write_all(answer.as_bytes()).unwrap();
                lines.next();
            }
        });
        client
    }

    #[test]
    fn negotiates_executes_and_keeps_events() {
        let mut qmp = Qmp::negotiate(server(&[
            "{\"QMP\": {}}\r\n",
            "{\"return\": {}, \"id\": 1}\r\n",
            "{\"event\": \"STOP\"}\r\n{\"return\": {\"status\": \"paused\"}, \"id\": 2}\r\n",
            "{\"error\": {\"class\": \"CommandNotFound\", \"desc\": \"no\"}, \"id\": 3}\r\n",
        ]))
        .unwrap();
        assert_eq!(qmp.status().unwrap(), "paused");
        qmp.event("STOP", SOON).unwrap();
        let error = qmp.try_execute("x", json!({})).unwrap().unwrap_err();
        assert_eq!(error.class, "CommandNotFound");
        let failure = qmp.event("RESUME", Duration::from_millis(20)).unwrap_err();
        assert!(failure.to_string().contains("-> {\"arguments\":{},\"execute\":\"x\""), "{failure}");
    }

    #[test]
    fn a_wrong_id_is_refused() {
        let qmp = Qmp::negotiate(server(&["{\"QMP\": {}}\n", "{\"return\": {}, \"id\": 7}\n", "x"]));
        assert!(qmp.err().unwrap().message().contains("another id"));
    }
}
