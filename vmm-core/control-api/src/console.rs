//! Link `control-console`: the broker asks the console for character devices and the power button, and
//! hands it connections.

use serde::{Deserialize, Serialize};

/// What the broker asks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Op {
    /// The character devices: [`Answer::Chardevs`].
    Chardevs,
    /// Press the power button.
    PowerButton,
    /// Make the one descriptor that is attached the client of a character device: [`Answer::Client`].
    AddClient {
        /// Id of the character device.
        chardev: String,
    },
}

/// The longest id of a character device in a request, in bytes.
pub const MAX_CHARDEV: usize = 1024;

/// Broker to console.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
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
    /// What became of a client.
    Client(Client),
}

/// What became of a client that was handed over. It is closed unless it was added.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Client {
    /// The character device talks to it.
    Added,
    /// The character device is no socket or has a client, or the descriptor is no connected stream socket.
    Refused,
    /// There is no such character device.
    NoChardev,
}

/// Console to broker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reply {
    /// The request's id.
    pub id: u32,
    /// The answer.
    pub answer: Answer,
}
