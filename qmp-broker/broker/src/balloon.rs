//! The balloon's commands and its event.

use std::rc::Rc;

use bulkhead_control_api::balloon::{Answer, FromBalloon, Op, Request};
use bulkhead_qapi::types::balloon::{BalloonArg, BalloonChangeData, BalloonInfo};
use bulkhead_qapi::{Error, table};
use serde_json::json;

use crate::commands::{Reply, reply};
use crate::hub::{Hub, away};

/// QEMU's name of the device model.
pub const DRIVER: &str = "virtio-balloon-pci";

pub fn unexpected() -> Error {
    Error::generic("the balloon answered something else")
}

/// A number of bytes in a reply.
fn bytes(actual: u64) -> i64 {
    i64::try_from(actual).unwrap_or(i64::MAX)
}

impl Hub {
    /// Asks the balloon, if the machine has one: pci knows, also of one that was unplugged.
    pub(crate) async fn ask_balloon(&self, op: Op) -> Result<Answer, Error> {
        let functions = self.functions().await?;
        if !self.balloon.exists() || !functions.iter().any(|function| function.driver == DRIVER) {
            return Err(Error::device_not_active("No balloon device has been activated"));
        }
        let answer = self.balloon.ask(|id| Request { id, op }).await;
        answer.map_err(|error| away("The balloon", error))
    }

    pub(crate) async fn query_balloon(&self) -> Reply {
        match self.ask_balloon(Op::Query).await? {
            Answer::Balloon { actual } => reply(BalloonInfo { actual: bytes(actual) }),
            _ => Err(unexpected()),
        }
    }

    /// QEMU looks for a balloon first, then at the size, which may be more than there is.
    pub(crate) async fn set_balloon(&self, args: BalloonArg) -> Reply {
        let wanted = u64::try_from(args.value).ok().filter(|bytes| *bytes > 0);
        let op = wanted.map_or(Op::Query, |bytes| Op::Target { bytes });
        let answer = self.ask_balloon(op).await?;
        match (wanted, answer) {
            (None, _) => Err(Error::generic("Parameter 'target' expects a size")),
            (Some(_), Answer::Done) => Ok(json!({})),
            _ => Err(unexpected()),
        }
    }

    /// What the balloon says.
    pub(crate) fn balloon_message(self: &Rc<Self>, message: FromBalloon) {
        match message {
            FromBalloon::Reply { id, answer } => self.balloon.answer(id, answer),
            FromBalloon::Changed { actual } => {
                let data = BalloonChangeData { actual: bytes(actual) };
                let data = serde_json::to_value(data).unwrap_or_default();
                self.emit_throttled(Rc::clone(&self.balloon_change), &table::BALLOON_CHANGE, data);
            }
        }
    }
}
