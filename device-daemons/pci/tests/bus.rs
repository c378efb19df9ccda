//! The bus as a guest's kernel sees it: enumeration, addresses, interrupts, hot-plug.

mod guest;

use std::time::{Duration, Instant};

use bulkhead_bus_api::pci::{Change, Msi};
use bulkhead_control_api::pci::{Event, Refusal};
use bulkhead_pci::bus::Bus;
use bulkhead_pci::device::Shared;
use bulkhead_pci::event::{is_signalled, signal};
use bulkhead_pci::function::Function;
use guest::{Core, Seen, add, config, device, insert, port};

const RAM_END: u64 = 0x1_4000_0000;
/// Where the 64-bit window begins.
const HIGH: u64 = 0x1_4000_0000;

/// A bus with a host bridge, a disk at slot 1 and two ports at slots 2 and 3.
struct Machine {
    bus: Bus,
    core: Core,
    disk: std::rc::Rc<std::cell::RefCell<Seen>>,
}

impl Machine {
    fn new() -> Self {
        let mut bus = Bus::new(RAM_END);
        insert(&mut bus, Function::host());
        let (_, disk) = add(&mut bus, device("d", "pcie.0", None), false);
        add(&mut bus, port("p1", 1), false);
        add(&mut bus, port("p2", 2), false);
        bus.power_on();
        let mut machine = Self { bus, core: Core::default(), disk };
        machine.settle();
        machine
    }

    fn settle(&mut self) {
        self.core.apply(self.bus.effects());
    }

    fn read(&mut self, addr: u64, size: u8) -> u64 {
        self.core.read(&mut self.bus, addr, size)
    }

    fn write(&mut self, addr: u64, size: u8, value: u64) {
        self.core.write(&mut self.bus, addr, size, value);
    }

    /// Lets a port have its bus number, windows, memory and mastering.
    fn open_port(&mut self, slot: u64, secondary: u64) {
        self.write(config(0, slot, 0, 0x18), 4, secondary << 16 | secondary << 8);
        self.write(config(0, slot, 0, 0x20), 4, 0xd0f0_d000);
        self.write(config(0, slot, 0, 0x04), 2, 6);
    }
}

#[test]
fn what_is_there_is_read_from_memory_and_what_is_not_reads_all_ones() {
    let mut machine = Machine::new();
    let mut found = Vec::new();
    for slot in 0..32 {
        let id = machine.read(config(0, slot, 0, 0), 4);
        if id != 0xffff_ffff {
            found.push((slot, id, machine.read(config(0, slot, 0, 8), 4) >> 16));
        }
    }
    let expected = [
        (0, 0x0008_1b36, 0x0600),
        (1, 0x1042_1af4, 0x0100),
        (2, 0x000c_1b36, 0x0604),
        (3, 0x000c_1b36, 0x0604),
    ];
    assert_eq!(found, expected);
    assert_eq!(machine.core.exits, 28, "only the absent ones exit");
    assert_eq!(machine.core.mapped.iter().copied().collect::<Vec<_>>(), [0, 8, 16, 24]);
    for (addr, size, value) in [
        (config(0, 1, 1, 0), 4, 0xffff_ffff),
        (config(255, 31, 7, 0xffc), 4, 0xffff_ffff),
        (config(1, 0, 0, 0), 2, 0xffff),
        (0xd000_0000, 8, u64::MAX),
        (0x1000, 1, 0xff),
    ] {
        assert_eq!(machine.read(addr, size), value, "{addr:#x}");
    }
    assert_eq!(machine.read(config(0, 1, 0, 0x100), 4), 0, "no extended capability");
    machine.write(config(0, 9, 0, 4), 4, 6);
}

