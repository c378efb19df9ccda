//! Lines of the log about what clients changed and what they were refused, as `key=value`.

use std::cell::Cell;
use std::time::Duration;

use bulkhead_jail::{notice, warn};
use bulkhead_qapi::table::Role;
use tokio::time::Instant;

use crate::commands::Reply;
use crate::policy::Subject;

/// Refusals that are logged within [`SPAN`].
const REFUSALS: u32 = 10;
/// Changes of the role `console`, which has nothing to change but its own, that are logged within [`SPAN`].
const CONSOLES: u32 = 50;
/// Lines beyond are counted in the next one.
const SPAN: Duration = Duration::from_secs(1);

/// Logs within bounds that clients cannot exceed, but for operators.
#[derive(Debug)]
pub struct Audit {
    refusals: Pace,
    consoles: Pace,
}

impl Default for Audit {
    fn default() -> Self {
        Self { refusals: Pace::new(REFUSALS), consoles: Pace::new(CONSOLES) }
    }
}

impl Audit {
    /// A command that changes state was carried out, or failed.
    pub fn changed(&self, who: Subject<'_>, command: &str, reply: &Reply) {
        let unlogged = if who.role == Role::Operator { Some(0) } else { self.consoles.next() };
        let Some(unlogged) = unlogged else { return };
        match reply {
            Ok(_) => notice!("qmp {who} command={command} outcome=ok unlogged={unlogged}"),
            Err(error) => {
                notice!("qmp {who} command={command} outcome={:?} unlogged={unlogged}", error.class)
            }
        }
    }

    /// A command is not for this client's role.
    pub fn forbidden(&self, who: Subject<'_>, command: &str) {
        if let Some(unlogged) = self.refusals.next() {
            notice!("qmp {who} command={command} outcome=forbidden unlogged={unlogged}");
        }
    }

    /// A client may not connect, or not go on.
    pub fn refused(&self, who: Subject<'_>, reason: &str) {
        if let Some(unlogged) = self.refusals.next() {
            warn!("qmp {who} outcome=refused reason={reason} unlogged={unlogged}");
        }
    }
}

/// A number of lines a second.
#[derive(Debug)]
struct Pace {
    limit: u32,
    /// When the span began.
    since: Cell<Instant>,
    /// Lines in it.
    count: Cell<u32>,
    /// Lines that have been left out since the last one.
    unlogged: Cell<u32>,
}

impl Pace {
    fn new(limit: u32) -> Self {
        Self { limit, since: Cell::new(Instant::now()), count: Cell::new(0), unlogged: Cell::new(0) }
    }

    /// How many lines the next one stands for beside itself, if there may be one.
    fn next(&self) -> Option<u32> {
        if self.since.get().elapsed() >= SPAN {
            self.since.set(Instant::now());
            self.count.set(0);
        }
        if self.count.get() >= self.limit {
            self.unlogged.set(self.unlogged.get().saturating_add(1));
            return None;
        }
        self.count.set(self.count.get() + 1);
        Some(self.unlogged.take())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_are_bounded_and_counted() {
        let pace = Pace::new(REFUSALS);
        for _ in 0..REFUSALS {
            assert_eq!(pace.next(), Some(0));
        }
        for _ in 0..5 {
            assert_eq!(pace.next(), None);
        }
        pace.since.set(Instant::now() - SPAN);
        assert_eq!(pace.next(), Some(5));
        assert_eq!(pace.next(), Some(0));
    }
}
