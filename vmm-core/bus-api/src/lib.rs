//! Wire format of the bus links between core and the bus daemons, and the platform map.
//!
//! A bus daemon (console, later pci) has one *main* link to core, which carries the messages of
//! [`main_link`] (postcard), and one *access* link per vCPU plus one for core's drainer, which carry
//! [`Request`] and [`Reply`] in the fixed little-endian layout below. All are `SOCK_SEQPACKET`: one
//! packet is one message. See `docs/decisions/0002-links.md`.
//!
//! ```text
//! request: seq u32 | space u8 | op u8 | size u8 | 0 | addr u64 | data u64 | { write }*
//! write:   space u8 | size u8 | 0 x 6 | addr u64 | data u64            (collected earlier, do first)
//! reply:   seq u32 | action u8 | 0 x 3 | data u64
//! ```

pub mod lasts;
pub mod main_link;
pub mod pci;
pub mod platform;

/// Version of everything in this crate; both ends of a link must have the same.
pub const VERSION: u16 = 5;
/// Length of a request without collected writes, in bytes.
pub const REQUEST_LEN: usize = 24;
/// Length of one collected write, in bytes.
pub const WRITE_LEN: usize = 24;
/// Length of a reply, in bytes.
pub const REPLY_LEN: usize = 16;
/// The most collected writes that one request carries (KVM's ring holds at most 170).
pub const MAX_WRITES: usize = 170;
/// The longest request, in bytes.
pub const MAX_REQUEST_LEN: usize = REQUEST_LEN + MAX_WRITES * WRITE_LEN;

/// The peer sent bytes that are no message of this version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("malformed bus packet")]
pub struct Malformed;

/// Address space of an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Space {
    /// x86 I/O ports.
    Pio,
    /// Guest physical memory.
    Mmio,
}

/// What an access does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Read `size` bytes; the reply's data holds them in the low bytes.
    Read,
    /// Write the low `size` bytes.
    Write(u64),
    /// No access: only the collected writes count.
    Flush,
}

/// One access by a vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// Address space.
    pub space: Space,
    /// First address.
    pub addr: u64,
    /// Width in bytes: 1, 2, 4 or 8.
    pub size: u8,
    /// Direction and data.
    pub op: Op,
}

/// A write that core collected before the access that carries it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CollectedWrite {
    /// Address space.
    pub space: Space,
    /// First address.
    pub addr: u64,
    /// Width in bytes: 1, 2, 4 or 8.
    pub size: u8,
    /// The low `size` bytes are written.
    pub data: u64,
}

/// What core must do before the vCPU goes on, beside completing the access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Nothing.
    None,
    /// The guest asked for a reset.
    Reset,
    /// The guest switched itself off (ACPI S5).
    PowerOff,
}

/// Answer to a [`Request`] of the same number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reply {
    /// Number of the request.
    pub seq: u32,
    /// What core does next.
    pub action: Action,
    /// Data of a read, 0 otherwise.
    pub data: u64,
}

/// An access with its number and the writes to do before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request<'a> {
    /// Per-link number; a repeated number is a repetition of the same request.
    pub seq: u32,
    /// The access.
    pub access: Access,
    writes: &'a [u8],
}

fn valid_size(size: u8) -> bool {
    matches!(size, 1 | 2 | 4 | 8)
}

fn space_from(byte: u8) -> Result<Space, Malformed> {
    match byte {
        0 => Ok(Space::Pio),
        1 => Ok(Space::Mmio),
        _ => Err(Malformed),
    }
}

/// Writes a field into a packet; every caller's offsets are constants inside it.
fn put(packet: &mut [u8], at: usize, field: &[u8]) {
    if let Some(slot) = packet.get_mut(at..).and_then(|rest| rest.get_mut(..field.len())) {
        slot.copy_from_slice(field);
    }
}

fn u64_at(bytes: &[u8], at: usize) -> Result<u64, Malformed> {
    let field = bytes.get(at..).and_then(|b| b.first_chunk::<8>()).ok_or(Malformed)?;
    Ok(u64::from_le_bytes(*field))
}

fn u32_at(bytes: &[u8], at: usize) -> Result<u32, Malformed> {
    let field = bytes.get(at..).and_then(|b| b.first_chunk::<4>()).ok_or(Malformed)?;
    Ok(u32::from_le_bytes(*field))
}

impl CollectedWrite {
    /// The write as bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; WRITE_LEN] {
        let mut out = [0; WRITE_LEN];
        put(&mut out, 0, &[self.space as u8, self.size]);
        put(&mut out, 8, &self.addr.to_le_bytes());
        put(&mut out, 16, &self.data.to_le_bytes());
        out
    }

    fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let &[space, size, ..] = bytes else { return Err(Malformed) };
        if !valid_size(size) {
            return Err(Malformed);
        }
        Ok(Self { space: space_from(space)?, addr: u64_at(bytes, 8)?, size, data: u64_at(bytes, 16)? })
    }
}