#[test]
fn a_bar_answers_where_the_guest_puts_it_once_memory_is_on() {
    let mut machine = Machine::new();
    let base = HIGH + 0x10_0000;
    machine.write(config(0, 1, 0, 0x10), 4, base & 0xffff_ffff);
    machine.write(config(0, 1, 0, 0x14), 4, base >> 32);
    machine.write(base + 8, 4, 7);
    assert!(machine.disk.borrow().registers.is_empty() && machine.core.bells.is_empty());
    machine.write(config(0, 1, 0, 4), 2, 6);
    assert!(machine.disk.borrow().master);
    machine.write(base + 8, 4, 0x1_2345_6789);
    assert_eq!(machine.read(base + 8, 4), 0x2345_6789);
    assert_eq!(machine.read(base + 0x4000, 4), 0xffff_ffff);
    assert_eq!(machine.read(base + 9, 4), 0xffff_ffff, "not aligned");
    let bells: Vec<u64> = machine.core.bells.values().copied().collect();
    assert_eq!(bells, [base + 0x3000, base + 0x3004]);
    machine.write(config(0, 1, 0, 0x10), 4, 0x8000_0000);
    let moved = (base & !0xffff_ffff) + 0x8000_0000;
    let bells: Vec<u64> = machine.core.bells.values().copied().collect();
    assert_eq!(bells, [moved + 0x3000, moved + 0x3004]);
    // Over RAM, or half outside the windows: nobody answers, nothing rings.
    for outside in [0x1000_0000, 0xffff_c000, 0xfee0_0000, HIGH - 0x4000, HIGH + (32 << 30)] {
        machine.write(config(0, 1, 0, 0x10), 4, outside & 0xffff_ffff);
        machine.write(config(0, 1, 0, 0x14), 4, outside >> 32);
        assert_eq!(machine.read(outside + 8, 4), 0xffff_ffff, "{outside:#x}");
        assert!(machine.core.bells.is_empty());
    }
}

#[test]
fn of_two_bars_at_one_address_the_first_answers() {
    let mut machine = Machine::new();
    let base = 0xd800_0000u64;
    machine.write(config(0, 1, 0, 0x10), 4, base);
    machine.write(config(0, 1, 0, 4), 2, 2);
    machine.write(config(0, 2, 0, 0x10), 4, base);
    machine.write(config(0, 2, 0, 4), 2, 2);
    machine.write(base, 4, 5);
    assert_eq!(machine.disk.borrow().registers.get(&(0, 0)), Some(&5));
    assert_eq!(machine.core.bells.len(), 2);
    // The MSI-X BAR over the doorbells of the same function: BAR 0 has them.
    machine.write(config(0, 1, 0, 0x18), 4, base + 0x2000);
    assert_eq!(machine.core.bells.len(), 2);
    machine.write(config(0, 1, 0, 4), 2, 0);
    assert_eq!(machine.read(base + 12, 4), 1, "the port's MSI-X table");
    assert!(machine.core.bells.is_empty());
}

/// A piece of the disk's BAR 0.
fn share(machine: &mut Machine, id: u64, offset: u64, len: u64) {
    let mut disk = machine.disk.borrow_mut();
    let (file_offset, writable) = (0x7000 * id, true);
    disk.shared.push(Shared { id, bar: 0, offset, len, file: guest::eventfd(), file_offset, writable });
    disk.changed = true;
    drop(disk);
    machine.bus.touch(1);
    machine.bus.take_touched();
    machine.settle();
}

fn shared(machine: &Machine) -> Vec<(u16, u64, u64)> {
    let windows = machine.core.windows.iter().filter(|(_, window)| window.writable);
    windows.map(|(number, window)| (*number, window.gpa, window.len)).collect()
}

