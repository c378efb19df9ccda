//! A device without a back end, and a core that keeps what it is told.

#![allow(dead_code, reason = "each test uses a part")]
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "helpers of tests")]

pub mod drive;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Instant;

use bulkhead_bus_api::pci::{Change, MAX_WINDOWS, Msi, Window};
use bulkhead_bus_api::platform::ECAM;
use bulkhead_bus_api::{Access, Op, Space};
use bulkhead_control_api::config::{PciDevice, PciKind, PciPlace, Virtio};
use bulkhead_pci::bus::{Bus, Effects};
use bulkhead_pci::device::{Backed, Bar, Capability, Device, Identity, Msix, Shared, ToMemory, Wires};
use bulkhead_pci::function::Function;
use bulkhead_pci::memory::Memory;
use bulkhead_pci::pieces::Ask;
use nix::poll::PollFd;
use nix::sys::eventfd::{EfdFlags, EventFd};

/// What a test sees of a device.
#[derive(Debug, Default)]
pub struct Seen {
    pub registers: BTreeMap<(u8, u64), u64>,
    pub master: bool,
    pub resets: usize,
    pub wires: Wires,
    pub placed: Vec<u8>,
    pub connected: Vec<String>,
    pub missing: Vec<String>,
    pub known: bool,
    pub paused: bool,
    pub quiet: bool,
    pub abandoned: usize,
    /// It comes to rest with a new connection only.
    pub stubborn: bool,
    pub kept: Option<Rc<OwnedFd>>,
    pub shared: Vec<Shared>,
    /// What it shares has changed.
    pub changed: bool,
    /// Whether core refused the first piece, by call.
    pub carried_out: Vec<bool>,
    /// Known once it has inherited something.
    pub inherits: bool,
    /// What the daemon of a memory device asks, and what it is told.
    pub asks: Vec<Ask>,
    pub told: Vec<ToMemory>,
    /// Pieces of guest memory, as it was set last.
    pub memory: usize,
    /// Its back end has not answered to a change of guest memory.
    pub telling: bool,
    pub held: bool,
    pub machine_resets: u64,
}

/// A device with BAR 0 (64 bits, prefetchable, registers and doorbells) and BAR 2 (MSI-X). A write to byte 12 of its
/// capability makes reads of its configuration space exit, or not.
pub struct Mock {
    pub seen: Rc<RefCell<Seen>>,
    /// What it shares, as of its last change.
    pub shared: Vec<Shared>,
    pub vectors: u16,
    pub bells: u64,
    /// Of BAR 0.
    pub size: u64,
}

impl Mock {
    pub fn new() -> (Self, Rc<RefCell<Seen>>) {
        let seen = Rc::new(RefCell::new(Seen { quiet: true, known: true, ..Seen::default() }));
        (Self { seen: Rc::clone(&seen), shared: vec![], vectors: 3, bells: 2, size: 0x4000 }, seen)
    }
}

impl Backed for Mock {
    fn missing(&self) -> Vec<String> {
        self.seen.borrow().missing.clone()
    }
    fn connected(&mut self, name: &str, _: OwnedFd) {
        let mut seen = self.seen.borrow_mut();
        seen.missing.retain(|missing| missing != name);
        seen.connected.push(name.to_owned());
        seen.known |= seen.missing.is_empty();
        seen.quiet |= seen.stubborn;
    }
    fn watch<'a>(&'a self, _: &mut Vec<PollFd<'a>>) {}
    fn advance(&mut self) {}
    fn deadline(&self) -> Option<Instant> {
        None
    }
    fn expire(&mut self) {}
    fn is_known(&self) -> bool {
        self.seen.borrow().known
    }
    fn is_connected(&self) -> bool {
        self.seen.borrow().missing.is_empty()
    }
    fn pause(&mut self) {
        self.seen.borrow_mut().paused = true;
    }
    fn resume(&mut self) {
        self.seen.borrow_mut().paused = false;
    }
    fn is_quiet(&self) -> bool {
        self.seen.borrow().quiet
    }
    fn abandon(&mut self) {
        let mut seen = self.seen.borrow_mut();
        seen.abandoned += 1;
        seen.quiet = !seen.stubborn;
    }
    fn kept(&self) -> Option<Rc<OwnedFd>> {
        self.seen.borrow().kept.clone()
    }
    fn inherit(&mut self, kept: OwnedFd) {
        let mut seen = self.seen.borrow_mut();
        seen.known |= seen.inherits;
        seen.kept = Some(Rc::new(kept));
    }
}

