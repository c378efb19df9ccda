//! A driver that does everything wrong with a virtio device. After each part the device is reset and the disk must
//! work.

use crate::blk::{self, Disk, KIND};
use crate::chipset::Clock;
use crate::pci::Bus;
use crate::port::{read, read_sized, write, write_sized};
use crate::pvh::StartInfo;
use crate::virtio::{
    ACKNOWLEDGE, DRIVER, DRIVER_OK, Device, FEATURES_OK, INDIRECT, NEEDS_RESET, NEXT, Queue, SIZE, VERSION_1,
    WRITE, common,
};
use crate::{dma, println, trap};

/// The states in which every register is written, in the order in which a driver passes them, and some that none has.
const STATES: [u8; 8] = [
    0,
    ACKNOWLEDGE,
    ACKNOWLEDGE | DRIVER,
    ACKNOWLEDGE | DRIVER | FEATURES_OK,
    ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK,
    DRIVER_OK,
    NEEDS_RESET | ACKNOWLEDGE,
    0x80 | ACKNOWLEDGE | DRIVER,
];
const VALUES: [u64; 3] = [u64::MAX, 0x8000_4000_2000_1001, 1];
/// How long a device may take over a ring that makes no sense, in microseconds. An answer to it is not expected.
const MOMENT: u64 = 3_000;

/// `test=hostile-virtio`: all parts, then `machine is well` if the disk worked after each.
pub fn run(info: &StartInfo) {
    let clock = Clock::new(info);
    let found = Bus::enumerate(info).and_then(|bus| Device::find(&bus, KIND, 0));
    let Some(device) = found else { return println!("no virtio-blk") };
    trap::enable();
    let top = info.ram().map(|entry| entry.address + entry.size).max().unwrap_or(0);
    let parts: [(&str, &dyn Fn()); 8] = [
        ("registers in every state", &|| registers(&device)),
        ("rings that do not exist", &|| no_such_ring(&device)),
        ("late writes", &|| late(&device)),
        ("rings anywhere", &|| rings(&device, &clock, top)),
        ("descriptors", &|| descriptors(&device, &clock, top)),
        ("indexes", &|| indexes(&device, &clock)),
        ("doorbells", &|| windows(&device)),
        ("access by configuration space", &|| access(&device)),
    ];
    let mut well = true;
    for (number, (name, part)) in parts.into_iter().enumerate() {
        let mark = dma::mark();
        part();
        let works =
            Disk::open(device).is_some_and(|mut disk| blk::works(&mut disk, &clock, number as u64 + 70));
        device.reset();
        dma::release(mark);
        println!("after {name}: disk works {works}");
        well &= works;
    }
    println!("{}", if well { "machine is well" } else { "machine is not well" });
}

/// Every register of the common configuration with every width and some values, in each state.
fn registers(device: &Device) {
    for state in STATES {
        for offset in 0..common::LENGTH {
            device.reset();
            if state & FEATURES_OK != 0 {
                device.set(common::STATUS, ACKNOWLEDGE | DRIVER);
                device.accept(VERSION_1);
            }
            device.set(common::STATUS, state);
            for size in [1, 2, 4, 8] {
                for value in VALUES {
                    write_sized(device.common + offset, size, value);
                    read_sized(device.common + offset, size);
                }
            }
        }
    }
}

/// Selects rings beyond the last: their size is 0 (virtio 1.2, 4.1.4.3.2) and nothing written to them sticks.
fn no_such_ring(device: &Device) {
    device.begin(0);
    let count: u16 = device.get(common::QUEUES);
    for index in [count, count + 1, 0x7fff, 0x8000, 0xffff] {
        device.set(common::QUEUE_SELECT, index);
        device.set(common::QUEUE_SIZE, 8u16);
        device.set(common::QUEUE_DESC, 0x100_0000u64);
        device.set(common::QUEUE_ENABLE, 1u16);
        let (size, on) = (device.get::<u16>(common::QUEUE_SIZE), device.get::<u16>(common::QUEUE_ENABLE));
        if (size, on) != (0, 0) {
            println!("wrong: ring {index} of {count} has size {size}, enabled {on}");
        }
    }
    device.go();
}

