//! Shared memory regions of a virtio device: what the back end may have mapped there, and for how long.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test that cannot go on fails"
)]

mod common;
mod transport;

use std::os::fd::OwnedFd;

use bulkhead_pci::device::{Backed as _, Bar, Device as _, Shared};
use bulkhead_pci::frontend::wire::{Request, SHMEM_MAP, SHMEM_UNMAP, protocol};
use bulkhead_pci::function::Function;
use bulkhead_pci::virtio::VirtioPci;
use common::VERSION_1;
use common::peer::{Asked, memory, piece, send, shmem_config, shmem_request, take};
use transport::{Bench, NEEDS_RESET, READY, STATUS, config, virtio};

const SHMEM: u64 = protocol::SHMEM | protocol::BACKEND_SEND_FD;
/// Length of the region, and what of it is asked for in most tests.
const LEN: u64 = 0x30_0000;
const AT: u64 = 0x1_0000;
const PAGE: u64 = 0x1000;

/// A device that runs, whose back end has shared memory regions.
fn running(regions: &[(u8, u64)]) -> Bench {
    let mut bench = Bench::empty(virtio());
    connect(&mut bench, regions);
    bench.drive(VERSION_1);
    bench.serve();
    bench.device.take_changed();
    bench
}

fn connect(bench: &mut Bench, regions: &[(u8, u64)]) {
    bench.connect_with(|peer| {
        peer.protocol |= SHMEM;
        peer.shmem = regions.to_vec();
    });
}

/// The back end asks; it is not answered unless that needs nobody else.
fn ask(bench: &mut Bench, request: u32, payload: &[u8], fd: Option<OwnedFd>) -> Option<u64> {
    let channel = bench.peer.as_ref().unwrap().channel.as_ref().unwrap();
    let fds: Vec<OwnedFd> = fd.into_iter().collect();
    send(channel, &shmem_request(request, payload), &fds).unwrap();
    bench.serve();
    answer(bench)
}

/// What the back end is answered.
fn answer(bench: &mut Bench) -> Option<u64> {
    bench.serve();
    let channel = bench.peer.as_ref()?.channel.as_ref()?;
    let Asked { payload, .. } = take(channel)?;
    Some(u64::from_ne_bytes(payload.try_into().unwrap()))
}

fn map(bench: &mut Bench, at: u64, len: u64) -> Option<u64> {
    let file = memory(i64::try_from(len + PAGE).unwrap());
    let waits = ask(bench, SHMEM_MAP, &piece(0, PAGE, at, len, 1), Some(file));
    if waits.is_some() {
        return waits;
    }
    assert!(bench.device.take_changed(), "nobody learns of it");
    bench.device.carried_out(&|_| false);
    answer(bench)
}

fn unmap(bench: &mut Bench, at: u64, len: u64) -> Option<u64> {
    let waits = ask(bench, SHMEM_UNMAP, &piece(0, 0, at, len, 0), None);
    if waits.is_some() {
        return waits;
    }
    assert!(bench.device.take_changed());
    bench.device.carried_out(&|_| false);
    answer(bench)
}

fn places(bench: &Bench) -> Vec<(u64, u64)> {
    bench.device.shared().iter().map(|piece| (piece.offset, piece.len)).collect()
}

#[test]
fn a_region_is_a_bar_of_its_own_with_a_capability() {
    let bench = running(&[(7, LEN)]);
    let (bars, capabilities) = bench.device.late();
    assert_eq!(bars, [Bar { index: 2, size: 0x40_0000, wide: true, prefetch: true }]);
    assert_eq!(capabilities.len(), 1);
    let body = &capabilities[0].body;
    assert_eq!((capabilities[0].id, &body[..6]), (9, &[24, 8, 2, 7, 0, 0][..]));
    let word = |at: usize| u32::from_le_bytes(body[at..at + 4].try_into().unwrap());
    assert_eq!([6, 10, 14, 18].map(word), [0, 0x30_0000, 0, 0]);
    assert!(capabilities[0].writable.is_empty());
    // Of 8 GiB, behind another one, for a device without configuration space.
    let mut bench = Bench::empty(bulkhead_control_api::config::Virtio { config: vec![], ..virtio() });
    connect(&mut bench, &[(0, PAGE), (255, 8 << 30)]);
    let (bars, capabilities) = bench.device.late();
    assert_eq!(bars[0].size, 16 << 30);
    let body = &capabilities[1].body;
    let word = |at: usize| u32::from_le_bytes(body[at..at + 4].try_into().unwrap());
    assert_eq!((body[3], [6, 10, 14, 18].map(word)), (255, [0x1000, 0, 0, 2]));
    // Both fit into configuration space beside the rest.
    let mut function = Function::device(config(virtio()), None, 8, Box::new(bench.device)).unwrap();
    let before = function.bars.len();
    function.grow();
    function.grow();
    assert_eq!(function.bars.len(), before + 1);
}

