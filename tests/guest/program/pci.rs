//! PCI Express: configuration space, enumeration, BARs, bridges, capabilities and MSI-X.
//!
//! Everything is found as an operating system finds it: MCFG, the windows of the host bridge, then the buses. The
//! firmware set nothing up.

use core::sync::atomic::{AtomicU64, Ordering};

use crate::acpi::Tables;
use crate::port::{read, write};
use crate::pvh::StartInfo;
use crate::{apic, boot, println, trap};

/// Command register: memory decoding and bus mastering.
pub const MEMORY_AND_MASTER: u16 = 6;
/// Offset of the command register.
pub const COMMAND: u16 = 4;
/// Offset of BAR 0.
pub const BARS: u16 = 0x10;
/// Capability id of MSI-X.
pub const MSIX: u8 = 0x11;
/// Vendor-specific capability id.
pub const VENDOR: u8 = 9;
const CAP_POINTER: u16 = 0x34;
const STATUS: u16 = 6;
const HAS_CAPS: u16 = 0x10;
const HEADER_TYPE: u16 = 0x0e;
const MULTIFUNCTION: u8 = 0x80;
const BUSES: u16 = 0x18;
const MEMORY_WINDOW: u16 = 0x20;
const PREFETCH_WINDOW: u16 = 0x24;
const PREFETCH_HIGH: u16 = 0x28;
/// The granule of a bridge's windows.
const WINDOW: u64 = 1 << 20;
const NO_WINDOW: u32 = 0x0000_fff0;
const MSIX_ENABLE: u16 = 1 << 15;
const MSI_ADDRESS: u32 = 0xfee0_0000;
/// The most functions that this program keeps.
pub const MOST: usize = 256;

static ECAM: AtomicU64 = AtomicU64::new(0);

/// A function's place: bus << 8 | device << 3 | function.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Function(pub u16);

impl core::fmt::Display for Function {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{:02x}:{:02x}.{}", self.0 >> 8, self.0 >> 3 & 31, self.0 & 7)
    }
}

/// A BAR as sizing shows it.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Bar {
    /// Bytes; 0 for a BAR that is not there, or the upper half of one.
    pub size: u64,
    /// It has two registers.
    pub wide: bool,
    /// It is prefetchable.
    pub prefetch: bool,
}

impl Function {
    /// Address of a register in the configuration window.
    pub fn at(self, offset: u16) -> u64 {
        ECAM.load(Ordering::Relaxed) + (u64::from(self.0) << 12) + u64::from(offset)
    }

    /// Reads a register.
    pub fn get<T: Copy>(self, offset: u16) -> T {
        read(self.at(offset))
    }

    /// Writes a register.
    pub fn set<T: Copy>(self, offset: u16, value: T) {
        write(self.at(offset), value);
    }

    /// Whether a function answers here.
    pub fn exists(self) -> bool {
        self.get::<u16>(0) != 0xffff
    }

    /// Header type 1.
    pub fn is_bridge(self) -> bool {
        self.get::<u8>(HEADER_TYPE) & 0x7f == 1
    }

    /// How many BARs its header has.
    pub fn bar_count(self) -> u16 {
        if self.is_bridge() { 2 } else { 6 }
    }

    /// The capabilities as `(offset, id)`; a list that loops ends after 48.
    pub fn capabilities(self) -> impl Iterator<Item = (u16, u8)> {
        let first = if self.get::<u16>(STATUS) & HAS_CAPS == 0 { 0 } else { self.get::<u8>(CAP_POINTER) };
        let mut next = u16::from(first & 0xfc);
        core::iter::from_fn(move || {
            (next != 0).then(|| {
                let found = (next, self.get::<u8>(next));
                next = u16::from(self.get::<u8>(next + 1) & 0xfc);
                found
            })
        })
        .take(48)
    }

