//! A virtio device on a bench: a driver on one side, a back end that does as it is told on the other.
#![allow(dead_code, reason = "each test binary uses a part of it")]
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test that cannot go on fails"
)]

pub mod play;

use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Instant;

use bulkhead_control_api::config::{PciDevice, PciKind, PciPlace, Virtio};
use bulkhead_pci::device::{Backed as _, Device as _, Wires};
use bulkhead_pci::event;
use bulkhead_pci::frontend::wire::protocol;
use bulkhead_pci::virtio::VirtioPci;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

use crate::common::peer::{CONFIG_LEN, Peer};
use crate::common::{BASE, Ram, VERSION_1, eventfd};

pub const BAR: u8 = 4;
pub const SELECT: u64 = 0x16;
pub const SIZE: u64 = 0x18;
pub const VECTOR: u64 = 0x1a;
pub const ENABLE: u64 = 0x1c;
pub const QUEUE_RESET: u64 = 0x3a;
pub const STATUS: u64 = 0x14;
pub const GENERATION: u64 = 0x15;
pub const ISR: u64 = 0x1000;
pub const CONFIG: u64 = 0x2000;
pub const NOTIFY: u64 = 0x3000;
/// Acknowledged, driver, features agreed on, ready.
pub const READY: u64 = 15;
pub const NEEDS_RESET: u64 = 64;
pub const RING_RESET: u64 = 1 << 40;
/// Room between the parts of two queues.
const PART: u64 = 0x1_0000;

pub fn virtio() -> Virtio {
    Virtio {
        device_type: 2,
        queues: 2,
        queue_size: 256,
        config: vec![0; CONFIG_LEN],
        without: 0,
        socket: "vhost.d0".into(),
        listens: false,
        side: None,
        resumes: true,
        memory: None,
    }
}

pub fn config(virtio: Virtio) -> PciDevice {
    let place = PciPlace { bus: "pcie.0".into(), addr: None, multifunction: false };
    PciDevice { id: "d0".into(), driver: "virtio-blk-pci".into(), place, kind: PciKind::Virtio(virtio) }
}

pub struct Bench {
    pub device: VirtioPci,
    pub peer: Option<Peer>,
    pub ram: Ram,
    pub wires: Wires,
    pub virtio: Virtio,
}

impl Bench {
    /// Without a back end.
    pub fn empty(virtio: Virtio) -> Self {
        let ram = Ram::new();
        let device = VirtioPci::new(&config(virtio.clone()), &ram.memory).unwrap();
        let fds = |count| (0..count).map(|_| eventfd()).collect();
        let vectors = device.msix().unwrap().vectors;
        let wires = Wires { vectors: fds(vectors), bells: fds(virtio.queues) };
        let mut bench = Self { device, peer: None, ram, wires, virtio };
        bench.wire();
        bench
    }

    pub fn new() -> Self {
        Self::of(virtio())
    }

    /// With a back end that has answered.
    pub fn of(virtio: Virtio) -> Self {
        let mut bench = Self::empty(virtio);
        bench.connect();
        assert!(bench.device.is_known());
        bench
    }

    fn wire(&mut self) {
        self.device.wire(self.wires.clone());
        let count = self.device.capabilities().len();
        let places: Vec<u8> = (0x60..).step_by(20).take(count).collect();
        self.device.placed(&places);
        self.device.set_master(true);
    }

    pub fn connect(&mut self) {
        self.connect_with(|_| {});
    }

    pub fn connect_with(&mut self, change: impl Fn(&mut Peer)) {
        let (mut peer, stream) = Peer::pair(protocol::WANTED);
        change(&mut peer);
        assert_eq!(self.device.missing().first(), Some(&self.virtio.socket));
        self.device.connected(&self.virtio.socket.clone(), stream);
        self.peer = Some(peer);
        self.serve();
    }

    /// The back end dies.
    pub fn kill(&mut self) {
        self.peer = None;
        self.serve();
        assert!(!self.device.is_connected());
    }

    /// Both sides go on until nothing is left to do.
    pub fn serve(&mut self) {
        for _ in 0..1000 {
            self.device.advance();
            let turn = self.peer.as_mut().and_then(Peer::turn);
            if let (Some((_, Some(answer))), Some(peer)) = (&turn, &self.peer) {
                peer.send(answer);
            }
            let busy = self.device.deadline().is_some_and(|at| at <= Instant::now());
            if turn.is_none() && !busy {
                return;
            }
        }
        panic!("they do not come to rest");
    }

    /// The process dies, the back end notices, another process takes over.
    pub fn restart(&mut self) {
        let kept = self.device.kept();
        self.restart_with(kept);
    }

    /// The same, but what was kept does not come back.
    pub fn restart_without_kept(&mut self) {
        self.restart_with(None);
    }

