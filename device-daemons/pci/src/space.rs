//! Configuration space of a function: bytes, which of their bits the guest may write, and capabilities
//! (PCI 3.0, chapter 6). Only the first 256 bytes have content; the extended ones read 0, which says that there is no
//! extended capability (PCI Express 3.0, 7.9.1).

use crate::device::{Bar, Identity};

/// Bytes of a function that are not constant.
pub const LEN: usize = 256;

/// Offset of the command register.
pub const COMMAND: u8 = 0x04;
/// Command register: memory decoding.
pub const MEMORY: u16 = 1 << 1;
/// Command register: the function may master the bus.
pub const MASTER: u16 = 1 << 2;
/// Command register bits that the guest may write: memory, master, parity, SERR, INTx disable.
const COMMAND_BITS: u16 = 0x0546;
const STATUS: u8 = 0x06;
/// Status register: there is a list of capabilities.
const STATUS_CAPABILITIES: u16 = 1 << 4;
const CACHE_LINE: u8 = 0x0c;
/// Offset of the header type.
pub const HEADER_TYPE: u8 = 0x0e;
const MULTIFUNCTION: u8 = 0x80;
/// Offset of the first base address register.
const BARS: u8 = 0x10;
const BAR_WIDE: u32 = 4;
const BAR_PREFETCH: u32 = 8;
const SUBSYSTEM: u8 = 0x2c;
const FIRST_CAPABILITY: u8 = 0x34;
const INTERRUPT_LINE: u8 = 0x3c;
/// Where capabilities begin, behind the header.
const CAPABILITIES: u8 = 0x40;

/// Layout of the header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Header {
    /// Type 0.
    Endpoint,
    /// Type 1.
    Bridge,
}

/// Configuration space.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Space {
    bytes: [u8; LEN],
    /// What a reset brings back.
    initial: [u8; LEN],
    /// Bits that the guest writes.
    writable: [u8; LEN],
    /// Bits that the guest clears by writing 1.
    clears: [u8; LEN],
    /// The byte that points to the next capability.
    link: u8,
    /// Where the next capability goes; none if there is no more room.
    free: Option<u8>,
}

/// What a read of `size` bytes gives where nothing answers.
#[must_use]
pub const fn all_ones(size: u8) -> u64 {
    match size {
        1 => 0xff,
        2 => 0xffff,
        4 => 0xffff_ffff,
        _ => u64::MAX,
    }
}

/// Whether configuration space takes such an access: 1, 2 or 4 bytes, naturally aligned.
#[must_use]
pub const fn is_access(offset: u16, size: u8) -> bool {
    matches!(size, 1 | 2 | 4) && offset.is_multiple_of(size as u16)
}

fn put(bytes: &mut [u8; LEN], at: u8, field: &[u8]) {
    if let Some(slot) = bytes.get_mut(usize::from(at)..).and_then(|rest| rest.get_mut(..field.len())) {
        slot.copy_from_slice(field);
    }
}

fn field<const N: usize>(bytes: &[u8; LEN], at: u8) -> [u8; N] {
    bytes.get(usize::from(at)..).and_then(|rest| rest.first_chunk::<N>()).copied().unwrap_or([0; N])
}

/// Offset of a base address register.
const fn bar_at(index: u8) -> u8 {
    BARS + 4 * (index % 6)
}

impl Space {
    /// A function without base address registers and capabilities.
    #[must_use]
    pub fn new(identity: &Identity, header: Header, multifunction: bool) -> Self {
        let mut space = Self {
            bytes: [0; LEN],
            initial: [0; LEN],
            writable: [0; LEN],
            clears: [0; LEN],
            link: FIRST_CAPABILITY,
            free: Some(CAPABILITIES),
        };
        let (vendor, device) = (identity.vendor.to_le_bytes(), identity.device.to_le_bytes());
        let class = (identity.class << 8 | u32::from(identity.revision)).to_le_bytes();
        space.define(0x00, &[vendor, device].concat(), &[]);
        space.define(COMMAND, &[0, 0], &COMMAND_BITS.to_le_bytes());
        space.define(0x08, &class, &[]);
        space.define(CACHE_LINE, &[0], &[0xff]);
        let kind = u8::from(header == Header::Bridge) | if multifunction { MULTIFUNCTION } else { 0 };
        space.define(HEADER_TYPE, &[kind], &[]);
        space.define(INTERRUPT_LINE, &[0], &[0xff]);
        if header == Header::Endpoint {
            let (vendor, id) = identity.subsystem;
            space.define(SUBSYSTEM, &[vendor.to_le_bytes(), id.to_le_bytes()].concat(), &[]);
        }
        space
    }

    /// Defines bytes and their writable bits (those beyond the end of `writable` are read-only).
    pub fn define(&mut self, at: u8, value: &[u8], writable: &[u8]) {
        put(&mut self.bytes, at, value);
        put(&mut self.initial, at, value);
        put(&mut self.writable, at, writable);
    }

