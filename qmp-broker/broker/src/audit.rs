//! Lines of the log about what clients changed and what they were refused, as `key=value`.

use std::cell::Cell;
use std::time::Duration;

use bulkhead_jail::{notice, warn};
use tokio::time::Instant;

use crate::commands::Reply;
use crate::policy::Subject;

/// Refusals that are logged ...
const REFUSALS: u32 = 10;
/// ... within this. Those beyond are counted in the next line.
const SPAN: Duration = Duration::from_secs(1);

/// Bounds what refused clients can do to the log.
#[derive(Debug)]
pub struct Audit {
    /// When the span began.
    since: Cell<Instant>,
    /// Refusals in it.
    count: Cell<u32>,
    /// Refusals that have not been logged since the last line.
    unlogged: Cell<u32>,
}

impl Default for Audit {
    fn default() -> Self {
        Self { since: Cell::new(Instant::now()), count: Cell::new(0), unlogged: Cell::new(0) }
    }
}

impl Audit {
    /// A command that changes state was carried out, or failed.
    pub fn changed(&self, who: Subject<'_>, command: &str, reply: &Reply) {
        match reply {
            Ok(_) => notice!("qmp {who} command={command} outcome=ok"),
            Err(error) => notice!("qmp {who} command={command} outcome={:?}", error.class),
        }
    }

    /// A command is not for this client's role.
    pub fn forbidden(&self, who: Subject<'_>, command: &str) {
        if let Some(unlogged) = self.next_refusal() {
            notice!("qmp {who} command={command} outcome=forbidden unlogged={unlogged}");
        }
    }

    /// A client may not connect, or not go on.
    pub fn refused(&self, who: Subject<'_>, reason: &str) {
        if let Some(unlogged) = self.next_refusal() {
            warn!("qmp {who} outcome=refused reason={reason} unlogged={unlogged}");
        }
    }

    /// How many refusals the next line stands for beside its own, if there may be one.
    fn next_refusal(&self) -> Option<u32> {
        if self.since.get().elapsed() >= SPAN {
            self.since.set(Instant::now());
            self.count.set(0);
        }
        if self.count.get() >= REFUSALS {
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
        let audit = Audit::default();
        for _ in 0..REFUSALS {
            assert_eq!(audit.next_refusal(), Some(0));
        }
        for _ in 0..5 {
            assert_eq!(audit.next_refusal(), None);
        }
        audit.since.set(Instant::now() - SPAN);
        assert_eq!(audit.next_refusal(), Some(5));
        assert_eq!(audit.next_refusal(), Some(0));
    }
}
