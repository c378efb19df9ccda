//! Where the structures are: BARs, capabilities, and the window onto them in configuration space
//! (virtio 1.2, 4.1.4).

use crate::device::{Bar, Capability};

use super::common;

/// The BAR with the structures; QEMU has it there, too.
pub const BAR: Bar = Bar { index: 4, size: 0x4000, wide: true, prefetch: true };
/// The BAR with the MSI-X structures.
pub const MSIX_BAR: Bar = Bar { index: 1, size: 0x1000, wide: false, prefetch: false };
/// Where the pending bits are there; the table has room for 128 vectors.
pub const PENDING: u32 = 0x800;

/// Where each structure begins in [`BAR`].
const COMMON: u32 = 0x0000;
const ISR: u32 = 0x1000;
const DEVICE: u32 = 0x2000;
const NOTIFY: u32 = 0x3000;
/// Distance of the doorbells of two queues.
const MULTIPLIER: u32 = 4;

const VENDOR_CAPABILITY: u8 = 0x09;
/// Bytes of a capability; those of notifications and of the window have four more.
const CAP_LEN: u8 = 16;
const CFG_COMMON: u8 = 1;
const CFG_NOTIFY: u8 = 2;
const CFG_ISR: u8 = 3;
const CFG_DEVICE: u8 = 4;
const CFG_PCI: u8 = 5;
const CFG_SHARED_MEMORY: u8 = 8;

/// A place in [`BAR`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// The common configuration structure, from its start.
    Common(u16),
    /// ISR status.
    Isr,
    /// The device's configuration space, from its start.
    Device(u16),
    /// The doorbell of a queue, or of none.
    Notify(u16),
    /// Nothing.
    Nowhere,
}

/// What is at an offset.
#[must_use]
pub fn place(offset: u64) -> Place {
    let offset = u32::try_from(offset).unwrap_or(u32::MAX);
    let short = |value: u32| u16::try_from(value).unwrap_or(u16::MAX);
    match offset {
        NOTIFY.. if offset % MULTIPLIER == 0 => Place::Notify(short((offset - NOTIFY) / MULTIPLIER)),
        NOTIFY.. => Place::Nowhere,
        DEVICE.. => Place::Device(short(offset - DEVICE)),
        ISR => Place::Isr,
        COMMON..ISR => Place::Common(short(offset - COMMON)),
        _ => Place::Nowhere,
    }
}

/// Offset of a queue's doorbell.
#[must_use]
pub fn bell(queue: u16) -> u64 {
    u64::from(NOTIFY + MULTIPLIER * u32::from(queue))
}

fn capability(kind: u8, place: (u32, u32), more: &[u8], writable: &[u8]) -> Capability {
    let len = CAP_LEN + if more.is_empty() { 0 } else { 4 };
    let bar = if kind == CFG_PCI { 0 } else { BAR.index };
    let mut body = vec![len, kind, bar, 0, 0, 0];
    body.extend(place.0.to_le_bytes());
    body.extend(place.1.to_le_bytes());
    body.extend(more);
    Capability { id: VENDOR_CAPABILITY, body, writable: writable.to_vec() }
}

/// How many shared memory regions configuration space has room for, beside the other capabilities.
#[must_use]
pub const fn most_regions(config: usize) -> usize {
    if config > 0 { 1 } else { 2 }
}

/// The capability of a shared memory region (4.1.4.7): the upper halves of offset and length follow.
#[must_use]
pub fn shmem_capability(bar: u8, id: u8, offset: u64, len: u64) -> Capability {
    let halves = |value: u64| {
        let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
        ([a, b, c, d], [e, f, g, h])
    };
    let (offset, len) = (halves(offset), halves(len));
    let mut body = vec![CAP_LEN + 8, CFG_SHARED_MEMORY, bar, id, 0, 0];
    [offset.0, len.0, offset.1, len.1].iter().for_each(|half| body.extend(half));
    Capability { id: VENDOR_CAPABILITY, body, writable: Vec::new() }
}

/// The capabilities of a device with so many queues and bytes of configuration space; the last one is the window.
#[must_use]
pub fn capabilities(queues: u16, config: usize) -> Vec<Capability> {
    let config = u32::try_from(config).unwrap_or(0);
    let mut all = vec![
        capability(CFG_COMMON, (COMMON, common::LEN.into()), &[], &[]),
        capability(CFG_ISR, (ISR, 1), &[], &[]),
    ];
    if config > 0 {
        all.push(capability(CFG_DEVICE, (DEVICE, config), &[], &[]));
    }
    let bells = MULTIPLIER * u32::from(queues);
    all.push(capability(CFG_NOTIFY, (NOTIFY, bells), &MULTIPLIER.to_le_bytes(), &[]));
    // BAR, offset, length and data are the guest's.
    let writable: Vec<u8> = (0..18).map(|at| if matches!(at, 2 | 6..) { 0xff } else { 0 }).collect();
    all.push(capability(CFG_PCI, (0, 0), &[0; 4], &writable));
    all
}

/// The window as the guest has set it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// Offset in [`BAR`].
    pub offset: u64,
    /// Bytes: 1, 2 or 4.
    pub len: u8,
    /// What the data field holds.
    pub data: [u8; 4],
}

impl Window {
    /// The window whose capability is at `at`; none if it is not on the structures, or not on an aligned field.
    #[must_use]
    pub fn of(space: &[u8], at: u8) -> Option<Self> {
        let capability = space.get(usize::from(at)..)?.first_chunk::<20>()?;
        let [_, _, _, _, bar, _, _, _, o0, o1, o2, o3, l0, l1, l2, l3, data @ ..] = *capability;
        let offset = u32::from_le_bytes([o0, o1, o2, o3]);
        let len = u32::from_le_bytes([l0, l1, l2, l3]);
        let valid = bar == BAR.index && matches!(len, 1 | 2 | 4) && offset.is_multiple_of(len);
        let inside = u64::from(offset) + u64::from(len) <= BAR.size;
        let window = Self { offset: offset.into(), len: u8::try_from(len).ok()?, data };
        (at != 0 && valid && inside).then_some(window)
    }

    /// The first `len` bytes of the data.
    #[must_use]
    pub fn value(&self) -> u64 {
        let all = u64::from(u32::from_le_bytes(self.data));
        all & crate::space::all_ones(self.len)
    }

    /// The data with what a read has given in its first bytes.
    #[must_use]
    pub fn with(&self, value: u64) -> [u8; 4] {
        let mut data = self.data;
        let bytes = value.to_le_bytes();
        data.iter_mut().zip(bytes).take(self.len.into()).for_each(|(to, from)| *to = from);
        data
    }
}

/// The first byte of the data field that an access touches, if it touches it.
#[must_use]
pub fn data_byte(at: u8, offset: u16) -> Option<usize> {
    let byte = offset.checked_sub(u16::from(at) + 16)?;
    (at != 0 && byte < 4).then_some(byte.into())
}