    /// The first capability of this kind.
    pub fn capability(self, id: u8) -> Option<u16> {
        self.capabilities().find(|found| found.1 == id).map(|found| found.0)
    }

    /// Sizes BAR `index`: all ones are written and what sticks is read; decoding is off meanwhile.
    pub fn bar(self, index: u16) -> Bar {
        let at = BARS + 4 * index;
        let command: u16 = self.get(COMMAND);
        self.set(COMMAND, command & !3);
        let before: u32 = self.get(at);
        self.set(at, u32::MAX);
        let low: u32 = self.get(at);
        self.set(at, before);
        let wide = low & 7 == 4;
        let mut mask = u64::from(low & !15) | 0xffff_ffff << 32;
        if wide {
            let before: u32 = self.get(at + 4);
            self.set(at + 4, u32::MAX);
            mask = u64::from(low & !15) | u64::from(self.get::<u32>(at + 4)) << 32;
            self.set(at + 4, before);
        }
        self.set(COMMAND, command);
        let size = if low & !15 == 0 && !wide { 0 } else { mask.wrapping_neg() };
        Bar { size, wide, prefetch: low & 8 != 0 }
    }

    /// The address in BAR `index`.
    pub fn bar_address(self, index: u16) -> u64 {
        let low: u32 = self.get(BARS + 4 * index);
        let high = if low & 6 == 4 { self.get::<u32>(BARS + 4 * index + 4) } else { 0 };
        u64::from(low & !15) | u64::from(high) << 32
    }

    /// Puts an address into BAR `index`.
    pub fn set_bar(self, index: u16, address: u64) {
        self.set(BARS + 4 * index, address as u32);
        if self.get::<u32>(BARS + 4 * index) & 6 == 4 {
            self.set(BARS + 4 * index + 4, (address >> 32) as u32);
        }
    }
}

/// What is left of the host bridge's windows.
struct Room {
    next: [u64; 2],
    end: [u64; 2],
}

impl Room {
    fn take(&mut self, high: usize, size: u64) -> Option<u64> {
        let address = self.next[high].next_multiple_of(size.max(0x1000));
        (address + size <= self.end[high]).then(|| {
            self.next[high] = address + size;
            address
        })
    }

    fn align(&mut self) {
        self.next = self.next.map(|next| next.next_multiple_of(WINDOW));
    }
}

/// All functions, in the order of the walk.
pub struct Bus {
    functions: [Function; MOST],
    count: usize,
    room: Room,
    next_bus: u8,
    /// Below a port only device 0 is looked for.
    links: bool,
}

impl Bus {
    /// Enumerates everything and gives every BAR an address and every bridge its buses and windows.
    pub fn enumerate(info: &StartInfo) -> Option<Self> {
        Self::enumerate_as(info, false)
    }

    /// The same; with `links` below a port only device 0 is looked for, as Linux does.
    pub fn enumerate_as(info: &StartInfo, links: bool) -> Option<Self> {
        let tables = Tables::find(info.rsdp)?;
        let (ecam, _) = tables.ecam().or_else(|| tables.fixed()?.ecam())?;
        ECAM.store(ecam, Ordering::Relaxed);
        let [low, high] = tables.fixed()?.pci_windows()?;
        // QEMU's may be out of this program's reach.
        let high = if high.1 <= boot::REACH { high } else { (0, 0) };
        let room = Room { next: [low.0, high.0], end: [low.1, high.1] };
        let mut bus = Self { functions: [Function(0); MOST], count: 0, room, next_bus: 1, links };
        bus.walk(0);
        Some(bus)
    }

    /// The functions.
    pub fn functions(&self) -> &[Function] {
        &self.functions[..self.count]
    }