#[test]
fn a_device_without_regions_is_as_before() {
    for bench in [Bench::running(), running(&[])] {
        assert_eq!((bench.device.late().0, bench.device.late().1), (vec![], vec![]));
        assert_eq!(bench.device.bars().len(), 2);
    }
    let mut bench = Bench::running();
    assert!(!bench.log().contains(&(Request::GET_SHMEM_CONFIG as u32)));
}

#[test]
fn a_piece_comes_and_goes_when_core_has_done_its_part() {
    let mut bench = running(&[(0, LEN)]);
    let file = memory(0x4000);
    let payload = piece(0, 0x2000, AT, 0x2000, 0);
    assert_eq!(ask(&mut bench, SHMEM_MAP, &payload, Some(file)), None, "not before core has it");
    assert!(bench.device.take_changed());
    let [Shared { id, bar: 2, offset: AT, len: 0x2000, file_offset: 0x2000, writable: false, .. }] =
        *bench.device.shared()
    else {
        panic!("{:?}", bench.device.shared())
    };
    // Nothing else is heard meanwhile.
    assert_eq!(ask(&mut bench, SHMEM_UNMAP, &piece(0, 0, AT, 0x2000, 0), None), None);
    assert_eq!(bench.device.shared().len(), 1);
    bench.device.carried_out(&|other| other != id);
    assert_eq!(answer(&mut bench), Some(0));
    assert!(bench.device.take_changed() && bench.device.shared().is_empty());
    assert_eq!(answer(&mut bench), None);
    bench.device.carried_out(&|_| panic!("nothing to refuse"));
    assert_eq!(answer(&mut bench), Some(0));
    // Core says no.
    let file = memory(0x4000);
    assert_eq!(ask(&mut bench, SHMEM_MAP, &payload, Some(file)), None);
    bench.device.carried_out(&|_| true);
    assert_eq!(answer(&mut bench), Some(1));
    assert!(bench.device.shared().is_empty());
    assert_eq!(bench.device.read(2, AT, 4), 0xffff_ffff, "nothing is there");
}

