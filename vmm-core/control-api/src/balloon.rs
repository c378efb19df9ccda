//! Link `control-balloon`: the broker asks the balloon daemon.

use serde::{Deserialize, Serialize};

/// What the broker asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Op {
    /// Aim at so many bytes of guest memory: [`Answer::Done`].
    Target {
        /// Bytes that the guest is to keep; rounded down to 4 KiB pages by the daemon.
        bytes: u64,
    },
    /// [`Answer::Balloon`].
    Query,
    /// The statistics: [`Answer::Stats`].
    Stats,
    /// Seconds between two requests for statistics, 0 for none.
    PollingInterval {
        /// Seconds.
        seconds: u32,
    },
}

/// Broker to balloon.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// Echoed in the reply.
    pub id: u32,
    /// What to do.
    pub op: Op,
}

/// Statistics that the guest gave last (virtio 1.2, 5.5.6.4), in bytes or counts; none if it never gave one, or has no
/// driver.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// Unix time of the last update in seconds, 0 without.
    pub last_update: u64,
    /// Values by tag, at most 16.
    pub values: Vec<(u16, u64)>,
    /// The polling interval in seconds.
    pub polling_interval: u32,
}

/// A successful answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// Done, nothing to say.
    Done,
    /// Bytes of guest memory that are not in the balloon: all of it while no driver is there.
    Balloon {
        /// Bytes.
        actual: u64,
    },
    /// Statistics.
    Stats(Stats),
}

/// Balloon to broker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromBalloon {
    /// Answer to the request of this id.
    Reply {
        /// The request's id.
        id: u32,
        /// The answer.
        answer: Answer,
    },
    /// The guest has changed its part: the new actual size, in bytes.
    Changed {
        /// Bytes of guest memory that are not in the balloon.
        actual: u64,
    },
}