    fn walk(&mut self, number: u8) {
        let devices = if self.links && number > 0 { 1 } else { 32 };
        for device in 0..devices {
            let first = Function(u16::from(number) << 8 | device << 3);
            if !first.exists() {
                continue;
            }
            let count = if first.get::<u8>(HEADER_TYPE) & MULTIFUNCTION == 0 { 1 } else { 8 };
            for function in (0..count).map(|function| Function(first.0 | function)).filter(|f| f.exists()) {
                if self.count < MOST {
                    self.functions[self.count] = function;
                    self.count += 1;
                }
                self.place(function);
                if function.is_bridge() {
                    self.bridge(function, number);
                }
            }
        }
    }

    /// Gives a function's BARs addresses and switches its decoding on.
    fn place(&mut self, function: Function) {
        let mut index = 0;
        while index < function.bar_count() {
            let bar = function.bar(index);
            if bar.size > 0 {
                let high = usize::from(bar.wide && bar.prefetch && self.room.end[1] > 0);
                match self.room.take(high, bar.size) {
                    Some(address) => function.set_bar(index, address),
                    None => println!("no room for BAR {index} of {function}"),
                }
            }
            index += 1 + u16::from(bar.wide);
        }
        function.set(COMMAND, MEMORY_AND_MASTER);
    }

    fn bridge(&mut self, function: Function, primary: u8) {
        let secondary = self.next_bus;
        self.next_bus = self.next_bus.saturating_add(1);
        let buses = |last: u8| u32::from(primary) | u32::from(secondary) << 8 | u32::from(last) << 16;
        function.set(BUSES, buses(0xff));
        self.room.align();
        let start = self.room.next;
        self.walk(secondary);
        self.room.align();
        let end = self.room.next;
        function.set(BUSES, buses(self.next_bus - 1));
        let window = |high: usize| match end[high] - start[high] {
            0 => NO_WINDOW,
            _ => (start[high] >> 16 & 0xfff0) as u32 | ((end[high] - 1) & 0xfff0_0000) as u32,
        };
        function.set(MEMORY_WINDOW, window(0));
        function.set(PREFETCH_WINDOW, window(1));
        function.set(PREFETCH_HIGH, (start[1] >> 32) as u32);
        function.set(PREFETCH_HIGH + 4, ((end[1].max(1) - 1) >> 32) as u32);
    }
}

/// The MSI-X table of a function.
#[derive(Clone, Copy)]
pub struct Msix {
    function: Function,
    capability: u16,
    table: u64,
    pending: u64,
    /// Number of vectors.
    pub size: u16,
}

impl Msix {
    /// Finds the table; the BARs must have their addresses.
    pub fn of(function: Function) -> Option<Self> {
        let capability = function.capability(MSIX)?;
        let size = (function.get::<u16>(capability + 2) & 0x7ff) + 1;
        let place = |offset: u16| {
            let register: u32 = function.get(capability + offset);
            let address = function.bar_address((register & 7) as u16) + u64::from(register & !7);
            boot::map(address).then_some(address)
        };
        Some(Self { function, capability, table: place(4)?, pending: place(8)?, size })
    }

    /// That of a function without MSI-X.
    pub fn none(function: Function) -> Self {
        Self { function, capability: 0, table: 0, pending: 0, size: 0 }
    }

    /// Switches MSI-X on or off.
    pub fn enable(&self, on: bool) {
        let control: u16 = self.function.get(self.capability + 2);
        let control = if on { control | MSIX_ENABLE } else { control & !MSIX_ENABLE };
        self.function.set(self.capability + 2, control);
    }

    /// Vector `entry` raises the `number`-th message interrupt of this program on this CPU.
    pub fn route(&self, entry: u16, number: u8) {
        self.write(entry, MSI_ADDRESS | apic::id() << 12, 0, u32::from(trap::MSI_BASE + number), false);
    }

    /// Writes a table entry as it is.
    pub fn write(&self, entry: u16, low: u32, high: u32, data: u32, masked: bool) {
        let at = self.table + 16 * u64::from(entry);
        write(at + 12, 1u32);
        write(at, low);
        write(at + 4, high);
        write(at + 8, data);
        write(at + 12, u32::from(masked));
    }