#[test]
fn what_is_no_piece_of_a_region_is_refused() {
    let mut bench = running(&[(0, LEN)]);
    assert_eq!(map(&mut bench, AT, 0x2000), Some(0));
    let before = places(&bench);
    let bad = [
        piece(1, 0, 0, PAGE, 1),
        piece(0, 0, 0, 0, 1),
        piece(0, 0, 8, PAGE, 1),
        piece(0, 8, 0, PAGE, 1),
        piece(0, 0, 0, 0x800, 1),
        piece(0, 0, LEN, PAGE, 1),
        piece(0, 0, LEN - PAGE, 2 * PAGE, 1),
        piece(0, 0, 0u64.wrapping_sub(PAGE), 2 * PAGE, 1),
        piece(0, 0, 0, 0u64.wrapping_sub(PAGE), 1),
        // Beyond the end of the file, also by more than a number holds.
        piece(0, 4 * PAGE, 0, PAGE, 1),
        piece(0, 3 * PAGE, 0, 2 * PAGE, 1),
        piece(0, 0u64.wrapping_sub(PAGE), 0, PAGE, 1),
        piece(0, 1 << 63, 0, PAGE, 1),
        // Over another one.
        piece(0, 0, AT, PAGE, 1),
        piece(0, 0, AT + PAGE, 2 * PAGE, 1),
        piece(0, 0, AT - PAGE, 2 * PAGE, 1),
        piece(0, 0, AT - PAGE, 4 * PAGE, 1),
        // Flags that nobody knows, too much, too little.
        piece(0, 0, 0, PAGE, 2),
        piece(0, 0, 0, PAGE, 1)[..39].to_vec(),
        [piece(0, 0, 0, PAGE, 1), vec![0]].concat(),
        vec![],
    ];
    for payload in bad {
        let file = Some(memory(0x4000));
        assert_eq!(ask(&mut bench, SHMEM_MAP, &payload, file), Some(1), "{payload:x?}");
        assert_eq!(places(&bench), before);
    }
    let wrong = [
        piece(0, 0, AT, PAGE, 0),
        piece(0, 0, AT + PAGE, PAGE, 0),
        piece(0, 0, AT, 3 * PAGE, 0),
        piece(0, 0, 0, PAGE, 0),
        piece(1, 0, AT, 0x2000, 0),
    ];
    for payload in wrong {
        assert_eq!(ask(&mut bench, SHMEM_UNMAP, &payload, None), Some(1), "{payload:x?}");
        assert_eq!(places(&bench), before);
    }
    assert_eq!(ask(&mut bench, SHMEM_MAP, &piece(0, 0, 0, PAGE, 1), None), Some(1), "without a file");
    assert!(bench.device.is_connected() && !bench.device.take_changed());
    assert_eq!(unmap(&mut bench, AT, 0x2000), Some(0));
}

#[test]
fn what_is_no_memory_ends_the_connection_and_is_not_looked_at() {
    for path in ["/dev/zero", "/", "/proc/self/exe"] {
        let mut bench = running(&[(0, LEN)]);
        let file = std::fs::File::open(path).unwrap();
        ask(&mut bench, SHMEM_MAP, &piece(0, 0, 0, PAGE, 1), Some(file.into()));
        assert!(!bench.device.is_connected() && bench.device.shared().is_empty(), "{path}");
        // It is not asked for any more, so it has not the regions that the guest knows.
        connect(&mut bench, &[(0, LEN)]);
        assert!(!bench.device.is_connected());
    }
}

#[test]
fn pieces_are_counted() {
    let mut bench = running(&[(0, LEN)]);
    for n in 0..64 {
        assert_eq!(map(&mut bench, n * PAGE, PAGE), Some(0));
    }
    assert_eq!(map(&mut bench, 64 * PAGE, PAGE), Some(1));
    assert_eq!((unmap(&mut bench, 7 * PAGE, PAGE), map(&mut bench, 64 * PAGE, PAGE)), (Some(0), Some(0)));
}

#[test]
fn descriptors_come_only_with_what_has_one() {
    for (offers, request) in [(true, SHMEM_UNMAP), (true, 2), (false, SHMEM_MAP), (false, 2)] {
        let mut bench = if offers { running(&[(0, LEN)]) } else { Bench::running() };
        ask(&mut bench, request, &piece(0, 0, 0, PAGE, 0), Some(memory(0x1000)));
        assert!(!bench.device.is_connected(), "{offers} {request}");
    }
    // Without the feature it is a request that is not known.
    let mut bench = Bench::running();
    assert_eq!(ask(&mut bench, SHMEM_UNMAP, &piece(0, 0, 0, PAGE, 0), None), Some(1));
}

#[test]
fn regions_that_cannot_be_end_the_connection() {
    let long = vec![(0, 32 << 30)];
    let many = vec![(0, PAGE), (1, PAGE)];
    let odd = vec![(3, PAGE + 1)];
    let huge = vec![(0, 1 << 41)];
    for regions in [long, many, odd, huge] {
        let mut bench = Bench::empty(virtio());
        connect(&mut bench, &regions);
        assert!(!bench.device.is_connected() && !bench.device.is_known(), "{regions:x?}");
        // The next one is as good as any.
        connect(&mut bench, &[(0, LEN)]);
        assert!(bench.device.is_known());
    }
    let whole = shmem_config(&[(0, PAGE)]);
    for (payload, good) in [
        (whole.clone(), true),
        (whole[..16].to_vec(), true),
        (whole[..8].to_vec(), true),
        (whole[..7].to_vec(), false),
        (whole[..17].to_vec(), false),
        ([whole.clone(), vec![0; 8]].concat(), false),
        ([vec![1, 1], whole[2..].to_vec()].concat(), false),
        (vec![], false),
    ] {
        let regions = bulkhead_pci::frontend::wire::as_shmem_config(&payload);
        assert_eq!(regions.is_some(), good, "{}", payload.len());
    }
}

