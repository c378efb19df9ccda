//! Random plays of a guest against the bus; the fuzz target `pci_bus` runs the same.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

mod guest;

use bulkhead_bus_api::platform::{ECAM, PCI_MEM32, PCI_MEM64_LEN};
use bulkhead_pci::bus::Bus;
use bulkhead_pci::function::Function;
use guest::{Core, Mock, config, device, insert};

const PLAYS: u64 = 500;

#[test]
fn whatever_a_guest_does_core_is_told_what_is_so() {
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    let mut byte = || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed.to_le_bytes()[4]
    };
    let mut seen = (0, 0, 0);
    for play in 0..PLAYS {
        let input: Vec<u8> = (0..2_000).map(|_| byte()).collect();
        let result = std::panic::catch_unwind(|| guest::drive::drive(&input));
        let most = result.unwrap_or_else(|_| panic!("play {play}: {input:?}"));
        seen = (seen.0 + most.0, seen.1 + most.1, seen.2 + most.2);
    }
    assert!(seen.0 > 300 && seen.1 > 500 && seen.2 > 200, "the plays do not get far: {seen:?}");
}

#[test]
fn every_write_to_configuration_space_is_survived() {
    let mut bus = Bus::new(0x8000_0000);
    let mut core = Core::default();
    insert(&mut bus, Function::host());
    guest::add(&mut bus, device("d", "pcie.0", None), false);
    guest::add(&mut bus, guest::port("p", 1), false);
    bus.power_on();
    core.apply(bus.effects());
    for value in [0, u64::MAX, 0x5555_5555_5555_5555, 0xaaaa_aaaa_aaaa_aaaa, 0x0102_0408_1020_4080] {
        for slot in 0..3 {
            for offset in 0..4096 {
                for size in [1, 2, 4, 8] {
                    core.write(&mut bus, config(0, slot, 0, offset), size, value);
                }
            }
            let ids = core.read(&mut bus, config(0, slot, 0, 0), 4);
            assert!([0x0008_1b36, 0x1042_1af4, 0x000c_1b36].contains(&ids), "{ids:#x}");
        }
    }
}

#[test]
fn a_bar_answers_exactly_where_it_lies_in_a_window() {
    let ram_end = 0x1_4000_0000;
    let windows = [(PCI_MEM32.base, PCI_MEM32.len), (ram_end, PCI_MEM64_LEN)];
    for shift in 14..37 {
        let size = 1u64 << shift;
        let mut bus = Bus::new(ram_end);
        let mut core = Core::default();
        let (mut mock, _) = Mock::new();
        mock.size = size;
        insert(&mut bus, Function::device(device("d", "pcie.0", None), None, 8, Box::new(mock)).unwrap());
        core.write(&mut bus, config(0, 1, 0, 4), 2, 2);
        let edges = [0, PCI_MEM32.base, ECAM.base, 0xfee0_0000, 1 << 32, ram_end, ram_end + PCI_MEM64_LEN];
        let places = edges.into_iter().flat_map(|edge| (0..5).map(move |n| (edge & !(size - 1), n)));
        for (edge, n) in places.chain([(0u64.wrapping_sub(size), 2)]) {
            let base = edge.wrapping_add(size.wrapping_mul(n)).wrapping_sub(2 * size);
            core.write(&mut bus, config(0, 1, 0, 0x10), 4, base & 0xffff_ffff);
            core.write(&mut bus, config(0, 1, 0, 0x14), 4, base >> 32);
            let inside = |(start, len): &(u64, u64)| {
                *start <= base && base - start + size <= *len && base + (size - 1) >= base
            };
            let expected = windows.iter().any(|window| base >= window.0 && inside(window));
            assert_eq!(bus.address(0, 0), expected.then_some(base), "{base:#x} of {size:#x}");
            let bells: Vec<u64> = core.bells.values().copied().collect();
            let at = if expected { vec![base + 0x3000, base + 0x3004] } else { vec![] };
            assert_eq!(bells, at);
        }
    }
}
