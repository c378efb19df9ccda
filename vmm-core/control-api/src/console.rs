//! Link `control-console`: the broker asks the console for character devices and the power button.

use serde::{Deserialize, Serialize};

/// What the broker asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Op {
    /// The character devices: [`Answer::Chardevs`].
    Chardevs,
    /// Press the power button.
    PowerButton,
}

/// Broker to console.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// Echoed in the reply.
    pub id: u32,
    /// What to do.
    pub op: Op,
}

/// State of one character device (QAPI `ChardevInfo`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Chardev {
    /// Its id.
    pub label: String,
    /// QEMU's description, such as `stdio`, `disconnected:unix:/p,server=on`, `file`.
    pub filename: String,
    /// Whether the front end (the serial port) has it open.
    pub frontend_open: bool,
}

/// A successful answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// Done, nothing to say.
    Done,
    /// All character devices of this process, in the order of the configuration.
    Chardevs(Vec<Chardev>),
}

/// Console to broker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reply {
    /// The request's id.
    pub id: u32,
    /// The answer.
    pub answer: Answer,
}
