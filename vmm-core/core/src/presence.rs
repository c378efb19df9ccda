//! Whether the console is there, and which one: what a vCPU that waits for it looks at.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};

use crate::gate::lock;

/// The console is given up for good.
const GIVEN_UP: u32 = u32::MAX;

/// Counts consoles: odd while one is there, even while it is away, one more with each change.
#[derive(Debug, Default)]
pub struct Presence {
    count: AtomicU32,
    /// Whoever waits for an absent console is let go (a reset, the end): its access no longer matters.
    discard: AtomicBool,
    turn: Mutex<()>,
    changed: Condvar,
}

/// What became of waiting for the console.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// It is there, with this number.
    There(u32),
    /// The access is of no interest any more.
    Discarded,
    /// It is given up.
    GivenUp,
}

const fn is_there(count: u32) -> bool {
    count % 2 == 1 && count != GIVEN_UP
}

impl Presence {
    /// The number of the console that is there.
    pub fn there(&self) -> Option<u32> {
        Some(self.count.load(Ordering::SeqCst)).filter(|count| is_there(*count))
    }

    /// Whether the console of this number is there no more.
    pub fn is_over(&self, number: u32) -> bool {
        self.count.load(Ordering::SeqCst) != number
    }

    /// Whether the console is given up.
    pub fn is_given_up(&self) -> bool {
        self.count.load(Ordering::SeqCst) == GIVEN_UP
    }

    /// Whether an access that would have to wait is of no interest.
    pub fn lets_go(&self) -> bool {
        self.discard.load(Ordering::SeqCst) && self.there().is_none()
    }

    /// Waits for a console with a number above `last`.
    pub fn wait(&self, last: u32) -> Wait {
        let look = || match self.count.load(Ordering::SeqCst) {
            GIVEN_UP => Some(Wait::GivenUp),
            count if is_there(count) && count > last => Some(Wait::There(count)),
            _ if self.discard.load(Ordering::SeqCst) => Some(Wait::Discarded),
            _ => None,
        };
        if let Some(wait) = look() {
            return wait;
        }
        let mut turn = lock(&self.turn);
        loop {
            if let Some(wait) = look() {
                return wait;
            }
            turn = self.changed.wait(turn).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn change(&self, change: impl FnOnce(u32) -> u32) {
        let turn = lock(&self.turn);
        let count = self.count.load(Ordering::SeqCst);
        if count != GIVEN_UP {
            self.count.store(change(count), Ordering::SeqCst);
        }
        drop(turn);
        self.changed.notify_all();
    }

    /// A console is there.
    pub fn arrive(&self) {
        // So many consoles that the numbers would run out: 2^31, at one a second 68 years.
        self.change(|count| if is_there(count) { count } else { count.saturating_add(1) });
    }

    /// It is away.
    pub fn leave(&self) {
        self.change(|count| if is_there(count) { count.saturating_add(1) } else { count });
    }

    /// It is given up; true the first time.
    pub fn give_up(&self) -> bool {
        let mut first = false;
        self.change(|_| {
            first = true;
            GIVEN_UP
        });
        first
    }

    /// From now on, or no longer, accesses that wait for an absent console are let go.
    pub fn set_discard(&self, discard: bool) {
        self.discard.store(discard, Ordering::SeqCst);
        self.change(|count| count);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waiting_ends_with_the_next_console_a_reset_or_the_end() {
        let presence = Presence::default();
        presence.leave();
        presence.arrive();
        presence.arrive();
        assert_eq!((presence.there(), presence.wait(0)), (Some(1), Wait::There(1)));
        presence.leave();
        assert!(presence.is_over(1) && presence.there().is_none());
        std::thread::scope(|scope| {
            let waits: Vec<_> = (0..3).map(|_| scope.spawn(|| presence.wait(1))).collect();
            presence.arrive();
            waits.into_iter().for_each(|wait| assert_eq!(wait.join().unwrap(), Wait::There(3)));
        });
        // One that broke the rules is not waited for again.
        presence.set_discard(true);
        assert_eq!((presence.wait(3), presence.wait(1)), (Wait::Discarded, Wait::There(3)));
        presence.set_discard(false);
        assert!(presence.give_up() && !presence.give_up());
        presence.arrive();
        presence.leave();
        assert!(presence.is_given_up());
        assert_eq!(presence.wait(0), Wait::GivenUp);
    }
}
