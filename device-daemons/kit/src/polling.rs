//! Adaptive polling before sleep: how long, as QEMU's I/O threads decide it (`poll-max-ns`, `poll-grow`,
//! `poll-shrink`).

use bulkhead_control_api::config::IoThread;

/// First length of polling, in nanoseconds.
const FIRST: u64 = 4000;

/// How long to poll before the thread sleeps.
#[derive(Clone, Debug)]
pub struct Polling {
    max: u64,
    grow: u64,
    shrink: u64,
    now: u64,
}

impl Polling {
    /// As configured.
    #[must_use]
    pub const fn new(config: &IoThread) -> Self {
        let grow = if config.poll_grow == 0 { 2 } else { config.poll_grow };
        Self { max: config.poll_max_ns, grow, shrink: config.poll_shrink, now: 0 }
    }

    /// Whether there is any polling.
    #[must_use]
    pub const fn enabled(&self) -> bool {
        self.max > 0
    }

    /// Nanoseconds to poll next time.
    #[must_use]
    pub const fn length(&self) -> u64 {
        self.now
    }

    /// Something to do came after `waited` nanoseconds of polling and sleep together.
    pub fn waited(&mut self, waited: u64) {
        if waited <= self.now {
            // Polling caught it.
        } else if waited > self.max {
            // No polling that is allowed would have: less of it.
            self.now = self.now.checked_div(self.shrink).unwrap_or(0);
        } else if self.now < self.max {
            self.now = if self.now == 0 { FIRST } else { self.now.saturating_mul(self.grow) }.min(self.max);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn polling(poll_max_ns: u64, poll_grow: u64, poll_shrink: u64) -> Polling {
        Polling::new(&IoThread { id: String::new(), poll_max_ns, poll_grow, poll_shrink })
    }

    #[test]
    fn it_grows_while_a_little_more_would_have_caught_the_event() {
        let mut p = polling(32_768, 0, 0);
        let lengths: Vec<u64> = (0..6)
            .map(|_| {
                p.waited(30_000);
                p.length()
            })
            .collect();
        assert_eq!(lengths, [4000, 8000, 16_000, 32_000, 32_000, 32_000]);
        let mut p = polling(5000, 3, 0);
        p.waited(4500);
        p.waited(4500);
        assert_eq!(p.length(), 5000);
    }

    #[test]
    fn long_waits_end_it_or_divide_it() {
        let mut p = polling(32_768, 0, 0);
        p.waited(10_000);
        p.waited(1_000_000);
        assert_eq!(p.length(), 0);
        let mut p = polling(32_768, 8, 4);
        p.waited(10_000);
        p.waited(10_000);
        p.waited(1_000_000);
        assert_eq!(p.length(), 8000);
        assert!(!polling(0, 0, 0).enabled());
    }
}
