//! Events that QEMU sends at most once in a while: the first one at once, then the newest when its time has come.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use bulkhead_qapi::table;
use serde_json::Value;
use tokio::task::spawn_local;
use tokio::time::sleep;

use crate::hub::Hub;

/// How often QEMU sends an event of one kind.
const PERIOD: Duration = Duration::from_secs(1);

/// What was sent of one event, and what waits.
#[derive(Debug, Default)]
pub struct Throttle {
    /// One was sent within the last period.
    is_closed: Cell<bool>,
    /// The newest one since.
    newest: RefCell<Option<Value>>,
}

impl Throttle {
    /// Whether an event may be sent now; else it waits in the place of the one before.
    fn admit(&self, data: Value) -> Option<Value> {
        if self.is_closed.replace(true) {
            self.newest.replace(Some(data));
            return None;
        }
        Some(data)
    }

    /// A period is over: what waits may be sent, and the next period begins. With nothing waiting there is none.
    fn turn(&self) -> Option<Value> {
        let waiting = self.newest.take();
        self.is_closed.set(waiting.is_some());
        waiting
    }
}

impl Hub {
    /// Sends an event now or later. Needs a `LocalSet`.
    pub(crate) fn emit_throttled(
        self: &Rc<Self>,
        throttle: Rc<Throttle>,
        event: &'static table::Event,
        data: Value,
    ) {
        let Some(data) = throttle.admit(data) else { return };
        self.emit(event, Some(data));
        let hub = Rc::clone(self);
        spawn_local(async move {
            loop {
                sleep(PERIOD).await;
                let Some(data) = throttle.turn() else { return };
                hub.emit(event, Some(data));
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_waits_for_its_time() {
        let throttle = Throttle::default();
        assert_eq!(throttle.admit(1.into()), Some(1.into()));
        assert_eq!(throttle.admit(2.into()), None);
        assert_eq!(throttle.admit(3.into()), None);
        assert_eq!(throttle.turn(), Some(3.into()), "and 2 is lost");
        assert_eq!(throttle.admit(4.into()), None, "3 has just been sent");
        assert_eq!(throttle.turn(), Some(4.into()));
        assert_eq!(throttle.turn(), None);
        assert_eq!(throttle.admit(5.into()), Some(5.into()));
    }
}
