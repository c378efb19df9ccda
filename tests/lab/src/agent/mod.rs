//! The side inside L1: takes requests from the host on standard input and answers on standard output.
//!
//! Requests: `run CASE`, `exec COMMAND` for the shell, `demo`. Answers: `log NAME<tab>TEXT`, `out TEXT` and `why TEXT`
//! lines, then `passed` or `failed`.

pub mod cases;
pub mod debian;
pub mod figures;
pub mod probe;
pub mod units;
pub mod vsock;

use std::io::{BufRead, BufReader, Write, stdin, stdout};
use std::process::{Command, Stdio};
use std::time::{SystemTime, UNIX_EPOCH};

use bulkhead_framework::{Failure, Result, Transcript};

use crate::host::Kind;

/// Bytes of each log that go to the host: its end.
const LOG_KEPT: usize = 256 << 10;

/// The logs of a case, kept whether it passes or fails.
#[derive(Default)]
pub struct Journal {
    logs: Vec<Transcript>,
}

impl Journal {
    /// Keeps what the transcripts hold at the end of the case.
    pub fn keep(&mut self, logs: &[Transcript]) {
        self.logs.extend_from_slice(logs);
    }
}

/// Serves requests until standard input ends.
///
/// # Errors
/// Standard input or output fails.
pub fn serve() -> Result<()> {
    say("agent ready", "")?;
    for line in stdin().lines() {
        let line = line?;
        let result = match line.split_once(' ').unwrap_or((&line, "")) {
            ("run", name) => run(name),
            ("exec", command) => execute(command),
            ("demo", _) => crate::demo::in_lab(),
            _ => Err(Failure::new(format!("unknown request {line:?}"))),
        };
        match result {
            Ok(()) => say("passed", "")?,
            Err(failure) => {
                for line in failure.to_string().lines() {
                    say("why ", line)?;
                }
                say("failed", "")?;
            }
        }
    }
    Ok(())
}

/// Passes one line of output to whoever asked for the demonstration.
///
/// # Errors
/// Standard output fails.
pub fn show(text: &str) -> Result<()> {
    text.lines().try_for_each(|line| say("out ", line))
}

fn run(name: &str) -> Result<()> {
    let case = cases::find(name).or_else(|| figures::ALL.iter().find(|case| case.name == name));
    let case = case.ok_or_else(|| Failure::new(format!("no case {name}")))?;
    let mut journal = Journal::default();
    let began = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let result = (case.run)(&mut journal);
    if case.kind == Kind::Systemd {
        journal.keep(&[units::log_since(began)?]);
        units::clean()?;
    }
    for (index, log) in journal.logs.iter().enumerate() {
        let text = log.text();
        let mut start = text.len().saturating_sub(LOG_KEPT);
        while !text.is_char_boundary(start) {
            start += 1;
        }
        for line in text.get(start..).unwrap_or_default().lines() {
            say("log ", &format!("{:02} {}\t{}", index + 1, log.name(), line.trim_end_matches('\r')))?;
        }
    }
    result
}

fn execute(command: &str) -> Result<()> {
    let mut child = Command::new("sh")
        .args(["-c", &format!("exec 2>&1; {command}")])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    if let Some(output) = child.stdout.take() {
        for line in BufReader::new(output).split(b'\n') {
            say("out ", &String::from_utf8_lossy(&line?))?;
        }
    }
    let status = child.wait()?;
    if status.success() { Ok(()) } else { Err(Failure::new(format!("{command}: {status}"))) }
}

/// Writes one line of the protocol.
fn say(keyword: &str, text: &str) -> Result<()> {
    let mut out = stdout().lock();
    out.write_all(format!("{keyword}{text}\n").as_bytes())?;
    Ok(out.flush()?)
}