    /// Masks or unmasks one vector.
    pub fn mask(&self, entry: u16, masked: bool) {
        write(self.table + 16 * u64::from(entry) + 12, u32::from(masked));
    }

    /// Whether an interrupt waits at this vector.
    pub fn is_pending(&self, entry: u16) -> bool {
        read::<u64>(self.pending + u64::from(entry / 64) * 8) >> (entry % 64) & 1 == 1
    }
}

fn describe(function: Function) {
    let [vendor, device, class]: [u16; 3] = [0, 2, 0x0a].map(|offset| function.get(offset));
    println!("pci {function} {vendor:04x}:{device:04x} class {class:04x}");
    let mut index = 0;
    while index < function.bar_count() {
        let bar = function.bar(index);
        if bar.size > 0 {
            let kind = if bar.prefetch { "prefetchable" } else { "plain" };
            println!("  bar {index}: {:#x} size {:#x} {kind}", function.bar_address(index), bar.size);
        }
        index += 1 + u16::from(bar.wide);
    }
    if function.is_bridge() {
        let buses: u32 = function.get(BUSES);
        println!("  buses {:02x} {:02x}-{:02x}", buses & 0xff, buses >> 8 & 0xff, buses >> 16 & 0xff);
    }
    for (offset, id) in function.capabilities() {
        println!("  capability {id:#04x} at {offset:#04x}");
    }
}

/// What no function may get wrong; says so in a line that begins with `wrong:`.
fn verify(function: Function) {
    let wrong = |what: &str| println!("wrong: {function} {what}");
    for (offset, _) in function.capabilities() {
        if offset < 0x40 {
            wrong("has a capability inside its header");
        }
    }
    if function.capabilities().count() == 48 {
        wrong("has capabilities without end");
    }
    let mut index = 0;
    while index < function.bar_count() {
        let bar = function.bar(index);
        if bar.size > 0 && !(bar.size.is_power_of_two() && function.bar_address(index) % bar.size == 0) {
            wrong("has a BAR of a size that is no power of two, or not on a multiple of it");
        }
        index += 1 + u16::from(bar.wide);
    }
    let before: u32 = function.get(0);
    function.set(0, !before);
    if function.get::<u32>(0) != before {
        wrong("has ids that can be written");
    }
    // Of a width and at an offset that do not fit each other the window still reads what is there.
    let bytes = [0, 1, 2, 3].map(|offset: u16| function.get::<u8>(offset));
    if u32::from_le_bytes(bytes) != before || function.get::<u16>(1) != (before >> 8) as u16 {
        wrong("reads differently at another width");
    }
}

/// `test=pci-list`: every function with its BARs and capabilities, and whether all is as it must be.
pub fn list(info: &StartInfo) {
    let Some(bus) = Bus::enumerate(info) else { return println!("no PCI bus") };
    for &function in bus.functions() {
        describe(function);
        verify(function);
    }
    println!("functions: {}", bus.functions().len());
}

/// `test=config-read n=`: so many reads of configuration space, over all functions and widths; then how long one took.
pub fn config_read(info: &StartInfo) {
    let Some(bus) = Bus::enumerate(info) else { return println!("no PCI bus") };
    let clock = crate::chipset::Clock::new(info);
    println!("reading");
    // The line above goes out by accesses of the serial port; none comes between here and the next line.
    let count = info.number("n", 100_000);
    let begin = clock.now();
    let mut sum = 0u64;
    for round in 0..count {
        let function = bus.functions()[round as usize % bus.functions().len()];
        sum = sum
            .wrapping_add(crate::port::read_sized(function.at((round * 8 & 0xff8) as u16), 1 << (round & 3)));
    }
    let nanoseconds = clock.microseconds_since(begin) * 1000 / count.max(1);
    println!("config reads: {count} of {nanoseconds} ns each, sum {sum:#x}");
}
