//! virtio-mem (virtio 1.2, 5.15): memory plugged and unplugged as the host requests, and used in between.

use crate::chipset::Clock;
use crate::pci::Bus;
use crate::port::{read, write};
use crate::pvh::StartInfo;
use crate::virtio::{Device, NEXT, Queue, WRITE};
use crate::{boot, dma, println, trap};

/// Type of the device.
const KIND: u16 = 24;
/// Feature: what is not plugged is not touched.
const UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;
/// Offsets in the configuration space (5.15.4).
mod field {
    pub const BLOCK: u64 = 0;
    pub const ADDR: u64 = 16;
    pub const REGION: u64 = 24;
    pub const USABLE: u64 = 32;
    pub const PLUGGED: u64 = 40;
    pub const REQUESTED: u64 = 48;
}
/// Requests and responses (5.15.6).
const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const ACK: u16 = 0;
const BUSY: u16 = 2;
/// Blocks in a request.
const STEP: u64 = 16;
const PAGE: u64 = 4096;
/// Offset of the response in the buffer.
const RESPONSE: u64 = 64;

/// A device whose first blocks are plugged.
struct Memory {
    device: Device,
    queue: Queue,
    buffer: u64,
    clock: Clock,
    block: u64,
    addr: u64,
    plugged: u64,
}

impl Memory {
    fn open(info: &StartInfo) -> Option<Self> {
        let device = Device::find(&Bus::enumerate(info)?, KIND, 0)?;
        device.begin(UNPLUGGED_INACCESSIBLE)?;
        device.msix.enable(true);
        let queue = Queue::new(&device, 0);
        device.go();
        trap::enable();
        let config = |field: u64| read::<u64>(device.config + field);
        let (addr, region) = (config(field::ADDR), config(field::REGION));
        for gib in addr >> 30..=(addr + region - 1) >> 30 {
            if !boot::map(gib << 30) {
                return None;
            }
        }
        let (block, clock) = (config(field::BLOCK), Clock::new(info));
        let mut this = Self { device, queue, buffer: dma::pages(PAGE), clock, block, addr, plugged: 0 };
        println!("region of {} MiB in blocks of {} KiB", region >> 20, this.block >> 10);
        if this.get(field::PLUGGED) > 0 {
            println!("{} MiB are plugged already", this.get(field::PLUGGED) >> 20);
            assert!(this.ask(UNPLUG_ALL, 0, 0) == ACK, "the device does not unplug");
        }
        Some(this)
    }

    fn get(&self, field: u64) -> u64 {
        read(self.device.config + field)
    }

    /// The response to a request on `count` blocks from `first` on.
    fn ask_once(&mut self, kind: u16, first: u64, count: u64) -> u16 {
        write(self.buffer, u64::from(kind));
        write(self.buffer + 8, self.addr.wrapping_add(first.wrapping_mul(self.block)));
        write(self.buffer + 16, count);
        self.queue.describe(0, self.buffer, 24, NEXT, 1);
        self.queue.describe(1, self.buffer + RESPONSE, 10, WRITE, 0);
        self.queue.offer(0);
        self.queue.kick();
        self.queue.wait();
        read(self.buffer + RESPONSE)
    }

    /// The same, until the device is not busy.
    fn ask(&mut self, kind: u16, first: u64, count: u64) -> u16 {
        loop {
            let response = self.ask_once(kind, first, count);
            if response != BUSY {
                return response;
            }
            println!("busy");
            self.clock.sleep(100_000);
        }
    }

    /// Plugs the next blocks, as many as one request has, and writes to each page of them.
    fn grow(&mut self, most: u64) {
        let count = STEP.min(most - self.plugged);
        let response = self.ask(PLUG, self.plugged, count);
        assert!(response == ACK, "plugging {count} blocks gets {response}");
        for page in pages(self.block, self.plugged, count) {
            write(self.addr + page * PAGE, page);
        }
        self.plugged += count;
    }

    /// Unplugs the last blocks; returns how many of their pages had lost what was written.
    fn shrink(&mut self, least: u64) -> usize {
        let count = STEP.min(self.plugged - least);
        let first = self.plugged - count;
        let is_lost = |page: &u64| read::<u64>(self.addr + page * PAGE) != *page;
        let lost = pages(self.block, first, count).filter(is_lost).count();
        let response = self.ask(UNPLUG, first, count);
        assert!(response == ACK, "unplugging {count} blocks gets {response}");
        self.plugged = first;
        lost
    }
}

fn pages(block: u64, first: u64, count: u64) -> core::ops::Range<u64> {
    first * (block / PAGE)..(first + count) * (block / PAGE)
}

/// `test=virtio-mem`: plugs and unplugs as the host requests, for ever.
pub fn follow(info: &StartInfo) {
    let Some(mut memory) = Memory::open(info) else { return println!("no virtio-mem") };
    let (mut said, mut lost) = (u64::MAX, 0);
    loop {
        let requested = memory.get(field::REQUESTED) / memory.block;
        if memory.plugged < requested {
            memory.grow(requested);
        } else if memory.plugged > requested {
            lost += memory.shrink(requested);
        } else if said == requested {
            memory.clock.sleep(1000);
        } else {
            said = requested;
            println!("plugged {} MiB, {lost} pages lost", requested * memory.block >> 20);
        }
    }
}

/// `test=virtio-mem-hostile`: requests that no driver makes, and touches of what is not plugged.
pub fn hostile(info: &StartInfo) {
    let Some(mut memory) = Memory::open(info) else { return println!("no virtio-mem") };
    let (region, usable) = (memory.get(field::REGION), memory.get(field::USABLE));
    let blocks = [0, 1, usable / memory.block, region / memory.block, u64::MAX / memory.block, 1 << 63];
    let mut answers = [0u32; 5];
    for kind in 0..6 {
        for first in blocks {
            for count in [0, 1, 2, 0x100, 0xffff] {
                let response = memory.ask_once(kind, first, count);
                if let Some(counter) = answers.get_mut(usize::from(response.min(4))) {
                    *counter += 1;
                }
            }
        }
    }
    println!("answers: {answers:?}");
    assert!(memory.ask(UNPLUG_ALL, 0, 0) == ACK, "the device does not unplug");
    for offset in [0, memory.block, region / 2, region - 8] {
        write(memory.addr + offset, 0x5a5a_5a5a_5a5a_5a5au64);
        println!("offset {offset:x}: {:x}", read::<u64>(memory.addr + offset));
    }
    println!("plugged {} MiB at the end", memory.get(field::PLUGGED) >> 20);
}