/// Writes to a ring that the device already works with: none may stick.
fn late(device: &Device) {
    let Some(disk) = Disk::open(*device) else { return println!("the disk does not open") };
    device.set(common::QUEUE_SELECT, 0u16);
    device.set(common::QUEUE_SIZE, 2u16);
    device.set(common::QUEUE_DESC, 0x10_0000u64);
    device.set(common::QUEUE_DRIVER, u64::MAX);
    device.set(common::QUEUE_DEVICE, 0xfee0_0000u64);
    device.set(common::QUEUE_ENABLE, 0u16);
    device.set(common::DRIVER_FEATURE, u32::MAX);
    let kept = device.get::<u16>(common::QUEUE_SIZE) == SIZE
        && device.get::<u64>(common::QUEUE_DESC) == disk.queue.desc
        && device.get::<u64>(common::QUEUE_DRIVER) == disk.queue.avail
        && device.get::<u64>(common::QUEUE_DEVICE) == disk.queue.used
        && device.get::<u16>(common::QUEUE_ENABLE) == 1;
    if !kept {
        println!("wrong: a ring in use changes");
    }
}

/// Rings outside RAM, at its edges, unaligned and one over the other.
fn rings(device: &Device, clock: &Clock, top: u64) {
    let good = dma::pages(0x1000);
    let bad = [
        0,
        1,
        top,
        top - 16,
        top - 1,
        0xbfff_fff0,
        0xe000_0000,
        0xfee0_0000,
        1 << 40,
        1 << 63,
        u64::MAX,
        good + 1,
        good + 2,
    ];
    // Each of the three at each place, then all three at one.
    for (which, place) in (0..4).flat_map(|which| bad.map(|place| (which, place))).chain([(3, good)]) {
        for size in [SIZE, 3, 0, 0xffff] {
            device.begin(0);
            device.set(common::QUEUE_SELECT, 0u16);
            device.set(common::QUEUE_SIZE, size);
            for (field, register) in
                [common::QUEUE_DESC, common::QUEUE_DRIVER, common::QUEUE_DEVICE].into_iter().enumerate()
            {
                let at = if which == field || which == 3 { place } else { good + 0x1000 * field as u64 };
                device.set(register, at);
            }
            device.set(common::QUEUE_ENABLE, 1u16);
            device.go();
            write(device.notify.0, 0u16);
            if size == SIZE {
                clock.sleep(MOMENT);
            }
        }
    }
}

/// What one hostile chain is made of: number, address, length, flags, next.
type Chain<'a> = &'a [(u16, u64, u32, u16, u16)];

/// Offers one chain to a fresh device, gives it a moment.
fn offer(device: &Device, clock: &Clock, head: u16, chain: Chain) {
    let mark = dma::mark();
    if let Some(mut disk) = Disk::open(*device) {
        for &(number, address, length, flags, next) in chain {
            disk.queue.describe(number, address, length, flags, next);
        }
        disk.queue.offer(head);
        disk.queue.kick();
        clock.sleep(MOMENT);
    } else {
        println!("the disk does not open");
    }
    device.reset();
    dma::release(mark);
}

