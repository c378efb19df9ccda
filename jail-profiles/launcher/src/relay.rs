//! Relays the compartments' logs to the launcher's standard error, line by line and bounded.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// The longest line that is passed on, in bytes.
const MAX_LINE: usize = 1024;
/// Lines that one compartment may log within [`WINDOW`].
const MAX_LINES: u32 = 200;
/// Span over which lines are counted.
const WINDOW: Duration = Duration::from_secs(1);

/// What a look at a log gave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pumped {
    /// Something; there may be more.
    Some,
    /// Nothing at the moment.
    Nothing,
    /// The end.
    End,
}

/// The log of one compartment.
#[derive(Debug)]
pub struct Relay {
    /// What the compartment calls itself.
    name: &'static str,
    /// What the launcher calls it.
    label: String,
    pending: Vec<u8>,
    since: Instant,
    lines: u32,
    dropped: u32,
}

/// Splits the level prefix of `sd-daemon(3)` off a line.
fn level(line: &str) -> (&str, &str) {
    match line.split_at_checked(3) {
        Some((prefix, rest)) if matches!(prefix.as_bytes(), [b'<', b'0'..=b'7', b'>']) => (prefix, rest),
        _ => ("<6>", line),
    }
}

/// Whether the journal reads standard error and wants the level prefixes.
fn journal() -> bool {
    std::env::var_os("JOURNAL_STREAM").is_some()
}

/// The least urgent level that is written: notices, or what `BULKHEAD_LOG=error|warning|notice|info` says.
fn threshold() -> u8 {
    static THRESHOLD: OnceLock<u8> = OnceLock::new();
    *THRESHOLD.get_or_init(|| match std::env::var("BULKHEAD_LOG").as_deref() {
        Ok("error") => b'3',
        Ok("warning") => b'4',
        Ok("info") => b'6',
        _ => b'5',
    })
}

/// Writes one line of the launcher itself or of a compartment. `level` is a prefix such as `<3>`.
pub fn say(level: &str, name: &str, text: &str) {
    let stderr = std::io::stderr();
    if level.as_bytes().get(1).is_some_and(|level| *level > threshold()) {
        return;
    }
    let prefix = if journal() { level } else { "" };
    // A reader that does not read must not stop the supervisor; the flag O_NONBLOCK would be shared
    // with the user's shell.
    let mut room = [PollFd::new(stderr.as_fd(), PollFlags::POLLOUT)];
    if !matches!(poll(&mut room, PollTimeout::ZERO), Ok(1)) {
        return;
    }
    // Raw mode keeps output processing on, so a plain newline is right on a terminal, too.
    let _ = stderr.lock().write_all(format!("{prefix}{name}: {text}\n").as_bytes());
}

impl Relay {
    /// A relay for a compartment that calls itself `name`, under the launcher's label for it.
    #[must_use]
    pub fn new(name: &'static str, label: String) -> Self {
        Self { name, label, pending: Vec::new(), since: Instant::now(), lines: 0, dropped: 0 }
    }

    /// Reads what is there of a non-blocking log, at most 4 KiB, and passes whole lines on.
    pub fn pump(&mut self, log: &mut File) -> Pumped {
        let mut bytes = [0; 4096];
        match log.read(&mut bytes) {
            Ok(0) => {
                let rest = std::mem::take(&mut self.pending);
                if !rest.is_empty() {
                    self.line(&rest);
                }
                self.report_dropped();
                Pumped::End
            }
            Ok(n) => {
                for byte in bytes.get(..n).unwrap_or(&[]) {
                    match byte {
                        b'\n' => {
                            let line = std::mem::take(&mut self.pending);
                            self.line(&line);
                        }
                        _ if self.pending.len() < MAX_LINE => self.pending.push(*byte),
                        _ => {}
                    }
                }
                Pumped::Some
            }
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => Pumped::Some,
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => Pumped::Nothing,
            Err(_) => Pumped::End,
        }
    }

    fn report_dropped(&mut self) {
        if self.dropped > 0 {
            say(
                "<4>",
                &self.label,
                &format!("{} log lines dropped, over {MAX_LINES} a second", self.dropped),
            );
            self.dropped = 0;
        }
    }

    fn line(&mut self, line: &[u8]) {
        if self.since.elapsed() >= WINDOW {
            self.since = Instant::now();
            self.lines = 0;
            self.report_dropped();
        }
        if self.lines >= MAX_LINES {
            self.dropped = self.dropped.saturating_add(1);
            return;
        }
        self.lines += 1;
        let text: String =
            String::from_utf8_lossy(line).chars().map(|c| if c.is_control() { '?' } else { c }).collect();
        let (prefix, text) = level(&text);
        // Level 0 and 1 are for the host: journald writes them to every terminal.
        let prefix = if matches!(prefix, "<0>" | "<1>") { "<2>" } else { prefix };
        // The name is the launcher's word: a compartment cannot speak for another.
        let text = text.strip_prefix(self.name).and_then(|t| t.strip_prefix(": ")).unwrap_or(text);
        say(prefix, &self.label, text);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floods_are_cut() {
        let (reader, writer) = nix::unistd::pipe().unwrap();
        let (mut reader, mut writer) = (File::from(reader), File::from(writer));
        let mut relay = Relay::new("bulkhead-test", "bulkhead-test".to_owned());
        // Below the threshold of what is written, so that the test itself is quiet.
        let line = format!("<7>{}\n", "x".repeat(3 * MAX_LINE));
        for _ in 0..=MAX_LINES {
            writer.write_all(line.as_bytes()).unwrap();
            assert_eq!(relay.pump(&mut reader), Pumped::Some);
            assert!(relay.pending.len() <= MAX_LINE);
        }
        drop(writer);
        assert_eq!((relay.lines, relay.dropped), (MAX_LINES, 1));
        assert_eq!(relay.pump(&mut reader), Pumped::End);
    }

    #[test]
    fn levels_are_split_off() {
        assert_eq!(level("<3>bulkhead-core: x"), ("<3>", "bulkhead-core: x"));
        assert_eq!(level("plain"), ("<6>", "plain"));
        assert_eq!(level("<9>x"), ("<6>", "<9>x"));
        assert_eq!(level("é"), ("<6>", "é"));
    }
}
