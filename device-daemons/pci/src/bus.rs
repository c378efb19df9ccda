//! The bus: which function answers an access, and what core is to change after it.
//!
//! There are no links and no memfds in here. An access changes functions at once; what must follow outside is
//! collected until [`Bus::effects`].

mod windows;

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::{Duration, Instant};

use bulkhead_bus_api::pci::{Change, MAX_BELLS, MAX_VECTORS};
use bulkhead_bus_api::platform::{ECAM, PCI_MEM32, Range, pci_mem64};
use bulkhead_bus_api::{Access, Op, Space as Addresses};
use bulkhead_control_api::config::PciKind;
use bulkhead_control_api::pci::{Event, Refusal};
use bulkhead_jail::warn;

pub use self::windows::MAX_SHARED;
use self::windows::Windows;
use crate::function::{Function, Kind, Saved};
use crate::msix::{Part, Route};
use crate::pieces::FIRST_WINDOW;
use crate::place::{MAX_FUNCTIONS, Taken};
use crate::port;
use crate::space::{self, LEN, MASTER, all_ones};

/// Bytes of configuration space per function.
const PAGE: u64 = 4096;
/// A request to give up a device may be repeated after this.
const ASK_AGAIN: Duration = Duration::from_secs(5);
/// Command register to prefetchable limit: what decides who answers at an address.
const DECIDES: std::ops::Range<usize> = 0x04..0x30;

/// What is to be done outside, in this order.
#[derive(Debug, Default)]
pub struct Effects {
    /// Bytes to write into the memfd of the configuration window, by offset.
    pub writes: Vec<(u64, Vec<u8>)>,
    /// Changes for core.
    pub changes: Vec<Change>,
    /// The file of each window that is not of the configuration window's memory.
    pub files: BTreeMap<u16, Rc<OwnedFd>>,
    /// Interrupts to raise then.
    pub raise: Vec<Rc<OwnedFd>>,
}

/// A BAR that answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Decoded {
    base: u64,
    size: u64,
    index: u16,
    bar: u8,
}

/// The bus.
pub struct Bus {
    functions: Vec<Option<Function>>,
    windows: [Range; 2],
    /// Functions by page of the configuration window.
    pages: BTreeMap<u16, u16>,
    decoded: Vec<Decoded>,
    applied: Windows,
    /// What core has is not known: a predecessor may have told it.
    pub(crate) unknown: bool,
    /// Who answers where may have changed.
    layout: bool,
    /// The same, for what core has.
    moved: bool,
    /// Functions whose configuration space or MSI-X table has changed.
    stale: BTreeSet<u16>,
    /// Functions whose state may have changed since the last commit.
    touched: BTreeSet<u16>,
    raise: BTreeSet<u16>,
    released: Vec<Change>,
    events: Vec<Event>,
    removed: Vec<Removed>,
}

/// A function that is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Removed {
    /// Its index.
    pub index: u16,
    /// Under which number something of its back end is kept.
    pub kept: Option<u32>,
}

impl Bus {
    /// An empty bus of a machine whose RAM ends at `ram_end`.
    #[must_use]
    pub fn new(ram_end: u64) -> Self {
        Self {
            functions: Vec::new(),
            windows: [PCI_MEM32, pci_mem64(ram_end)],
            pages: BTreeMap::new(),
            decoded: Vec::new(),
            applied: Windows::default(),
            unknown: true,
            layout: true,
            moved: true,
            stale: BTreeSet::new(),
            touched: BTreeSet::new(),
            raise: BTreeSet::new(),
            released: Vec::new(),
            events: Vec::new(),
            removed: Vec::new(),
        }
    }

    /// The functions with their indices.
    pub fn functions(&self) -> impl Iterator<Item = (u16, &Function)> {
        (0..).zip(&self.functions).filter_map(|(index, function)| Some((index, function.as_ref()?)))
    }

    /// The same, to be changed.
    pub fn functions_mut(&mut self) -> impl Iterator<Item = (u16, &mut Function)> {
        (0..).zip(&mut self.functions).filter_map(|(index, function)| Some((index, function.as_mut()?)))
    }

