//! The device: features, configuration space, statistics; what each queue is for (virtio 1.2, 5.5).

use crate::pages::PAGE;
use bulkhead_control_api::config;

/// Feature bits of the device type (virtio 1.2, 5.5.3).
const VIRTIO_BALLOON_F_STATS_VQ: u32 = 1;
const VIRTIO_BALLOON_F_DEFLATE_ON_OOM: u32 = 2;
const VIRTIO_BALLOON_F_PAGE_POISON: u32 = 4;
const VIRTIO_BALLOON_F_REPORTING: u32 = 5;

/// Length of the configuration space in bytes: `num_pages`, `actual`, `free_page_hint_cmd_id`, `poison_val`.
pub const CONFIG_LEN: usize = 16;
/// The most virtqueues.
pub const QUEUES: usize = 4;
/// The most entries of statistics that are kept.
pub const MAX_STATS: usize = 16;
/// Length of an entry in bytes: tag (16 bits), value (64 bits).
const STAT_LEN: usize = 10;
const ACTUAL: usize = 4;
const POISON: usize = 12;

/// What a virtqueue is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Numbers of pages that the guest gives.
    Inflate,
    /// Numbers of pages that it takes back.
    Deflate,
    /// Buffers with statistics, each kept until the next ones are wanted.
    Stats,
    /// Ranges of memory that the guest does not use at the moment.
    Reporting,
}

/// What outlives the process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Kept {
    /// Pages that the guest is to give.
    pub target: u32,
    /// Pages that it has given, as it says.
    pub actual: u32,
    /// What it fills free pages with.
    pub poison: u32,
    /// Seconds between two requests for statistics, 0 for none.
    pub interval: u32,
}

/// What a write to configuration space has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Written {
    /// Nothing that anybody waits for.
    Nothing,
    /// The guest has given or taken back pages.
    Actual,
}

/// The device.
#[derive(Debug)]
pub struct Balloon {
    /// `-m`, in bytes.
    ram: u64,
    offered: u64,
    acked: u64,
    /// What outlives the process.
    pub kept: Kept,
    stats: Vec<(u16, u64)>,
}

const fn bit(feature: u32) -> u64 {
    1 << feature
}

impl Balloon {
    /// The device at power-on, or as its predecessor left it.
    #[must_use]
    pub fn new(config: &config::Balloon, kept: Kept) -> Self {
        let mut offered = bit(VIRTIO_BALLOON_F_STATS_VQ);
        for (wanted, feature) in [
            (config.deflate_on_oom, VIRTIO_BALLOON_F_DEFLATE_ON_OOM),
            (config.free_page_reporting, VIRTIO_BALLOON_F_REPORTING),
            (config.page_poison, VIRTIO_BALLOON_F_PAGE_POISON),
        ] {
            if wanted {
                offered |= bit(feature);
            }
        }
        Self { ram: config.ram, offered, acked: 0, kept, stats: Vec::new() }
    }

    /// Feature bits of the device type that it offers.
    #[must_use]
    pub const fn offered(&self) -> u64 {
        self.offered
    }

    /// The guest has taken these features.
    pub const fn acknowledge(&mut self, features: u64) {
        self.acked = features;
    }

    fn has(&self, feature: u32) -> bool {
        self.acked & self.offered & bit(feature) != 0
    }

    /// What virtqueue `index` is for: drivers number those that the features give without gaps.
    #[must_use]
    pub fn role(&self, index: usize) -> Option<Role> {
        let roles = [
            Some(Role::Inflate),
            Some(Role::Deflate),
            self.has(VIRTIO_BALLOON_F_STATS_VQ).then_some(Role::Stats),
            self.has(VIRTIO_BALLOON_F_REPORTING).then_some(Role::Reporting),
        ];
        roles.into_iter().flatten().nth(index)
    }

    /// The configuration space.
    #[must_use]
    pub fn config(&self) -> [u8; CONFIG_LEN] {
        let fields = [self.kept.target, self.kept.actual, 0, self.kept.poison];
        let mut space = [0; CONFIG_LEN];
        for (slot, field) in space.chunks_exact_mut(4).zip(fields) {
            slot.copy_from_slice(&field.to_le_bytes());
        }
        space
    }

    /// The guest writes `bytes` at `offset`. Other fields than `actual` and `poison_val` are not its to write.
    pub fn write_config(&mut self, offset: usize, bytes: &[u8]) -> Written {
        let mut space = self.config();
        let Some(range) = offset.checked_add(bytes.len()).and_then(|end| space.get_mut(offset..end)) else {
            return Written::Nothing;
        };
        range.copy_from_slice(bytes);
        let field = |at: usize| {
            let bytes = space.get(at..).and_then(|rest| rest.first_chunk::<4>());
            bytes.map_or(0, |bytes| u32::from_le_bytes(*bytes))
        };
        if self.has(VIRTIO_BALLOON_F_PAGE_POISON) {
            self.kept.poison = field(POISON);
        }
        let actual = field(ACTUAL);
        if std::mem::replace(&mut self.kept.actual, actual) == actual {
            Written::Nothing
        } else {
            Written::Actual
        }
    }

