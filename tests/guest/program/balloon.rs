//! virtio-balloon (virtio 1.2, 5.5): pages given, taken back, and used although they were given.

use crate::chipset::Clock;
use crate::pci::Bus;
use crate::port::{read, write};
use crate::pvh::StartInfo;
use crate::virtio::{Device, Queue};
use crate::{boot, dma, println, trap};

/// Type of the device.
pub const KIND: u16 = 5;
/// Page numbers in a buffer, as Linux's driver has them.
pub const NUMBERS: u64 = 256;
const PAGE: u64 = 4096;
/// Where the pages begin that are given: behind everything that this program uses.
const FLOOR: u64 = 64 << 20;
/// Offset of `actual` in the configuration space.
const ACTUAL: u64 = 4;

/// A balloon with the queues that every one has.
struct Balloon {
    device: Device,
    inflate: Queue,
    deflate: Queue,
    numbers: u64,
    /// Pages that it holds.
    held: u32,
}

/// Which of the two queues.
#[derive(Clone, Copy)]
enum Way {
    In,
    Out,
}

impl Balloon {
    fn open(info: &StartInfo) -> Option<Self> {
        let device = Device::find(&Bus::enumerate(info)?, KIND, 0)?;
        device.begin(0)?;
        device.msix.enable(true);
        let (inflate, deflate) = (Queue::new(&device, 0), Queue::new(&device, 1));
        device.go();
        trap::enable();
        Some(Self { device, inflate, deflate, numbers: dma::pages(NUMBERS * 4), held: 0 })
    }

    /// Moves `count` pages from `first` on, `step` apart, into or out of the balloon, and says so.
    fn move_pages(&mut self, way: Way, first: u64, count: u64, step: u64) {
        let mut done = 0;
        while done < count {
            let part = NUMBERS.min(count - done);
            for index in 0..part {
                write(self.numbers + 4 * index, (first + (done + index) * step) as u32);
            }
            let queue = match way {
                Way::In => &mut self.inflate,
                Way::Out => &mut self.deflate,
            };
            queue.describe(0, self.numbers, (part * 4) as u32, 0, 0);
            queue.offer(0);
            queue.kick();
            queue.wait();
            done += part;
        }
        self.held = match way {
            Way::In => self.held + count as u32,
            Way::Out => self.held - count as u32,
        };
        write(self.device.config + ACTUAL, self.held);
    }
}

/// Pages above the floor, up to the end of the first piece of RAM that reaches beyond it.
fn pages(info: &StartInfo) -> Option<(u64, u64)> {
    let entry = info.ram().find(|entry| entry.address <= FLOOR && entry.address + entry.size > FLOOR)?;
    let end = entry.address + entry.size;
    let mapped = (FLOOR >> 30..=(end - 1) >> 30).all(|gib| boot::map(gib << 30));
    mapped.then_some((FLOOR / PAGE, (end - FLOOR) / PAGE))
}

/// Writes a word into each page.
fn touch(first: u64, count: u64) {
    (first..first + count).for_each(|page| write(page * PAGE, page));
}

/// Pages that do not hold the word that `touch` wrote.
fn lost(first: u64, count: u64) -> usize {
    (first..first + count).filter(|page| read::<u64>(page * PAGE) != *page).count()
}

/// `test=balloon`: touches memory, gives it, takes half of it back, as often as `rounds=` says, or for ever.
pub fn give(info: &StartInfo) {
    let (Some(mut balloon), Some((first, count))) = (Balloon::open(info), pages(info)) else {
        return println!("no balloon, or no memory to give");
    };
    let half = count / 2;
    touch(first, count);
    println!("touched {count} pages");
    for round in 0..info.number("rounds", u64::MAX) {
        balloon.move_pages(Way::In, first, half, 1);
        println!("round {round}: gave {half} pages");
        let kept = lost(first + half, count - half);
        balloon.move_pages(Way::Out, first, half, 1);
        touch(first, half);
        println!(
            "round {round}: took back {half} pages, {kept} of the others lost, {} lost",
            lost(first, half)
        );
    }
}

/// `test=balloon-hold`: touches memory, gives half of it, and keeps still.
pub fn hold(info: &StartInfo) {
    let (Some(mut balloon), Some((first, count))) = (Balloon::open(info), pages(info)) else {
        return println!("no balloon, or no memory to give");
    };
    touch(first, count);
    println!("touched {count} pages");
    let clock = Clock::new(info);
    let begin = clock.now();
    balloon.move_pages(Way::In, first, count / 2, 1);
    println!("gave {} pages in {} us", count / 2, clock.microseconds_since(begin));
}

/// `test=balloon-cheat`: gives memory, and then uses it as if it had not, for ever.
pub fn cheat(info: &StartInfo) {
    let (Some(mut balloon), Some((first, count))) = (Balloon::open(info), pages(info)) else {
        return println!("no balloon, or no memory to give");
    };
    balloon.move_pages(Way::In, first, count, 1);
    println!("gave {count} pages");
    loop {
        touch(first, count);
        println!("used {count} pages that were given");
    }
}
