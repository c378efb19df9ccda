//! How often something may happen: a guest that resets itself in a loop, a compartment that dies again and again, or a
//! peer that has each of its tries logged must not keep the host busy.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// What has happened within the last second.
#[derive(Debug)]
pub struct Pace {
    burst: usize,
    at: VecDeque<Instant>,
    left_out: u32,
}

impl Pace {
    /// So often without a pause ...
    pub const BURST: usize = 10;
    /// ... within this.
    const SPAN: Duration = Duration::from_secs(1);

    /// `burst` times a second, at least once.
    #[must_use]
    pub fn new(burst: usize) -> Self {
        Self { burst: burst.max(1), at: VecDeque::new(), left_out: 0 }
    }

    /// When the next one may be, if not at once.
    #[must_use]
    pub fn next(&self) -> Option<Instant> {
        if self.at.len() < self.burst { None } else { self.at.front().map(|at| *at + Self::SPAN) }
    }

    /// Whether the next one may be now.
    #[must_use]
    pub fn allows(&self) -> bool {
        self.next().is_none_or(|at| Instant::now() >= at)
    }

    /// It happens.
    pub fn take(&mut self) {
        self.at.push_back(Instant::now());
        if self.at.len() > self.burst {
            self.at.pop_front();
        }
    }

    /// Takes the next one if it may be now, and says how many were left out since the last; else leaves it out.
    pub fn ask(&mut self) -> Option<u32> {
        if !self.allows() {
            self.left_out = self.left_out.saturating_add(1);
            return None;
        }
        self.take();
        Some(std::mem::take(&mut self.left_out))
    }
}

impl Default for Pace {
    fn default() -> Self {
        Self::new(Self::BURST)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn starts_are_paced() {
        let mut pace = Pace::default();
        for _ in 0..Pace::BURST {
            assert!(pace.allows() && pace.next().is_none());
            pace.take();
        }
        assert!(!pace.allows() && pace.next().is_some_and(|at| at > Instant::now()));
        pace.take();
        assert_eq!(pace.at.len(), Pace::BURST);
    }

    #[test]
    fn what_is_left_out_is_counted() {
        let mut pace = Pace::new(3);
        for _ in 0..3 {
            assert_eq!(pace.ask(), Some(0));
        }
        for _ in 0..5 {
            assert_eq!(pace.ask(), None);
        }
        for at in &mut pace.at {
            *at -= Pace::SPAN;
        }
        assert_eq!(pace.ask(), Some(5));
        assert_eq!(pace.ask(), Some(0));
    }
}
