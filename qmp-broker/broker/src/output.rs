//! One client's output: bytes that wait until the client reads.

/// Above this many waiting bytes no further request of the client is read.
const PAUSE: usize = 64 << 10;
/// Above this many waiting bytes an event ends the client.
const MAX_WITH_EVENTS: usize = 1 << 20;
/// Buffers that grew beyond this are given back once they are empty.
const KEEP: usize = 16 << 10;

/// Bytes to send.
#[derive(Debug, Default)]
pub struct Output {
    bytes: Vec<u8>,
    sent: usize,
}

impl Output {
    /// Bytes that wait.
    #[must_use]
    pub fn pending(&self) -> &[u8] {
        self.bytes.get(self.sent..).unwrap_or_default()
    }

    /// Whether requests are to be read: the client reads its replies.
    #[must_use]
    pub fn has_room(&self) -> bool {
        self.pending().len() <= PAUSE
    }

    /// Adds a line.
    pub fn push(&mut self, line: &str) {
        self.bytes.extend_from_slice(line.as_bytes());
        self.bytes.extend_from_slice(b"\r\n");
    }

    /// Adds a line that the client did not ask for; false if too much waits already.
    pub fn push_event(&mut self, line: &str) -> bool {
        let fits = self.pending().len() + line.len() <= MAX_WITH_EVENTS;
        if fits {
            self.push(line);
        }
        fits
    }

    /// Forgets the first `count` waiting bytes: they are sent.
    pub fn consume(&mut self, count: usize) {
        self.sent += count;
        if self.sent >= self.bytes.len() {
            self.bytes.clear();
            self.bytes.shrink_to(KEEP);
            self.sent = 0;
        } else if self.sent > self.bytes.len() / 2 {
            self.bytes.drain(..self.sent);
            self.sent = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sends_in_order_and_bounds_events() {
        let mut output = Output::default();
        output.push("one");
        assert!(output.push_event("two"));
        assert_eq!(output.pending(), b"one\r\ntwo\r\n");
        output.consume(4);
        assert_eq!(output.pending(), b"\ntwo\r\n");
        output.consume(6);
        assert!(output.pending().is_empty() && output.has_room());
        output.push(&"x".repeat(PAUSE));
        assert!(!output.has_room());
        let mut events = 0;
        while output.push_event(&"e".repeat(1000)) {
            events += 1;
        }
        assert!(events > 900 && output.pending().len() <= MAX_WITH_EVENTS + 2);
    }
}
