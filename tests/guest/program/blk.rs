//! virtio-blk (virtio 1.2, 5.2): data that is verified, and load that never ends.

use crate::chipset::Clock;
use crate::pci::Bus;
use crate::port::{read, write};
use crate::pvh::StartInfo;
use crate::virtio::{Device, NEXT, Queue, WRITE};
use crate::{dma, println, trap};

/// Type of the device.
pub const KIND: u16 = 2;
/// Bytes of a block, which is what a request moves.
pub const BLOCK: u64 = 4096;
/// Sectors of a block.
const SECTORS: u64 = BLOCK / 512;
/// Requests that may be under way at once; each has three descriptors.
const SLOTS: u16 = 16;
/// Feature: flushes.
const FLUSH_OFFERED: u64 = 1 << 9;
/// Blocks that a program uses: a generation of each is kept.
const BLOCKS: usize = 4096;
/// A time without any completion that is told, in microseconds.
const STALL: u64 = 20_000;
/// Time from one line of the load to the next, in microseconds.
const PACE: u64 = 500_000;

/// What a request does.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Device to memory.
    Read = 0,
    /// Memory to device.
    Write = 1,
    /// What was written is to last.
    Flush = 4,
}

/// A disk with one ring.
pub struct Disk {
    /// The device.
    pub device: Device,
    /// Its ring.
    pub queue: Queue,
    /// Size in blocks.
    pub blocks: u64,
    flushes: bool,
    memory: u64,
}

impl Disk {
    /// The `index`-th disk, ready for requests.
    pub fn open(device: Device) -> Option<Self> {
        let features = device.begin(FLUSH_OFFERED)?;
        device.msix.enable(true);
        let queue = Queue::new(&device, 0);
        device.go();
        let blocks = read::<u64>(device.config) / SECTORS;
        let memory = dma::pages(u64::from(SLOTS) * (BLOCK + 0x1000));
        Some(Self { device, queue, blocks, flushes: features & FLUSH_OFFERED != 0, memory })
    }

    /// Address of a slot's data.
    pub fn data(&self, slot: u16) -> u64 {
        self.memory + u64::from(slot) * (BLOCK + 0x1000)
    }

    /// Address of a slot's status byte.
    fn status(&self, slot: u16) -> u64 {
        self.data(slot) + BLOCK + 16
    }

    /// Starts a request in a free slot.
    pub fn start(&mut self, slot: u16, kind: Kind, block: u64) {
        let (header, first) = (self.data(slot) + BLOCK, 3 * slot);
        write(header, kind as u32);
        write(header + 4, 0u32);
        write(header + 8, if kind == Kind::Flush { 0 } else { block * SECTORS });
        write(self.status(slot), 0xffu8);
        let direction = if kind == Kind::Read { WRITE } else { 0 };
        let second = if kind == Kind::Flush { first + 2 } else { first + 1 };
        self.queue.describe(first, header, 16, NEXT, second);
        self.queue.describe(first + 1, self.data(slot), BLOCK as u32, NEXT | direction, first + 2);
        self.queue.describe(first + 2, self.status(slot), 1, WRITE, 0);
        self.queue.offer(first);
        self.queue.kick();
    }

    /// Waits for a completion: slot and status.
    pub fn finish(&mut self) -> (u16, u8) {
        let (head, _) = self.queue.wait();
        assert!(head % 3 == 0 && head < 3 * SLOTS, "the device returns a chain that it never had");
        (head / 3, read(self.status(head / 3)))
    }

    /// One request with nothing else under way. False if it fails or does not end within `limit` microseconds.
    pub fn one(&mut self, kind: Kind, block: u64, clock: &Clock, limit: u64) -> bool {
        self.start(0, kind, block);
        self.queue.poll(clock, limit).is_some_and(|(head, _)| head == 0) && read::<u8>(self.status(0)) == 0
    }

    /// Fills a slot's data with what block `block` has in generation `generation`.
    pub fn fill(&self, slot: u16, block: u64, generation: u64) {
        for word in 0..BLOCK / 8 {
            write(self.data(slot) + 8 * word, pattern(block, generation, word));
        }
    }

    /// Whether a slot's data is that.
    pub fn verify(&self, slot: u16, block: u64, generation: u64) -> bool {
        (0..BLOCK / 8).all(|word| read::<u64>(self.data(slot) + 8 * word) == pattern(block, generation, word))
    }
}

fn pattern(block: u64, generation: u64, word: u64) -> u64 {
    (block << 40 | generation << 16 | word).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ generation
}

/// The disk that `disk=` names by its number, from 0, once the bus is enumerated.
pub fn find(info: &StartInfo) -> Option<Disk> {
    let bus = Bus::enumerate(info)?;
    let device = Device::find(&bus, KIND, info.number("disk", 0) as usize)?;
    let disk = Disk::open(device)?;
    trap::enable();
    println!("disk {} of {} blocks", device.function, disk.blocks);
    Some(disk)
}

