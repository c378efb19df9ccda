//! Bytes on their way, counted from the beginning, so that a saved state can say which of them are where.

use std::collections::VecDeque;

/// A queue of bytes.
#[derive(Debug, Default)]
pub struct Queue {
    bytes: VecDeque<u8>,
    /// Bytes that have ever come in.
    appended: u64,
}

impl Queue {
    /// A queue into which `appended` bytes have come, the last of which are `bytes`.
    #[must_use]
    pub fn restored(appended: u64, bytes: Vec<u8>) -> Self {
        Self { bytes: bytes.into(), appended }
    }

    /// Bytes that wait.
    #[must_use]
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether none waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Bytes that have ever come in.
    #[must_use]
    pub const fn appended(&self) -> u64 {
        self.appended
    }

    /// Bytes that have ever gone out.
    #[must_use]
    pub fn consumed(&self) -> u64 {
        self.appended.saturating_sub(self.bytes.len() as u64)
    }

    /// The bytes that wait, oldest first, in two pieces.
    #[must_use]
    pub fn as_slices(&self) -> (&[u8], &[u8]) {
        self.bytes.as_slices()
    }

    /// The youngest `count` of them.
    pub fn youngest(&self, count: usize) -> impl Iterator<Item = u8> + '_ {
        self.bytes.iter().skip(self.bytes.len().saturating_sub(count)).copied()
    }

    /// One more byte.
    pub fn push(&mut self, byte: u8) {
        self.bytes.push_back(byte);
        self.appended += 1;
    }

    /// Takes at most `count` bytes out.
    pub fn take(&mut self, count: usize) -> impl Iterator<Item = u8> + '_ {
        self.bytes.drain(..count.min(self.bytes.len()))
    }
}
