//! A pci dies between any two of its steps and another one takes its place: the guest must not see that.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod guest;
mod rig;

use bulkhead_bus_api::Access;
use bulkhead_bus_api::pci::{MAX_BELLS, MAX_VECTORS};
use bulkhead_pci::machine::{Machine, MachineError};
use guest::{config, device, port};
use rig::{Host, memfd, read, write};

/// What a kernel does: it finds functions, sizes and sets their BARs, opens a port, sets interrupts, uses devices.
fn script() -> Vec<Access> {
    let mut script = Vec::new();
    for slot in 0..8 {
        script.extend([read(config(0, slot, 0, 0), 4), read(config(0, slot, 0, 0x0c), 4)]);
    }
    for at in [0x10, 0x14, 0x18] {
        let at = config(0, 1, 0, at);
        script.extend([write(at, 4, 0xffff_ffff), read(at, 4)]);
    }
    script.extend([
        // A root port with a device behind it.
        write(config(0, 2, 0, 0x18), 4, 0x0003_0300),
        read(config(3, 0, 0, 0), 4),
        write(config(0, 2, 0, 0x20), 4, 0xd0f0_d000),
        write(config(0, 2, 0, 4), 2, 6),
        write(config(0, 2, 0, 0x58), 2, 0x11f9),
        read(config(0, 2, 0, 0x58), 4),
        write(config(0, 2, 0, 0x5a), 2, 0x10),
        write(config(3, 0, 0, 0x18), 4, 0xd010_0000),
        write(config(3, 0, 0, 0x10), 4, 0xd020_0000),
        write(config(3, 0, 0, 4), 2, 6),
        write(0xd020_0010, 4, 0x1234),
        // Its bus gets another number.
        write(config(0, 2, 0, 0x18), 4, 0x0005_0500),
        read(config(3, 0, 0, 0), 4),
        read(config(5, 0, 0, 0x10), 4),
        read(0xd020_0010, 4),
        // The disk.
        write(config(0, 1, 0, 0x10), 4, 0x4000_0000),
        write(config(0, 1, 0, 0x14), 4, 1),
        write(config(0, 1, 0, 0x18), 4, 0xd800_0000),
        write(config(0, 1, 0, 4), 2, 6),
        write(config(0, 1, 0, 0x7e), 2, 0xc000),
        write(0xd800_0010, 8, 0xfee0_1000),
        write(0xd800_0018, 8, 0x31),
        write(config(0, 1, 0, 0x7e), 2, 0x8000),
        write(0xd800_001c, 4, 1),
        read(0xd800_1000, 8),
        write(0x1_4000_0008, 8, 0xdead_beef_1234_5678),
        read(0x1_4000_0008, 8),
        write(0xd800_001c, 4, 0),
        // Reads of its configuration space exit for a while.
        write(config(0, 1, 0, 0x94), 4, 1),
        read(config(0, 1, 0, 0x8c), 4),
        write(config(0, 1, 0, 0x94), 4, 0),
        read(config(0, 1, 0, 0x10), 4),
        // The slot loses its power, and gets it back.
        write(config(0, 2, 0, 0x58), 2, 0x17f9),
        read(config(5, 0, 0, 0), 4),
        write(config(0, 2, 0, 0x58), 2, 0x11f9),
        read(config(5, 0, 0, 0x10), 4),
    ]);
    script
}

fn host() -> Host {
    Host::new(vec![device("d", "pcie.0", None), port("p", 1), device("n", "p", None)])
}

/// What the guest has seen, and what core has in the end.
#[derive(Debug, PartialEq, Eq)]
struct View {
    data: Vec<u64>,
    core: String,
}

fn view(host: &Host, data: Vec<u64>) -> View {
    let inner = host.inner.lock().unwrap();
    let core = format!("{:?} {:?} {:?}", inner.core.mapped, inner.core.routes, inner.core.bells);
    drop(inner);
    let pages = [0, 8, 16, 0x500].map(|page: u64| (0..64).map(move |at| (page, at * 4)));
    let shown = pages.into_iter().flatten().map(|(page, at)| host.mapped(0xe000_0000 + (page << 12) + at, 4));
    View { data, core: format!("{core} {:?}", shown.collect::<Vec<_>>()) }
}

fn data(reply: [u8; 16]) -> u64 {
    bulkhead_bus_api::Reply::decode(&reply).unwrap().data
}

/// One access as the guest makes it: from memory, or by an exit.
fn access(host: &Host, machine: &mut Machine, seq: u32, access: &Access) -> Result<u64, MachineError> {
    if access.op == bulkhead_bus_api::Op::Read
        && let Some(data) = host.mapped(access.addr, access.size)
    {
        return Ok(data);
    }
    machine.access(0, seq, &[], access).map(data)
}

fn undisturbed() -> View {
    let host = host();
    let mut machine = host.machine().unwrap();
    let data =
        (1..).zip(script()).map(|(seq, step)| access(&host, &mut machine, seq, &step).unwrap()).collect();
    view(&host, data)
}

