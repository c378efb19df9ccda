//! Character devices, objects and daemons that came while the machine ran. They outlive the broker with its state.

use bulkhead_control_api::config::IoThread;
use serde::{Deserialize, Serialize};

/// The most character devices, and objects.
pub const MAX_ENTRIES: usize = 128;
/// The longest id, in bytes: with a prefix it is a name that the opener knows.
pub const MAX_ID: usize = 200;
/// The longest path of a unix socket, in bytes.
pub const MAX_PATH: usize = 107;

/// What a character device is connected to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    /// Nothing.
    Null,
    /// The socket of this path, for the back end of a device.
    Socket(String),
}

/// A character device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Chardev {
    /// Its id.
    pub id: String,
    /// What it is connected to.
    pub kind: Kind,
}

/// A memory back end (`memory-backend-memfd`). Its memory comes to be when a device takes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memory {
    /// Its id.
    pub id: String,
    /// Size in bytes, a multiple of 4,096.
    pub size: u64,
    /// Whether others may map it; ours do in any case.
    pub share: bool,
}

/// A daemon of ours that was started for a device while the machine ran.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Begun {
    /// Its name.
    pub key: String,
    /// Id of the I/O thread of its queues; empty without.
    pub thread: String,
}

/// All that came, and what went of the command line.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registry {
    /// Character devices, the oldest first.
    pub chardevs: Vec<Chardev>,
    /// Ids of the command line's character devices that were removed.
    pub removed: Vec<String>,
    /// Memory back ends, the oldest first.
    pub memory: Vec<Memory>,
    /// I/O threads, the oldest first. Each is one of a daemon as soon as a device takes it.
    pub threads: Vec<IoThread>,
    /// Ids of the command line's I/O threads that were removed.
    pub removed_objects: Vec<String>,
    /// The last start of each daemon that was started while the machine ran.
    pub begun: Vec<Begun>,
}

impl Registry {
    /// Whether clients can have made it so.
    #[must_use]
    pub fn is_plausible(&self) -> bool {
        let short = |id: &String| id.len() <= MAX_ID;
        let path = |kind: &Kind| !matches!(kind, Kind::Socket(path) if path.len() > MAX_PATH);
        [self.chardevs.len(), self.memory.len(), self.threads.len()].iter().all(|count| *count <= MAX_ENTRIES)
            && self.chardevs.iter().all(|chardev| short(&chardev.id) && path(&chardev.kind))
            && self.memory.iter().all(|memory| short(&memory.id))
            && self.threads.iter().all(|thread| short(&thread.id))
    }

    /// A daemon is started, with the queues of its device on this thread.
    pub fn begin(&mut self, key: &str, thread: &str) {
        self.begun.retain(|begun| begun.key != key);
        self.begun.push(Begun { key: key.to_owned(), thread: thread.to_owned() });
    }
}

/// Whether a text is what QEMU calls an identifier: a letter, then letters, digits and `-._`.
#[must_use]
pub fn is_identifier(id: &str) -> bool {
    id.starts_with(|char: char| char.is_ascii_alphabetic())
        && id.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._".contains(&byte))
}

/// The name under which pci and the opener know a character device.
#[must_use]
pub fn socket_name(id: &str) -> String {
    format!("chardev.{id}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_no_client_can_have_made_is_refused() {
        let of = |id: &str, path: &str| Registry {
            chardevs: vec![Chardev { id: id.to_owned(), kind: Kind::Socket(path.to_owned()) }],
            ..Registry::default()
        };
        assert!(of("a", "/p").is_plausible());
        assert!(!of(&"a".repeat(MAX_ID + 1), "/p").is_plausible());
        assert!(!of("a", &"p".repeat(MAX_PATH + 1)).is_plausible());
        let mut many = of("a", "/p");
        many.chardevs = vec![many.chardevs[0].clone(); MAX_ENTRIES + 1];
        assert!(!many.is_plausible());
    }

    #[test]
    fn identifiers() {
        for (id, good) in
            [("a", true), ("a-b._9", true), ("", false), ("9", false), ("a/b", false), ("é", false)]
        {
            assert_eq!(is_identifier(id), good, "{id}");
        }
    }
}
