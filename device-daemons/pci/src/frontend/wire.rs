//! Messages of vhost-user on the wire: a header of three 32-bit numbers (request, flags, size of the payload), then the
//! payload, all in the machine's byte order; descriptors come with the header.

use std::os::fd::OwnedFd;
use std::rc::Rc;

use super::{Inflight, Ring};
use crate::memory::Region;

/// What guest physical addresses are raised by in messages, where the protocol wants addresses of this process
/// (decision 0006): a back end learns none.
pub const BIAS: u64 = 1 << 46;

/// Bytes of a header.
pub const HEADER: usize = 12;
/// The longest payload that is taken, in bytes: a reply to GET_SHMEM_CONFIG.
pub const MAX_PAYLOAD: usize = 8 + 8 * MAX_SHMEM;
/// Shared memory regions that the protocol has room for.
pub const MAX_SHMEM: usize = 256;
/// The largest shared memory region that is believed, in bytes.
const MAX_SHMEM_LEN: u64 = 1 << 40;
/// Bytes of offset, size and flags before the bytes of configuration space.
pub const CONFIG_HEADER: usize = 12;
/// Bytes of configuration space in one message (the spec's limit for all of it).
pub const MAX_CONFIG: usize = 256;

const VERSION_MASK: u32 = 3;
const VERSION: u32 = 1;
const REPLY: u32 = 4;
const NEED_REPLY: u32 = 8;
const RESERVED: u32 = !15;

/// Requests to the back end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, non_camel_case_types, reason = "names of the specification")]
pub enum Request {
    GET_FEATURES = 1,
    SET_FEATURES = 2,
    SET_OWNER = 3,
    SET_MEM_TABLE = 5,
    SET_VRING_NUM = 8,
    SET_VRING_ADDR = 9,
    SET_VRING_BASE = 10,
    GET_VRING_BASE = 11,
    SET_VRING_KICK = 12,
    SET_VRING_CALL = 13,
    GET_PROTOCOL_FEATURES = 15,
    SET_PROTOCOL_FEATURES = 16,
    GET_QUEUE_NUM = 17,
    SET_VRING_ENABLE = 18,
    SET_BACKEND_REQ_FD = 21,
    GET_CONFIG = 24,
    SET_CONFIG = 25,
    GET_INFLIGHT_FD = 31,
    SET_INFLIGHT_FD = 32,
    RESET_DEVICE = 34,
    GET_MAX_MEM_SLOTS = 36,
    ADD_MEM_REG = 37,
    REM_MEM_REG = 38,
    GET_SHMEM_CONFIG = 44,
}

/// Request of the back end: its configuration space has changed.
pub const CONFIG_CHANGE: u32 = 2;
/// Request of the back end: a piece of the file that comes along is to be in a shared memory region.
pub const SHMEM_MAP: u32 = 9;
/// Request of the back end: it is to be there no more.
pub const SHMEM_UNMAP: u32 = 10;

/// Virtio feature bits that are the protocol's own: logging and protocol features.
pub const LOG_ALL: u64 = 1 << 26;
/// See [`LOG_ALL`].
pub const PROTOCOL_FEATURES: u64 = 1 << 30;

/// Protocol features.
pub mod protocol {
    /// More than one queue.
    pub const MQ: u64 = 1 << 0;
    /// Requests without a reply of their own are acknowledged if asked.
    pub const REPLY_ACK: u64 = 1 << 3;
    /// A channel for requests of the back end.
    pub const BACKEND_REQ: u64 = 1 << 5;
    /// Configuration space is the back end's.
    pub const CONFIG: u64 = 1 << 9;
    /// Requests of the back end may come with a descriptor.
    pub const BACKEND_SEND_FD: u64 = 1 << 10;
    /// Memory that notes what is in flight.
    pub const INFLIGHT_SHMFD: u64 = 1 << 12;
    /// A device reset.
    pub const RESET_DEVICE: u64 = 1 << 13;
    /// Memory is added and removed piece by piece.
    pub const CONFIGURE_MEM_SLOTS: u64 = 1 << 15;
    /// Shared memory regions.
    pub const SHMEM: u64 = 1 << 22;
    /// What this front end wants. Not STATUS: the `vhost-user-backend` crate ends a connection that uses it.
    pub const WANTED: u64 =
        MQ | REPLY_ACK | BACKEND_REQ | CONFIG | INFLIGHT_SHMFD | RESET_DEVICE | CONFIGURE_MEM_SLOTS;
}

/// A message that came.
#[derive(Debug)]
pub struct Message {
    /// Its number.
    pub request: u32,
    /// A reply.
    pub reply: bool,
    /// Its sender wants an acknowledgement.
    pub need_reply: bool,
    /// At most [`MAX_PAYLOAD`] bytes.
    pub payload: Vec<u8>,
    /// No more than the reader was made for.
    pub fds: Vec<OwnedFd>,
}