#[test]
fn a_reset_takes_all_pieces_away() {
    let mut bench = running(&[(0, LEN)]);
    assert_eq!(map(&mut bench, AT, PAGE), Some(0));
    bench.write(STATUS, 1, 0);
    bench.serve();
    assert_eq!((bench.status(), bench.device.shared().len()), (0, 0));
    assert!(bench.device.take_changed());
    // Of a device that has never run the back end hears no reset.
    let mut bench = Bench::empty(virtio());
    connect(&mut bench, &[(0, LEN)]);
    assert_eq!(map(&mut bench, AT, PAGE), Some(0));
    bench.drive(VERSION_1);
    bench.serve();
    assert_eq!((bench.status(), bench.device.shared().len()), (READY, 1));
    // What is asked for and not done is over, too, and the back end hears that.
    let file = memory(0x4000);
    assert_eq!(ask(&mut bench, SHMEM_MAP, &piece(0, 0, 0, PAGE, 1), Some(file)), None);
    bench.write(STATUS, 1, 0);
    bench.serve();
    bench.device.carried_out(&|_| false);
    assert_eq!((answer(&mut bench), bench.device.shared().len()), (Some(1), 0));
    assert_eq!(map(&mut bench, AT, PAGE), Some(0), "it goes on");
}

#[test]
fn what_was_mapped_does_not_outlive_the_connection_and_the_guest_learns_that() {
    let mut bench = running(&[(0, LEN)]);
    bench.kill();
    connect(&mut bench, &[(0, LEN)]);
    assert_eq!(bench.status(), READY, "nothing was mapped");
    assert_eq!(map(&mut bench, AT, PAGE), Some(0));
    bench.kill();
    assert!(bench.device.take_changed() && bench.device.shared().is_empty());
    assert_eq!(bench.status(), READY | NEEDS_RESET);
    connect(&mut bench, &[(0, LEN)]);
    bench.drive(VERSION_1);
    bench.serve();
    assert_eq!((bench.status(), map(&mut bench, AT, PAGE)), (READY, Some(0)));
    // The same with the life of this process.
    bench.restart();
    assert_eq!(bench.status(), READY | NEEDS_RESET);
    assert!(bench.device.shared().is_empty());
    assert_eq!(bench.device.late().0.len(), 1, "the guest knows the region");
    connect(&mut bench, &[(0, LEN)]);
    assert!(bench.device.is_connected());
}

#[test]
fn another_back_end_must_have_the_same_regions() {
    for (before, after) in [
        (vec![(0, LEN)], vec![]),
        (vec![(0, LEN)], vec![(1, LEN)]),
        (vec![(0, LEN)], vec![(0, LEN + PAGE)]),
        (vec![], vec![(0, LEN)]),
    ] {
        for restart in [false, true] {
            let mut bench = running(&before);
            if restart {
                bench.restart()
            } else {
                bench.kill()
            }
            connect(&mut bench, &after);
            assert!(!bench.device.is_connected(), "{before:x?} {after:x?}");
            connect(&mut bench, &before);
            assert!(bench.device.is_connected());
        }
    }
}

#[test]
fn a_state_with_regions_that_cannot_be_is_refused() {
    let mut bench = Bench::empty(bulkhead_control_api::config::Virtio { config: vec![], ..virtio() });
    connect(&mut bench, &[(0, PAGE), (1, PAGE)]);
    let saved = bench.device.save();
    let mut other = VirtioPci::new(&config(virtio()), &bench.ram.memory).unwrap();
    assert!(!other.restore(&saved));
}