    fn restart_with(&mut self, kept: Option<Rc<OwnedFd>>) {
        let saved = self.device.save();
        assert!(saved.len() <= bulkhead_pci::device::MAX_SAVED, "{}", saved.len());
        self.device = VirtioPci::new(&config(self.virtio.clone()), &self.ram.memory).unwrap();
        self.peer = None;
        let master = true;
        self.device.wire(self.wires.clone());
        self.wire();
        self.device.set_master(false);
        if let Some(kept) = kept {
            self.device.inherit(kept.try_clone().unwrap());
        }
        assert!(self.device.restore(&saved));
        self.device.set_master(master);
    }

    pub fn read(&mut self, offset: u64, size: u8) -> u64 {
        self.device.read(BAR, offset, size)
    }

    pub fn write(&mut self, offset: u64, size: u8, value: u64) {
        self.device.write(BAR, offset, size, value);
    }

    pub fn status(&mut self) -> u64 {
        self.read(STATUS, 1)
    }

    pub fn add_status(&mut self, bits: u64) {
        let status = self.status();
        self.write(STATUS, 1, status | bits);
    }

    pub fn offered(&mut self) -> u64 {
        let mut half = |select| {
            self.write(0, 4, select);
            self.read(4, 4)
        };
        half(0) | half(1) << 32
    }

    pub fn accept(&mut self, features: u64) {
        for (select, half) in [features & 0xffff_ffff, features >> 32].into_iter().enumerate() {
            self.write(8, 4, select as u64);
            self.write(12, 4, half);
        }
    }

    /// As Linux begins: reset, acknowledge, driver, features.
    pub fn negotiate(&mut self, features: u64) {
        self.write(STATUS, 1, 0);
        self.serve();
        assert_eq!(self.status(), 0);
        self.add_status(1);
        self.add_status(2);
        let offered = self.offered();
        self.accept(offered & features);
        self.add_status(8);
        assert_eq!(self.status(), 11);
    }

    pub fn areas(index: u16) -> [u64; 3] {
        let desc = BASE + PART * u64::from(index);
        [desc, desc + 0x1000, desc + 0x2000]
    }

    pub fn set_areas(&mut self, areas: [u64; 3]) {
        for (at, area) in [0x20, 0x28, 0x30].into_iter().zip(areas) {
            self.write(at, 4, area & 0xffff_ffff);
            self.write(at + 4, 4, area >> 32);
        }
    }

    pub fn set_up_queue(&mut self, index: u16) {
        self.write(SELECT, 2, index.into());
        assert_ne!(self.read(SIZE, 2), 0);
        self.write(SIZE, 2, 8);
        self.set_areas(Self::areas(index));
        self.write(VECTOR, 2, u64::from(index) + 1);
        assert_eq!(self.read(VECTOR, 2), u64::from(index) + 1);
        self.write(ENABLE, 2, 1);
        assert_eq!(self.read(ENABLE, 2), 1);
    }

    /// As Linux's driver does it all.
    pub fn drive(&mut self, features: u64) {
        self.negotiate(features);
        self.write(0x10, 2, 0);
        for index in 0..self.virtio.queues {
            self.set_up_queue(index);
        }
        self.add_status(4);
        assert_eq!(self.status(), READY);
    }

    /// A device that runs.
    pub fn running() -> Self {
        Self::running_of(virtio())
    }

    pub fn running_of(virtio: Virtio) -> Self {
        let mut bench = Self::of(virtio);
        bench.drive(VERSION_1 | RING_RESET);
        bench.serve();
        bench
    }

    /// The requests that the back end got since the last call.
    pub fn log(&mut self) -> Vec<u32> {
        self.peer.as_mut().map_or(Vec::new(), |peer| std::mem::take(&mut peer.log))
    }

    /// Whether a vector was raised since the last call.
    pub fn raised(&mut self, vector: usize) -> bool {
        self.commit();
        taken(&self.wires.vectors[vector])
    }

    /// The state is kept: the guest hears of it.
    pub fn commit(&mut self) {
        self.device.save();
        self.device.take_interrupts().iter().for_each(|fd| event::signal(fd).unwrap());
    }

    pub fn kicked(&self, queue: usize) -> bool {
        taken(&self.wires.bells[queue])
    }

    /// Sets the indices of a queue's rings in memory.
    pub fn set_indices(&self, queue: u16, avail: u16, used: u16) {
        let part = PART * u64::from(queue);
        self.ram.write(part + 0x1002, &avail.to_le_bytes());
        self.ram.write(part + 0x2002, &used.to_le_bytes());
    }
}

pub fn taken(fd: &Rc<OwnedFd>) -> bool {
    let signalled = event::is_signalled(fd);
    event::drain(fd);
    signalled
}

pub fn pair_of_packets() -> (OwnedFd, OwnedFd) {
    socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap()
}
