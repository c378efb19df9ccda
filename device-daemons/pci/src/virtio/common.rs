//! The common configuration structure (virtio 1.2, 4.1.4.3): registers, and what a write to them asks for.

use serde::{Deserialize, Serialize};

use super::kind::{RING_RESET, VERSION_1};

/// Device status bits (2.1).
pub mod status {
    /// The guest has found the device.
    pub const ACKNOWLEDGE: u8 = 1;
    /// It has a driver.
    pub const DRIVER: u8 = 2;
    /// The driver is ready.
    pub const DRIVER_OK: u8 = 4;
    /// Features are agreed on.
    pub const FEATURES_OK: u8 = 8;
    /// The device has met an error that only a reset mends.
    pub const NEEDS_RESET: u8 = 64;
    /// The driver has given up.
    pub const FAILED: u8 = 128;
}

/// No interrupt is wanted.
pub const NO_VECTOR: u16 = 0xffff;
/// Length of the structure in bytes.
pub const LEN: u16 = 0x3c;

/// Registers: offset and width in bytes.
const DEVICE_FEATURE_SELECT: (u16, u8) = (0x00, 4);
const DEVICE_FEATURE: (u16, u8) = (0x04, 4);
const DRIVER_FEATURE_SELECT: (u16, u8) = (0x08, 4);
const DRIVER_FEATURE: (u16, u8) = (0x0c, 4);
const CONFIG_VECTOR: (u16, u8) = (0x10, 2);
const NUM_QUEUES: (u16, u8) = (0x12, 2);
const DEVICE_STATUS: (u16, u8) = (0x14, 1);
const CONFIG_GENERATION: (u16, u8) = (0x15, 1);
const QUEUE_SELECT: (u16, u8) = (0x16, 2);
const QUEUE_SIZE: (u16, u8) = (0x18, 2);
const QUEUE_VECTOR: (u16, u8) = (0x1a, 2);
const QUEUE_ENABLE: (u16, u8) = (0x1c, 2);
const QUEUE_NOTIFY_OFF: (u16, u8) = (0x1e, 2);
const QUEUE_RESET: (u16, u8) = (0x3a, 2);
/// The three addresses of a queue, each in two halves.
const QUEUE_ADDRESSES: std::ops::Range<u16> = 0x20..0x38;

/// What a device offers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    /// Feature bits.
    pub features: u64,
    /// Virtqueues.
    pub queues: u16,
}

/// What never changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shape {
    /// Virtqueues at most.
    pub queues: u16,
    /// Size of a virtqueue at most.
    pub queue_size: u16,
    /// Vectors in the MSI-X table.
    pub vectors: u16,
}

/// A virtqueue.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Queue {
    /// Its size.
    pub size: u16,
    /// Its interrupt.
    pub vector: u16,
    /// The driver has enabled it: what follows does not change any more.
    pub enabled: bool,
    /// A reset of it is under way.
    pub resetting: bool,
    /// It has been reset by itself, so that it can be set up although the driver is ready.
    fresh: bool,
    /// Descriptor area, driver area, device area.
    pub areas: [u64; 3],
    /// Index from which it goes on; none once it has run, until it has been stopped.
    pub base: Option<u16>,
}

impl Queue {
    const fn new(size: u16, fresh: bool) -> Self {
        let (enabled, resetting) = (false, false);
        Self { size, vector: NO_VECTOR, enabled, resetting, fresh, areas: [0; 3], base: Some(0) }
    }

    /// It is enabled and no reset is under way.
    #[must_use]
    pub const fn is_live(&self) -> bool {
        self.enabled && !self.resetting
    }
}

/// What a write asks for beyond the register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    /// The device is to be reset.
    Reset,
    /// The status has new bits.
    Status,
    /// This queue is to be reset.
    ResetQueue(u16),
    /// This queue has been enabled while the driver is ready.
    StartQueue(u16),
    /// This queue has another vector.
    Vector(u16),
}