#[test]
fn deaths_between_accesses_are_not_seen() {
    let host = host();
    drop(host.machine().unwrap());
    let mut seen = Vec::new();
    for (seq, step) in (1..).zip(script()) {
        let mut machine = host.machine().unwrap();
        let first = access(&host, &mut machine, seq, &step).unwrap();
        drop(machine);
        // The reply was lost with it.
        let again = access(&host, &mut host.machine().unwrap(), seq, &step).unwrap();
        assert_eq!(first, again, "{step:x?}");
        seen.push(again);
    }
    assert_eq!(view(&host, seen), undisturbed());
}

#[test]
fn deaths_within_accesses_are_not_seen() {
    let expected = undisturbed();
    // Dies at the request to core of this number in every access, and once more while it takes over.
    for patience in 0..2 {
        let host = host();
        drop(host.machine().unwrap());
        let (mut seen, mut deaths) = (Vec::new(), 0);
        for (seq, step) in (1..).zip(script()) {
            let mut machine = host.machine().unwrap();
            host.inner.lock().unwrap().patience = Some(patience);
            let result = access(&host, &mut machine, seq, &step);
            drop(machine);
            deaths += usize::from(result.is_err());
            for patience in [0, 3, 5] {
                host.inner.lock().unwrap().patience = Some(patience);
                assert!(host.machine().is_err());
            }
            host.inner.lock().unwrap().patience = None;
            let again = access(&host, &mut host.machine().unwrap(), seq, &step).unwrap();
            if let Ok(first) = result {
                assert_eq!(first, again, "{step:x?}");
            }
            seen.push(again);
        }
        assert_eq!(view(&host, seen), expected);
        assert!(deaths > 0 || patience > 0, "{deaths}");
    }
}

#[test]
fn a_first_pci_that_dies_while_it_begins_leaves_nothing_behind() {
    let mut deaths = 0;
    loop {
        let host = host();
        host.inner.lock().unwrap().patience = Some(deaths);
        let is_dead = host.machine().is_err();
        host.inner.lock().unwrap().patience = None;
        let mut machine = host.machine().unwrap();
        assert_eq!(access(&host, &mut machine, 1, &read(config(0, 2, 0, 0), 4)).unwrap(), 0x000c_1b36);
        if !is_dead {
            break;
        }
        deaths += 1;
    }
    assert!(deaths >= 3, "{deaths}");
}

#[test]
fn only_the_first_pci_of_a_core_takes_for_granted_that_core_has_nothing() {
    let mut host = host();
    let asked = || {
        let before = host.inner.lock().unwrap().changes;
        drop(host.machine().unwrap());
        host.inner.lock().unwrap().changes - before
    };
    let first = asked();
    let all = usize::from(MAX_VECTORS + MAX_BELLS);
    assert!((1..64).contains(&first), "{first}");
    assert!(asked() > all);
    // Its state is lost, core is the same.
    host.state = memfd();
    let before = host.inner.lock().unwrap().changes;
    drop(host.machine().unwrap());
    assert!(host.inner.lock().unwrap().changes > before + all);
}

#[test]
fn the_largest_bus_is_enumerated_and_survives_a_death() {
    let mut devices = Vec::new();
    for n in 0..32 {
        let mut port = port(&format!("p{n}"), n);
        port.place.addr = Some((28 + u8::try_from(n / 8).unwrap(), u8::try_from(n % 8).unwrap()));
        devices.push(port);
    }
    devices.extend((0..216).map(|n| device(&format!("d{n}"), "pcie.0", Some((1 + n / 8, n % 8)))));
    devices.extend((0..7).map(|n| device(&format!("b{n}"), &format!("p{n}"), None)));
    assert_eq!(devices.len(), 255);
    devices.iter_mut().for_each(|device| device.place.multifunction = true);
    let host = Host::new(devices);
    let mut machine = host.machine().unwrap();
    let mut found = 0;
    let mut seq = 0;
    let mut step = |machine: &mut Machine, what: Access| {
        seq += 1;
        access(&host, machine, seq, &what).unwrap()
    };
    for slot in 0..32 {
        for function in 0..8 {
            let id = step(&mut machine, read(config(0, slot, function, 0), 4));
            found += u64::from(id != 0xffff_ffff);
            if id == 0x000c_1b36 {
                let bus = 1 + (slot - 28) * 8 + function;
                step(&mut machine, write(config(0, slot, function, 0x18), 4, bus << 16 | bus << 8));
                found += u64::from(step(&mut machine, read(config(bus, 0, 0, 0), 4)) != 0xffff_ffff);
            }
        }
    }
    assert_eq!(found, 256);
    drop(machine);
    let mut machine = host.machine().unwrap();
    assert_eq!(host.inner.lock().unwrap().core.mapped.len(), 256);
    assert_eq!(step(&mut machine, read(config(7, 0, 0, 0), 4)), 0x1042_1af4);
    let more = device("more", "p8", None);
    assert!(matches!(machine.find_place(&more), Err(bulkhead_control_api::pci::Refusal::NoRoom(_))));
}
