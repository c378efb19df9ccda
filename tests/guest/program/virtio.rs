//! virtio-pci, modern interface (virtio 1.2, 4.1) with split rings (2.7) and an MSI-X vector per ring.

use core::sync::atomic::{AtomicU32, Ordering, fence};

use crate::chipset::Clock;
use crate::pci::{Bus, Function, Msix, VENDOR};
use crate::port::{read, write};
use crate::{boot, dma, println, trap};

/// Device status bits (virtio 1.2, 2.1).
pub const ACKNOWLEDGE: u8 = 1;
/// The guest has a driver.
pub const DRIVER: u8 = 2;
/// The driver works.
pub const DRIVER_OK: u8 = 4;
/// Features are agreed.
pub const FEATURES_OK: u8 = 8;
/// The device gave up until it is reset.
pub const NEEDS_RESET: u8 = 64;
/// Feature: the interface is that of virtio 1.
pub const VERSION_1: u64 = 1 << 32;
/// Feature: each side says by an index when it wants to be told.
pub const EVENT_IDX: u64 = 1 << 29;

/// Offsets in the common configuration (virtio 1.2, 4.1.4.3).
pub mod common {
    pub const DEVICE_FEATURE_SELECT: u64 = 0;
    pub const DEVICE_FEATURE: u64 = 4;
    pub const DRIVER_FEATURE_SELECT: u64 = 8;
    pub const DRIVER_FEATURE: u64 = 0xc;
    pub const CONFIG_VECTOR: u64 = 0x10;
    pub const QUEUES: u64 = 0x12;
    pub const STATUS: u64 = 0x14;
    pub const QUEUE_SELECT: u64 = 0x16;
    pub const QUEUE_SIZE: u64 = 0x18;
    pub const QUEUE_VECTOR: u64 = 0x1a;
    pub const QUEUE_ENABLE: u64 = 0x1c;
    pub const QUEUE_NOTIFY_OFF: u64 = 0x1e;
    pub const QUEUE_DESC: u64 = 0x20;
    pub const QUEUE_DRIVER: u64 = 0x28;
    pub const QUEUE_DEVICE: u64 = 0x30;
    /// Length of all that this program knows of.
    pub const LENGTH: u64 = 0x40;
}

/// Descriptor flag: there is a next one.
pub const NEXT: u16 = 1;
/// Descriptor flag: the device writes.
pub const WRITE: u16 = 2;
/// Descriptor flag: a table of descriptors.
pub const INDIRECT: u16 = 4;

/// Flag of the available ring: no interrupts.
const NO_INTERRUPT: u16 = 1;

/// A device with its windows.
#[derive(Clone, Copy)]
pub struct Device {
    /// Its place on the bus.
    pub function: Function,
    /// Address of the common configuration.
    pub common: u64,
    /// Address of the doorbells, and their distance.
    pub notify: (u64, u64),
    /// Address of the interrupt status.
    pub isr: u64,
    /// Address of the device's own configuration.
    pub config: u64,
    /// Offset of the capability that reads BARs through configuration space; 0 for none.
    pub access: u16,
    /// Its vectors.
    pub msix: Msix,
}

impl Device {
    /// The `index`-th device of this virtio type on the bus.
    pub fn find(bus: &Bus, kind: u16, index: usize) -> Option<Self> {
        Self::find_polled(bus, kind, index).filter(|device| device.msix.size > 0)
    }

    /// The same, which may be without MSI-X.
    pub fn find_polled(bus: &Bus, kind: u16, index: usize) -> Option<Self> {
        let is_it = |f: &&Function| f.get::<u16>(0) == 0x1af4 && f.get::<u16>(2) == 0x1040 + kind;
        let &function = bus.functions().iter().filter(is_it).nth(index)?;
        let mut device = Self {
            function,
            common: 0,
            notify: (0, 0),
            isr: 0,
            config: 0,
            access: 0,
            msix: Msix::of(function).unwrap_or(Msix::none(function)),
        };
        for (at, _) in function.capabilities().filter(|capability| capability.1 == VENDOR) {
            let kind: u8 = function.get(at + 3);
            if kind == 5 {
                device.access = at;
                continue;
            }
            let bar = u16::from(function.get::<u8>(at + 4));
            let address = function.bar_address(bar.min(5)) + u64::from(function.get::<u32>(at + 8));
            if !boot::map(address) {
                return None;
            }
            match kind {
                1 => device.common = address,
                2 => device.notify = (address, function.get::<u32>(at + 16).into()),
                3 => device.isr = address,
                4 => device.config = address,
                _ => {}
            }
        }
        (device.common != 0 && device.notify.0 != 0 && device.isr != 0).then_some(device)
    }