    /// Defines bits that a 1 clears.
    pub fn define_clears(&mut self, at: u8, bits: u16) {
        put(&mut self.clears, at, &bits.to_le_bytes());
    }

    /// Adds a base address register; its size is a power of two.
    pub fn add_bar(&mut self, bar: &Bar) {
        let flags = if bar.wide { BAR_WIDE } else { 0 } | if bar.prefetch { BAR_PREFETCH } else { 0 };
        let mask = !bar.size.wrapping_sub(1);
        let value = u64::from(flags).to_le_bytes();
        let mask = mask.to_le_bytes();
        let len = if bar.wide { 8 } else { 4 };
        self.define(
            bar_at(bar.index),
            value.get(..len).unwrap_or_default(),
            mask.get(..len).unwrap_or_default(),
        );
    }

    /// The address that the guest has put into a base address register.
    #[must_use]
    pub fn bar(&self, bar: &Bar) -> u64 {
        let low = self.u32(bar_at(bar.index)) & !0xf;
        let high = if bar.wide { self.u32(bar_at(bar.index + 1)) } else { 0 };
        u64::from(high) << 32 | u64::from(low)
    }

    /// Appends a capability and returns its offset; none if there is no room.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> Option<u8> {
        let at = self.free?;
        let end = usize::from(at).checked_add(2)?.checked_add(body.len())?;
        if end > LEN || writable.len() > body.len() {
            return None;
        }
        let link = self.link;
        self.define(link, &[at], &[]);
        self.define(at, &[id, 0], &[]);
        self.define(at + 2, body, writable);
        let status = self.u16(STATUS) | STATUS_CAPABILITIES;
        self.define(STATUS, &status.to_le_bytes(), &[]);
        self.link = at + 1;
        self.free = u8::try_from(end.next_multiple_of(4)).ok();
        Some(at)
    }

    /// What the guest reads, as bytes.
    #[must_use]
    pub const fn bytes(&self) -> &[u8; LEN] {
        &self.bytes
    }

    /// The same, for changes that are not the guest's.
    pub const fn bytes_mut(&mut self) -> &mut [u8; LEN] {
        &mut self.bytes
    }

    /// A byte.
    #[must_use]
    pub fn u8(&self, at: u8) -> u8 {
        let [byte] = field(&self.bytes, at);
        byte
    }

    /// Two bytes.
    #[must_use]
    pub fn u16(&self, at: u8) -> u16 {
        u16::from_le_bytes(field(&self.bytes, at))
    }

    /// Four bytes.
    #[must_use]
    pub fn u32(&self, at: u8) -> u32 {
        u32::from_le_bytes(field(&self.bytes, at))
    }

    /// Sets two bytes, as the hardware does.
    pub fn set_u16(&mut self, at: u8, value: u16) {
        put(&mut self.bytes, at, &value.to_le_bytes());
    }

    /// Whether the command register has all of these bits.
    #[must_use]
    pub fn commands(&self, bits: u16) -> bool {
        self.u16(COMMAND) & bits == bits
    }

    /// A read by the guest; all ones for an access that configuration space does not take.
    #[must_use]
    pub fn read(&self, offset: u16, size: u8) -> u64 {
        if !is_access(offset, size) {
            return all_ones(size);
        }
        let Ok(at) = u8::try_from(offset) else { return 0 };
        u64::from(self.u32(at & !3)) >> (8 * u32::from(at & 3)) & all_ones(size)
    }

    /// A write by the guest; false if it is ignored as a whole.
    pub fn write(&mut self, offset: u16, size: u8, value: u64) -> bool {
        if !is_access(offset, size) || usize::from(offset) >= LEN {
            return false;
        }
        for (at, new) in (usize::from(offset)..).zip(value.to_le_bytes()).take(usize::from(size)) {
            let (Some(byte), Some(writable), Some(clears)) =
                (self.bytes.get_mut(at), self.writable.get(at), self.clears.get(at))
            else {
                break;
            };
            *byte = (*byte & !writable | new & writable) & !(new & clears);
        }
        true
    }

    /// The state after power-on.
    pub const fn reset(&mut self) {
        self.bytes = self.initial;
    }

    /// Takes over what a predecessor had; false if it is of another length.
    pub fn restore(&mut self, bytes: &[u8]) -> bool {
        let Ok(bytes) = bytes.try_into() else { return false };
        self.bytes = bytes;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const IDENTITY: Identity = Identity {
        vendor: 0x1af4,
        device: 0x1042,
        class: 0x01_00_00,
        revision: 1,
        subsystem: (0x1af4, 0x1100),
    };

    fn endpoint() -> Space {
        Space::new(&IDENTITY, Header::Endpoint, false)
    }

    #[test]
    fn a_header_says_what_the_function_is() {
        let space = Space::new(&IDENTITY, Header::Endpoint, true);
        assert_eq!(space.read(0, 4), 0x1042_1af4);
        assert_eq!(space.read(8, 4), 0x0100_0001);
        assert_eq!(space.read(0x0c, 4), 0x0080_0000);
        assert_eq!(space.read(0x2c, 4), 0x1100_1af4);
        assert_eq!(space.read(0x3c, 4), 0, "no interrupt pin");
        assert_eq!(Space::new(&IDENTITY, Header::Bridge, false).read(0x0e, 1), 1);
    }

    #[test]
    fn reads_of_every_width_agree_and_others_give_all_ones() {
        let space = endpoint();
        for at in 0..4096u16 {
            let byte = |n: u16| space.read(at + n, 1) << (8 * n);
            if at % 4 == 0 {
                assert_eq!(space.read(at, 4), byte(0) | byte(1) | byte(2) | byte(3));
            }
            if at % 2 == 0 {
                assert_eq!(space.read(at, 2), byte(0) | byte(1));
            } else {
                assert_eq!((space.read(at, 2), space.read(at, 4)), (0xffff, 0xffff_ffff));
            }
            assert_eq!(space.read(at, 8), u64::MAX);
        }
    }

    #[test]
    fn only_writable_bits_are_written() {
        let mut space = endpoint();
        let before = space.clone();
        for at in 0..4096u16 {
            space.write(at, 8, u64::MAX);
            space.write(at | 1, 2, u64::MAX);
        }
        assert_eq!(space, before);
        for at in (0..4096).step_by(4) {
            space.write(at, 4, u64::MAX);
        }
        assert_eq!(space.read(4, 4), 0x0000_0546);
        assert_eq!((space.read(0x0c, 1), space.read(0x3c, 4)), (0xff, 0xff));
        assert_eq!(space.read(0, 4), 0x1042_1af4);
        assert!((0x10..0x2c).chain(0x30..0x3c).all(|at| space.read(at, 1) == 0));
        space.reset();
        assert_eq!(space, before);
    }

    #[test]
    fn ones_clear_what_they_are_to_clear() {
        let mut space = endpoint();
        space.define_clears(0x80, 0x0101);
        space.set_u16(0x80, 0x0fff);
        space.write(0x80, 1, 0);
        assert_eq!(space.u16(0x80), 0x0fff);
        space.write(0x80, 1, 0xff);
        assert_eq!(space.u16(0x80), 0x0ffe);
        space.write(0x80, 4, 0x100);
        assert_eq!(space.u16(0x80), 0x0efe);
    }

    #[test]
    fn every_size_of_bar_is_found_by_sizing_and_moves_in_its_steps() {
        for shift in 12..40 {
            for (wide, prefetch) in [(false, false), (false, true), (true, false), (true, true)] {
                if !wide && shift > 31 {
                    continue;
                }
                let bar = Bar { index: 2, size: 1 << shift, wide, prefetch };
                let mut space = endpoint();
                space.add_bar(&bar);
                let flags = u64::from(wide) << 2 | u64::from(prefetch) << 3;
                assert_eq!((space.read(0x18, 4), space.bar(&bar)), (flags, 0));
                space.write(0x18, 4, 0xffff_ffff);
                space.write(0x1c, 4, 0xffff_ffff);
                let (low, high) = (space.read(0x18, 4), space.read(0x1c, 4));
                assert_eq!(low & 0xf, flags);
                let mask = if wide { high << 32 | low & !0xf } else { !0 << 32 | low & !0xf };
                assert_eq!(!mask + 1, bar.size);
                assert_eq!(high != 0, wide);
                let address = 0x12_3456_7890_u64;
                space.write(0x18, 4, address);
                space.write(0x1c, 4, address >> 32);
                let expected = if wide { address } else { address & 0xffff_ffff } & !(bar.size - 1);
                assert_eq!(space.bar(&bar), expected, "{bar:?}");
            }
        }
    }

    #[test]
    fn capabilities_form_a_list_until_there_is_no_room() {
        let mut space = endpoint();
        assert_eq!(space.read(0x06, 2), 0);
        let mut offsets = Vec::new();
        for len in (1..60).cycle() {
            let Some(at) = space.add_capability(9, &vec![0xaa; len], &[0x0f]) else { break };
            offsets.push(u64::from(at));
            assert!(offsets.len() < 64);
        }
        assert_eq!(space.read(0x06, 2), 0x10);
        let (mut seen, mut at) = (Vec::new(), space.read(0x34, 1));
        while at != 0 {
            assert_eq!((at % 4, space.read(u16::try_from(at).unwrap(), 1)), (0, 9));
            seen.push(at);
            at = space.read(u16::try_from(at).unwrap() + 1, 1);
        }
        assert_eq!(seen, offsets);
        space.write(0x40, 4, 0xffff_ffff);
        assert_eq!(space.read(0x40, 4) & 0xffff_00ff, 0x00af_0009);
        let mut full = endpoint();
        assert!(full.add_capability(9, &[0; 190], &[]).is_some());
        assert!(full.add_capability(9, &[], &[]).is_none());
    }
}