#[test]
fn what_a_device_shares_follows_its_bar() {
    let mut machine = Machine::new();
    share(&mut machine, 1, 0, 0x1000);
    share(&mut machine, 2, 0x2000, 0x1000);
    assert_eq!(shared(&machine), [], "memory is off");
    let base = HIGH + 0x10_0000;
    let place = |machine: &mut Machine, base: u64| {
        machine.write(config(0, 1, 0, 0x10), 4, base & 0xffff_ffff);
        machine.write(config(0, 1, 0, 0x14), 4, base >> 32);
    };
    place(&mut machine, base);
    machine.write(config(0, 1, 0, 4), 2, 2);
    let at = |base| vec![(256, base, 0x1000), (257, base + 0x2000, 0x1000)];
    assert_eq!(shared(&machine), at(base));
    // The second one is where the first one was.
    place(&mut machine, base - 0x4000);
    assert_eq!(shared(&machine), at(base - 0x4000));
    place(&mut machine, 0x1000_0000);
    assert_eq!(shared(&machine), [], "over RAM");
    place(&mut machine, 0xd800_0000);
    assert_eq!(shared(&machine), at(0xd800_0000));
    // Where a port answers, too.
    machine.write(config(0, 2, 0, 0x10), 4, 0xd800_2000);
    machine.write(config(0, 2, 0, 4), 2, 2);
    assert_eq!(shared(&machine), [(256, 0xd800_0000, 0x1000)]);
    machine.write(config(0, 2, 0, 4), 2, 0);
    machine.bus.carried_out(&[257]);
    machine.bus.touch(1);
    // One goes, another one comes with its number.
    machine.disk.borrow_mut().shared.remove(0);
    share(&mut machine, 3, 0x1000, 0x1000);
    assert_eq!(shared(&machine), [(256, 0xd800_1000, 0x1000), (257, 0xd800_2000, 0x1000)]);
    machine.write(config(0, 1, 0, 4), 2, 0);
    assert_eq!(shared(&machine), []);
    machine.write(config(0, 1, 0, 4), 2, 2);
    assert_eq!(shared(&machine).len(), 2);
    machine.bus.remove(1);
    machine.settle();
    assert_eq!(shared(&machine), []);
}

#[test]
fn a_device_learns_which_of_its_pieces_core_has_refused() {
    let mut machine = Machine::new();
    share(&mut machine, 5, 0, 0x1000);
    for (refused, expected) in [(vec![], false), (vec![255, 257], false), (vec![256], true)] {
        machine.disk.borrow_mut().changed = true;
        machine.bus.touch(1);
        machine.bus.take_touched();
        machine.settle();
        machine.bus.carried_out(&refused);
        machine.bus.carried_out(&refused);
        assert_eq!(std::mem::take(&mut machine.disk.borrow_mut().carried_out), [expected]);
    }
    // More pieces than there are numbers for: the last one, which is asked about, has none.
    let mut pieces: Vec<Shared> = (100..356).map(|id| Shared { id, ..piece() }).collect();
    std::mem::swap(&mut machine.disk.borrow_mut().shared, &mut pieces);
    share(&mut machine, 99, 0, 0x1000);
    machine.disk.borrow_mut().shared.rotate_right(1);
    machine.bus.carried_out(&[]);
    assert_eq!(machine.disk.borrow().carried_out, [true], "there is no number for it");
}

fn piece() -> Shared {
    let (bar, offset, len, file_offset, writable) = (0, 0, 0x1000, 0, false);
    Shared { id: 0, bar, offset, len, file: guest::eventfd(), file_offset, writable }
}

