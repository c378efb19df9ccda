//! Side link of a device daemon: what vhost-user cannot carry.
//!
//! The daemon listens (descriptor `side`), pci connects. After the hello each way pci says [`FromPci::Resets`], and the
//! daemon says what it is and has: [`ToPci::Thread`], then, if it has memory of the guest's, [`ToPci::Memory`], each
//! [`ToPci::Piece`] and [`ToPci::Pieces`]. See `docs/decisions/0007-memory.md` for what a piece is.

use serde::{Deserialize, Serialize};

/// The most pieces of a device.
pub const MAX_PIECES: u16 = 256;
/// The smallest chunk of a virtio-mem region, in bytes: a chunk is one piece.
pub const MIN_CHUNK: u64 = 128 << 20;
/// The longest text in a message, in bytes.
pub const MAX_TEXT: usize = 256;

/// A piece of a memory device: page aligned, inside the device's range of guest physical addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Piece {
    /// Guest physical address.
    pub addr: u64,
    /// Length in bytes.
    pub len: u64,
    /// Offset in its file, in bytes.
    pub offset: u64,
}

/// Length of the chunks that a virtio-mem region of `len` bytes is cut into, a multiple of `block`: the last one may be
/// shorter. There are at most [`MAX_PIECES`].
#[must_use]
pub fn chunk_len(len: u64, block: u64) -> u64 {
    let even = len.div_ceil(MAX_PIECES.into()).max(MIN_CHUNK);
    even.checked_next_multiple_of(block.max(1)).unwrap_or(even)
}

/// A memory device's sizes, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemorySizes {
    /// What the guest has plugged.
    pub plugged: u64,
    /// What it is to plug.
    pub requested: u64,
}

/// Daemon to pci.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToPci {
    /// The device's configuration space has changed: read it again and tell the guest.
    ConfigChanged,
    /// The device cannot go on until the guest resets it (virtio 1.2, 2.1 "Device Status Field").
    NeedsReset,
    /// The queue thread owns the attached descriptor (`bulkhead-jail`'s `owner`). Said first.
    Thread,
    /// The sizes are these now, and the configuration space says so: the guest is not told.
    Memory(MemorySizes),
    /// This piece, number `number` of the device, in the attached file, is to be the guest's and every back end's. It is
    /// answered with [`FromPci::Settled`] when it is. Repeated, it changes nothing.
    Piece {
        /// Below [`MAX_PIECES`].
        number: u16,
        /// Where.
        piece: Piece,
    },
    /// The piece is to be nobody's: answered likewise. One that there is not is gone already.
    NoPiece {
        /// Its number.
        number: u16,
    },
    /// Every piece has been said: a predecessor's others are to go, which [`FromPci::Pieces`] answers. Said once on each link.
    Pieces,
}

/// Pci to daemon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromPci {
    /// The machine has been reset so many times since it was powered on. Said first, and after each reset.
    Resets(u64),
    /// A [`ToPci::Piece`] or [`ToPci::NoPiece`] is carried out, or cannot be: a text for the log, of at most [`MAX_TEXT`] bytes.
    Settled {
        /// The number.
        number: u16,
        /// Why not. What was the guest's before stays so.
        result: Result<(), String>,
    },
    /// The device has the pieces that were said before [`ToPci::Pieces`] and no others.
    Pieces,
    /// The guest is to plug so many bytes. Answered by [`ToPci::Memory`].
    Request {
        /// Bytes.
        bytes: u64,
    },
}
