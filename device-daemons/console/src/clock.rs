//! Time as the devices see it.

use serde::{Deserialize, Serialize};

/// One moment, on both clocks that devices use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Now {
    /// Time of day in nanoseconds since 1970-01-01 00:00:00 UTC.
    pub wall: i128,
    /// Nanoseconds for which the machine has run; stands still while it is paused.
    pub run: u64,
}

/// A clock that can be stopped, driven by a monotonic one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunClock {
    /// Run time up to `since`.
    elapsed: u64,
    /// Monotonic time at which the clock was last let go; `None` while it stands.
    since: Option<u64>,
}

impl RunClock {
    /// A clock that starts from 0 at `monotonic` (nanoseconds).
    #[must_use]
    pub const fn running_from(monotonic: u64) -> Self {
        Self { elapsed: 0, since: Some(monotonic) }
    }

    /// Run time at `monotonic`.
    #[must_use]
    pub const fn at(&self, monotonic: u64) -> u64 {
        match self.since {
            Some(since) => self.elapsed.saturating_add(monotonic.saturating_sub(since)),
            None => self.elapsed,
        }
    }

    /// Whether the clock runs.
    #[must_use]
    pub const fn runs(&self) -> bool {
        self.since.is_some()
    }

    /// Stops the clock; nothing happens if it stands already.
    pub const fn pause(&mut self, monotonic: u64) {
        self.elapsed = self.at(monotonic);
        self.since = None;
    }

    /// Lets the clock go on; nothing happens if it runs already.
    pub const fn resume(&mut self, monotonic: u64) {
        if self.since.is_none() {
            self.since = Some(monotonic);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_run_clock_stands_still_while_paused() {
        let mut clock = RunClock::running_from(100);
        assert_eq!(clock.at(150), 50);
        clock.pause(200);
        clock.pause(300);
        assert_eq!((clock.at(1000), clock.runs()), (100, false));
        clock.resume(2000);
        clock.resume(2500);
        assert_eq!((clock.at(2010), clock.runs()), (110, true));
    }

    #[test]
    fn a_monotonic_time_before_the_start_is_no_underflow() {
        assert_eq!(RunClock::running_from(100).at(0), 0);
    }
}