/// Chains that loop, lie, or are no requests.
fn descriptors(device: &Device, clock: &Clock, top: u64) {
    let header = dma::pages(0x1000);
    let data = dma::pages(0x4000);
    let table = dma::pages(0x1000);
    // A read of sector 0, and tables that are tables of themselves.
    for entry in 0..256 {
        write(table + 16 * entry, table);
        write(table + 16 * entry + 8, 4096u32);
        write(table + 16 * entry + 12, if entry % 2 == 0 { INDIRECT | NEXT } else { NEXT });
        write(table + 16 * entry + 14, (entry as u16 + 1) % 256);
    }
    let status = data + 0x2000;
    let chains: [Chain; 20] = [
        &[(0, header, 16, NEXT, 0)],
        &[(0, header, 16, NEXT, 1), (1, data, 512, NEXT, 0)],
        &[(0, header, 16, NEXT, SIZE)],
        &[(0, header, 16, NEXT, 0xffff)],
        &[(0, header, 16, NEXT, 1), (1, data, u32::MAX, WRITE | NEXT, 2), (2, status, 1, WRITE, 0)],
        &[(0, header, u32::MAX, NEXT, 1), (1, data, 512, WRITE | NEXT, 2), (2, status, 1, WRITE, 0)],
        &[(0, header, 16, NEXT, 1), (1, u64::MAX - 100, 512, WRITE | NEXT, 2), (2, status, 1, WRITE, 0)],
        &[(0, header, 16, NEXT, 1), (1, top - 256, 512, WRITE | NEXT, 2), (2, status, 1, WRITE, 0)],
        &[(0, header, 16, NEXT, 1), (1, 0xe000_0000, 512, WRITE | NEXT, 2), (2, status, 1, WRITE, 0)],
        &[(0, 0xfee0_0000, 16, NEXT, 1), (1, data, 512, WRITE | NEXT, 2), (2, status, 1, WRITE, 0)],
        &[(0, header, 16, NEXT, 1), (1, data, 512, WRITE | NEXT, 2), (2, top, 1, WRITE, 0)],
        &[(0, header, 16, NEXT, 1), (1, data, 512, WRITE | NEXT, 2), (2, status, 1, 0, 0)],
        &[(0, header, 16, NEXT | WRITE, 1), (1, data, 512, NEXT, 2), (2, status, 1, WRITE, 0)],
        &[(0, header, 16, NEXT, 1), (1, data, 0, WRITE | NEXT, 2), (2, status, 0, WRITE, 0)],
        &[(0, header, 3, 0, 0)],
        &[(0, status, 1, WRITE, 0)],
        &[(0, table, 4096, INDIRECT, 0)],
        &[(0, table, 17, INDIRECT, 0)],
        &[(0, table, 0, INDIRECT | NEXT, 1), (1, data, 512, WRITE, 0)],
        &[(0, top - 8, u32::MAX & !15, INDIRECT, 0)],
    ];
    for chain in chains {
        offer(device, clock, 0, chain);
    }
    for head in [SIZE, 0x7fff, 0xffff] {
        offer(device, clock, head, &[(0, header, 16, 0, 0)]);
    }
    // Sixteen GiB in one request, out of a ring full of descriptors of the longest kind.
    let mut long = [(0, data, u32::MAX, WRITE | NEXT, 0); SIZE as usize];
    for (number, descriptor) in long.iter_mut().enumerate() {
        (descriptor.0, descriptor.4) = (number as u16, (number as u16 + 1) % SIZE);
    }
    offer(device, clock, 0, &long);
    // A type that no device knows, and sectors beyond the end.
    for (kind, sector) in
        [(0xffff_ffffu32, 0u64), (0, u64::MAX), (1, u64::MAX - 1), (0, 1 << 55), (11, 0), (13, 0)]
    {
        write(header, kind);
        write(header + 8, sector);
        let chain: Chain =
            &[(0, header, 16, NEXT, 1), (1, data, 512, WRITE | NEXT, 2), (2, status, 1, WRITE, 0)];
        offer(device, clock, 0, chain);
    }
}

