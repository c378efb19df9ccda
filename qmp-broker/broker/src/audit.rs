//! Lines of the log about what clients changed and what they were refused, as `key=value`.

use std::cell::RefCell;

use bulkhead_jail::pace::Pace;
use bulkhead_jail::{notice, warn};
use bulkhead_qapi::table::Role;

use crate::commands::Reply;
use crate::policy::Subject;

/// Refusals that are logged within a second. Lines beyond are counted in the next one.
const REFUSALS: usize = 10;
/// Changes of the role `console`, which has nothing to change but its own, that are logged within a second.
const CONSOLES: usize = 50;

/// Logs within bounds that clients cannot exceed, but for operators.
#[derive(Debug)]
pub struct Audit {
    refusals: RefCell<Pace>,
    consoles: RefCell<Pace>,
}

impl Default for Audit {
    fn default() -> Self {
        Self { refusals: Pace::new(REFUSALS).into(), consoles: Pace::new(CONSOLES).into() }
    }
}

impl Audit {
    /// A command that changes state was carried out, or failed.
    pub fn changed(&self, who: Subject<'_>, command: &str, reply: &Reply) {
        let unlogged = if who.role == Role::Operator { Some(0) } else { self.consoles.borrow_mut().ask() };
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
        if let Some(unlogged) = self.refusals.borrow_mut().ask() {
            notice!("qmp {who} command={command} outcome=forbidden unlogged={unlogged}");
        }
    }

    /// A client may not connect, or not go on.
    pub fn refused(&self, who: Subject<'_>, reason: &str) {
        if let Some(unlogged) = self.refusals.borrow_mut().ask() {
            warn!("qmp {who} outcome=refused reason={reason} unlogged={unlogged}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_are_bounded_and_counted() {
        let audit = Audit::default();
        for (pace, limit) in [(&audit.refusals, 10), (&audit.consoles, 50)] {
            for _ in 0..limit {
                assert_eq!(pace.borrow_mut().ask(), Some(0));
            }
            assert_eq!(pace.borrow_mut().ask(), None);
        }
    }
}
