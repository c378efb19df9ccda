//! Memory devices' pieces between their daemons, the other back ends and core, over the death of pci.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

mod guest;
mod rig;

use std::cell::RefCell;
use std::os::fd::OwnedFd;
use std::rc::Rc;

use bulkhead_control_api::config::{DeviceMemory, PciDevice, PciKind};
use bulkhead_control_api::side::Piece;
use bulkhead_pci::device::ToMemory;
use bulkhead_pci::machine::Machine;
use bulkhead_pci::pieces::{Ask, FIRST_WINDOW, Reply};
use guest::{Seen, device};
use rig::{Host, memfd};

const MEMORY: DeviceMemory = DeviceMemory { addr: 1 << 40, len: 1 << 30, pieces: 8, first: 3 };
const LEN: u64 = 1 << 20;

fn memory_device() -> PciDevice {
    let mut device = device("m", "pcie.0", None);
    let PciKind::Virtio(virtio) = &mut device.kind else { panic!("no virtio device") };
    (virtio.device_type, virtio.memory) = (24, Some(MEMORY));
    device
}

fn file() -> Rc<OwnedFd> {
    let file = memfd();
    nix::unistd::ftruncate(&file, 16 << 20).unwrap();
    Rc::new(file)
}

fn piece(number: u16, file: &Rc<OwnedFd>) -> Ask {
    let offset = u64::from(number) * LEN;
    Ask::Piece(number, Piece { addr: MEMORY.addr + offset, len: LEN, offset }, Rc::clone(file))
}

fn seen(host: &Host, id: &str) -> Rc<RefCell<Seen>> {
    Rc::clone(host.mocks.borrow().get(id).unwrap())
}

fn ask(host: &Host, machine: &mut Machine, asks: Vec<Ask>) -> Vec<ToMemory> {
    seen(host, "m").borrow_mut().asks = asks;
    machine.settle().unwrap();
    told(host)
}

fn told(host: &Host) -> Vec<ToMemory> {
    std::mem::take(&mut seen(host, "m").borrow_mut().told)
}

/// What core has of the device, by the device's numbers.
fn windows(host: &Host) -> Vec<u16> {
    let inner = host.inner.lock().unwrap();
    let own = inner.core.windows.keys().filter(|window| **window >= FIRST_WINDOW);
    own.map(|window| window - FIRST_WINDOW - MEMORY.first).collect()
}

fn settled(number: u16) -> ToMemory {
    ToMemory::Reply(Reply::Settled(number, Ok(())))
}

const ALL: ToMemory = ToMemory::Reply(Reply::All);

#[test]
fn a_piece_is_the_guests_when_every_back_end_has_it() {
    let host = Host::new(vec![device("d", "pcie.0", None), memory_device()]);
    let mut machine = host.machine().unwrap();
    let disk = seen(&host, "d");
    assert!(disk.borrow().held && seen(&host, "m").borrow().held);
    assert_eq!(ask(&host, &mut machine, vec![Ask::Begin, Ask::All]), [ALL]);
    assert!(!disk.borrow().held);
    let file = file();
    disk.borrow_mut().telling = true;
    assert_eq!(ask(&host, &mut machine, vec![piece(2, &file)]), []);
    assert_eq!((disk.borrow().memory, windows(&host)), (2, vec![]));
    disk.borrow_mut().telling = false;
    machine.settle().unwrap();
    assert_eq!((told(&host), windows(&host)), (vec![settled(2)], vec![2]));
    disk.borrow_mut().telling = true;
    assert_eq!(ask(&host, &mut machine, vec![Ask::NoPiece(2)]), []);
    assert_eq!((disk.borrow().memory, windows(&host)), (1, vec![]));
    disk.borrow_mut().telling = false;
    machine.settle().unwrap();
    assert_eq!(told(&host), [settled(2)]);
}

#[test]
fn a_successor_leaves_pieces_where_they_are_until_their_daemon_has_spoken() {
    let host = Host::new(vec![device("d", "pcie.0", None), memory_device()]);
    let mut machine = host.machine().unwrap();
    let file = file();
    let asks = vec![Ask::Begin, piece(0, &file), piece(1, &file), piece(2, &file), Ask::All];
    assert_eq!(ask(&host, &mut machine, asks), [settled(0), settled(1), settled(2), ALL]);
    assert_eq!(windows(&host), [0, 1, 2]);
    drop(machine);
    let mut machine = host.machine().unwrap();
    machine.settle().unwrap();
    assert_eq!(windows(&host), [0, 1, 2], "the guest uses them");
    assert!(seen(&host, "d").borrow().held, "its back end would not know them");
    // The daemon has unplugged one meanwhile.
    let replies = ask(&host, &mut machine, vec![Ask::Begin, piece(0, &file), piece(2, &file), Ask::All]);
    assert_eq!(replies, [settled(0), settled(2), ALL]);
    assert_eq!(windows(&host), [0, 2]);
    let disk = seen(&host, "d");
    assert_eq!((disk.borrow().held, disk.borrow().memory), (false, 3));
}

#[test]
fn resets_are_counted_over_deaths() {
    let host = Host::new(vec![memory_device()]);
    let mut machine = host.machine().unwrap();
    assert_eq!(seen(&host, "m").borrow().machine_resets, 0);
    machine.count_reset();
    machine.settle().unwrap();
    assert_eq!(seen(&host, "m").borrow().machine_resets, 1);
    drop(machine);
    let _machine = host.machine().unwrap();
    assert_eq!(seen(&host, "m").borrow().machine_resets, 1);
}