/// Writes a block, flushes, reads it back. False if any of it fails within two seconds each.
pub fn works(disk: &mut Disk, clock: &Clock, generation: u64) -> bool {
    const LIMIT: u64 = 2_000_000;
    let block = generation % disk.blocks.max(1);
    disk.fill(0, block, generation);
    let written = disk.one(Kind::Write, block, clock, LIMIT);
    let flushed = !disk.flushes || disk.one(Kind::Flush, 0, clock, LIMIT);
    disk.fill(0, 0, 0);
    written && flushed && disk.one(Kind::Read, block, clock, LIMIT) && disk.verify(0, block, generation)
}

/// `test=blk-verify rounds= blocks=`: writes so many blocks, flushes, reads all back and compares, with all slots busy.
pub fn verify(info: &StartInfo) {
    let Some(mut disk) = find(info) else { return println!("no virtio-blk") };
    let count = info.number("blocks", 256).min(disk.blocks);
    let mut errors = 0u64;
    for round in 1..=info.number("rounds", 3) {
        for kind in [Kind::Write, Kind::Flush, Kind::Read] {
            let count = if kind == Kind::Flush { u64::from(disk.flushes) } else { count };
            errors += pass(&mut disk, kind, count, round);
        }
        println!("round {round}: {errors} errors");
    }
    println!("interrupts {}", disk.queue.interrupts());
}

/// All blocks once, in steps that jump over the disk; returns the number of errors.
fn pass(disk: &mut Disk, kind: Kind, count: u64, round: u64) -> u64 {
    let mut slots = [0u64; SLOTS as usize];
    let (mut started, mut finished, mut errors) = (0, 0, 0);
    while finished < count {
        let slot = if started < count.min(SLOTS.into()) {
            started as u16
        } else {
            let (slot, status) = disk.finish();
            finished += 1;
            let block = slots[slot as usize];
            if status != 0 || (kind == Kind::Read && !disk.verify(slot, block, round)) {
                println!("error: block {block} status {status}");
                errors += 1;
            }
            slot
        };
        if started < count {
            let block = started * (disk.blocks / count);
            slots[slot as usize] = block;
            if kind == Kind::Write {
                disk.fill(slot, block, round);
            }
            disk.start(slot, kind, block);
            started += 1;
        }
    }
    errors
}

/// The load's counters.
#[derive(Default)]
struct Load {
    reads: u64,
    writes: u64,
    errors: u64,
}

/// `test=blk-load`: reads and writes of random blocks with all slots busy, for ever or until `n=` requests. Every read
/// is compared with what was last written there. Prints the counters twice a second, and `stall N us` for each time
/// without any completion that is longer than 20 ms.
pub fn load(info: &StartInfo) {
    let Some(mut disk) = find(info) else { return println!("no virtio-blk") };
    let clock = Clock::new(info);
    let count = disk.blocks.min(BLOCKS as u64);
    let limit = info.number("n", u64::MAX);
    // Too much for the stack.
    let generations = dma::pages(4 * BLOCKS as u64);
    let mut slots = [(0u64, Kind::Read); SLOTS as usize];
    let mut load = Load::default();
    let mut random = 0x1234_5678_9abc_def1u64;
    let (mut last, mut told) = (clock.now(), clock.now());
    let mut idle = SLOTS;
    loop {
        let slot = if idle > 0 {
            idle -= 1;
            idle
        } else {
            let (slot, status) = disk.finish();
            let stall = clock.microseconds_since(last);
            last = clock.now();
            if stall > STALL {
                println!("stall {stall} us");
            }
            let (block, kind) = slots[slot as usize];
            load.check(&disk, slot, (block, kind, status), read(generations + 4 * block));
            slot
        };
        if clock.microseconds_since(told) > PACE {
            told = clock.now();
            println!("load reads={} writes={} errors={}", load.reads, load.writes, load.errors);
            last = clock.now();
        }
        if load.reads + load.writes >= limit {
            return println!("load reads={} writes={} errors={}", load.reads, load.writes, load.errors);
        }
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        // Each slot has blocks of its own, so that no two requests of one block are under way at once.
        let block = (random % (count / u64::from(SLOTS))) * u64::from(SLOTS) + u64::from(slot);
        let known: u32 = read(generations + 4 * block);
        let kind = if known == 0 || random >> 40 & 1 == 0 { Kind::Write } else { Kind::Read };
        if kind == Kind::Write {
            write(generations + 4 * block, known + 1);
            disk.fill(slot, block, u64::from(known) + 1);
        }
        slots[slot as usize] = (block, kind);
        disk.start(slot, kind, block);
    }
}

impl Load {
    fn check(&mut self, disk: &Disk, slot: u16, (block, kind, status): (u64, Kind, u8), generation: u32) {
        let good = status == 0 && (kind == Kind::Write || disk.verify(slot, block, generation.into()));
        if !good {
            self.errors += 1;
            println!("error: block {block} generation {generation} status {status}");
        }
        match kind {
            Kind::Write => self.writes += 1,
            _ => self.reads += 1,
        }
    }
}
