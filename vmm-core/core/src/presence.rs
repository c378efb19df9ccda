//! Whether a bus daemon is there, and which one: what a vCPU that waits for it looks at.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use crate::gate::lock;
use crate::notice::{Notice, Notices};

/// The daemon is given up for good.
const GIVEN_UP: u32 = u32::MAX;

/// The bus daemons.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Daemon {
    /// Ports of the serial line and the platform.
    Console,
    /// Configuration space and the windows of PCI.
    Pci,
}

impl Daemon {
    /// Its name in the topology.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Console => "console",
            Self::Pci => "pci",
        }
    }
}

/// What all threads share of one bus daemon.
#[derive(Debug)]
pub struct Seat {
    /// Which one.
    pub daemon: Daemon,
    /// Counts daemons: odd while one is there, even while it is away, one more with each change.
    count: AtomicU32,
    /// Whoever waits for an absent daemon is let go (a reset, the end): its access no longer matters.
    discard: AtomicBool,
    turn: Mutex<()>,
    changed: Condvar,
    /// The one that broke the protocol, and how.
    breach: Mutex<Option<(u32, &'static str)>>,
    notices: Arc<Notices>,
}

/// What became of waiting for the daemon.
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

impl Seat {
    /// The seat of a daemon that has not come yet.
    pub fn new(daemon: Daemon, notices: Arc<Notices>) -> Self {
        let (count, discard, turn, changed, breach) = Default::default();
        Self { daemon, count, discard, turn, changed, breach, notices }
    }

    /// Gives the daemon up; the first reason counts.
    pub fn fail(&self, why: &'static str) {
        let mut first = false;
        self.change(|_| {
            first = true;
            GIVEN_UP
        });
        if first {
            self.notices.post(Notice::PeerFailed(self.daemon, why));
        }
    }

    /// Daemon `number` broke the protocol. What a vCPU says late of a daemon that is over must not hide what
    /// its successor has done: whoever met that waits until the successor is cut off.
    pub fn note_breach(&self, number: u32, why: &'static str) {
        let mut breach = lock(&self.breach);
        if breach.is_none_or(|(latest, _)| latest <= number) {
            *breach = Some((number, why));
        }
        drop(breach);
        self.notices.post(Notice::Breach(self.daemon));
    }

    /// Takes what the daemon that is there has done against the protocol.
    pub fn take_breach(&self) -> Option<&'static str> {
        let (number, why) = lock(&self.breach).take()?;
        Some(why).filter(|_| !self.is_over(number))
    }

    /// The number of the daemon that is there.
    pub fn there(&self) -> Option<u32> {
        Some(self.count.load(Ordering::SeqCst)).filter(|count| is_there(*count))
    }

    /// Whether the daemon of this number is there no more.
    pub fn is_over(&self, number: u32) -> bool {
        self.count.load(Ordering::SeqCst) != number
    }

    /// Whether the daemon is given up.
    pub fn is_given_up(&self) -> bool {
        self.count.load(Ordering::SeqCst) == GIVEN_UP
    }

    /// Whether an access that would have to wait is of no interest.
    pub fn lets_go(&self) -> bool {
        self.discard.load(Ordering::SeqCst) && self.there().is_none()
    }

    /// Waits for a daemon with a number above `last`.
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

    /// A daemon is there.
    pub fn arrive(&self) {
        // So many daemons that the numbers would run out: 2^31, at one a second 68 years.
        self.change(|count| if is_there(count) { count } else { count.saturating_add(1) });
    }

    /// It is away.
    pub fn leave(&self) {
        self.change(|count| if is_there(count) { count.saturating_add(1) } else { count });
    }

    /// From now on, or no longer, accesses that wait for an absent daemon are let go.
    pub fn set_discard(&self, discard: bool) {
        self.discard.store(discard, Ordering::SeqCst);
        self.change(|count| count);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_late_breach_does_not_hide_that_of_the_next_daemon() {
        let seat = Seat::new(Daemon::Console, Arc::new(Notices::new().unwrap()));
        seat.arrive();
        seat.note_breach(1, "first");
        seat.leave();
        assert_eq!(seat.take_breach(), None, "it is over");
        seat.arrive();
        for late in [[(1, "first"), (3, "second")], [(3, "second"), (1, "first")]] {
            late.iter().for_each(|(number, why)| seat.note_breach(*number, why));
            assert_eq!(seat.take_breach(), Some("second"));
        }
        assert_eq!(seat.take_breach(), None);
    }

    #[test]
    fn waiting_ends_with_the_next_console_a_reset_or_the_end() {
        let notices = Arc::new(Notices::new().unwrap());
        let presence = Seat::new(Daemon::Pci, Arc::clone(&notices));
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
        presence.fail("first");
        presence.fail("second");
        assert_eq!(notices.take(), [Notice::PeerFailed(Daemon::Pci, "first")]);
        presence.arrive();
        presence.leave();
        assert!(presence.is_given_up());
        assert_eq!(presence.wait(0), Wait::GivenUp);
    }
}
