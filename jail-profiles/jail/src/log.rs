//! One line per message on descriptor 2, with the level prefix that journald and the launcher understand.

use std::{fmt, io::Write as _, sync::OnceLock};

/// The longest line, in bytes.
const MAX_LINE: usize = 1024;

static NAME: OnceLock<&'static str> = OnceLock::new();

/// Severity (syslog numbers, `sd-daemon(3)`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// The process cannot go on.
    Error = 3,
    /// Something is wrong; the process goes on.
    Warning = 4,
    /// Normal, but the operator may wait for it.
    Notice = 5,
    /// Normal life.
    Info = 6,
}

/// Names the process in each line from now on; the first call counts.
pub fn init(name: &'static str) {
    let _ = NAME.set(name);
}

/// Writes one line. Control characters are replaced: a peer's text cannot forge a line.
pub fn write(level: Level, message: fmt::Arguments<'_>) {
    let name = NAME.get().copied().unwrap_or("bulkhead");
    let text: String = message.to_string().chars().map(|c| if c.is_control() { '?' } else { c }).collect();
    let mut line = format!("<{}>{name}: {text}", level as u8);
    if line.len() >= MAX_LINE {
        let end = (0..MAX_LINE - 4).rev().find(|i| line.is_char_boundary(*i)).unwrap_or(0);
        line.truncate(end);
        line.push_str("...");
    }
    line.push('\n');
    // A log that cannot be written is nothing that the process could act on.
    let _ = std::io::stderr().write_all(line.as_bytes());
}

/// Logs an error, in `format!` syntax.
#[macro_export]
macro_rules! error {
    ($($arg:tt)*) => { $crate::log::write($crate::log::Level::Error, format_args!($($arg)*)) };
}

/// Logs a warning, in `format!` syntax.
#[macro_export]
macro_rules! warn {
    ($($arg:tt)*) => { $crate::log::write($crate::log::Level::Warning, format_args!($($arg)*)) };
}

/// Logs what the operator should see although nothing is wrong, in `format!` syntax.
#[macro_export]
macro_rules! notice {
    ($($arg:tt)*) => { $crate::log::write($crate::log::Level::Notice, format_args!($($arg)*)) };
}

/// Logs what normally happens, in `format!` syntax.
#[macro_export]
macro_rules! info {
    ($($arg:tt)*) => { $crate::log::write($crate::log::Level::Info, format_args!($($arg)*)) };
}
