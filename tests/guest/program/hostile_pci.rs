//! A driver that does everything wrong with configuration space, BARs and MSI-X. After each part the disk must work.

use crate::blk::{self, Disk, KIND, Kind};
use crate::chipset::Clock;
use crate::pci::{BARS, Bus, COMMAND, Function, MEMORY_AND_MASTER};
use crate::port::{read, read_sized, write, write_sized};
use crate::pvh::StartInfo;
use crate::virtio::Device;
use crate::{dma, println, trap};

/// What is written everywhere.
const VALUES: [u64; 4] = [u64::MAX, 0, 0x5a5a_a5a5_1234_fedc, 0x0000_0001_0000_0001];
/// Addresses where no BAR has any business: RAM, its end, the interrupt controllers, the configuration window, the
/// ends of the address spaces.
const PLACES: [u64; 12] = [
    0,
    0x1000,
    0x10_0000,
    0x100_0000,
    0xbfff_f000,
    0xe000_0000,
    0xefff_f000,
    0xfec0_0000,
    0xfee0_0000,
    0xffff_f000,
    0x1_0000_0000,
    0xffff_ffff_ffff_f000,
];
/// Message addresses outside the window of the local APICs.
const MESSAGES: [(u32, u32); 6] =
    [(0, 0), (0x100_0000, 0), (0xfec0_0000, 0), (0xfed0_0000, 0), (0xfee0_0000, 1), (u32::MAX, u32::MAX)];
/// What RAM must still have wherever a BAR was laid over it.
const MARK: u64 = 0x600d_600d_600d_600d;
/// Slot control of a root port, from its PCI Express capability: all ones there takes the power from its slot.
const EXPRESS: u8 = 0x10;
const SLOT_CONTROL: u16 = 0x18;

/// `test=hostile-pci`: all parts, then `machine is well` if the disk worked after each.
pub fn run(info: &StartInfo) {
    let clock = Clock::new(info);
    trap::enable();
    let parts: [(&str, fn(&Bus, &Device, &Clock)); 4] = [
        ("configuration writes", configuration),
        ("BARs elsewhere", elsewhere),
        ("BARs over each other", overlap),
        ("message addresses", messages),
    ];
    let mut well = true;
    for (number, (name, part)) in parts.into_iter().enumerate() {
        let Some((bus, device)) = set_up(info) else { return println!("no virtio-blk") };
        let ids = bus.functions().iter().map(|f| u64::from(f.get::<u32>(0))).sum::<u64>();
        part(&bus, &device, &clock);
        let mark = dma::mark();
        let Some((bus, device)) = set_up(info) else { return println!("the disk is gone after {name}") };
        let same = ids == bus.functions().iter().map(|f| u64::from(f.get::<u32>(0))).sum::<u64>();
        let works =
            Disk::open(device).is_some_and(|mut disk| blk::works(&mut disk, &clock, number as u64 + 7));
        dma::release(mark);
        println!("after {name}: same functions {same}, disk works {works}");
        well &= same && works;
    }
    println!("{}", if well { "machine is well" } else { "machine is not well" });
}

fn set_up(info: &StartInfo) -> Option<(Bus, Device)> {
    let bus = Bus::enumerate(info)?;
    let device = Device::find(&bus, KIND, 0)?;
    Some((bus, device))
}

/// Every value at every offset with every width, aligned or not, in all functions; then what is not there at all.
fn configuration(bus: &Bus, _: &Device, _: &Clock) {
    for &function in bus.functions().iter().rev() {
        let slot = function.capability(EXPRESS).map(|at| at + SLOT_CONTROL);
        // The end of the header and the capabilities, then the extended space in larger steps.
        let offsets = (0..0x110).chain((0x110..0xff8).step_by(124));
        for offset in offsets {
            // A guest may take the power from a slot, but then what is in it is gone.
            if slot.is_some_and(|slot| (slot - 8..slot + 2).contains(&offset)) {
                continue;
            }
            for size in [1, 2, 4, 8] {
                let before = read_sized(function.at(offset), size);
                for value in VALUES {
                    write_sized(function.at(offset), size, value);
                }
                write_sized(function.at(offset), size, before);
            }
        }
        write(function.at(0xffe), u32::MAX);
        // What was latched is set back, so that the next walk begins as the first one did.
        function.set(COMMAND, 0u16);
    }
    for nobody in [Function(31 << 3 | 7), Function(0xff00), Function(0xffff)] {
        for size in [1, 2, 4, 8] {
            write_sized(nobody.at(0x10), size, u64::MAX);
            if read_sized(nobody.at(0x10), size) != u64::MAX >> (64 - 8 * size) {
                println!("something answers at {nobody}");
            }
        }
    }
}