#[test]
fn vectors_are_routed_as_the_masks_say_and_wait_meanwhile() {
    let mut machine = Machine::new();
    let table = 0xd000_0000u64;
    machine.write(config(0, 1, 0, 0x18), 4, table);
    machine.write(config(0, 1, 0, 4), 2, 6);
    let vector = machine.disk.borrow().wires.vectors[1].clone();
    // Before MSI-X is on nobody waits for what is signalled.
    signal(&vector).unwrap();
    let cap = config(0, 1, 0, 0x7c);
    assert_eq!(machine.read(cap, 4) & 0xff, 0x11);
    machine.write(cap + 2, 2, 0xc000);
    assert!(!is_signalled(&vector));
    machine.write(table + 16, 8, 0xfee0_1000);
    machine.write(table + 24, 4, 0x31);
    machine.write(table + 28, 4, 0);
    assert_eq!((machine.read(table + 16, 8), machine.read(table + 24, 8)), (0xfee0_1000, 0x31));
    assert!(machine.core.routes.is_empty(), "the function mask");
    signal(&vector).unwrap();
    assert_eq!((machine.read(table + 0x1000, 8), machine.read(table + 0x1004, 4)), (2, 0));
    machine.write(cap + 2, 2, 0x8000);
    assert_eq!(
        machine.core.routes.values().copied().collect::<Vec<_>>(),
        [Msi { address: 0xfee0_1000, data: 0x31 }]
    );
    assert!(is_signalled(&vector), "core sends it");
    assert_eq!(machine.read(table + 0x1000, 8), 0);
    machine.write(table + 28, 4, 1);
    assert!(machine.core.routes.is_empty());
    machine.write(table + 20, 4, 1);
    machine.write(table + 28, 4, 0);
    assert!(machine.core.routes.is_empty(), "an address that is no interrupt");
    machine.write(table + 20, 4, 0);
    assert_eq!(machine.core.routes.len(), 1);
    machine.write(config(0, 1, 0, 4), 2, 2);
    assert!(machine.core.routes.is_empty(), "no bus mastering, no message");
}

#[test]
fn reads_exit_while_a_device_wants_it() {
    let mut machine = Machine::new();
    let at = u64::from(machine.disk.borrow().placed[0]);
    machine.write(config(0, 1, 0, at + 12), 4, 1);
    assert!(!machine.core.mapped.contains(&8));
    assert_eq!(machine.read(config(0, 1, 0, at + 4), 4), 0x5678);
    assert_eq!(machine.read(config(0, 1, 0, 0), 4), 0x1042_1af4);
    machine.write(config(0, 1, 0, 0x3c), 1, 0x55);
    machine.write(config(0, 1, 0, at + 12), 4, 0);
    assert!(machine.core.mapped.contains(&8));
    assert_eq!(machine.read(config(0, 1, 0, 0x3c), 4), 0x55);
}

#[test]
fn a_device_behind_a_port_is_where_the_ports_numbers_and_windows_say() {
    let mut machine = Machine::new();
    let (_, seen) = add(&mut machine.bus, device("n", "p1", None), false);
    machine.bus.power_on();
    machine.settle();
    assert_eq!(machine.read(config(1, 0, 0, 0), 4), 0xffff_ffff, "no bus number");
    machine.open_port(2, 1);
    assert_eq!(machine.read(config(1, 0, 0, 0), 4), 0x1042_1af4);
    machine.write(config(1, 0, 0, 0x3c), 1, 0x77);
    machine.open_port(2, 9);
    assert_eq!(machine.read(config(1, 0, 0, 0), 4), 0xffff_ffff);
    assert_eq!(machine.read(config(9, 0, 0, 0x3c), 1), 0x77);
    machine.write(config(9, 0, 0, 0x18), 4, 0xd010_0000);
    machine.write(config(9, 0, 0, 0x10), 4, 0xd020_0000);
    machine.write(config(9, 0, 0, 4), 2, 6);
    machine.write(0xd020_0000, 4, 1);
    assert_eq!(seen.borrow().registers.len(), 1);
    assert_eq!(machine.core.bells.len(), 2);
    machine.write(config(0, 2, 0, 0x20), 4, 0xd010_d000);
    assert_eq!(machine.read(0xd020_0000, 4), 0xffff_ffff, "outside the port's window");
    assert_eq!(machine.read(0xd010_000c, 4), 1, "inside");
    assert!(machine.core.bells.is_empty());
    // Two ports with the same number: the first one has it; numbers that cannot be are none.
    add(&mut machine.bus, device("m", "p2", None), false);
    machine.bus.power_on();
    machine.open_port(3, 9);
    assert_eq!(machine.core.mapped.iter().filter(|page| **page >= 256).count(), 1);
    for numbers in [0x0009_0009, 0x0000_0000, 0x0008_0900] {
        machine.write(config(0, 2, 0, 0x18), 4, numbers);
        machine.write(config(0, 3, 0, 0x18), 4, numbers);
        assert_eq!(machine.core.mapped.iter().filter(|page| **page >= 256).count(), 0, "{numbers:#x}");
    }
}