impl Device for Mock {
    fn identity(&self) -> Identity {
        let class = 0x01_00_00;
        Identity { vendor: 0x1af4, device: 0x1042, class, revision: 1, subsystem: (0x1af4, 0x1100) }
    }
    fn bars(&self) -> Vec<Bar> {
        vec![
            Bar { index: 0, size: self.size, wide: true, prefetch: true },
            Bar { index: 2, size: 0x2000, wide: false, prefetch: false },
        ]
    }
    fn msix(&self) -> Option<Msix> {
        Some(Msix { vectors: self.vectors, bar: 2, table: 0, pba: 0x1000 })
    }
    fn capabilities(&self) -> Vec<Capability> {
        vec![Capability { id: 9, body: vec![0; 14], writable: vec![0xff; 14] }]
    }
    fn shared(&self) -> &[Shared] {
        &self.shared
    }
    fn take_changed(&mut self) -> bool {
        let mut seen = self.seen.borrow_mut();
        self.shared = seen.shared.clone();
        std::mem::take(&mut seen.changed)
    }
    fn carried_out(&mut self, refused: &dyn Fn(u64) -> bool) {
        let mut seen = self.seen.borrow_mut();
        let first = seen.shared.first().is_some_and(|piece| refused(piece.id));
        seen.carried_out.push(first);
    }
    fn set_memory(&mut self, memory: &Rc<Memory>) {
        self.seen.borrow_mut().memory = memory.regions.len();
    }
    fn has_memory(&self) -> bool {
        !self.seen.borrow().telling
    }
    fn hold(&mut self, hold: bool) {
        self.seen.borrow_mut().held = hold;
    }
    fn set_resets(&mut self, resets: u64) {
        self.seen.borrow_mut().machine_resets = resets;
    }
    fn take_asks(&mut self) -> Vec<Ask> {
        std::mem::take(&mut self.seen.borrow_mut().asks)
    }
    fn tell_memory(&mut self, what: ToMemory) -> bool {
        self.seen.borrow_mut().told.push(what);
        true
    }
    fn placed(&mut self, offsets: &[u8]) {
        self.seen.borrow_mut().placed = offsets.to_vec();
    }
    fn bells(&self) -> Vec<(u8, u64)> {
        (0..self.bells).map(|n| (0, 0x3000 + 4 * n)).collect()
    }
    fn wire(&mut self, wires: Wires) {
        self.seen.borrow_mut().wires = wires;
    }
    fn read(&mut self, bar: u8, offset: u64, _: u8) -> u64 {
        self.seen.borrow().registers.get(&(bar, offset)).copied().unwrap_or(0)
    }
    fn write(&mut self, bar: u8, offset: u64, _: u8, value: u64) {
        let mut seen = self.seen.borrow_mut();
        if seen.registers.len() < 64 {
            seen.registers.insert((bar, offset), value);
        }
    }
    fn config_written(&mut self, _: u16, _: u8, space: &mut [u8]) -> bool {
        let placed = self.seen.borrow().placed.clone();
        placed.first().and_then(|at| space.get(usize::from(*at) + 12)).is_some_and(|armed| *armed != 0)
    }
    fn config_read(&mut self, offset: u16, _: u8, _: &[u8]) -> Option<u64> {
        let placed = self.seen.borrow().placed.clone();
        placed.first().filter(|at| offset == u16::from(**at) + 4).map(|_| 0x5678)
    }
    fn set_master(&mut self, enabled: bool) {
        self.seen.borrow_mut().master = enabled;
    }
    fn reset(&mut self) {
        let mut seen = self.seen.borrow_mut();
        seen.resets += 1;
        seen.registers.clear();
        // Another one, as with the next start of a real device.
        seen.kept = seen.kept.take().map(|_| eventfd());
    }
    fn save(&self) -> Vec<u8> {
        let seen = self.seen.borrow();
        let mut saved = Vec::new();
        for ((bar, offset), value) in &seen.registers {
            saved.push(*bar);
            saved.extend(offset.to_le_bytes());
            saved.extend(value.to_le_bytes());
        }
        saved
    }
    fn restore(&mut self, saved: &[u8]) -> bool {
        let mut seen = self.seen.borrow_mut();
        for entry in saved.chunks_exact(17) {
            let number = |at: usize| u64::from_le_bytes(entry[at..at + 8].try_into().unwrap());
            seen.registers.insert((entry[0], number(1)), number(9));
        }
        saved.len().is_multiple_of(17)
    }
}

pub fn eventfd() -> Rc<OwnedFd> {
    Rc::new(EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC).unwrap().into())
}

pub fn device(id: &str, bus: &str, addr: Option<(u8, u8)>) -> PciDevice {
    let virtio = Virtio {
        device_type: 2,
        queues: 1,
        queue_size: 256,
        config: Vec::new(),
        without: 0,
        socket: format!("vhost.{id}"),
        listens: false,
        side: None,
        resumes: true,
        memory: None,
    };
    PciDevice {
        id: id.to_owned(),
        driver: "virtio-blk-pci".to_owned(),
        place: PciPlace { bus: bus.to_owned(), addr, multifunction: false },
        kind: PciKind::Virtio(virtio),
    }
}

pub fn port(id: &str, slot: u16) -> PciDevice {
    let kind = PciKind::RootPort { chassis: 0, slot };
    PciDevice { driver: "pcie-root-port".to_owned(), kind, ..device(id, "pcie.0", None) }
}

