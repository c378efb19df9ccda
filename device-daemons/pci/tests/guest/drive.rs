//! A play: bytes are what a guest does to the bus. `tests/bus_random.rs` and the fuzz target `pci_bus` run it.

use std::time::Instant;

use bulkhead_bus_api::{Access, Op, Space};
use bulkhead_pci::bus::Bus;
use bulkhead_pci::function::Function;

use super::{Core, add, config, device, insert, port};

/// End of the RAM of the machine that is played.
const RAM_END: u64 = 0x1_4000_0000;
/// Addresses where something begins or ends.
const EDGES: [u64; 16] = [
    0,
    0x1000,
    0x8000_0000,
    0xbfff_f000,
    0xc000_0000,
    0xd000_0000,
    TABLE,
    0xdfff_c000,
    0xdfff_f000,
    0xe000_0000,
    0xfee0_0000,
    0xffff_f000,
    RAM_END,
    RAM_END + 0x4000,
    RAM_END + (32 << 30) - 0x4000,
    0xffff_ffff_ffff_f000,
];
/// Where the prologue puts the disk's MSI-X table.
const TABLE: u64 = 0xd800_0000;
/// Registers that decide the most: command, BARs, bus numbers, windows, slot, MSI-X.
const REGISTERS: [u64; 16] =
    [0x04, 0x10, 0x14, 0x18, 0x1a, 0x20, 0x24, 0x28, 0x2c, 0x3e, 0x50, 0x58, 0x5a, 0x7c, 0x7e, 0x94];

/// The bytes of a play.
struct Input<'a>(std::slice::Iter<'a, u8>);

impl Input<'_> {
    fn byte(&mut self) -> u64 {
        self.0.next().copied().unwrap_or(0).into()
    }

    fn pick<T: Copy, const N: usize>(&mut self, from: [T; N]) -> T {
        from[usize::try_from(self.byte()).unwrap() % N]
    }

    fn value(&mut self) -> u64 {
        match self.byte() % 4 {
            0 => self.pick(EDGES),
            1 => self.pick(EDGES) >> 16 | self.pick(EDGES) & 0xffff_0000,
            2 => self.pick([0, u64::MAX, 6, 2, 0x8000, 0xc000, 0x0001_0100, 0x0002_0200, 0x17f9, 0x11f9, 1]),
            _ => (0..8).fold(0, |value, _| value << 8 | self.byte()),
        }
    }

    /// An address of configuration space.
    fn config(&mut self) -> u64 {
        let place = self.pick([(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (2, 0), (255, 31)]);
        let offset = if self.byte().is_multiple_of(4) {
            self.byte() << 4 | self.byte() & 0xf
        } else {
            self.pick(REGISTERS)
        };
        config(
            place.0,
            place.1,
            if self.byte().is_multiple_of(16) { self.byte() & 7 } else { 0 },
            offset & 0xfff,
        )
    }

    fn access(&mut self) -> Access {
        let addr = if self.byte().is_multiple_of(4) {
            self.pick(EDGES).wrapping_add(self.byte() << self.pick([0, 2, 3, 4, 8]))
        } else {
            self.config()
        };
        let size = self.pick([1, 2, 4, 4, 4, 4, 8, 8]);
        let op = if self.byte().is_multiple_of(4) { Op::Read } else { Op::Write(self.value()) };
        Access { space: if self.byte() == 255 { Space::Pio } else { Space::Mmio }, addr, size, op }
    }
}

/// What core has must be what the bus says when it is asked.
fn check(bus: &mut Bus, core: &Core) {
    for page in &core.mapped {
        for offset in [0, 4, 0x10, 0x18, 0x3c, 0x58] {
            let at = u64::from(*page) << 12 | offset;
            let byte = |n: u64| u64::from(core.ecam.get(&(at + n)).copied().unwrap_or(0)) << (8 * n);
            let shown: u64 = (0..4).map(byte).sum();
            let read = Access { space: Space::Mmio, addr: 0xe000_0000 + at, size: 4, op: Op::Read };
            assert_eq!(bus.access(&read), shown, "page {page:#x} offset {offset:#x}");
        }
    }
    for at in core.bells.values() {
        let low = (0xc000_0000..0xe000_0000).contains(at);
        assert!(low || (RAM_END..RAM_END + (32 << 30)).contains(at), "a doorbell at {at:#x}");
    }
}

/// What a kernel does at first: the disk's BARs and an interrupt, a bus behind a port.
fn prologue(bus: &mut Bus, core: &mut Core) {
    let steps = [
        (config(0, 1, 0, 0x10), RAM_END & 0xffff_ffff),
        (config(0, 1, 0, 0x14), RAM_END >> 32),
        (config(0, 1, 0, 0x18), TABLE),
        (config(0, 1, 0, 0x04), 6),
        (config(0, 1, 0, 0x7c), 0x8000 << 16),
        (TABLE + 16, 0xfee0_1000),
        (TABLE + 28, 0),
        (config(0, 2, 0, 0x18), 0x0001_0100),
        (config(0, 2, 0, 0x20), 0xdff0_d000),
        (config(0, 2, 0, 0x04), 6),
        (config(1, 0, 0, 0x10), 0xd000_0000),
        (config(1, 0, 0, 0x04), 6),
    ];
    steps.into_iter().for_each(|(addr, value)| core.write(bus, addr, 4, value));
}

/// Plays; returns how many pages beyond the root bus and how many doorbells and routes there have been.
pub fn drive(input: &[u8]) -> (usize, usize, usize) {
    let mut bus = Bus::new(RAM_END);
    let mut core = Core::default();
    insert(&mut bus, Function::host());
    add(&mut bus, device("d", "pcie.0", None), false);
    add(&mut bus, port("p1", 1), false);
    add(&mut bus, port("p2", 2), false);
    add(&mut bus, device("n", "p1", None), false);
    add(&mut bus, device("m", "p2", None), false);
    bus.power_on();
    core.apply(bus.effects());
    let mut input = Input(input.iter());
    if !input.byte().is_multiple_of(4) {
        prologue(&mut bus, &mut core);
    }
    let mut most = (0, 0, 0);
    while !input.0.as_slice().is_empty() {
        match input.byte() {
            0 => bus.reset(),
            1 => drop(bus.unplug(["n", "m"][usize::try_from(input.byte() & 1).unwrap()], Instant::now())),
            2 => {
                let at = if input.byte() & 1 == 0 { ("n", "p1") } else { ("m", "p2") };
                let config = device(at.0, at.1, None);
                if bulkhead_pci::place::find(&bus.taken(), &config, true).is_ok() {
                    add(&mut bus, config, true);
                }
            }
            _ => drop(bus.access(&input.access())),
        }
        if !input.byte().is_multiple_of(4) {
            core.apply(bus.effects());
            check(&mut bus, &core);
            let beyond = core.mapped.iter().filter(|page| **page >= 256).count();
            most = (most.0.max(beyond), most.1.max(core.bells.len()), most.2.max(core.routes.len()));
        }
    }
    most
}