/// Slot control and status of the port at a slot.
fn slot_control(slot: u64) -> (u64, u64) {
    (config(0, slot, 0, 0x58), config(0, slot, 0, 0x5a))
}

#[test]
fn a_device_comes_and_goes_as_pciehp_does_it() {
    let mut machine = Machine::new();
    machine.open_port(2, 1);
    let (control, status) = slot_control(2);
    // MSI-X of the port, then every event and the indicators as Linux has them with an empty slot: with a button, none of presence.
    machine.write(config(0, 2, 0, 0x10), 4, 0xd000_0000);
    machine.write(0xd000_0000, 8, 0xfee0_0000);
    machine.write(0xd000_0008, 8, 0x22);
    machine.write(config(0, 2, 0, 0x7e), 2, 0x8000);
    machine.write(control, 2, 0x17f1);
    machine.write(status, 2, 0x1ff);
    assert_eq!((machine.core.routes.len(), machine.core.raised), (1, 1), "command completed");
    add(&mut machine.bus, device("n", "p1", None), true);
    machine.settle();
    assert_eq!((machine.read(status, 2), machine.core.raised), (0x49, 2));
    assert_eq!(machine.read(config(1, 0, 0, 0), 4), 0xffff_ffff, "not before it has power");
    machine.write(status, 2, 0x1ff);
    machine.write(control, 2, 0x12f1);
    assert_eq!(machine.read(config(0, 2, 0, 0x52), 2) & 0x2000, 0x2000, "link up");
    assert_eq!(machine.read(config(1, 0, 0, 0), 4), 0x1042_1af4);
    machine.write(control, 2, 0x11f1);
    machine.write(status, 2, 0x1ff);
    // The user wants it back.
    let now = Instant::now();
    assert_eq!(machine.bus.unplug("x", now), Err(Refusal::NoDevice));
    assert_eq!(machine.bus.unplug("d", now), Err(Refusal::NoHotplug));
    assert_eq!(machine.bus.unplug("n", now), Ok(()));
    machine.settle();
    assert_eq!(machine.read(status, 2), 0x41);
    assert_eq!(machine.bus.unplug("n", now), Err(Refusal::Pending));
    machine.write(status, 2, 1);
    machine.write(control, 2, 0x12f1);
    assert_eq!(machine.bus.unplug("n", now + Duration::from_secs(6)), Err(Refusal::Pending), "it blinks");
    assert_eq!(machine.bus.take_events(), []);
    machine.write(control, 2, 0x16f9);
    assert_eq!(machine.bus.take_events(), [Event::Deleted { id: "n".to_owned() }]);
    assert_eq!(machine.read(status, 2) & 0x40, 0);
    assert_eq!(machine.read(config(1, 0, 0, 0), 4), 0xffff_ffff);
    // The slot has no power: the next one goes at once.
    add(&mut machine.bus, device("n", "p1", None), true);
    assert_eq!(machine.bus.unplug("n", now), Ok(()));
    assert_eq!(machine.bus.take_events(), [Event::Deleted { id: "n".to_owned() }]);
    machine.settle();
    assert_eq!(machine.read(status, 2) & 0x40, 0);
}

#[test]
fn power_that_the_guest_takes_by_itself_removes_nothing() {
    let mut machine = Machine::new();
    let (_, seen) = add(&mut machine.bus, device("n", "p1", None), false);
    machine.bus.power_on();
    machine.open_port(2, 1);
    let (control, _) = slot_control(2);
    machine.write(config(1, 0, 0, 0x3c), 1, 0x77);
    machine.write(control, 2, 0x0740);
    assert_eq!(machine.read(config(1, 0, 0, 0), 4), 0xffff_ffff);
    assert_eq!((seen.borrow().resets, machine.bus.take_events()), (1, vec![]));
    machine.write(control, 2, 0x0140);
    assert_eq!(machine.read(config(1, 0, 0, 0), 4), 0x1042_1af4);
    assert_eq!(machine.read(config(1, 0, 0, 0x3c), 1), 0);
    machine.write(config(0, 2, 0, 0x3e), 2, 0x40);
    assert_eq!(seen.borrow().resets, 2, "secondary bus reset");
}

