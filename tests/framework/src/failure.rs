//! The one error of the framework: a message and the logs that explain it.

use std::fmt::{self, Display};

use crate::Transcript;

/// What a test or a case returns.
pub type Result<T> = std::result::Result<T, Failure>;

/// Bytes of each log that a printed failure shows: its end.
const SHOWN: usize = 16 << 10;

/// Why a test failed. `Debug` prints like `Display`, so that a test returning it shows its logs.
pub struct Failure {
    message: String,
    logs: Vec<Transcript>,
}

impl Failure {
    /// A failure with no log yet.
    pub fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), logs: Vec::new() }
    }

    /// Adds logs to show; one that is there already is not shown twice.
    #[must_use]
    pub fn with_logs(mut self, logs: &[Transcript]) -> Self {
        for log in logs {
            if !self.logs.iter().any(|known| known.name() == log.name()) {
                self.logs.push(log.clone());
            }
        }
        self
    }

    /// Puts what was being done before the message.
    #[must_use]
    pub fn context(mut self, doing: impl Display) -> Self {
        self.message = format!("{doing}: {}", self.message);
        self
    }

    /// The message without the logs.
    pub fn message(&self) -> &str {
        &self.message
    }
}

impl Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        for log in &self.logs {
            let text = log.text();
            let mut start = text.len().saturating_sub(SHOWN);
            while !text.is_char_boundary(start) {
                start += 1;
            }
            write!(f, "\n--- {}", log.name())?;
            match text.get(start..).unwrap_or_default().trim_end() {
                "" => write!(f, ": empty")?,
                shown => write!(f, "{}\n{shown}", if start > 0 { " (its end)" } else { "" })?,
            }
        }
        Ok(())
    }
}

impl fmt::Debug for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Display::fmt(self, f)
    }
}

impl std::error::Error for Failure {}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        Self::new(error.to_string())
    }
}

impl From<String> for Failure {
    fn from(message: String) -> Self {
        Self::new(message)
    }
}

impl From<&str> for Failure {
    fn from(message: &str) -> Self {
        Self::new(message)
    }
}
