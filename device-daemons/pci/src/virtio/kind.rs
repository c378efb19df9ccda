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
const MEM: u16 = 24;
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

/// Whether the guest is to hear of a change of the configuration space. What it has plugged (`plugged_size`, 5.15.4) it knows.
pub fn is_news(device_type: u16, old: &[u8], new: &[u8]) -> bool {
    let own = if device_type == MEM { 40..48 } else { 0..0 };
    old.len() != new.len()
        || old.iter().zip(new).enumerate().any(|(at, (old, new))| old != new && !own.contains(&at))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_driver_knows_what_it_has_plugged() {
        let (old, mut new) = ([0; 56], [0; 56]);
        new[40] = 1;
        assert!(!is_news(MEM, &old, &new) && is_news(BLOCK, &old, &new));
        new[48] = 1;
        assert!(is_news(MEM, &old, &new) && !is_news(MEM, &old, &old));
    }

    fn device(device_type: u16, queues: u16, config: usize) -> Virtio {
        Virtio {
            device_type,
            queues,
            queue_size: 256,
            config: vec![0; config],
            without: 0,
            socket: String::new(),
            listens: false,
            side: None,
            resumes: true,
            memory: None,
        }
    }

    #[test]
    fn classes_are_those_of_qemu() {
        // As `query-pci` of QEMU 7.2 says them.
        let known =
            [(1, 512), (2, 256), (3, 1920), (4, 255), (5, 255), (8, 256), (16, 896), (23, 255), (26, 384)];
        for (device_type, code) in known {
            assert_eq!(class(device_type), code << 8, "{device_type}");
        }
    }

    #[test]
    fn only_what_the_transport_can_do_is_offered() {
        let all = features(&device(2, 1, 60), u64::MAX, 1);
        for bit in 0..64 {
            // Notification on empty rings, any layout, dirty log, protocol features; IOMMU, packed rings, order of the
            // platform, SR-IOV, data in notifications and later ones are not.
            let known = bit < 24 || matches!(bit, 28 | 29 | 32 | 35 | 40) || bit >= 50;
            assert_eq!(all & 1 << bit != 0, known, "bit {bit}");
        }
        assert_eq!(features(&device(2, 1, 60), VERSION_1, 1), VERSION_1 | RING_RESET);
        let without = Virtio { without: RING_RESET | EVENT_IDX, ..device(2, 1, 60) };
        assert_eq!(features(&without, VERSION_1 | EVENT_IDX, 1), VERSION_1);
        assert_eq!(features(&device(26, 2, 44), 3, 2) & 3, 2, "a file system has no notifications");
    }

    #[test]
    fn only_our_own_network_daemon_has_a_control_queue() {
        let own = |queues| Virtio { side: Some(String::new()), ..device(1, queues, 12) };
        let other = |queues| device(1, queues, 12);
        let control = 0x7f << 17 | NET_CTRL_GUEST_OFFLOADS;
        let cases = [
            (own(5), 5, 5, true),
            (own(5), 64, 5, true),
            (own(5), 4, 2, false),
            (own(2), 2, 2, false),
            (other(5), 256, 2, false),
            (other(2), 256, 2, false),
        ];
        for (device, has, expected, offered) in cases {
            let queues = queues(&device, has);
            assert_eq!(queues, expected, "{} of {has}", device.queues);
            let features = features(&device, u64::MAX, queues);
            assert_eq!(features & control, if offered { control } else { 0 });
            assert_eq!(features & NET_FIELDS, 0);
        }
        let own_fields = NET_MAC | NET_STATUS;
        assert_eq!(features(&device(1, 2, 12), 0, 2) & own_fields, own_fields, "the front end's fields");
        assert_eq!(features(&device(1, 2, 0), 0, 2) & own_fields, 0);
    }

    #[test]
    fn numbers_of_queues_in_the_configuration_are_those_that_exist() {
        let limited = |device_type, queues, at: Range<usize>| {
            let mut config = vec![0xff; 60];
            limit_queues(&device(device_type, queues, 60), queues, &mut config);
            let field = config[at.clone()].iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte));
            config.drain(at);
            assert!(config.iter().all(|byte| *byte == 0xff), "no other field");
            field
        };
        assert_eq!((limited(1, 2, 8..10), limited(1, 5, 8..10)), (1, 2));
        assert_eq!((limited(2, 1, 34..36), limited(2, 64, 34..36)), (1, 64));
        assert_eq!(limited(8, 6, 0..4), 4);
        assert_eq!((limited(26, 2, 36..40), limited(26, 1, 36..40)), (1, 1));
        assert_eq!(limited(4, 1, 0..0), 0);
        // Fewer than that, or no such field.
        let mut config = [vec![0; 34], vec![2, 0]].concat();
        limit_queues(&device(2, 4, 36), 4, &mut config);
        assert_eq!(config[34], 2);
        limit_queues(&device(2, 4, 35), 1, &mut config[..35]);
        assert_eq!(config[34], 2);
    }

    #[test]
    fn fields_are_written_within_their_bounds() {
        for device_type in 0..64 {
            for from in 0..64 {
                for len in [1, 2, 4, 8] {
                    let field = writable(device_type, u64::MAX, &(from..from + len));
                    let inside = |(a, b): (usize, usize)| a <= from && from + len <= b && b - a <= 4;
                    assert!(field.is_none_or(inside));
                }
            }
            assert_eq!(writable(device_type, u64::MAX, &(4..4)), None);
        }
        assert_eq!(writable(2, 1 << 11, &(32..33)), Some((32, 33)));
        assert_eq!(writable(2, !(1 << 11), &(32..33)), None, "without the feature");
        assert_eq!(writable(5, 0, &(4..8)), Some((4, 8)));
        assert_eq!(writable(5, 0, &(12..16)), None);
        assert_eq!(writable(1, u64::MAX, &(0..4)), None, "an address is fixed");
    }
}
