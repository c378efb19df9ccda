//! Link `control-pci`: the broker asks the pci daemon for what is on the bus and for hot-plug.
//!
//! Events come on the same link, in the order in which they happen, before the reply to what caused them.

use serde::{Deserialize, Serialize};

use crate::config::PciDevice;
use crate::side::MemorySizes;

/// The most functions in one [`Answer::Functions`].
pub const MAX_FUNCTIONS: usize = 32;
/// The longest text in a message, in bytes.
pub const MAX_TEXT: usize = 512;

/// What the broker asks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Op {
    /// Functions from this one on, in ascending order: [`Answer::Functions`].
    Functions {
        /// Index of the first one.
        from: u16,
    },
    /// The queue thread of our own daemon behind a device: [`Answer::Thread`], or [`Refusal::NoDevice`].
    Thread {
        /// What the opener knows the daemon by: [`crate::config::Virtio::socket`].
        socket: String,
    },
    /// Plug a device: [`Answer::Done`] once its back end has answered and the guest is told of it.
    Add(Box<PciDevice>),
    /// Ask the guest to give up the device of this id ([`Event::Deleted`] follows).
    Remove {
        /// Its id.
        id: String,
    },
    /// The memory device of this id is to have so many bytes plugged: [`Answer::Done`] once its daemon knows.
    RequestMemory {
        /// Its id.
        id: String,
        /// Bytes.
        bytes: u64,
    },
}

/// Broker to pci.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// Echoed in the reply.
    pub id: u32,
    /// What to do.
    pub op: Op,
}

/// A function on the bus, from live configuration space.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Function {
    /// Bus number that the guest gave its bridge; 0 is the root bus. None while the bridge has no number.
    pub bus: Option<u8>,
    /// Index (of the whole list) of the root port that it is behind.
    pub parent: Option<u16>,
    /// Device number.
    pub slot: u8,
    /// Function number.
    pub function: u8,
    /// Id of the device on the command line, empty without.
    pub qdev_id: String,
    /// QEMU's name of the device model (`virtio-blk-pci`).
    pub driver: String,
    /// Class code: base class and subclass.
    pub class: u16,
    /// Vendor id.
    pub vendor: u16,
    /// Device id.
    pub device: u16,
    /// Subsystem vendor id and id; none for a bridge.
    pub subsystem: Option<(u16, u16)>,
    /// BARs that exist.
    pub regions: Vec<Region>,
    /// Of a bridge.
    pub bridge: Option<Bridge>,
    /// Of a virtio device.
    pub back_end: Option<BackEnd>,
}

/// A back end as its device sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackEnd {
    /// What the opener knows it by: [`crate::config::Virtio::socket`].
    pub socket: String,
    /// There is a connection.
    pub connected: bool,
    /// Of a memory device, as its daemon has said.
    pub memory: Option<MemorySizes>,
}

/// A base address register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Region {
    /// Its number, 0 to 5.
    pub bar: u8,
    /// Where the guest has put it; none while it is not set or memory decoding is off.
    pub address: Option<u64>,
    /// Size in bytes.
    pub size: u64,
    /// 64 bits wide.
    pub wide: bool,
    /// Prefetchable.
    pub prefetch: bool,
}

/// Numbers and windows of a bridge as the guest has set them (base to limit, inclusive).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bridge {
    /// Primary bus number.
    pub primary: u8,
    /// Secondary bus number.
    pub secondary: u8,
    /// Subordinate bus number.
    pub subordinate: u8,
    /// I/O window.
    pub io: (u64, u64),
    /// Memory window.
    pub memory: (u64, u64),
    /// Prefetchable memory window.
    pub prefetchable: (u64, u64),
}

/// A successful answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// Done, nothing to say.
    Done,
    /// The attached descriptor's owner is the thread; without one the daemon is away, or has not told.
    Thread,
    /// At most [`MAX_FUNCTIONS`] of them.
    Functions {
        /// They.
        functions: Vec<Function>,
        /// There are more.
        more: bool,
    },
}

/// Why not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Refusal {
    /// There is no such device.
    NoDevice,
    /// There is no such bus.
    NoBus,
    /// The bus takes no device while the machine runs.
    NoHotplug,
    /// The slot is taken, by the device of this id.
    SlotTaken(String),
    /// The id is taken.
    IdTaken,
    /// The back end did not answer in time or cannot be used; a text for the user.
    BackEnd(String),
    /// No room for vectors, doorbells or functions; a text for the user.
    NoRoom(String),
    /// The guest is asked already.
    Pending,
}

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Event {
    /// A device is gone.
    Deleted {
        /// Its id, empty without.
        id: String,
    },
    /// The guest refused to give a device up.
    UnplugRefused {
        /// Its id.
        id: String,
    },
    /// The guest has plugged or unplugged memory of a memory device.
    MemorySize {
        /// Its id.
        id: String,
        /// Bytes that are plugged now.
        plugged: u64,
    },
    /// A device's back end is away or there again.
    BackEnd {
        /// Id of the device.
        id: String,
        /// It is there.
        connected: bool,
    },
}

/// Pci to broker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromPci {
    /// Answer to the request of this id.
    Reply {
        /// The request's id.
        id: u32,
        /// The answer.
        result: Result<Answer, Refusal>,
    },
    /// An event.
    Event(Event),
}
