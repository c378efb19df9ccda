//! Commands about devices: the bus, the balloon, and what the broker itself keeps of them.

use bulkhead_qapi::types::balloon::BalloonArg;

use crate::commands::Reply;
use crate::hub::Hub;

/// What is to be done.
#[derive(Debug)]
pub enum Op {
    /// `query-pci`.
    Pci,
    /// `query-balloon`.
    QueryBalloon,
    /// `balloon`.
    Balloon(BalloonArg),
}

impl Hub {
    pub(crate) async fn device_command(&self, op: Op) -> Reply {
        match op {
            Op::Pci => self.query_pci().await,
            Op::QueryBalloon => self.query_balloon().await,
            Op::Balloon(args) => self.set_balloon(args).await,
        }
    }
}