    /// Reads a field of the common configuration.
    pub fn get<T: Copy>(&self, field: u64) -> T {
        read(self.common + field)
    }

    /// Writes a field of the common configuration.
    pub fn set<T: Copy>(&self, field: u64, value: T) {
        write(self.common + field, value);
    }

    /// The device status.
    pub fn status(&self) -> u8 {
        self.get(common::STATUS)
    }

    /// Resets the device and waits until it says that it is.
    pub fn reset(&self) {
        self.set(common::STATUS, 0u8);
        let mut rounds = 0;
        while self.status() != 0 {
            rounds += 1;
            // Its disk may have much to finish: how long that takes is the host's.
            assert!(rounds < 20_000_000, "the device does not leave its reset");
        }
    }

    /// What it offers.
    pub fn features(&self) -> u64 {
        let half = |index: u32| {
            self.set(common::DEVICE_FEATURE_SELECT, index);
            u64::from(self.get::<u32>(common::DEVICE_FEATURE))
        };
        half(0) | half(1) << 32
    }

    /// Takes these of the features. False if the device does not agree.
    pub fn accept(&self, features: u64) -> bool {
        for index in [0u32, 1] {
            self.set(common::DRIVER_FEATURE_SELECT, index);
            self.set(common::DRIVER_FEATURE, (features >> (32 * index)) as u32);
        }
        self.set(common::STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        self.status() & FEATURES_OK != 0
    }

    /// Reset, then up to features of which `wanted` are taken where offered. Returns what was taken.
    pub fn begin(&self, wanted: u64) -> Option<u64> {
        self.reset();
        self.set(common::STATUS, ACKNOWLEDGE);
        self.set(common::STATUS, ACKNOWLEDGE | DRIVER);
        let features = self.features() & (wanted | VERSION_1);
        self.accept(features).then_some(features)
    }

    /// Says that the driver works.
    pub fn go(&self) {
        self.set(common::STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    }
}

/// The most descriptors of a ring.
pub const SIZE: u16 = 64;

/// A split ring.
pub struct Queue {
    /// Its number.
    pub index: u16,
    /// Address of the descriptors.
    pub desc: u64,
    /// Address of the available ring.
    pub avail: u64,
    /// Address of the used ring.
    pub used: u64,
    bell: u64,
    next: u16,
    told: u16,
    seen: u16,
    size: u16,
    vector: u8,
    counter: &'static AtomicU32,
}

impl Queue {
    /// Makes ring `index` and tells the device; its vector is `index`, too.
    pub fn new(device: &Device, index: u16) -> Self {
        Self::sized(device, index, SIZE)
    }

    /// The same of at most `most` descriptors, which are 256 or less.
    pub fn sized(device: &Device, index: u16, most: u16) -> Self {
        let (desc, avail, used) = (dma::pages(16 * u64::from(most)), dma::pages(0x1000), dma::pages(0x1000));
        device.set(common::QUEUE_SELECT, index);
        let size = device.get::<u16>(common::QUEUE_SIZE).min(most);
        assert!(size > 0, "the device has no such ring");
        device.set(common::QUEUE_SIZE, size);
        let vector = (index % u16::from(trap::MSI_COUNT)) as u8;
        if device.msix.size > 0 {
            device.msix.route(index, vector);
            device.set(common::QUEUE_VECTOR, index);
            assert!(
                device.get::<u16>(common::QUEUE_VECTOR) == index,
                "the device has no vector for its ring"
            );
        }
        device.set(common::QUEUE_DESC, desc);
        device.set(common::QUEUE_DRIVER, avail);
        device.set(common::QUEUE_DEVICE, used);
        device.set(common::QUEUE_ENABLE, 1u16);
        let off = u64::from(device.get::<u16>(common::QUEUE_NOTIFY_OFF));
        let bell = device.notify.0 + off * device.notify.1;
        let counter = trap::msi_counter(vector);
        Self { index, desc, avail, used, bell, next: 0, told: 0, seen: 0, size, vector, counter }
    }

    /// Writes a descriptor.
    pub fn describe(&self, number: u16, address: u64, length: u32, flags: u16, next: u16) {
        let at = self.desc + 16 * u64::from(number);
        write(at, address);
        write(at + 8, length);
        write(at + 12, flags);
        write(at + 14, next);
    }

    /// Makes the chain that begins at `head` available; [`Queue::kick`] tells the device.
    pub fn offer(&mut self, head: u16) {
        write(self.avail + 4 + 2 * u64::from(self.next % self.size), head);
        self.next = self.next.wrapping_add(1);
        self.publish(self.next);
    }

    /// Writes the index of the available ring.
    pub fn publish(&self, index: u16) {
        fence(Ordering::SeqCst);
        write(self.avail + 2, index);
        fence(Ordering::SeqCst);
    }

    /// Rings the doorbell.
    pub fn kick(&self) {
        write(self.bell, self.index);
    }

    /// With [`EVENT_IDX`]: rings the doorbell if the device wants to hear of what was offered since the last time.
    pub fn kick_if_wanted(&mut self) {
        let (old, new) = (core::mem::replace(&mut self.told, self.next), self.next);
        let event: u16 = read(self.used + 4 + 8 * u64::from(self.size));
        if new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old) {
            self.kick();
        }
    }

    /// With [`EVENT_IDX`]: as [`Queue::wait`]; an interrupt comes only when there is nothing to take.
    pub fn wait_for_event(&mut self) -> (u16, u32) {
        loop {
            let interrupts = self.counter.load(Ordering::SeqCst);
            if let Some(found) = self.take() {
                return found;
            }
            write(self.avail + 4 + 2 * u64::from(self.size), self.seen);
            if let Some(found) = self.take() {
                return found;
            }
            trap::wait(self.counter, interrupts);
        }
    }

    /// The device's own index.
    pub fn used_index(&self) -> u16 {
        read(self.used + 2)
    }

    /// The next used chain: its head and the bytes written.
    pub fn take(&mut self) -> Option<(u16, u32)> {
        fence(Ordering::SeqCst);
        if self.used_index() == self.seen {
            return None;
        }
        let at = self.used + 4 + 8 * u64::from(self.seen % self.size);
        self.seen = self.seen.wrapping_add(1);
        Some((read::<u32>(at) as u16, read(at + 4)))
    }

    /// As [`Queue::take`], but halts the CPU until the ring's interrupt says that there is one.
    pub fn wait(&mut self) -> (u16, u32) {
        loop {
            let interrupts = self.counter.load(Ordering::SeqCst);
            if let Some(found) = self.take() {
                return found;
            }
            trap::wait(self.counter, interrupts);
        }
    }

    /// As [`Queue::take`], but never halts the CPU: the device is told to raise no interrupt.
    pub fn spin(&mut self) -> (u16, u32) {
        write(self.avail, NO_INTERRUPT);
        loop {
            if let Some(found) = self.take() {
                return found;
            }
            core::hint::spin_loop();
        }
    }

    /// As [`Queue::take`], for at most so many microseconds.
    pub fn poll(&mut self, clock: &Clock, limit: u64) -> Option<(u16, u32)> {
        let begin = clock.now();
        loop {
            if let Some(found) = self.take() {
                return Some(found);
            }
            if clock.microseconds_since(begin) > limit {
                return None;
            }
            core::hint::spin_loop();
        }
    }

    /// How many interrupts the ring has raised.
    pub fn interrupts(&self) -> u32 {
        self.counter.load(Ordering::SeqCst)
    }

    /// The number of its message interrupt.
    pub fn vector(&self) -> u8 {
        self.vector
    }
}

/// `test=rng n=`: so many reads of 64 bytes from the entropy device, with what came.
pub fn rng(info: &crate::pvh::StartInfo) {
    let bus = Bus::enumerate(info);
    let Some(device) = bus.and_then(|bus| Device::find(&bus, 4, 0)) else { return println!("no virtio-rng") };
    assert!(device.begin(0).is_some(), "the device refuses the features");
    device.msix.enable(true);
    let mut queue = Queue::new(&device, 0);
    device.go();
    trap::enable();
    let buffer = dma::pages(0x1000);
    for round in 0..info.number("n", 4) {
        queue.describe(0, buffer, 64, WRITE, 0);
        queue.offer(0);
        queue.kick();
        let (_, length) = queue.wait();
        println!("random {round}: {length} bytes {:016x}", read::<u64>(buffer));
    }
}
