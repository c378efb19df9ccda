//! The shared memory region of a virtio device (virtio 1.2, 2.10): memory of the back end, which it maps and unmaps when it
//! is asked to in the device's queue.

use crate::pci::{Bus, VENDOR};
use crate::port::{read, write};
use crate::virtio::{Device, NEEDS_RESET, Queue, WRITE};
use crate::{boot, dma, println, trap};

/// Kind of the capability (virtio 1.2, 4.1.4).
const SHARED_MEMORY: u8 = 8;
/// What the back end is asked: the length of the buffer.
const MAP: u32 = 1;
const UNMAP: u32 = 2;
/// Reads while memory is mapped.
const READS: u32 = 100_000;

/// Id, address and length of the region.
fn region(device: &Device) -> Option<(u8, u64, u64)> {
    let function = device.function;
    let is_it = |at: &u16| function.get::<u8>(at + 3) == SHARED_MEMORY;
    let (at, _) = function.capabilities().filter(|found| found.1 == VENDOR).find(|found| is_it(&found.0))?;
    let wide = |low: u16, high: u16| {
        u64::from(function.get::<u32>(at + low)) | u64::from(function.get::<u32>(at + high)) << 32
    };
    let address = function.bar_address(u16::from(function.get::<u8>(at + 4))) + wide(8, 16);
    Some((function.get(at + 5), address, wide(12, 20))).filter(|_| boot::map(address))
}

fn begin(device: &Device) -> Queue {
    assert!(device.begin(0).is_some(), "the device refuses the features");
    device.msix.enable(true);
    let queue = Queue::new(device, 0);
    device.go();
    trap::enable();
    queue
}

/// Asks the back end; what it says in its answer's first byte.
fn ask(queue: &mut Queue, buffer: u64, what: u32) -> u8 {
    write(buffer, 0xffu8);
    queue.describe(0, buffer, what, WRITE, 0);
    queue.offer(0);
    queue.kick();
    queue.wait();
    read(buffer)
}

/// `test=shmem`: the back end is an entropy device with a region. It maps a page when it is asked for one byte, and unmaps it
/// when it is asked for two. At the end the page goes with the bus's process, and the device needs a reset.
pub fn run(info: &crate::pvh::StartInfo) {
    let device = Bus::enumerate(info).and_then(|bus| Device::find(&bus, 4, 0));
    let Some(device) = device else { return println!("no virtio-rng") };
    let Some((id, address, length)) = region(&device) else { return println!("no region") };
    println!("region {id}: {length:#x} bytes, absent {:#x}", read::<u64>(address));
    let buffer = dma::pages(0x1000);
    let mut queue = begin(&device);
    assert!(ask(&mut queue, buffer, MAP) == 0, "it does not map");
    println!("mapped {:#x}, beside it {:#x}", read::<u64>(address), read::<u64>(address + 0x1000));
    for count in 0..READS {
        write(address + 8, count);
        assert!(read::<u32>(address + 8) == count, "another value");
    }
    assert!(ask(&mut queue, buffer, MAP) == 1, "it maps over what it has mapped");
    assert!(ask(&mut queue, buffer, UNMAP) == 0, "it does not unmap");
    println!("unmapped {:#x}", read::<u64>(address));
    assert!(ask(&mut queue, buffer, UNMAP) == 1, "it unmaps what is not there");
    assert!(ask(&mut queue, buffer, MAP) == 0, "it does not map again");
    println!("again {} of {READS}", read::<u32>(address + 8) + 1);
    while read::<u64>(address) != u64::MAX {
        core::hint::spin_loop();
    }
    println!("gone, needs a reset: {}", device.status() & NEEDS_RESET != 0);
    let mut queue = begin(&device);
    assert!(ask(&mut queue, buffer, MAP) == 0, "it does not map any more");
    println!("back {}", read::<u32>(address + 8) + 1);
    println!("done: shmem");
}