    /// A function.
    #[must_use]
    pub fn get(&self, index: u16) -> Option<&Function> {
        self.functions.get(usize::from(index))?.as_ref()
    }

    /// A function, to be changed.
    pub fn get_mut(&mut self, index: u16) -> Option<&mut Function> {
        self.functions.get_mut(usize::from(index))?.as_mut()
    }

    /// What is taken, for [`crate::place::find`].
    #[must_use]
    pub fn taken(&self) -> Vec<Taken<'_>> {
        let taken = |(index, function): (u16, &Function)| {
            let port = matches!(function.kind, Kind::Port(_));
            // The borrow of the configuration is the bus's.
            (index, function.parent, function.devfn, port)
        };
        let describe = |(index, parent, devfn, port)| {
            Some(Taken { index, config: &self.get(index)?.config, parent, devfn, port })
        };
        self.functions().map(taken).filter_map(describe).collect()
    }

    /// The first free index.
    #[must_use]
    pub fn free_index(&self) -> Option<u16> {
        let free = self.functions.iter().position(Option::is_none).unwrap_or(self.functions.len());
        u16::try_from(free).ok().filter(|_| free < MAX_FUNCTIONS)
    }

    /// Vectors and doorbells that functions have.
    fn used_wires(&self) -> (BTreeSet<u16>, BTreeSet<u16>) {
        let (mut vectors, mut bells) = (BTreeSet::new(), BTreeSet::new());
        for (_, function) in self.functions() {
            vectors.extend(function.vectors.iter().map(|vector| vector.number));
            bells.extend(function.bells.iter().map(|bell| bell.number));
        }
        (vectors, bells)
    }

    /// So many vectors and doorbells that nobody has.
    #[must_use]
    pub fn free_wires(&self, vectors: usize, bells: usize) -> Option<(Vec<u16>, Vec<u16>)> {
        let (mut used_vectors, mut used_bells) = self.used_wires();
        // Core has not heard yet that these are nobody's.
        for change in &self.released {
            match change {
                Change::NoVector { vector } => used_vectors.insert(*vector),
                Change::NoBell { bell } => used_bells.insert(*bell),
                _ => false,
            };
        }
        let vectors_left = (0..MAX_VECTORS).filter(|number| !used_vectors.contains(number));
        let bells_left = (0..MAX_BELLS).filter(|number| !used_bells.contains(number));
        let found: (Vec<u16>, Vec<u16>) =
            (vectors_left.take(vectors).collect(), bells_left.take(bells).collect());
        (found.0.len() == vectors && found.1.len() == bells).then_some(found)
    }

    /// Puts a function at a free index.
    pub fn insert(&mut self, index: u16, function: Function) {
        let at = usize::from(index);
        if at >= MAX_FUNCTIONS {
            return;
        }
        if self.functions.len() <= at {
            self.functions.resize_with(at + 1, || None);
        }
        if let Some(slot) = self.functions.get_mut(at) {
            *slot = Some(function);
        }
        self.stale.insert(index);
        self.touched.insert(index);
        self.rearrange();
    }

    /// Takes a function away. The guest is not asked.
    pub fn remove(&mut self, index: u16) {
        let Some(function) = self.functions.get_mut(usize::from(index)).and_then(Option::take) else {
            return;
        };
        // Its back end may keep the eventfds: whoever has the numbers next gets others.
        let vectors = function.vectors.iter().map(|vector| Change::NoVector { vector: vector.number });
        let bells = function.bells.iter().map(|bell| Change::NoBell { bell: bell.number });
        self.released.extend(vectors.chain(bells));
        self.removed.push(Removed { index, kept: function.kept });
        self.touched.insert(index);
        self.raise.remove(&index);
        self.rearrange();
    }

    /// All functions and ports are there: the slots are as after power-on.
    pub fn power_on(&mut self) {
        let indices: Vec<u16> = self.functions().map(|(index, _)| index).collect();
        for index in indices {
            let present = self.is_occupied(index);
            if let Some(function) = self.get_mut(index)
                && let Kind::Port(port) = &mut function.kind
            {
                port.power_on(&mut function.space, present);
            }
            self.stale.insert(index);
        }
        self.rearrange();
    }

    const fn rearrange(&mut self) {
        self.layout = true;
        self.moved = true;
    }

    /// Whether function 0 of a port's slot is there.
    fn is_occupied(&self, port: u16) -> bool {
        self.functions().any(|(_, f)| f.parent == Some(port) && f.devfn == 0 && f.plugged)
    }

    /// Functions in a port's slot.
    fn behind(&self, port: u16) -> Vec<u16> {
        let behind = self.functions().filter(|(_, f)| f.parent == Some(port) && f.plugged);
        behind.map(|(index, _)| index).collect()
    }

    /// Whether the guest has been asked to give up what is behind a port.
    fn is_leaving(&self, port: u16) -> bool {
        self.get(port).is_some_and(|f| matches!(&f.kind, Kind::Port(slot) if slot.saved.leaving))
    }

    /// Has all devices come to rest, as they must be before a reset.
    pub fn rest(&mut self) {
        for function in self.functions.iter_mut().flatten() {
            if let Some(device) = function.as_device() {
                device.set_master(false);
            }
        }
    }

    /// Puts everything into the state after power-on. What the guest was asked to give up is gone.
    pub fn reset(&mut self) {
        let indices: Vec<u16> = self.functions().map(|(index, _)| index).collect();
        for port in &indices {
            if self.is_leaving(*port) {
                self.empty_slot(*port);
            }
        }
        for index in indices {
            let present = self.is_occupied(index);
            if let Some(function) = self.get_mut(index) {
                function.reset(present);
                self.stale.insert(index);
                self.touched.insert(index);
            }
        }
        self.raise.clear();
        self.rearrange();
    }

    /// Who answers at which page and address.
    fn settle(&mut self) {
        if !std::mem::take(&mut self.layout) {
            return;
        }
        let mut buses = BTreeMap::new();
        for (index, function) in self.functions() {
            if let Kind::Port(port) = &function.kind
                && port.is_link_up(&function.space)
                && let Some(bus) = port::secondary(&function.space)
            {
                // Of two with the same number the first one has it.
                buses.entry(bus).or_insert(index);
            }
        }
        let numbers: BTreeMap<u16, u8> = buses.into_iter().map(|(bus, index)| (index, bus)).collect();
        let (mut pages, mut decoded) = (BTreeMap::new(), Vec::new());
        for (index, function) in self.functions().filter(|(_, function)| function.plugged) {
            let bus = function.parent.map_or(Some(0), |parent| numbers.get(&parent).copied());
            if let Some(bus) = bus {
                pages.entry(u16::from(bus) << 8 | u16::from(function.devfn)).or_insert(index);
            }
            decoded.extend(self.decode_bars(index, function));
        }
        (self.pages, self.decoded) = (pages, decoded);
    }

    /// The BARs of a function that answer.
    fn decode_bars(&self, index: u16, function: &Function) -> Vec<Decoded> {
        if !function.space.commands(space::MEMORY) {
            return Vec::new();
        }
        let bridge = match function.parent {
            None => None,
            Some(parent) => {
                let Some(parent) = self.get(parent) else { return Vec::new() };
                let Kind::Port(port) = &parent.kind else { return Vec::new() };
                if !port.is_link_up(&parent.space) || !parent.space.commands(space::MEMORY) {
                    return Vec::new();
                }
                Some(port::windows(&parent.space))
            }
        };
        let passes = |base: u64, size: u64| {
            let last = base + (size - 1);
            let in_windows = self.windows.iter().any(|window| window.contains(base, size));
            let inside = |window: &port::Window| window.0 <= base && last <= window.1;
            in_windows && bridge.as_ref().is_none_or(|windows| windows.iter().any(inside))
        };
        let decoded = function.bars.iter().map(|bar| (function.space.bar(bar), bar));
        decoded
            // A base that is a multiple of its size has no end beyond the address space.
            .filter(|(base, bar)| passes(*base, bar.size))
            .map(|(base, bar)| Decoded { base, size: bar.size, index, bar: bar.index })
            .collect()
    }

    /// Whose BAR holds an address, and the offset in it. The first one of several has it.
    fn decode(&self, addr: u64) -> Option<(Decoded, u64)> {
        self.decoded.iter().find_map(|decoded| {
            let offset = addr.checked_sub(decoded.base)?;
            (offset < decoded.size).then_some((*decoded, offset))
        })
    }

    /// Where a BAR of a function answers.
    #[must_use]
    pub fn address(&self, index: u16, bar: u8) -> Option<u64> {
        self.decoded.iter().find(|d| d.index == index && d.bar == bar).map(|decoded| decoded.base)
    }

    /// The bus number that the guest gave the bus of a function.
    #[must_use]
    pub fn bus_number(&self, index: u16) -> Option<u8> {
        let function = self.get(index)?;
        match function.parent {
            None => Some(0),
            Some(parent) => port::secondary(&self.get(parent)?.space),
        }
    }

    /// Does one access of the guest and returns what it reads.
    pub fn access(&mut self, access: &Access) -> u64 {
        match access.op {
            Op::Flush => 0,
            Op::Read => self.read(access.space, access.addr, access.size),
            Op::Write(data) => {
                self.write(access.space, access.addr, access.size, data);
                0
            }
        }
    }

    fn read(&mut self, addresses: Addresses, addr: u64, size: u8) -> u64 {
        let nothing = all_ones(size);
        if addresses == Addresses::Pio || !addr.is_multiple_of(u64::from(size.max(1))) {
            return nothing;
        }
        self.settle();
        if let Some((page, offset)) = config_place(addr) {
            let Some(index) = self.pages.get(&page).copied() else { return nothing };
            return self.read_config(index, offset, size).unwrap_or(nothing);
        }
        let Some((at, offset)) = self.decode(addr) else { return nothing };
        self.touched.insert(at.index);
        let Some(function) = self.get_mut(at.index) else { return nothing };
        let part = function.msix.as_ref().and_then(|table| table.part(at.bar, offset));
        match (part, &function.msix) {
            (Some(Part::Table(at)), Some(table)) => table.read(at, size),
            (Some(Part::Pending(at)), Some(table)) => {
                table.read_pending(at, size, |vector| function.is_pending(vector))
            }
            _ => function.as_device().map_or(0, |device| device.read(at.bar, offset, size)) & nothing,
        }
    }

    fn read_config(&mut self, index: u16, offset: u16, size: u8) -> Option<u64> {
        if !space::is_access(offset, size) {
            return None;
        }
        let function = self.get_mut(index)?;
        let bytes = *function.space.bytes();
        if function.exits
            && let Some(value) = function.as_device().and_then(|d| d.config_read(offset, size, &bytes))
        {
            self.touched.insert(index);
            return Some(value & all_ones(size));
        }
        Some(function.space.read(offset, size))
    }

    /// Does one write of the guest.
    pub fn write(&mut self, addresses: Addresses, addr: u64, size: u8, value: u64) {
        if addresses == Addresses::Pio || !addr.is_multiple_of(u64::from(size.max(1))) {
            return;
        }
        self.settle();
        let value = value & all_ones(size);
        if let Some((page, offset)) = config_place(addr) {
            if let Some(index) = self.pages.get(&page).copied() {
                self.write_config(index, offset, size, value);
            }
            return;
        }
        let Some((at, offset)) = self.decode(addr) else { return };
        self.touched.insert(at.index);
        let Some(function) = self.get_mut(at.index) else { return };
        match function.msix.as_ref().and_then(|table| table.part(at.bar, offset)) {
            Some(Part::Table(place)) => {
                if let Some(table) = &mut function.msix {
                    table.write(place, size, value);
                }
                self.stale.insert(at.index);
            }
            Some(Part::Pending(_)) => {}
            None => {
                if let Some(device) = function.as_device() {
                    device.write(at.bar, offset, size, value);
                }
            }
        }
    }

    fn write_config(&mut self, index: u16, offset: u16, size: u8, value: u64) {
        let Some(function) = self.get_mut(index) else { return };
        let before = *function.space.bytes();
        let (had_msix, exited) = (function.has_msix_on(), function.exits);
        if !function.space.write(offset, size, value) {
            return;
        }
        if !had_msix && function.has_msix_on() {
            function.drain_vectors();
        }
        let master = function.space.commands(MASTER);
        let mut effects = port::Effects::default();
        let mut moves = function.space.bytes().get(DECIDES) != before.get(DECIDES);
        match &mut function.kind {
            Kind::Host => {}
            Kind::Port(port) => {
                let up = port.is_link_up(&function.space);
                effects = port.written(&mut function.space, &before, offset, size);
                moves |= up != port.is_link_up(&function.space);
            }
            Kind::Device(device) => {
                let bytes: &mut [u8; LEN] = function.space.bytes_mut();
                function.exits = device.config_written(offset, size, bytes);
                device.set_master(master);
            }
        }
        moves |= function.exits != exited;
        self.stale.insert(index);
        self.touched.insert(index);
        if moves {
            self.rearrange();
        }
        if effects.power_off {
            self.power_off(index);
        } else if effects.reset {
            self.reset_behind(index);
        }
        self.check_edge(index);
    }

    /// Raises a port's interrupt if it has an event that it had not.
    fn check_edge(&mut self, index: u16) {
        let Some(function) = self.get_mut(index) else { return };
        if let Kind::Port(port) = &mut function.kind
            && port.take_edge(&function.space)
        {
            self.raise.insert(index);
        }
        self.stale.insert(index);
        self.touched.insert(index);
    }

    /// A slot has lost its power: what was to leave is gone, anything else starts anew with the next power.
    fn power_off(&mut self, port: u16) {
        if self.is_leaving(port) {
            self.empty_slot(port);
        } else {
            self.reset_behind(port);
        }
    }

    fn reset_behind(&mut self, port: u16) {
        for index in self.behind(port) {
            if let Some(function) = self.get_mut(index) {
                function.reset(false);
            }
            self.stale.insert(index);
            self.touched.insert(index);
        }
        self.rearrange();
    }

    fn empty_slot(&mut self, port: u16) {
        for index in self.behind(port) {
            let id = self.get(index).map_or(String::new(), |function| function.config.id.clone());
            self.remove(index);
            self.events.push(Event::Deleted { id });
        }
        if let Some(function) = self.get_mut(port)
            && let Kind::Port(slot) = &mut function.kind
        {
            slot.saved.leaving = false;
            slot.set_present(&mut function.space, false);
        }
        self.rearrange();
        self.check_edge(port);
    }

    /// The guest may see a function that was being added.
    pub fn plug(&mut self, index: u16) {
        let Some(function) = self.get_mut(index) else { return };
        function.plugged = true;
        let (parent, devfn) = (function.parent, function.devfn);
        self.stale.insert(index);
        self.touched.insert(index);
        self.rearrange();
        let Some(port) = parent else { return };
        if devfn == 0
            && let Some(function) = self.get_mut(port)
            && let Kind::Port(slot) = &mut function.kind
        {
            slot.set_present(&mut function.space, true);
            // A slot with a button has no other way to ask for power: Linux enables no event of presence there.
            if !slot.is_powered(&function.space) {
                slot.press_button(&mut function.space);
            }
            self.check_edge(port);
        }
    }

    /// What the queue thread of a daemon of ours owns, by the name that the opener knows it by; none while the daemon is
    /// away.
    ///
    /// # Errors
    /// [`Refusal::NoDevice`].
    pub fn thread(&self, socket: &str) -> Result<Option<Rc<OwnedFd>>, Refusal> {
        let is_its = |kind: &PciKind| matches!(kind, PciKind::Virtio(virtio) if virtio.socket == socket);
        let found = self.functions().find(|(_, function)| is_its(&function.config.kind));
        let (_, function) = found.ok_or(Refusal::NoDevice)?;
        Ok(function.device_ref().and_then(|device| device.thread()))
    }

    /// Asks the guest to give up a device.
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn unplug(&mut self, id: &str, now: Instant) -> Result<(), Refusal> {
        let found = self.functions().find(|(_, f)| f.plugged && !id.is_empty() && f.config.id == id);
        let (index, function) = found.ok_or(Refusal::NoDevice)?;
        let (asked, parent) = (function.asked, function.parent.ok_or(Refusal::NoHotplug)?);
        if !self.is_occupied(parent) {
            // The guest does not know of functions before function 0 is there.
            self.remove(index);
            self.events.push(Event::Deleted { id: id.to_owned() });
            return Ok(());
        }
        let recent = asked.is_some_and(|at| now.saturating_duration_since(at) < ASK_AGAIN);
        let Some(function) = self.get_mut(parent) else { return Err(Refusal::NoBus) };
        let Kind::Port(slot) = &mut function.kind else { return Err(Refusal::NoBus) };
        if !slot.is_powered(&function.space) {
            self.empty_slot(parent);
            return Ok(());
        }
        if recent || slot.is_busy(&function.space) {
            return Err(Refusal::Pending);
        }
        slot.saved.leaving = true;
        slot.press_button(&mut function.space);
        if let Some(function) = self.get_mut(index) {
            function.asked = Some(now);
        }
        self.check_edge(parent);
        Ok(())
    }

    /// What has happened since the last call, for the broker.
    pub fn take_events(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.events)
    }

    /// Functions that are gone since the last call.
    pub fn take_removed(&mut self) -> Vec<Removed> {
        std::mem::take(&mut self.removed)
    }

    /// Functions whose state may have changed since the last call, with what it is; none if the function is gone.
    pub fn take_touched(&mut self) -> Vec<(u16, Option<Saved>)> {
        let touched = std::mem::take(&mut self.touched);
        touched.iter().for_each(|index| self.look_for_changes(*index));
        let save = |index: u16| (index, self.get(index).filter(|f| f.plugged).map(Function::save));
        touched.into_iter().map(save).collect()
    }

    /// A device's state may have changed by what its back end said.
    pub fn touch(&mut self, index: u16) {
        self.touched.insert(index);
    }

    /// The same of all of them.
    pub fn touch_all(&mut self) {
        self.touched = self.functions().map(|(index, _)| index).collect();
    }

    /// A predecessor may have died between a change and the interrupt for it.
    pub fn raise_again(&mut self) {
        let asserted = |f: &Function| matches!(&f.kind, Kind::Port(port) if port.saved.asserted);
        self.raise = self.functions().filter(|(_, f)| asserted(f)).map(|(index, _)| index).collect();
    }

    /// What is to be done outside for all that has happened since the last call.
    pub fn effects(&mut self) -> Effects {
        self.settle();
        if self.moved {
            self.stale.extend(self.functions.iter().zip(0..).filter_map(|(f, i)| f.as_ref().map(|_| i)));
        }
        let writes = self.publish();
        let changes =
            if std::mem::take(&mut self.unknown) { self.all_changes() } else { self.some_changes() };
        self.stale.clear();
        self.moved = false;
        let vector = |bus: &Self, index: u16| Some(Rc::clone(&bus.get(index)?.vectors.first()?.fd));
        let raise = std::mem::take(&mut self.raise).into_iter().filter_map(|index| vector(self, index));
        let placed = |change: &Change| matches!(change, Change::Window { to: Some(_), .. });
        let files = if changes.iter().any(placed) { self.applied.files() } else { BTreeMap::new() };
        Effects { writes, changes, files, raise: raise.collect() }
    }

    /// What has changed of the pages that the guest reads.
    fn publish(&mut self) -> Vec<(u64, Vec<u8>)> {
        let mut writes = Vec::new();
        let by_index: BTreeMap<u16, u16> = self.pages.iter().map(|(page, index)| (*index, *page)).collect();
        for index in self.stale.clone() {
            let Some(function) = self.get_mut(index) else { continue };
            let Some(page) = by_index.get(&index).filter(|_| !function.exits) else {
                function.shown = None;
                continue;
            };
            let bytes = *function.space.bytes();
            let range = match &function.shown {
                Some((shown, old)) if shown == page => {
                    let differs = |at: &usize| bytes.get(*at) != old.get(*at);
                    (0..LEN).find(differs).zip((0..LEN).rev().find(differs))
                }
                _ => Some((0, LEN - 1)),
            };
            function.shown = Some((*page, bytes));
            if let Some((first, last)) = range {
                let offset = u64::from(*page) * PAGE + u64::try_from(first).unwrap_or(0);
                writes.push((offset, bytes.get(first..=last).unwrap_or_default().to_vec()));
            }
        }
        writes
    }

    /// The route that a vector is to have.
    fn wanted_route(function: &mut Function, vector: u16) -> Option<bulkhead_bus_api::pci::Msi> {
        match function.route(vector) {
            Route::To(msi) => Some(msi),
            Route::Masked => None,
            Route::Foreign => {
                if !std::mem::replace(&mut function.warned, true) {
                    warn!(
                        "device {:?}: the guest has set a message that is no interrupt; it goes nowhere",
                        function.config.id
                    );
                }
                None
            }
        }
    }

    /// Changes of the vectors of functions that are stale.
    fn vector_changes(&mut self) -> Vec<Change> {
        let mut changes = Vec::new();
        for index in self.stale.clone() {
            let Some(function) = self.get_mut(index) else { continue };
            for number in (0..).take(function.vectors.len()) {
                let to = Self::wanted_route(function, number);
                let Some(vector) = function.vectors.get_mut(usize::from(number)) else { continue };
                if vector.applied != to {
                    vector.applied = to;
                    changes.push(Change::Vector { vector: vector.number, to });
                }
            }
        }
        changes
    }

    /// Takes doorbells away, then puts them where they are to be.
    fn bell_changes(&mut self) -> (Vec<Change>, Vec<Change>) {
        let (mut off, mut on) = (Vec::new(), Vec::new());
        let mut wanted = Vec::new();
        for (index, function) in self.functions() {
            for bell in &function.bells {
                let at = self.address(index, bell.bar).and_then(|base| base.checked_add(bell.offset));
                // Not where another function answers.
                let own =
                    |at: &u64| self.decode(*at).is_some_and(|(d, _)| d.index == index && d.bar == bell.bar);
                wanted.push(at.filter(own));
            }
        }
        let bells = self.functions_mut().flat_map(|(_, function)| &mut function.bells);
        for (bell, at) in bells.zip(wanted) {
            if bell.applied == at {
                continue;
            }
            if bell.applied.is_some() {
                off.push(Change::Bell { bell: bell.number, at: None });
            }
            if at.is_some() {
                on.push(Change::Bell { bell: bell.number, at });
            }
            bell.applied = at;
        }
        (off, on)
    }

    fn some_changes(&mut self) -> Vec<Change> {
        let mut changes = std::mem::take(&mut self.released);
        let mut on = Vec::new();
        if self.moved {
            let (off, later) = self.bell_changes();
            changes.extend(off);
            on = later;
            let (off, new) = self.window_changes();
            changes.extend(off);
            changes.extend(new);
        }
        changes.extend(self.vector_changes());
        changes.extend(on);
        changes
    }

    /// Everything, absences included.
    fn all_changes(&mut self) -> Vec<Change> {
        self.released.clear();
        let (_, on) = self.bell_changes();
        let vectors = self.vector_changes();
        let (used_vectors, used_bells) = self.used_wires();
        let away = |bell| {
            if used_bells.contains(&bell) { Change::Bell { bell, at: None } } else { Change::NoBell { bell } }
        };
        let mut changes: Vec<Change> = (0..MAX_BELLS).map(away).collect();
        let routed: BTreeSet<u16> = vectors
            .iter()
            .filter_map(
                |change| if let Change::Vector { vector, .. } = change { Some(*vector) } else { None },
            )
            .collect();
        let others = (0..MAX_VECTORS).filter(|vector| !routed.contains(vector));
        changes.extend(others.map(|vector| {
            let masked = used_vectors.contains(&vector);
            if masked { Change::Vector { vector, to: None } } else { Change::NoVector { vector } }
        }));
        let (_, new) = self.window_changes();
        // What is there already stays there: a guest that reads it does not come out. What memory devices have is not known yet.
        let absent = (0..FIRST_WINDOW).filter(|window| !self.applied.is_placed(*window));
        changes.extend(absent.map(|window| Change::Window { window, to: None }));
        changes.extend(new);
        changes.extend(vectors);
        changes.extend(on);
        changes
    }
}

/// Page and offset of an address in the configuration window.
fn config_place(addr: u64) -> Option<(u16, u16)> {
    let at = addr.checked_sub(ECAM.base).filter(|at| *at < ECAM.len)?;
    Some((u16::try_from(at / PAGE).ok()?, u16::try_from(at % PAGE).ok()?))
}