/// Core's side: what it is told, and the guest's way to the bus.
#[derive(Default)]
pub struct Core {
    pub ecam: BTreeMap<u64, u8>,
    pub mapped: BTreeSet<u16>,
    pub routes: BTreeMap<u16, Msi>,
    pub bells: BTreeMap<u16, u64>,
    pub windows: BTreeMap<u16, Window>,
    /// Interrupts that were raised by the bus.
    pub raised: usize,
    /// Accesses that exited.
    pub exits: usize,
}

impl Core {
    pub fn apply(&mut self, effects: Effects) {
        for (offset, bytes) in effects.writes {
            assert!(offset + bytes.len() as u64 <= ECAM.len);
            self.ecam.extend((offset..).zip(bytes));
        }
        for change in effects.changes {
            self.change(change);
        }
        for fd in effects.raise {
            nix::unistd::write(&*fd, &1u64.to_ne_bytes()).unwrap();
            self.raised += 1;
        }
    }

    pub fn change(&mut self, change: Change) {
        match change {
            Change::Vector { vector, to: Some(msi) } => {
                assert!(vector < 1024 && msi.address & 0xfff0_0000 == 0xfee0_0000);
                self.routes.insert(vector, msi);
            }
            Change::NoVector { vector } => drop(self.routes.remove(&vector)),
            Change::NoBell { bell } => drop(self.bells.remove(&bell)),
            Change::Vector { vector, to: None } => drop(self.routes.remove(&vector)),
            Change::Bell { bell, at: Some(at) } => {
                assert!(bell < 900 && (0xc000_0000..0xe000_0000).contains(&at) || at >= 1 << 32, "{at:#x}");
                assert!(!self.bells.values().any(|other| *other == at), "two doorbells at {at:#x}");
                self.bells.insert(bell, at);
            }
            Change::Bell { bell, at: None } => drop(self.bells.remove(&bell)),
            Change::Window { window, to } => {
                assert!(window < MAX_WINDOWS);
                let page = |window: &Window| {
                    let at = window.gpa.checked_sub(ECAM.base).filter(|at| *at < ECAM.len)?;
                    assert_eq!((window.len, window.offset, window.writable), (0x1000, at, false));
                    u16::try_from(at >> 12).ok()
                };
                if let Some(old) = self.windows.remove(&window) {
                    page(&old).map(|page| self.mapped.remove(&page));
                }
                let Some(to) = to else { return };
                let over = |other: &Window| to.gpa < other.gpa + other.len && other.gpa < to.gpa + to.len;
                assert!(!self.windows.values().any(over), "{to:x?} is over another window");
                self.windows.insert(window, to);
                self.mapped.extend(page(&to));
            }
        }
    }

    /// A read of the guest, from memory where core has it.
    pub fn read(&mut self, bus: &mut Bus, addr: u64, size: u8) -> u64 {
        if let Some(at) = addr.checked_sub(ECAM.base).filter(|at| *at < ECAM.len)
            && self.mapped.contains(&u16::try_from(at >> 12).unwrap())
        {
            let byte = |n: u64| u64::from(self.ecam.get(&(at + n)).copied().unwrap_or(0)) << (8 * n);
            return (0..u64::from(size)).map(byte).sum();
        }
        self.exits += 1;
        let data = bus.access(&Access { space: Space::Mmio, addr, size, op: Op::Read });
        self.apply(bus.effects());
        data
    }

    pub fn write(&mut self, bus: &mut Bus, addr: u64, size: u8, value: u64) {
        self.exits += 1;
        bus.access(&Access { space: Space::Mmio, addr, size, op: Op::Write(value) });
        self.apply(bus.effects());
    }
}

/// Address of a register in the configuration window.
pub fn config(bus: u64, slot: u64, function: u64, offset: u64) -> u64 {
    ECAM.base + (bus << 20 | slot << 15 | function << 12 | offset)
}

/// Adds a function with wires of its own.
pub fn insert(bus: &mut Bus, mut function: Function) -> u16 {
    let (vectors, bells) = function.needs();
    let (vectors, bells) = bus.free_wires(vectors, bells).unwrap();
    let wires = |numbers: Vec<u16>| numbers.into_iter().map(|number| (number, eventfd())).collect();
    function.wire(wires(vectors), wires(bells));
    let index = bus.free_index().unwrap();
    bus.insert(index, function);
    index
}

/// Adds a device where the rules of places put it.
pub fn add(bus: &mut Bus, config: PciDevice, hot: bool) -> (u16, Rc<RefCell<Seen>>) {
    let place = bulkhead_pci::place::find(&bus.taken(), &config, hot).unwrap();
    let (mock, seen) = Mock::new();
    let mut function = match config.kind {
        PciKind::RootPort { slot, .. } => Function::port(config, place.devfn, slot).unwrap(),
        PciKind::Virtio(_) => Function::device(config, place.parent, place.devfn, Box::new(mock)).unwrap(),
    };
    function.plugged = !hot;
    let index = insert(bus, function);
    if hot {
        bus.plug(index);
    }
    (index, seen)
}