/// What is no message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// Another version, or reserved flags.
    #[error("sent a header that is none of vhost-user version 1")]
    Header,
    /// A payload that no message has.
    #[error("sent a message of {0} bytes")]
    Oversized(u32),
    /// Descriptors that nobody asked for.
    #[error("sent descriptors that nobody asked for")]
    Descriptors,
}

/// Puts messages together from bytes as they come.
#[derive(Debug)]
pub struct Reader {
    bytes: Vec<u8>,
    fds: Vec<OwnedFd>,
    max_fds: usize,
}

impl Reader {
    /// Of messages with at most so many descriptors.
    #[must_use]
    pub fn new(max_fds: usize) -> Self {
        Self { bytes: Vec::new(), fds: Vec::new(), max_fds }
    }

    /// How many bytes to read next. To read more would mix up the descriptors of two messages.
    #[must_use]
    pub fn wants(&self) -> usize {
        let size = self.header().map_or(0, |[_, _, size]| size as usize);
        (HEADER + size).saturating_sub(self.bytes.len()).min(HEADER + MAX_PAYLOAD)
    }

    fn header(&self) -> Option<[u32; 3]> {
        let header = self.bytes.first_chunk::<HEADER>()?;
        let word = |at: usize| u32_at(header, at);
        Some([word(0)?, word(4)?, word(8)?])
    }

    /// Takes at most [`Self::wants`] bytes with what descriptors came along; returns a message once one is whole.
    ///
    /// # Errors
    /// See [`Malformed`]: the stream is of no more use. All descriptors are closed.
    pub fn push(&mut self, bytes: &[u8], fds: Vec<OwnedFd>) -> Result<Option<Message>, Malformed> {
        if self.fds.len() + fds.len() > self.max_fds {
            self.fds.clear();
            return Err(Malformed::Descriptors);
        }
        self.fds.extend(fds);
        self.bytes.extend_from_slice(bytes.get(..self.wants()).unwrap_or(bytes));
        let Some([request, flags, size]) = self.header() else { return Ok(None) };
        if flags & VERSION_MASK != VERSION || flags & RESERVED != 0 {
            return Err(Malformed::Header);
        }
        if size as usize > MAX_PAYLOAD {
            return Err(Malformed::Oversized(size));
        }
        if self.bytes.len() < HEADER + size as usize {
            return Ok(None);
        }
        let mut payload = std::mem::take(&mut self.bytes);
        payload.drain(..HEADER);
        let (reply, need_reply) = (flags & REPLY != 0, flags & NEED_REPLY != 0);
        Ok(Some(Message { request, reply, need_reply, payload, fds: std::mem::take(&mut self.fds) }))
    }
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|chunk| u32::from_ne_bytes(*chunk))
}

/// A payload that is one number of 64 bits.
#[must_use]
pub fn as_u64(payload: &[u8]) -> Option<u64> {
    payload.try_into().map(u64::from_ne_bytes).ok()
}

/// A payload with index and number of a ring.
#[must_use]
pub fn as_ring_state(payload: &[u8]) -> Option<(u32, u32)> {
    (payload.len() == 8).then_some((u32_at(payload, 0)?, u32_at(payload, 4)?))
}

/// The configuration space in a reply, `len` bytes from its start; empty if the back end says that it cannot.
#[must_use]
pub fn as_config(payload: &[u8], len: usize) -> Option<Vec<u8>> {
    if payload.is_empty() {
        return Some(Vec::new());
    }
    let (offset, size) = (u32_at(payload, 0)?, u32_at(payload, 4)? as usize);
    let bytes = payload.get(CONFIG_HEADER..)?;
    (offset == 0 && size == bytes.len() && (size == len || size == 0)).then(|| bytes.to_vec())
}

/// Length and offset in a reply to GET_INFLIGHT_FD. The specification's structure has 20 bytes; C pads it to 24.
#[must_use]
pub fn as_inflight(payload: &[u8]) -> Option<(u64, u64)> {
    let [size, offset] = [payload.get(..8)?, payload.get(8..16)?].map(as_u64);
    matches!(payload.len(), 20 | 24).then_some((size?, offset?))
}

/// Shared memory regions in a reply to GET_SHMEM_CONFIG: id and length of each that there is. The count at its start is
/// of those, too, and of no use. All lengths are whole pages.
#[must_use]
pub fn as_shmem_config(payload: &[u8]) -> Option<Vec<(u8, u64)>> {
    let (head, sizes) = payload.split_at_checked(8)?;
    let count = u32_at(head, 0)? as usize;
    let regions: Vec<(u8, u64)> =
        (0u8..=u8::MAX).zip(sizes.chunks_exact(8).filter_map(as_u64)).filter(|(_, len)| *len > 0).collect();
    let good = |len: &u64| len.is_multiple_of(4096) && *len <= MAX_SHMEM_LEN;
    let whole = sizes.len().is_multiple_of(8) && sizes.len() <= 8 * MAX_SHMEM && count <= MAX_SHMEM;
    (whole && regions.iter().all(|(_, len)| good(len))).then_some(regions)
}