/// Indexes that jump, backwards or by more than the ring has, and used rings that the driver writes.
fn indexes(device: &Device, clock: &Clock) {
    for index in [0xffffu16, 0x8000, SIZE + 1, 1000, 2 * SIZE] {
        let mark = dma::mark();
        let Some(disk) = Disk::open(*device) else { return println!("the disk does not open") };
        disk.queue.publish(index);
        disk.queue.kick();
        clock.sleep(MOMENT);
        disk.queue.publish(0);
        disk.queue.kick();
        write(disk.queue.used + 2, 0x1234u16);
        disk.queue.kick();
        clock.sleep(MOMENT);
        device.reset();
        dma::release(mark);
    }
    // Rings that change while the device reads them.
    let mark = dma::mark();
    let Some(mut disk) = Disk::open(*device) else { return println!("the disk does not open") };
    let begin = clock.now();
    while clock.microseconds_since(begin) < 300_000 {
        churn(&mut disk.queue, begin);
    }
    device.reset();
    dma::release(mark);
}

fn churn(queue: &mut Queue, seed: u64) {
    let mut random = crate::port::tsc() ^ seed | 1;
    for number in 0..SIZE {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        // Within this program's own memory for rings: what the device writes must not hit the program.
        let address = (32 << 20) + (random & 0xf_f000);
        queue.describe(
            number,
            address,
            random as u32 & 0xf_ffff,
            (random >> 32) as u16 & 7,
            (random >> 48) as u16 % SIZE,
        );
    }
    queue.offer(random as u16 % SIZE);
    queue.kick();
}

/// All of the windows behind the BAR, with every width: doorbells, interrupt status, the device's own configuration.
fn windows(device: &Device) {
    let Some(disk) = Disk::open(*device) else { return println!("the disk does not open") };
    let count: u16 = device.get(common::QUEUES);
    for queue in [0, count.saturating_sub(1), count, 0xffff] {
        for size in [1, 2, 4, 8] {
            for offset in [0, 1, 2, 3, 4, device.notify.1 * u64::from(count), device.notify.1 * 63] {
                write_sized(device.notify.0 + offset, size, queue.into());
                read_sized(device.notify.0 + offset, size);
            }
        }
    }
    for size in [1, 2, 4, 8] {
        for offset in 0..80 {
            write_sized(device.isr + offset % 8, size, u64::MAX);
            read_sized(device.isr + offset % 8, size);
            if device.config != 0 {
                write_sized(device.config + offset, size, u64::MAX);
                read_sized(device.config + offset, size);
            }
        }
    }
    drop(disk);
}

/// The capability through which a driver reaches BARs from configuration space (virtio 1.2, 4.1.4.9).
fn access(device: &Device) {
    let (function, at) = (device.function, device.access);
    if at == 0 {
        return println!("wrong: no access capability");
    }
    for bar in 0..=255u8 {
        for (offset, length) in
            [(0u32, 4u32), (0, 0), (0, 3), (0, 8), (1, 4), (0xffff_fffc, 4), (u32::MAX, u32::MAX)]
        {
            function.set(at + 4, bar);
            function.set(at + 8, offset);
            function.set(at + 12, length);
            function.get::<u32>(at + 16);
            // Bar 4 or whichever has the status register must not be reset in the middle: nothing is written there.
            if bar > 5 {
                function.set(at + 16, u32::MAX);
            }
        }
    }
    // And it works: the number of rings, by both ways.
    let (bar, offset) = home(device);
    function.set(at + 4, bar);
    function.set(at + 8, offset + common::QUEUES as u32);
    function.set(at + 12, 2u32);
    let (through, direct) = (function.get::<u16>(at + 16), device.get::<u16>(common::QUEUES));
    if through != direct {
        println!("wrong: {through} rings by configuration space, {direct} by the BAR");
    }
}

/// BAR and offset of the common configuration.
fn home(device: &Device) -> (u8, u32) {
    let mut found = device.function.capabilities().filter(|capability| capability.1 == 9);
    let at = found.find(|(at, _)| device.function.get::<u8>(at + 3) == 1).map_or(0, |found| found.0);
    (read(device.function.at(at + 4)), read(device.function.at(at + 8)))
}
