//! Figures of devices. Each program says `bench begin`, works, and says `bench end all=CYCLES` with what it counted: who
//! reads that knows how long it took, and so how long a cycle is.

use crate::balloon::{KIND, NUMBERS};
use crate::pci::Bus;
use crate::port::{read, tsc, write};
use crate::pvh::StartInfo;
use crate::virtio::{Device, EVENT_IDX, NEXT, Queue, WRITE};
use crate::{blk, dma, println, trap};

/// Descriptors of a disk's ring.
const RING: u16 = 128;
/// The most requests under way: each has three descriptors.
const DEPTH: u64 = 32;
/// Header, status and data of a request, each on a page of its own.
const SLOT: u64 = 0x3000;

/// `test=bench-blk depth= n= cycles=`: random reads of 4 KiB, so many under way, until either is over.
pub fn disk(info: &StartInfo) {
    let found = Bus::enumerate(info).and_then(|bus| Device::find(&bus, blk::KIND, 0));
    let Some(device) = found else { return println!("no virtio-blk") };
    let features = device.begin(EVENT_IDX).unwrap_or(0);
    assert!(features & EVENT_IDX != 0, "the disk has no event indexes");
    device.msix.enable(true);
    let mut queue = Queue::sized(&device, 0, RING);
    let begin = tsc();
    device.go();
    trap::enable();
    let blocks = read::<u64>(device.config) / 8;
    let depth = info.number("depth", 1).clamp(1, DEPTH);
    let (limit, cycles) = (info.number("n", u64::MAX), info.number("cycles", u64::MAX));
    let memory = dma::pages(SLOT * DEPTH);
    let mut random = 12_345u64;
    let mut start = |queue: &mut Queue, slot: u64| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let (header, first) = (memory + SLOT * slot, 3 * slot as u16);
        write(header, 0u64);
        write(header + 8, (random >> 33) % blocks * 8);
        queue.describe(first, header, 16, NEXT, first + 1);
        queue.describe(first + 1, header + 0x2000, 4096, NEXT | WRITE, first + 2);
        queue.describe(first + 2, header + 0x1000, 1, WRITE, 0);
        queue.offer(first);
    };
    // The back end may still be on its way: the first read says how long that takes.
    start(&mut queue, 0);
    queue.kick_if_wanted();
    queue.wait_for_event();
    let first = tsc() - begin;
    println!("bench begin");
    let begin = tsc();
    let (mut count, mut errors) = (0u64, 0u64);
    if limit > 0 {
        (0..depth).for_each(|slot| start(&mut queue, slot));
        queue.kick_if_wanted();
    }
    while count < limit && tsc() - begin < cycles {
        let mut next = Some(queue.wait_for_event());
        while let Some((head, _)) = next {
            let slot = u64::from(head / 3);
            errors += u64::from(read::<u8>(memory + SLOT * slot + 0x1000) != 0);
            count += 1;
            start(&mut queue, slot);
            next = queue.take();
        }
        queue.kick_if_wanted();
    }
    // Of one width: a character is an exit.
    println!(
        "bench end all={:016} n={count:016} errors={errors:016} interrupts={:016} first={first:016}",
        tsc() - begin,
        queue.interrupts()
    );
}

/// `test=bench-pci rounds=`: enumerates the bus so many times, as Linux would, with all capabilities.
pub fn bus(info: &StartInfo) {
    let rounds = info.number("rounds", 1);
    println!("bench begin");
    let begin = tsc();
    let (mut functions, mut capabilities) = (0, 0);
    for _ in 0..rounds {
        let Some(bus) = Bus::enumerate_as(info, true) else { return println!("no PCI bus") };
        functions = bus.functions().len();
        capabilities = bus.functions().iter().map(|function| function.capabilities().count()).sum();
    }
    let all = tsc() - begin;
    println!("bench end all={all:016} functions={functions:04} capabilities={capabilities:04}");
}

/// `test=bench-balloon first= pages= step= touch= ahead=`: gives every `step`-th page from `first` on, all touched or none,
/// with so many buffers under way (Linux: 1); then takes all back and touches them.
/// A device without MSI-X, as QEMU's balloon is, is polled: it does all of its work before the kick is over.
pub fn balloon(info: &StartInfo) {
    let found = Bus::enumerate(info).and_then(|bus| Device::find_polled(&bus, KIND, 0));
    let Some(device) = found else { return println!("no virtio-balloon") };
    assert!(device.begin(0).is_some(), "the device refuses the features");
    let polled = device.msix.size == 0;
    if !polled {
        device.msix.enable(true);
    }
    let [mut inflate, mut deflate] = [0, 1].map(|index| Queue::new(&device, index));
    device.go();
    trap::enable();
    let (first, step) = (info.number("first", 0x4000), info.number("step", 1));
    let buffers = info.number("pages", NUMBERS) / NUMBERS;
    let ahead = info.number("ahead", 1).clamp(1, 32);
    let page = |index: u64| first + index * step;
    let numbers = dma::pages(4 * NUMBERS * buffers);
    (0..buffers * NUMBERS).for_each(|index| write(numbers + 4 * index, page(index) as u32));
    let touch = || {
        let begin = tsc();
        (0..buffers * NUMBERS).for_each(|index| write(page(index) << 12, index));
        tsc() - begin
    };
    println!("bench begin");
    let begin = tsc();
    if info.number("touch", 0) != 0 {
        touch();
    }
    let given = pass(&mut inflate, numbers, buffers, (ahead, polled));
    let taken = pass(&mut deflate, numbers, buffers, (ahead, polled));
    let touched = touch();
    let all = tsc() - begin;
    println!("bench end all={all} inflate={given} deflate={taken} touch={touched}");
}

/// Hands all buffers to the device; returns the cycles from the first kick to the last completion.
fn pass(queue: &mut Queue, numbers: u64, buffers: u64, (ahead, polled): (u64, bool)) -> u64 {
    let begin = tsc();
    let mut done = 0;
    while done < buffers {
        let batch = ahead.min(buffers - done);
        for slot in 0..batch {
            let length = 4 * NUMBERS;
            queue.describe(slot as u16, numbers + (done + slot) * length, length as u32, 0, 0);
            queue.offer(slot as u16);
        }
        queue.kick();
        for _ in 0..batch {
            if polled {
                queue.spin();
            } else {
                queue.wait();
            }
        }
        done += batch;
    }
    tsc() - begin
}