/// What a back end asks to be mapped, or no more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Id of the shared memory region.
    pub region: u8,
    /// Offset in the file, in bytes.
    pub file_offset: u64,
    /// Offset in the region, in bytes.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
    /// The guest may write.
    pub writable: bool,
}

/// The payload of SHMEM_MAP and SHMEM_UNMAP: id, padding, offset in the file, offset in the region, length, flags.
#[must_use]
pub fn as_piece(payload: &[u8]) -> Option<Piece> {
    let number = |at: usize| payload.get(8 * at..8 * at + 8).and_then(as_u64);
    let (region, flags) = (*payload.first()?, number(4)?);
    let (file_offset, offset, len) = (number(1)?, number(2)?, number(3)?);
    (payload.len() == 40 && flags <= 1).then_some(Piece {
        region,
        file_offset,
        offset,
        len,
        writable: flags == 1,
    })
}

/// A message to send.
#[derive(Debug)]
pub struct Packet {
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// Its descriptors, which go with the first byte.
    pub fds: Vec<Rc<OwnedFd>>,
}

impl Packet {
    /// A request.
    #[must_use]
    pub fn request(request: Request, need_reply: bool, payload: &[u8], fds: Vec<Rc<OwnedFd>>) -> Self {
        let flags = VERSION | if need_reply { NEED_REPLY } else { 0 };
        Self { bytes: frame(request as u32, flags, payload), fds }
    }

    /// An answer to a request of the back end: 0 is success.
    #[must_use]
    pub fn answer(request: u32, value: u64) -> Self {
        Self { bytes: frame(request, VERSION | REPLY, &value.to_ne_bytes()), fds: Vec::new() }
    }
}

fn frame(request: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    // A payload is one of those below.
    let size = u32::try_from(payload.len()).unwrap_or(u32::MAX);
    let mut bytes = [request, flags, size].map(u32::to_ne_bytes).concat();
    bytes.extend_from_slice(payload);
    bytes
}

/// Index and number of a ring.
#[must_use]
pub fn ring_state(index: u16, number: u16) -> Vec<u8> {
    [index, number].map(|n| u32::from(n).to_ne_bytes()).concat()
}

/// Where a ring is.
#[must_use]
pub fn ring_addresses(ring: &Ring) -> Vec<u8> {
    let mut bytes = ring_state(ring.index, 0);
    // The last one is for logging, which is not negotiated.
    let addresses = [ring.desc, ring.used, ring.avail].map(|address| address.wrapping_add(BIAS));
    bytes.extend(addresses.into_iter().chain([0]).flat_map(u64::to_ne_bytes));
    bytes
}

fn region(region: &Region) -> Vec<u8> {
    let place = region.place;
    [place.base, place.len, place.base.wrapping_add(BIAS), region.offset].map(u64::to_ne_bytes).concat()
}

/// One piece of memory, after padding.
#[must_use]
pub fn memory_region(one: &Region) -> Vec<u8> {
    [0u64.to_ne_bytes().to_vec(), region(one)].concat()
}

/// All pieces of memory.
#[must_use]
pub fn memory_table(regions: &[Region]) -> Vec<u8> {
    let count = u32::try_from(regions.len()).unwrap_or(u32::MAX);
    let mut bytes = [count, 0].map(u32::to_ne_bytes).concat();
    bytes.extend(regions.iter().flat_map(region));
    bytes
}

/// Bytes of configuration space at an offset, for reading (the bytes do not matter) or writing by the guest.
#[must_use]
pub fn config(offset: u32, bytes: &[u8]) -> Vec<u8> {
    let size = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
    let mut payload = [offset, size, 0].map(u32::to_ne_bytes).concat();
    payload.extend_from_slice(bytes);
    payload
}

/// Memory for what is in flight; its length and offset are 0 where it is asked for. With the padding of C, which
/// all back ends have.
#[must_use]
pub fn inflight(size: u64, offset: u64, queues: u16, queue_size: u16) -> Vec<u8> {
    let mut payload = [size, offset].map(u64::to_ne_bytes).concat();
    payload.extend([queues, queue_size, 0, 0].map(u16::to_ne_bytes).concat());
    payload
}

impl Inflight {
    /// Payload that hands it to the back end.
    #[must_use]
    pub(super) fn payload(&self) -> Vec<u8> {
        inflight(self.size, self.offset, self.queues, self.queue_size)
    }
}
