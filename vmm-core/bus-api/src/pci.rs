//! Messages of the pci daemon's main link to core: descriptors, what it asks of core, commands.
//!
//! After the version exchange core sends [`FromCore::Welcome`] with its descriptors. Then both may speak at any
//! time: core commands, and each command is answered [`ToCore::Done`]; the daemon asks, and each request is answered
//! [`FromCore::Answer`]. Whoever waits for an answer goes on to serve what the other side asks meanwhile. Everything
//! that the daemon asks is idempotent and names its object by number, so that a daemon whose predecessor died asks
//! again for all that it wants and for the absence of all else. See `docs/decisions/0006-pci.md`.

use serde::{Deserialize, Serialize};

use crate::main_link::Command;

/// MSI-X vectors of a VM, numbered from 0; core gives vector `v` an interrupt route of its own.
pub const MAX_VECTORS: u16 = 1024;
/// Doorbells of a VM, numbered from 0 (KVM has room for 1,000 on its MMIO bus).
pub const MAX_BELLS: u16 = 900;
/// The most numbers in one [`Ask::Eventfds`].
pub const MAX_EVENTFDS: usize = 128;
/// Windows of a VM, numbered from 0; core gives each a memory slot of KVM.
pub const MAX_WINDOWS: u16 = 1024;
/// The most changes in one [`Ask::Apply`]. Each may come with a descriptor, and a message has room for 253.
pub const MAX_CHANGES: usize = 250;
/// MSI messages go to this megabyte (Intel SDM volume 3, "Message Address Register Format").
pub const MSI_WINDOW: u32 = 0xfee0_0000;
/// Mask of [`MSI_WINDOW`].
pub const MSI_WINDOW_MASK: u32 = 0xfff0_0000;

/// A piece of guest RAM: `base..base + len`, page aligned; its memfd has exactly this size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memory {
    /// Guest physical address.
    pub base: u64,
    /// Length in bytes.
    pub len: u64,
}

/// A message signalled interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Msi {
    /// Low half of the address; the high half is 0. Inside [`MSI_WINDOW`].
    pub address: u32,
    /// Data.
    pub data: u32,
}

/// A piece of a file that the guest reaches without an exit: core maps `len` bytes from `offset` at `gpa`. All three are
/// multiples of 4,096. The file is a memfd or another regular file of at least `offset + len` bytes. One that is cut
/// shorter later stops the machine when the guest touches what is gone (run state `internal-error`, as in QEMU).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Window {
    /// Guest physical address, inside the configuration window or a PCI window; no two windows overlap.
    pub gpa: u64,
    /// Length in bytes.
    pub len: u64,
    /// Offset in the file.
    pub offset: u64,
    /// The guest may write, for which the descriptor must be open; else its writes exit.
    pub writable: bool,
}

/// What core is to change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Change {
    /// What a write to the vector's eventfd does. Without a message the eventfd is nobody's: it counts, and when it
    /// gets a message again what it has counted is sent as one interrupt.
    Vector {
        /// Number of the vector.
        vector: u16,
        /// The interrupt, or none while it is masked or unused.
        to: Option<Msi>,
    },
    /// A write of any width and value to this address rings the bell's eventfd instead of an exit.
    Bell {
        /// Number of the bell.
        bell: u16,
        /// A guest physical address inside the PCI windows, or none.
        at: Option<u64>,
    },
    /// The vector is nobody's: it has no route, and who names it next gets another eventfd.
    NoVector {
        /// Number of the vector.
        vector: u16,
    },
    /// The bell is nobody's: it is nowhere, and who names it next gets another eventfd.
    NoBell {
        /// Number of the bell.
        bell: u16,
    },
    /// What the guest finds at a place instead of an exit. The same piece of the same file again changes nothing, not even
    /// for a moment; another one replaces it.
    Window {
        /// Number of the window.
        window: u16,
        /// Its place, or none. One descriptor comes with the message for each change that has a place, in order; core
        /// keeps none of them.
        to: Option<Window>,
    },
}

/// What the daemon asks of core.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Ask {
    /// The eventfds of these vectors, then of these bells, in the answer.
    Eventfds {
        /// Vectors.
        vectors: Vec<u16>,
        /// Bells.
        bells: Vec<u16>,
    },
    /// Do all this in order. After an error none of the later ones is done.
    Apply(Vec<Change>),
}

impl Ask {
    /// How many descriptors come with it: one for each window that is to be somewhere.
    #[must_use]
    pub fn descriptors(&self) -> usize {
        let placed = |change: &&Change| matches!(change, Change::Window { to: Some(_), .. });
        if let Self::Apply(changes) = self { changes.iter().filter(placed).count() } else { 0 }
    }
}

/// Why core does not do what it was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum Refusal {
    /// A number or an address is not this daemon's to name, or too much was asked at once.
    #[error("not permitted")]
    NotPermitted,
    /// KVM or the host refused.
    #[error("error {0} of the host")]
    Host(i32),
}

/// Core to daemon. `Command` and `Leave` are on the wire what they are on the console's link, as is [`ToCore::Done`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromCore {
    /// First message. Attached fds: `vcpus` access links, one memfd per entry of `memory`, the memfd of the
    /// configuration window ([`crate::platform::ECAM`], sparse and sealed), in that order.
    Welcome {
        /// Number of vCPUs.
        vcpus: u16,
        /// Guest RAM in ascending order.
        memory: Vec<Memory>,
    },
    /// Do this, then answer [`ToCore::Done`] with the same id. `Pause`: the devices touch no guest memory and raise
    /// no interrupt when it is done.
    Command {
        /// Echoed in the answer.
        id: u32,
        /// What to do.
        what: Command,
    },
    /// The daemon broke the protocol: it is to end, so that another one can take its place.
    Leave,
    /// Answer to [`ToCore::Ask`].
    Answer {
        /// The request's id.
        id: u32,
        /// What became of it.
        result: Result<(), Refusal>,
    },
}

/// Daemon to core.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToCore {
    /// The command of this id is done.
    Done {
        /// The command's id.
        id: u32,
    },
    /// Accesses will be answered and all devices of the command line are known. The machine does not start before.
    Ready,
    /// After a reset a back end may still touch guest memory: nothing of the next guest comes there before [`ToCore::Ready`].
    NotReady,
    /// Please.
    Ask {
        /// Echoed in the answer.
        id: u32,
        /// What.
        what: Ask,
    },
}