/// The BARs that a function has, as (number, size).
fn bars(function: Function) -> impl Iterator<Item = (u16, u64)> {
    let mut next = 0;
    core::iter::from_fn(move || {
        (next < function.bar_count()).then(|| {
            let (index, bar) = (next, function.bar(next));
            next += 1 + u16::from(bar.wide);
            (index, bar.size)
        })
    })
    .filter(|bar| bar.1 > 0)
}

/// Every BAR at every place where it must not be, decoding and being accessed.
fn elsewhere(bus: &Bus, device: &Device, clock: &Clock) {
    let ram = 0x100_0000;
    let page = dma::pages(0x1000);
    for &function in bus.functions() {
        for (index, size) in bars(function) {
            let home = function.bar_address(index);
            for place in PLACES.into_iter().chain([home & !0xffff_ffff | 0xd000_0000 | size]) {
                write(page, MARK);
                function.set(COMMAND, 0u16);
                function.set_bar(index, place);
                function.set(COMMAND, MEMORY_AND_MASTER);
                // RAM stays RAM.
                write(ram + 0x100, MARK);
                if read::<u64>(ram + 0x100) != MARK || read::<u64>(page) != MARK {
                    println!("RAM is not RAM with BAR {index} of {function} at {place:#x}");
                }
            }
            function.set(COMMAND, 0u16);
            function.set_bar(index, home);
            function.set(COMMAND, MEMORY_AND_MASTER);
        }
    }
    // A BAR that moves while a request is under way.
    let Some(mut disk) = Disk::open(*device) else { return println!("the disk does not open") };
    for round in 0..32 {
        disk.start(0, Kind::Read, round);
        for (index, size) in bars(device.function) {
            let home = device.function.bar_address(index);
            device.function.set_bar(index, home ^ size);
            device.function.set_bar(index, home);
        }
        if disk.queue.poll(clock, 2_000_000).is_none() {
            // Its kick went to where the doorbell was not: that is the driver's own fault.
            disk.queue.kick();
            disk.queue.poll(clock, 2_000_000);
        }
    }
    device.reset();
}

/// All BARs of all functions at one address, with accesses to it.
fn overlap(bus: &Bus, device: &Device, _: &Clock) {
    let target = device.common & !0xf_ffff;
    for &function in bus.functions() {
        for (index, _) in bars(function) {
            function.set_bar(index, target);
        }
        function.set(COMMAND, MEMORY_AND_MASTER);
    }
    for offset in (0..0x4000).step_by(164) {
        for size in [1, 2, 4, 8] {
            write_sized(target + offset, size, u64::MAX);
            read_sized(target + offset, size);
        }
    }
    for &function in bus.functions() {
        function.set(COMMAND, 0u16);
        for index in 0..function.bar_count() {
            function.set(BARS + 4 * index, 0u32);
        }
    }
}

/// Vectors whose message goes anywhere but to a local APIC: nothing may be written there and nothing raised.
fn messages(_: &Bus, device: &Device, clock: &Clock) {
    let Some(mut disk) = Disk::open(*device) else { return println!("the disk does not open") };
    let victim = 0x100_0000;
    for (round, (low, high)) in MESSAGES.into_iter().enumerate() {
        write(victim, MARK);
        device.msix.write(0, low, high, 0xdead_0000 | u32::from(trap::MSI_BASE), false);
        let before = disk.queue.interrupts();
        if !disk.one(Kind::Read, round as u64, clock, 2_000_000) {
            println!("no answer with messages to {high:#x}:{low:#x}");
        }
        if disk.queue.interrupts() != before || read::<u64>(victim) != MARK {
            println!("a message went to {high:#x}:{low:#x}");
        }
    }
    // Masked, the interrupt waits; unmasked, it comes.
    device.msix.route(0, disk.queue.vector());
    device.msix.mask(0, true);
    let before = disk.queue.interrupts();
    disk.one(Kind::Read, 0, clock, 2_000_000);
    clock.sleep(20_000);
    let (pending, early) = (device.msix.is_pending(0), disk.queue.interrupts() != before);
    device.msix.mask(0, false);
    clock.sleep(200_000);
    let late = disk.queue.interrupts() != before;
    println!("masked: pending {pending}, raised {early}; unmasked: raised {late}");
    for entry in [device.msix.size, 0x7ff, 0xfff] {
        device.msix.write(entry, u32::MAX, u32::MAX, u32::MAX, false);
    }
    device.reset();
}