    /// Aims at `bytes` of memory for the guest, at most all of it; false if that changes nothing.
    pub fn set_target(&mut self, bytes: u64) -> bool {
        let pages = self.ram.saturating_sub(bytes) / PAGE;
        let pages = u32::try_from(pages).unwrap_or(u32::MAX);
        std::mem::replace(&mut self.kept.target, pages) != pages
    }

    /// Bytes of memory that are not in the balloon.
    #[must_use]
    pub fn actual(&self) -> u64 {
        self.ram.saturating_sub(u64::from(self.kept.actual) * PAGE)
    }

    /// Whether reported pages may be freed: their next content is zero, which must be what the guest expects.
    #[must_use]
    pub fn may_free_reported(&self) -> bool {
        !self.has(VIRTIO_BALLOON_F_PAGE_POISON) || self.kept.poison == 0
    }

    /// Takes a buffer of statistics: the first [`MAX_STATS`] entries.
    pub fn take_stats(&mut self, bytes: &[u8]) {
        self.stats.clear();
        for entry in bytes.chunks_exact(STAT_LEN).take(MAX_STATS) {
            let Some((tag, value)) = entry.split_first_chunk::<2>() else { continue };
            let Some(value) = value.first_chunk::<8>() else { continue };
            self.stats.push((u16::from_le_bytes(*tag), u64::from_le_bytes(*value)));
        }
    }

    /// The statistics that came last.
    #[must_use]
    pub fn stats(&self) -> &[(u16, u64)] {
        &self.stats
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RAM: u64 = 1 << 30;

    fn balloon(reporting: bool, poison: bool) -> Balloon {
        let config = config::Balloon {
            life: 1,
            id: "b0".to_owned(),
            ram: RAM,
            deflate_on_oom: true,
            free_page_reporting: reporting,
            page_poison: poison,
            iothread: config::IoThread::default(),
        };
        Balloon::new(&config, Kept::default())
    }

    #[test]
    fn queues_are_numbered_without_gaps() {
        let mut device = balloon(true, false);
        assert_eq!(device.offered(), 1 << 1 | 1 << 2 | 1 << 5);
        device.acknowledge(device.offered());
        assert_eq!(device.role(2), Some(Role::Stats));
        assert_eq!((device.role(3), device.role(4)), (Some(Role::Reporting), None));
        device.acknowledge(1 << 5);
        assert_eq!((device.role(2), device.role(3)), (Some(Role::Reporting), None));
        device.acknowledge(0);
        assert_eq!(
            (device.role(0), device.role(1), device.role(2)),
            (Some(Role::Inflate), Some(Role::Deflate), None)
        );
        let mut plain = balloon(false, false);
        plain.acknowledge(u64::MAX);
        assert_eq!((plain.role(2), plain.role(3)), (Some(Role::Stats), None), "not offered, not there");
    }

    #[test]
    fn the_target_is_pages_to_give() {
        let mut device = balloon(false, false);
        for (bytes, pages) in
            [(RAM, 0), (RAM - 1, 0), (RAM - 4096, 1), (RAM / 2, 1 << 17), (u64::MAX, 0), (0, 1 << 18)]
        {
            device.set_target(bytes);
            assert_eq!(device.config()[..4], u32::to_le_bytes(pages), "{bytes}");
        }
        assert!(!device.set_target(0));
    }

    #[test]
    fn the_guest_writes_actual_and_nothing_else() {
        let mut device = balloon(false, false);
        assert_eq!(device.write_config(4, &256u32.to_le_bytes()), Written::Actual);
        assert_eq!(device.write_config(4, &256u32.to_le_bytes()), Written::Nothing);
        assert_eq!(device.actual(), RAM - (1 << 20));
        device.write_config(0, &[0xff; 16]);
        assert_eq!(device.actual(), 0, "more than there is");
        assert_eq!(device.config()[..4], [0; 4]);
        assert_eq!(device.config()[8..], [0; 8], "no page poison was offered");
        let before = device.config();
        for (offset, len) in [(13, 4), (16, 1), (usize::MAX, 1), (4, 13)] {
            assert_eq!(device.write_config(offset, &vec![0; len]), Written::Nothing);
        }
        assert_eq!(device.config(), before);
    }

    #[test]
    fn poisoned_pages_are_not_freed_behind_the_guest() {
        let mut device = balloon(true, true);
        device.acknowledge(device.offered());
        assert!(device.may_free_reported());
        device.write_config(12, &0xaaaa_aaaau32.to_le_bytes());
        assert!(!device.may_free_reported());
        device.acknowledge(1 << 5);
        assert!(device.may_free_reported(), "the next driver does not poison");
    }

    #[test]
    fn statistics_are_bounded() {
        let mut device = balloon(false, false);
        let mut buffer: Vec<u8> = (0..100u16)
            .flat_map(|tag| tag.to_le_bytes().into_iter().chain(u64::from(tag).to_le_bytes()))
            .collect();
        buffer.push(1);
        device.take_stats(&buffer);
        assert_eq!(device.stats().len(), MAX_STATS);
        assert_eq!(device.stats()[3], (3, 3));
        device.take_stats(&buffer[..25]);
        assert_eq!(device.stats(), [(0, 0), (1, 1)]);
    }
}
