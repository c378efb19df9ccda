//! A byte stream that a thread collects and tests wait on.

use std::io::Read;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::{Failure, Result};

/// Bytes kept of one stream; a stream that runs away is drained but no longer kept.
const KEPT: usize = 64 << 20;

/// All that a stream (console, stderr, QMP) has brought so far, with a reading position. Clones share both.
#[derive(Clone)]
pub struct Transcript {
    shared: Arc<Shared>,
}

struct Shared {
    name: String,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    bytes: Vec<u8>,
    position: usize,
    closed: bool,
}

impl State {
    fn unread(&self) -> &[u8] {
        self.bytes.get(self.position..).unwrap_or_default()
    }
}

impl Transcript {
    /// An empty transcript that [`Transcript::push`] fills.
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            shared: Arc::new(Shared { name: name.into(), state: Mutex::default(), changed: Condvar::new() }),
        }
    }

    /// A transcript of `stream`, filled by a thread until the stream ends.
    pub fn of(name: impl Into<String>, mut stream: impl Read + Send + 'static) -> Self {
        let transcript = Self::new(name);
        let writer = transcript.clone();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            loop {
                match stream.read(&mut buffer) {
                    Ok(count) if count > 0 => writer.push(buffer.get(..count).unwrap_or_default()),
                    Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                    _ => break,
                }
            }
            writer.close();
        });
        transcript
    }

    /// What the stream is called in failures.
    pub fn name(&self) -> &str {
        &self.shared.name
    }

    /// Appends bytes and wakes whoever waits.
    pub fn push(&self, bytes: &[u8]) {
        let mut state = self.state();
        if state.bytes.len() < KEPT {
            state.bytes.extend_from_slice(bytes);
        }
        drop(state);
        self.shared.changed.notify_all();
    }

    fn close(&self) {
        self.state().closed = true;
        self.shared.changed.notify_all();
    }

    /// Everything so far, whatever the reading position.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.state().bytes).into_owned()
    }

    /// What came since the last read, moving the reading position to the end.
    pub fn take_new(&self) -> String {
        let mut state = self.state();
        let text = String::from_utf8_lossy(state.unread()).into_owned();
        state.position = state.bytes.len();
        text
    }

    /// Waits until `pattern` has come and moves the reading position behind it.
    ///
    /// # Errors
    /// The stream ended or `limit` passed without it; the failure carries this transcript.
    pub fn expect(&self, pattern: &str, limit: Duration) -> Result<()> {
        let found = self.wait(limit, |unread| {
            let at = find(unread, pattern.as_bytes())?;
            Some((at + pattern.len(), ()))
        });
        found.map_err(|why| self.failure(&format!("no {pattern:?} on the {} {why}", self.name())))
    }

    /// Waits for a line that begins with `prefix` or has it behind a prompt, and returns the rest of it. With an
    /// empty prefix that is the next line.
    ///
    /// # Errors
    /// As [`Transcript::expect`].
    pub fn expect_line(&self, prefix: &str, limit: Duration) -> Result<String> {
        let found = self.wait(limit, |unread| {
            let start = find(unread, prefix.as_bytes())? + prefix.len();
            let rest = unread.get(start..)?;
            let length = rest.iter().position(|&byte| byte == b'\n')?;
            let line = String::from_utf8_lossy(rest.get(..length)?).trim_end().to_owned();
            Some((start + length + 1, line))
        });
        found.map_err(|why| self.failure(&format!("no line with {prefix:?} on the {} {why}", self.name())))
    }

    /// Waits until the stream has ended.
    ///
    /// # Errors
    /// `limit` passed first.
    pub fn expect_end(&self, limit: Duration) -> Result<()> {
        let guard = self.state();
        let waited = self.shared.changed.wait_timeout_while(guard, limit, |state| !state.closed);
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        let closed = state.closed;
        drop(state);
        if closed {
            Ok(())
        } else {
            Err(self.failure(&format!("the {} did not end within {limit:?}", self.name())))
        }
    }

    /// Waits until `probe` finds something in the unread bytes: how many it consumes, and its result.
    fn wait<T>(
        &self,
        limit: Duration,
        mut probe: impl FnMut(&[u8]) -> Option<(usize, T)>,
    ) -> std::result::Result<T, String> {
        let end = Instant::now() + limit;
        let mut state = self.state();
        loop {
            if let Some((used, value)) = probe(state.unread()) {
                state.position += used;
                return Ok(value);
            }
            if state.closed {
                return Err("before it ended".to_owned());
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(format!("within {limit:?}"));
            }
            let waited = self.shared.changed.wait_timeout(state, left);
            (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn failure(&self, message: &str) -> Failure {
        Failure::new(message).with_logs(std::slice::from_ref(self))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where `needle` begins in `haystack`; an empty one at once.
fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    if needle.is_empty() {
        return Some(0);
    }
    haystack.windows(needle.len()).position(|window| window == needle)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_secs(5);

    #[test]
    fn finds_patterns_in_order_and_across_reads() {
        let (mut writer, reader) = std::os::unix::net::UnixStream::pair().unwrap();
        let transcript = Transcript::of("console", reader);
        std::io::Write::write_all(&mut writer, b"one tw").unwrap();
        transcript.expect("one", SOON).unwrap();
        std::io::Write::write_all(&mut writer, b"o value=42\r\nthree").unwrap();
        transcript.expect("two", SOON).unwrap();
        assert_eq!(transcript.expect_line("value=", SOON).unwrap(), "42");
        drop(writer);
        transcript.expect_end(SOON).unwrap();
        assert_eq!(transcript.take_new(), "three");
        assert_eq!(transcript.text(), "one two value=42\r\nthree");
    }

    #[test]
    fn a_missing_pattern_fails_with_the_log() {
        let transcript = Transcript::of("console", &b"only this"[..]);
        let failure = transcript.expect("that", SOON).unwrap_err();
        assert!(failure.message().contains("before it ended"), "{failure}");
        assert!(failure.to_string().contains("only this"), "{failure}");
        let silent = Transcript::new("stderr");
        let failure = silent.expect("x", Duration::from_millis(1)).unwrap_err();
        assert!(failure.message().contains("within 1ms"), "{failure}");
    }
}