#[test]
fn a_device_that_is_to_leave_does_not_survive_a_reset() {
    let mut machine = Machine::new();
    add(&mut machine.bus, device("n", "p1", None), false);
    machine.bus.power_on();
    machine.open_port(2, 1);
    assert_eq!(machine.bus.unplug("n", Instant::now()), Ok(()));
    machine.settle();
    machine.bus.reset();
    machine.settle();
    assert_eq!(machine.bus.take_events(), [Event::Deleted { id: "n".to_owned() }]);
    assert_eq!(machine.read(slot_control(2).1, 2), 0);
    assert_eq!(machine.read(slot_control(2).0, 2), 0x07c0);
    assert_eq!(machine.disk.borrow().resets, 1);
}

#[test]
fn functions_are_told_of_with_function_0() {
    let mut machine = Machine::new();
    machine.open_port(2, 1);
    let (_, status) = slot_control(2);
    let mut first = device("f1", "p1", Some((0, 1)));
    first.place.multifunction = true;
    add(&mut machine.bus, first, true);
    machine.settle();
    assert_eq!(machine.read(status, 2) & 0x40, 0);
    assert_eq!(machine.bus.unplug("f1", Instant::now()), Ok(()));
    assert_eq!(machine.bus.take_events().len(), 1);
    add(&mut machine.bus, device("f2", "p1", Some((0, 2))), true);
    let mut zero = device("f0", "p1", Some((0, 0)));
    zero.place.multifunction = true;
    add(&mut machine.bus, zero, true);
    machine.settle();
    assert_eq!(machine.read(status, 2) & 0x40, 0x40);
    machine.write(slot_control(2).0, 2, 0x0140);
    assert_eq!(machine.read(config(1, 0, 0, 0x0c), 4), 0x0080_0000);
    assert_eq!(machine.read(config(1, 0, 2, 0), 4), 0x1042_1af4);
    assert_eq!(machine.bus.unplug("f2", Instant::now()), Ok(()));
    machine.write(slot_control(2).0, 2, 0x0740);
    let gone = ["f2", "f0"].map(|id| Event::Deleted { id: id.to_owned() });
    assert_eq!(machine.bus.take_events(), gone);
}

#[test]
fn all_wires_are_given_out_once_and_come_back() {
    let mut machine = Machine::new();
    assert!(machine.bus.free_wires(1025, 0).is_none() && machine.bus.free_wires(0, 901).is_none());
    let (vectors, bells) = machine.bus.free_wires(1024 - 5, 900 - 2).unwrap();
    assert_eq!((vectors.len(), bells.len()), (1019, 898));
    assert!(machine.bus.free_wires(1020, 0).is_none());
    machine.write(config(0, 1, 0, 0x10), 4, 0xd000_0000);
    machine.write(config(0, 1, 0, 4), 2, 6);
    assert_eq!(machine.core.bells.len(), 2);
    machine.bus.remove(1);
    machine.settle();
    assert!(machine.core.bells.is_empty() && machine.bus.free_wires(1022, 900).is_some());
}

#[test]
fn wires_of_a_device_that_is_gone_come_again_with_other_eventfds_only() {
    let mut machine = Machine::new();
    let index = (0..8).find(|n| machine.bus.get(*n).is_some_and(|f| f.config.id == "d")).unwrap();
    let first = machine.bus.get(index).unwrap().vectors.first().unwrap().number;
    machine.bus.remove(index);
    let free = |machine: &Machine| machine.bus.free_wires(1, 1).unwrap().0;
    assert_ne!(free(&machine), [first], "core has not heard of it");
    let changes = machine.bus.effects().changes;
    assert!(changes.iter().any(|change| matches!(change, Change::NoVector { vector } if *vector == first)));
    assert_eq!(free(&machine), [first]);
}
