//! How often something may be started: a guest that resets itself in a loop, or a compartment that dies
//! again and again, must not keep the host busy.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// The starts of the last second.
#[derive(Debug, Default)]
pub struct Pace {
    at: VecDeque<Instant>,
}

impl Pace {
    /// Starts without a pause ...
    const BURST: usize = 10;
    /// ... within this.
    const SPAN: Duration = Duration::from_secs(1);

    /// When the next one may be, if not at once.
    #[must_use]
    pub fn next(&self) -> Option<Instant> {
        if self.at.len() < Self::BURST { None } else { self.at.front().map(|at| *at + Self::SPAN) }
    }

    /// Whether the next one may be now.
    #[must_use]
    pub fn allows(&self) -> bool {
        self.next().is_none_or(|at| Instant::now() >= at)
    }

    /// One is started.
    pub fn take(&mut self) {
        self.at.push_back(Instant::now());
        if self.at.len() > Self::BURST {
            self.at.pop_front();
        }
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
}
