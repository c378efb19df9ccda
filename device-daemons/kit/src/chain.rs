//! Descriptor chains (virtio 1.2, 2.7.5): walked once, checked, bounded.
//!
//! The iterators of `virtio-queue` end a broken chain early without a word and cannot start at a given head, which
//! in-flight tracking needs; this walk refuses what the specification forbids.

use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes as _, GuestAddress};

use crate::memory::{Memory, contains};

/// The most descriptors of a chain, those of an indirect table included.
pub const MAX_PARTS: usize = 1024;
/// The most bytes of a chain (2.7.5.2: a chain is at most 2^32 bytes long).
const MAX_BYTES: u64 = 1 << 32;
/// Size of a descriptor in bytes.
const DESCRIPTOR: u64 = 16;

/// What is wrong with a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// A descriptor number is not below the table's size.
    #[error("descriptor number out of range")]
    Index,
    /// More descriptors than the queue, the table or [`MAX_PARTS`] has: a loop, perhaps.
    #[error("descriptor chain too long or looping")]
    Loop,
    /// A descriptor table is not in guest memory.
    #[error("descriptor table outside of guest memory")]
    Table,
    /// A buffer is not in guest memory.
    #[error("buffer outside of guest memory")]
    Buffer,
    /// A buffer to read comes after one to write.
    #[error("readable buffer after a writable one")]
    Order,
    /// An indirect table is empty, of a strange length, nested, or has a successor.
    #[error("malformed indirect descriptor")]
    Indirect,
    /// The chain is longer than 2^32 bytes.
    #[error("descriptor chain of more than 4 GiB")]
    Bytes,
}

/// A buffer in guest memory; all of it exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// Guest physical address.
    pub addr: u64,
    /// Length in bytes, not 0.
    pub len: u32,
}

/// The buffers of a chain: first those that the device reads, then those that it writes.
#[derive(Clone, Debug, Default)]
pub struct Chain {
    head: u16,
    parts: Vec<Part>,
    readable: usize,
    read_len: u64,
    write_len: u64,
}

/// A part of a chain's bytes: `len` of them from `skip` on, in `parts`.
#[derive(Clone, Copy, Debug)]
pub struct Bytes<'a> {
    parts: &'a [Part],
    skip: u64,
    len: u64,
}

/// A descriptor table.
#[derive(Clone, Copy, Debug)]
struct Table {
    addr: u64,
    len: u64,
}

impl Table {
    fn read(&self, memory: &Memory, index: u16) -> Result<Descriptor, ChainError> {
        let index = u64::from(index);
        if index >= self.len {
            return Err(ChainError::Index);
        }
        let addr = self.addr.checked_add(index * DESCRIPTOR).ok_or(ChainError::Table)?;
        memory.read_obj(GuestAddress(addr)).map_err(|_| ChainError::Table)
    }
}

impl Chain {
    /// Walks the chain that begins at `head` in the table at `table` of `size` descriptors, into the buffers of `self`.
    ///
    /// # Errors
    /// [`ChainError`]: the driver broke the specification.
    pub(crate) fn walk(
        &mut self,
        memory: &Memory,
        (table, size): (u64, u16),
        head: u16,
    ) -> Result<(), ChainError> {
        self.parts.clear();
        (self.head, self.readable, self.read_len, self.write_len) = (head, 0, 0, 0);
        let mut table = Table { addr: table, len: size.into() };
        let (mut index, mut indirect, mut left) = (head, false, table.len);
        loop {
            left = left.checked_sub(1).ok_or(ChainError::Loop)?;
            let descriptor = table.read(memory, index)?;
            if descriptor.refers_to_indirect_table() {
                let (addr, len) = (descriptor.addr().0, u64::from(descriptor.len()));
                let whole = len > 0 && len.is_multiple_of(DESCRIPTOR) && len / DESCRIPTOR <= MAX_PARTS as u64;
                if indirect || !whole || descriptor.has_next() {
                    return Err(ChainError::Indirect);
                }
                if !contains(memory, addr, len) {
                    return Err(ChainError::Table);
                }
                table = Table { addr, len: len / DESCRIPTOR };
                (index, indirect, left) = (0, true, table.len);
                continue;
            }
            self.add(memory, &descriptor)?;
            if !descriptor.has_next() {
                return Ok(());
            }
            index = descriptor.next();
        }
    }

