//! What the transport knows of device types (virtio 1.2, 5): class codes, features, configuration space.

use std::ops::Range;

use bulkhead_control_api::config::Virtio;

use super::sync::Span;

/// Feature bits of the transport and the ring (virtio 1.2, 6).
pub const INDIRECT_DESC: u64 = 1 << 28;
/// Event index.
pub const EVENT_IDX: u64 = 1 << 29;
/// A device of virtio 1.0 and later.
pub const VERSION_1: u64 = 1 << 32;
/// Buffers are used in order.
pub const IN_ORDER: u64 = 1 << 35;
/// A queue can be reset by itself.
pub const RING_RESET: u64 = 1 << 40;

const NET: u16 = 1;
const BLOCK: u16 = 2;
const CONSOLE: u16 = 3;
const BALLOON: u16 = 5;
const SCSI: u16 = 8;
const GPU: u16 = 16;
const IOMMU: u16 = 23;
const FS: u16 = 26;

/// Bits that belong to the device type (virtio 1.2, 2.2).
const OF_TYPE: u64 = 0x00ff_ffff | !0 << 50;
/// What a guest may be offered if the back end has it. The others need what this transport does not do (packed rings,
/// an IOMMU, data in notifications) or are no virtio features at all.
const KNOWN: u64 = OF_TYPE | INDIRECT_DESC | EVENT_IDX | VERSION_1 | IN_ORDER;

// Network device (virtio 1.2, 5.1.3).
const NET_CTRL_GUEST_OFFLOADS: u64 = 1 << 2;
const NET_MTU: u64 = 1 << 3;
const NET_MAC: u64 = 1 << 5;
const NET_STATUS: u64 = 1 << 16;
/// Control queue, and what is asked for on it: receive modes, VLANs, announcements, queue pairs, addresses.
const NET_CTRL: u64 = 0x7f << 17 | NET_CTRL_GUEST_OFFLOADS;
const NET_HASH_REPORT: u64 = 1 << 57;
const NET_RSS: u64 = 1 << 60;
const NET_STANDBY: u64 = 1 << 62;
const NET_SPEED_DUPLEX: u64 = 1 << 63;
/// What needs fields of the configuration space that the front end does not have.
const NET_FIELDS: u64 = NET_MTU | NET_HASH_REPORT | NET_RSS | NET_STANDBY | NET_SPEED_DUPLEX;
/// File system (5.11.3): one more queue before the requests'.
const FS_NOTIFICATION: u64 = 1;

/// PCI class code of a device type: base class, subclass, interface; QEMU's.
pub const fn class(device_type: u16) -> u32 {
    let class = match device_type {
        NET => 0x0200,
        BLOCK | SCSI => 0x0100,
        // Console, sockets, I2C, GPIO.
        CONSOLE | 19 | 34 | 41 => 0x0780,
        // File system of 9P.
        9 => 0x0002,
        GPU => 0x0380,
        // Input.
        18 => 0x0980,
        // Sound.
        25 => 0x0401,
        FS => 0x0180,
        _ => 0x00ff,
    };
    class << 8
}

/// Whether the back end owns the configuration space. A network device's and a file system's is the front end's.
pub const fn is_config_remote(device_type: u16) -> bool {
    !matches!(device_type, NET | FS)
}

/// Virtqueues that the guest sees, of a back end with `has`.
///
/// A network device's control queue must be the back end's: only our own daemon, which has a side link, serves one.
/// Without, there is one pair of queues.
pub fn queues(device: &Virtio, has: u16) -> u16 {
    let queues = device.queues.min(has);
    if device.device_type == NET && !has_control(device, queues) { queues.min(2) } else { queues }
}

const fn has_control(device: &Virtio, queues: u16) -> bool {
    device.side.is_some() && queues == device.queues && queues >= 3 && queues % 2 == 1
}

/// Features that the guest is offered, of a back end with these features and `queues` virtqueues.
pub fn features(device: &Virtio, has: u64, queues: u16) -> u64 {
    let mut features = has & KNOWN | RING_RESET;
    match device.device_type {
        NET => {
            features &= !NET_FIELDS;
            if !has_control(device, queues) {
                features &= !NET_CTRL;
            }
            if device.config.len() >= 8 {
                features |= NET_MAC | NET_STATUS;
            }
        }
        FS => features &= !FS_NOTIFICATION,
        _ => {}
    }
    features & !device.without
}

/// Sets what the configuration space says of the number of queues to what the guest sees.
pub fn limit_queues(device: &Virtio, queues: u16, config: &mut [u8]) {
    let (field, most): (Range<usize>, u16) = match device.device_type {
        NET => (8..10, (queues / 2).max(1)),
        BLOCK => (34..36, queues.max(1)),
        // Beside the requests' queues there are two, or one.
        SCSI => (0..4, queues.saturating_sub(2).max(1)),
        FS => (36..40, queues.saturating_sub(1).max(1)),
        _ => return,
    };
    let Some(field) = config.get_mut(field) else { return };
    let is = field.iter().rev().fold(0u64, |value, byte| value << 8 | u64::from(*byte));
    let bytes = is.min(most.into()).to_le_bytes();
    field.iter_mut().zip(bytes).for_each(|(to, from)| *to = from);
}

/// The field of the configuration space with these bytes, if the guest may write it with the features that it has
/// accepted.
pub fn writable(device_type: u16, features: u64, bytes: &Range<usize>) -> Option<Span> {
    let fields: &[(Range<usize>, u64)] = match device_type {
        // `writeback` (5.2.4).
        BLOCK => &[(32..33, 1 << 11)],
        // `emerg_wr` (5.3.4).
        CONSOLE => &[(8..12, 1 << 2)],
        // `actual`, `poison_val` (5.5.4).
        BALLOON => &[(4..8, 0), (12..16, 1 << 4)],
        // `sense_size`, `cdb_size` (5.6.4).
        SCSI => &[(20..24, 0), (24..28, 0)],
        // `events_clear` (5.7.4).
        GPU => &[(4..8, 0)],
        // `bypass` (5.13.4).
        IOMMU => &[(36..37, 1 << 6)],
        _ => &[],
    };
    let inside =
        |field: &Range<usize>| field.start <= bytes.start && bytes.end <= field.end && !bytes.is_empty();
    let found = fields.iter().find(|(field, needs)| inside(field) && features & needs == *needs);
    found.map(|(field, _)| (field.start, field.end))
}