/// The registers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Common {
    shape: Shape,
    device_select: u32,
    driver_select: u32,
    /// Features that the driver accepts.
    pub driver: u64,
    /// It has accepted one that no device can offer.
    alien: bool,
    /// Vector for changes of configuration.
    pub config_vector: u16,
    /// Device status; while a reset is under way the one from before.
    pub status: u8,
    /// A reset is under way: nothing can be written.
    pub resetting: bool,
    /// Counts changes of the configuration space.
    pub generation: u8,
    queue_select: u16,
    /// Virtqueues.
    pub queues: Vec<Queue>,
}

impl Common {
    /// As after power-on.
    #[must_use]
    pub fn new(shape: Shape) -> Self {
        Self {
            shape,
            device_select: 0,
            driver_select: 0,
            driver: 0,
            alien: false,
            config_vector: NO_VECTOR,
            status: 0,
            resetting: false,
            generation: 0,
            queue_select: 0,
            queues: vec![Queue::new(shape.queue_size, false); shape.queues.into()],
        }
    }

    /// A reset begins.
    pub fn begin_reset(&mut self) {
        let (status, generation) = (self.status, self.generation);
        *self = Self { status, generation, resetting: true, ..Self::new(self.shape) };
    }

    /// A reset is over.
    pub fn end_reset(&mut self) {
        *self = Self { generation: self.generation, ..Self::new(self.shape) };
    }

    /// A queue's own reset is over.
    pub fn end_queue_reset(&mut self, index: u16) {
        let size = self.shape.queue_size;
        if let Some(queue) = self.queues.get_mut(usize::from(index)).filter(|queue| queue.resetting) {
            *queue = Queue::new(size, true);
        }
    }

    /// Whether the status has all of these bits.
    #[must_use]
    pub const fn has(&self, bits: u8) -> bool {
        self.status & bits == bits
    }

    /// Whether it belongs to a device of this shape.
    #[must_use]
    pub fn fits(&self, shape: Shape) -> bool {
        self.shape == shape && self.queues.len() == usize::from(shape.queues)
    }

    /// A read; 0 where there is no register of this width.
    #[must_use]
    pub fn read(&self, offset: u16, width: u8, offer: &Offer) -> u64 {
        match (offset, width) {
            DEVICE_FEATURE_SELECT => self.device_select.into(),
            DEVICE_FEATURE => half(offer.features, self.device_select),
            DRIVER_FEATURE_SELECT => self.driver_select.into(),
            DRIVER_FEATURE => half(self.driver, self.driver_select),
            CONFIG_VECTOR => self.config_vector.into(),
            NUM_QUEUES => offer.queues.into(),
            DEVICE_STATUS => self.status.into(),
            CONFIG_GENERATION => self.generation.into(),
            QUEUE_SELECT => self.queue_select.into(),
            _ => self.read_queue(offset, width, offer),
        }
    }

    fn read_queue(&self, offset: u16, width: u8, offer: &Offer) -> u64 {
        let index = self.queue_select;
        let queue = self.queues.get(usize::from(index)).filter(|_| index < offer.queues);
        let Some(queue) = queue else {
            return if (offset, width) == QUEUE_VECTOR { NO_VECTOR.into() } else { 0 };
        };
        match (offset, width) {
            QUEUE_SIZE => queue.size.into(),
            QUEUE_VECTOR => queue.vector.into(),
            QUEUE_ENABLE => queue.enabled.into(),
            QUEUE_NOTIFY_OFF => index.into(),
            QUEUE_RESET => queue.resetting.into(),
            _ => match part(offset, width) {
                Some((area, part)) => queue.areas.get(area).map_or(0, |address| part.of(*address)),
                None => 0,
            },
        }
    }

    /// A write; ignored where there is no register of this width, or if it is too late for it.
    pub fn write(&mut self, offset: u16, width: u8, value: u64, offer: &Offer) -> Option<Act> {
        if self.resetting {
            return None;
        }
        let word = u32::try_from(value & 0xffff_ffff).unwrap_or(0);
        let short = u16::try_from(value & 0xffff).unwrap_or(0);
        match (offset, width) {
            DEVICE_FEATURE_SELECT => self.device_select = word,
            DRIVER_FEATURE_SELECT => self.driver_select = word,
            DRIVER_FEATURE => self.accept(word),
            CONFIG_VECTOR => self.config_vector = self.vector(short),
            DEVICE_STATUS => return self.write_status(u8::try_from(value & 0xff).unwrap_or(0), offer),
            QUEUE_SELECT => self.queue_select = short,
            _ => return self.write_queue((offset, width), value, offer),
        }
        None
    }