impl<'a> Request<'a> {
    /// The fixed part of a request; collected writes follow it in the same packet.
    #[must_use]
    pub fn encode_head(seq: u32, access: &Access) -> [u8; REQUEST_LEN] {
        let (op, data) = match access.op {
            Op::Read => (0, 0),
            Op::Write(data) => (1, data),
            Op::Flush => (2, 0),
        };
        let mut out = [0; REQUEST_LEN];
        put(&mut out, 0, &seq.to_le_bytes());
        put(&mut out, 4, &[access.space as u8, op, access.size]);
        put(&mut out, 8, &access.addr.to_le_bytes());
        put(&mut out, 16, &data.to_le_bytes());
        out
    }

    /// Checks a packet.
    ///
    /// # Errors
    /// [`Malformed`] for any length, operation or width that this version does not have.
    pub fn decode(packet: &'a [u8]) -> Result<Self, Malformed> {
        let (head, writes) = packet.split_at_checked(REQUEST_LEN).ok_or(Malformed)?;
        if writes.len() % WRITE_LEN != 0 || writes.len() > MAX_WRITES * WRITE_LEN {
            return Err(Malformed);
        }
        let &[_, _, _, _, space, op, size, _, ..] = head else { return Err(Malformed) };
        let data = u64_at(head, 16)?;
        let op = match op {
            0 => Op::Read,
            1 => Op::Write(data),
            2 => Op::Flush,
            _ => return Err(Malformed),
        };
        if op != Op::Flush && !valid_size(size) {
            return Err(Malformed);
        }
        let access = Access { space: space_from(space)?, addr: u64_at(head, 8)?, size, op };
        Ok(Self { seq: u32_at(head, 0)?, access, writes })
    }

    /// The collected writes in the order in which the guest made them.
    pub fn writes(&self) -> impl Iterator<Item = Result<CollectedWrite, Malformed>> + 'a {
        self.writes.chunks_exact(WRITE_LEN).map(CollectedWrite::decode)
    }
}

impl Reply {
    /// The reply as bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; REPLY_LEN] {
        let mut out = [0; REPLY_LEN];
        put(&mut out, 0, &self.seq.to_le_bytes());
        put(&mut out, 4, &[self.action as u8]);
        put(&mut out, 8, &self.data.to_le_bytes());
        out
    }

    /// Checks a packet.
    ///
    /// # Errors
    /// [`Malformed`] for any length or action that this version does not have.
    pub fn decode(packet: &[u8]) -> Result<Self, Malformed> {
        if packet.len() != REPLY_LEN {
            return Err(Malformed);
        }
        let action = match packet.get(4) {
            Some(0) => Action::None,
            Some(1) => Action::Reset,
            Some(2) => Action::PowerOff,
            _ => return Err(Malformed),
        };
        Ok(Self { seq: u32_at(packet, 0)?, action, data: u64_at(packet, 8)? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_survive_the_wire() {
        let write = CollectedWrite { space: Space::Pio, addr: 0x3f8, size: 1, data: 0x41 };
        for op in [Op::Read, Op::Write(0x1234_5678_9abc_def0), Op::Flush] {
            let access = Access { space: Space::Mmio, addr: 0xfee0_0000, size: 4, op };
            let mut packet = Request::encode_head(7, &access).to_vec();
            packet.extend(write.encode());
            let request = Request::decode(&packet).unwrap();
            assert_eq!((request.seq, request.access), (7, access));
            assert_eq!(request.writes().collect::<Result<Vec<_>, _>>().unwrap(), [write]);
        }
        for action in [Action::None, Action::Reset, Action::PowerOff] {
            let reply = Reply { seq: u32::MAX, action, data: u64::MAX };
            assert_eq!(Reply::decode(&reply.encode()).unwrap(), reply);
        }
    }

    #[test]
    fn every_truncation_and_bad_byte_is_refused() {
        let access = Access { space: Space::Pio, addr: 0x3f8, size: 1, op: Op::Read };
        let good = Request::encode_head(1, &access);
        for len in 0..good.len() {
            assert_eq!(Request::decode(&good[..len]), Err(Malformed));
        }
        for (at, bad) in [(4, 2), (5, 3), (6, 0), (6, 3), (6, 16)] {
            let mut packet = good;
            packet[at] = bad;
            assert_eq!(Request::decode(&packet), Err(Malformed), "byte {at}");
        }
        assert_eq!(Request::decode(&vec![0; MAX_REQUEST_LEN + WRITE_LEN]), Err(Malformed));
        let mut reply = Reply { seq: 1, action: Action::None, data: 0 }.encode();
        reply[4] = 3;
        assert_eq!(Reply::decode(&reply), Err(Malformed));
        assert_eq!(Reply::decode(&reply[..15]), Err(Malformed));
    }
}
