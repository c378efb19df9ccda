//! Daemons of ours that are started while the machine runs: what is declared for that, and what a device says of its
//! daemon.

use serde::{Deserialize, Serialize};

use crate::config::{IoThread, Virtio};

/// The longest serial number of a disk, in bytes (virtio 1.2, 5.2.6.1).
pub const MAX_SERIAL: usize = 20;
/// The most request queues of a disk.
pub const MAX_QUEUES: u16 = 64;
/// The longest id of an I/O thread, in bytes.
pub const MAX_ID: usize = 200;
/// Descriptors of a queue of our own daemons' devices.
pub const QUEUE_SIZE: u16 = 256;

/// What was declared at the start for a device of ours, in use or not. Its daemon is started for one device at a time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Declared {
    /// What.
    pub what: What,
    /// The daemon's name: the opener knows it by `vhost.KEY`.
    pub key: String,
    /// Id of the I/O thread of the device that has it at the start; empty without.
    pub thread: String,
}

/// What a device is put on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum What {
    /// A drive, or a block node.
    Drive {
        /// Its id or name.
        id: String,
        /// It is a block node.
        is_node: bool,
    },
    /// A TAP interface.
    Net {
        /// Id of the network back end.
        id: String,
        /// MAC address of a device that names none.
        mac: [u8; 6],
        /// Queue pairs that were opened.
        pairs: u16,
    },
    /// Guest memory.
    Balloon,
    /// Memory of a device of its own: it stays with the device that has it at the start.
    Memory {
        /// Id of the memory back end.
        id: String,
    },
}

/// What a device says of its daemon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Settings {
    /// A disk.
    Block {
        /// `serial`, up to [`MAX_SERIAL`] bytes.
        serial: String,
        /// Request queues, 1 to [`MAX_QUEUES`].
        queues: u16,
        /// Discard and write-zeroes are offered.
        discard: bool,
        /// The thread of its queues.
        iothread: IoThread,
    },
    /// A network device.
    Net {
        /// MAC address.
        mac: [u8; 6],
        /// Queue pairs, at most those that were opened.
        pairs: u16,
        /// The thread of its queues.
        iothread: IoThread,
    },
    /// The balloon.
    Balloon {
        /// `deflate-on-oom`.
        deflate_on_oom: bool,
        /// `free-page-reporting`.
        free_page_reporting: bool,
        /// `page-poison`.
        page_poison: bool,
        /// The thread of its queues.
        iothread: IoThread,
    },
}

/// Virtqueues of a network device (virtio 1.2, 5.1.2): with more than one pair there is a control queue.
const fn net_queues(pairs: u16) -> u16 {
    if pairs > 1 { pairs.saturating_mul(2).saturating_add(1) } else { 2 }
}

/// Configuration space of a network device (virtio 1.2, 5.1.4): address, status (the link is up), queue pairs.
fn net_config(mac: [u8; 6], pairs: u16) -> Vec<u8> {
    [&mac[..], &1u16.to_le_bytes(), &pairs.to_le_bytes()].concat()
}

/// What pci has to know of a network device: virtqueues and configuration space.
#[must_use]
pub fn net_shape(mac: [u8; 6], pairs: u16) -> (u16, Vec<u8>) {
    (net_queues(pairs), net_config(mac, pairs))
}

/// A MAC address as users write it: six bytes in hexadecimal, between colons or dashes.
#[must_use]
pub fn mac(text: &str) -> Option<[u8; 6]> {
    let separator = if text.contains('-') { '-' } else { ':' };
    let mut parts = text.split(separator);
    let mut mac = [0; 6];
    for byte in &mut mac {
        let part = parts.next().filter(|p| p.len() == 2 && p.bytes().all(|b| b.is_ascii_hexdigit()))?;
        *byte = u8::from_str_radix(part, 16).ok()?;
    }
    if parts.next().is_some() { None } else { Some(mac) }
}

impl Settings {
    /// The thread of its queues.
    #[must_use]
    pub const fn iothread(&self) -> &IoThread {
        match self {
            Self::Block { iothread, .. } | Self::Net { iothread, .. } | Self::Balloon { iothread, .. } => {
                iothread
            }
        }
    }

    /// Whether all values are in their ranges; `pairs` is how many were opened.
    #[must_use]
    pub fn is_plausible(&self, pairs: u16) -> bool {
        let own = match self {
            Self::Block { serial, queues, .. } => {
                serial.len() <= MAX_SERIAL && (1..=MAX_QUEUES).contains(queues)
            }
            Self::Net { pairs: wanted, .. } => (1..=pairs).contains(wanted),
            Self::Balloon { .. } => true,
        };
        own && self.iothread().id.len() <= MAX_ID
    }

    /// The device as pci sees it, behind the daemon of this name. All our daemons go on from the used index.
    #[must_use]
    pub fn virtio(&self, key: &str) -> Virtio {
        let (device_type, (queues, config)) = match self {
            // The daemon knows capacity and limits (virtio 1.2, 5.2.4).
            Self::Block { queues, .. } => (2, (*queues, vec![0; 60])),
            Self::Net { mac, pairs, .. } => (1, net_shape(*mac, *pairs)),
            // Inflate, deflate, statistics, reporting; four words (virtio 1.2, 5.5.2 and 5.5.4).
            Self::Balloon { free_page_reporting, .. } => {
                (5, (3 + u16::from(*free_page_reporting), vec![0; 16]))
            }
        };
        Virtio {
            device_type,
            queues,
            queue_size: QUEUE_SIZE,
            config,
            without: 0,
            socket: format!("vhost.{key}"),
            listens: false,
            side: Some(format!("side.{key}")),
            resumes: true,
            memory: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        assert_eq!(mac("52:54:00:aB:cd:01"), Some([0x52, 0x54, 0, 0xab, 0xcd, 1]));
        assert_eq!(mac("52-54-00-ab-cd-01"), Some([0x52, 0x54, 0, 0xab, 0xcd, 1]));
        for text in ["", "52:54:00:ab:cd", "52:54:00:ab:cd:01:02", "5:54:00:ab:cd:01", "+2:54:00:ab:cd:01"] {
            assert_eq!(mac(text), None, "{text}");
        }
    }

    #[test]
    fn what_no_device_has_is_refused() {
        let block = |serial: usize, queues| Settings::Block {
            serial: "s".repeat(serial),
            queues,
            discard: true,
            iothread: IoThread::default(),
        };
        for (settings, good) in [
            (block(20, 64), true),
            (block(21, 1), false),
            (block(0, 0), false),
            (block(0, 65), false),
            (Settings::Net { mac: [0; 6], pairs: 2, iothread: IoThread::default() }, true),
            (Settings::Net { mac: [0; 6], pairs: 3, iothread: IoThread::default() }, false),
            (Settings::Net { mac: [0; 6], pairs: 0, iothread: IoThread::default() }, false),
        ] {
            assert_eq!(settings.is_plausible(2), good, "{settings:?}");
        }
        let iothread = IoThread { id: "t".repeat(MAX_ID + 1), ..IoThread::default() };
        assert!(!Settings::Net { mac: [0; 6], pairs: 1, iothread }.is_plausible(2));
    }
}