    fn add(&mut self, memory: &Memory, descriptor: &Descriptor) -> Result<(), ChainError> {
        let part = Part { addr: descriptor.addr().0, len: descriptor.len() };
        if self.parts.len() >= MAX_PARTS {
            return Err(ChainError::Loop);
        }
        let writable = descriptor.is_write_only();
        if !writable && self.readable < self.parts.len() {
            return Err(ChainError::Order);
        }
        // Empty buffers mean nothing; their address need not.
        if part.len == 0 {
            return Ok(());
        }
        if !contains(memory, part.addr, part.len.into()) {
            return Err(ChainError::Buffer);
        }
        if self.read_len + self.write_len + u64::from(part.len) > MAX_BYTES {
            return Err(ChainError::Bytes);
        }
        self.parts.push(part);
        if writable {
            self.write_len += u64::from(part.len);
        } else {
            self.readable += 1;
            self.read_len += u64::from(part.len);
        }
        Ok(())
    }

    /// Number of its first descriptor.
    #[must_use]
    pub const fn head(&self) -> u16 {
        self.head
    }

    /// What the device reads.
    #[must_use]
    pub fn readable(&self) -> Bytes<'_> {
        let parts = self.parts.get(..self.readable).unwrap_or_default();
        Bytes { parts, skip: 0, len: self.read_len }
    }

    /// What the device writes.
    #[must_use]
    pub fn writable(&self) -> Bytes<'_> {
        let parts = self.parts.get(self.readable..).unwrap_or_default();
        Bytes { parts, skip: 0, len: self.write_len }
    }
}

impl<'a> Bytes<'a> {
    /// How many.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "nobody asks")]
    pub const fn len(&self) -> u64 {
        self.len
    }

    /// `len` of them from `from` on, if there are so many.
    #[must_use]
    pub fn slice(&self, from: u64, len: u64) -> Option<Self> {
        let end = from.checked_add(len)?;
        if end > self.len {
            return None;
        }
        Some(Self { parts: self.parts, skip: self.skip.checked_add(from)?, len })
    }

    /// Where they are: address and length of each piece.
    pub fn pieces(&self) -> impl Iterator<Item = (u64, u32)> + 'a {
        let (mut skip, mut left) = (self.skip, self.len);
        self.parts.iter().filter_map(move |part| {
            let len = u64::from(part.len);
            let skipped = skip.min(len);
            let take = (len - skipped).min(left);
            skip -= skipped;
            left -= take;
            let take = u32::try_from(take).ok().filter(|take| *take > 0)?;
            Some((part.addr + skipped, take))
        })
    }

    /// Copies as many as `buffer` takes; returns how many that were.
    ///
    /// # Errors
    /// [`ChainError::Buffer`]: the memory is gone.
    pub fn read(&self, memory: &Memory, buffer: &mut [u8]) -> Result<usize, ChainError> {
        let mut done = 0;
        for (addr, len) in self.pieces() {
            let len = usize::try_from(len).unwrap_or(usize::MAX);
            let rest = buffer.get_mut(done..).unwrap_or_default();
            let count = rest.len().min(len);
            let Some(into) = rest.get_mut(..count).filter(|into| !into.is_empty()) else { break };
            memory.read_slice(into, GuestAddress(addr)).map_err(|_| ChainError::Buffer)?;
            done += count;
        }
        Ok(done)
    }

    /// Fills them from `data`; returns how many were written.
    ///
    /// # Errors
    /// [`ChainError::Buffer`]: the memory is gone.
    pub fn write(&self, memory: &Memory, data: &[u8]) -> Result<usize, ChainError> {
        let mut done = 0;
        for (addr, len) in self.pieces() {
            let len = usize::try_from(len).unwrap_or(usize::MAX);
            let rest = data.get(done..).unwrap_or_default();
            let Some(from) = rest.get(..rest.len().min(len)).filter(|from| !from.is_empty()) else { break };
            memory.write_slice(from, GuestAddress(addr)).map_err(|_| ChainError::Buffer)?;
            done += from.len();
        }
        Ok(done)
    }
}