    fn accept(&mut self, word: u32) {
        if self.has(status::FEATURES_OK) {
            return;
        }
        match self.driver_select {
            0 => self.driver = Part::Low.put(self.driver, word.into()),
            1 => self.driver = Part::High.put(self.driver, word.into()),
            _ => self.alien |= word != 0,
        }
    }

    const fn vector(&self, vector: u16) -> u16 {
        if vector < self.shape.vectors { vector } else { NO_VECTOR }
    }

    /// Bits are only set; a reset clears them.
    fn write_status(&mut self, value: u8, offer: &Offer) -> Option<Act> {
        if value == 0 {
            return Some(Act::Reset);
        }
        let before = self.status;
        self.status |= value & (status::ACKNOWLEDGE | status::DRIVER | status::FAILED);
        let agreed = self.driver & !offer.features == 0 && self.driver & VERSION_1 != 0 && !self.alien;
        if value & status::FEATURES_OK != 0 && agreed {
            self.status |= status::FEATURES_OK;
        }
        if value & status::DRIVER_OK != 0 && self.has(status::FEATURES_OK) {
            self.status |= status::DRIVER_OK;
        }
        (self.status != before).then_some(Act::Status)
    }

    fn write_queue(&mut self, register: (u16, u8), value: u64, offer: &Offer) -> Option<Act> {
        let index = self.queue_select;
        let short = u16::try_from(value & 0xffff).unwrap_or(0);
        let vector = self.vector(short);
        let ready = self.has(status::DRIVER_OK);
        let can_reset = ready && self.driver & RING_RESET != 0;
        let max_size = self.shape.queue_size;
        let queue = self.queues.get_mut(usize::from(index)).filter(|_| index < offer.queues)?;
        let open = !queue.enabled && (!ready || queue.fresh);
        match register {
            QUEUE_VECTOR => {
                queue.vector = vector;
                return Some(Act::Vector(index));
            }
            QUEUE_RESET if short == 1 && can_reset && queue.is_live() => {
                queue.resetting = true;
                return Some(Act::ResetQueue(index));
            }
            QUEUE_SIZE if open && short.is_power_of_two() && short <= max_size => queue.size = short,
            QUEUE_ENABLE if open && short == 1 => {
                queue.enabled = true;
                return ready.then_some(Act::StartQueue(index));
            }
            (offset, width) if open => {
                let (area, part) = part(offset, width)?;
                let address = queue.areas.get_mut(area)?;
                *address = part.put(*address, value);
            }
            _ => {}
        }
        None
    }
}

/// Part of a field of 64 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Low,
    High,
    Whole,
}

impl Part {
    const fn of(self, field: u64) -> u64 {
        match self {
            Self::Low => field & 0xffff_ffff,
            Self::High => field >> 32,
            Self::Whole => field,
        }
    }

    const fn put(self, field: u64, value: u64) -> u64 {
        match self {
            Self::Low => field & !0xffff_ffff | value & 0xffff_ffff,
            Self::High => field & 0xffff_ffff | value << 32,
            Self::Whole => value,
        }
    }
}

/// The half of the features that is selected; there are two.
const fn half(features: u64, select: u32) -> u64 {
    match select {
        0 => Part::Low.of(features),
        1 => Part::High.of(features),
        _ => 0,
    }
}

/// Which address, and which part of it, an access is to. The specification has halves only (4.1.3.1), but QEMU takes
/// both at once, too.
fn part(offset: u16, width: u8) -> Option<(usize, Part)> {
    let at = offset.checked_sub(QUEUE_ADDRESSES.start).filter(|_| QUEUE_ADDRESSES.contains(&offset))?;
    let part = match (width, at % 8) {
        (4, 0) => Part::Low,
        (4, 4) => Part::High,
        (8, 0) => Part::Whole,
        _ => return None,
    };
    Some((usize::from(at / 8), part))
}
