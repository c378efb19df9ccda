//! Windows: what the guest reaches without an exit. These are the pages of configuration space of functions that are there,
//! read-only, and what devices share in their BARs.
//!
//! The window of a function's page has the function's number, so a successor of this process, which goes on with the same
//! numbers, asks for what is there already.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;
use std::rc::Rc;

use bulkhead_bus_api::pci::{Change, Window};
use bulkhead_bus_api::platform::ECAM;

use super::{Bus, PAGE};
use crate::device::Shared;
use crate::place::MAX_FUNCTIONS;

/// What all devices may share at a time, in pieces.
pub const MAX_SHARED: usize = 256;

/// What is in a window.
#[derive(Clone, Debug)]
struct Placed {
    place: Window,
    /// The file; none is the configuration window's memory.
    file: Option<Rc<OwnedFd>>,
}

impl Placed {
    fn is(&self, other: &Self) -> bool {
        let file = |placed: &Self| placed.file.as_ref().map(Rc::as_ptr);
        self.place == other.place && file(self) == file(other)
    }
}

/// The windows.
#[derive(Debug, Default)]
pub struct Windows {
    /// What core has been asked for.
    placed: BTreeMap<u16, Placed>,
    /// Pieces of guest memory that memory devices have.
    memory: BTreeMap<u16, Placed>,
    /// Numbers of such pieces that are to be nowhere, whatever a predecessor has left.
    absent: Vec<u16>,
    /// Numbers of what devices share, by function and id.
    numbers: BTreeMap<(u16, u64), u16>,
    /// Devices that wait for what has changed.
    waiting: BTreeSet<u16>,
}

impl Windows {
    /// Whether there is something in a window.
    pub fn is_placed(&self, window: u16) -> bool {
        self.placed.contains_key(&window)
    }

    /// The file of each window that has one of its own.
    pub fn files(&self) -> BTreeMap<u16, Rc<OwnedFd>> {
        let file = |(window, placed): (&u16, &Placed)| Some((*window, Rc::clone(placed.file.as_ref()?)));
        self.placed.iter().filter_map(file).collect()
    }

    /// The number of a piece; none if there are too many pieces.
    fn number(&mut self, index: u16, id: u64) -> Option<u16> {
        if let Some(number) = self.numbers.get(&(index, id)) {
            return Some(*number);
        }
        let taken: BTreeSet<u16> = self.numbers.values().copied().collect();
        let first = u16::try_from(MAX_FUNCTIONS).ok()?;
        let free = (first..).take(MAX_SHARED).find(|number| !taken.contains(number))?;
        self.numbers.insert((index, id), free);
        Some(free)
    }
}

impl Bus {
    /// These pieces of guest memory are to be there, by number of the window; at `absent` numbers there is to be nothing.
    pub fn set_memory(&mut self, pieces: impl Iterator<Item = (u16, Window, Rc<OwnedFd>)>, absent: Vec<u16>) {
        let placed = |(number, place, file)| (number, Placed { place, file: Some(file) });
        let memory: BTreeMap<u16, Placed> = pieces.map(placed).collect();
        let same = |(a, b): ((&u16, &Placed), (&u16, &Placed))| a.0 == b.0 && a.1.is(b.1);
        let unchanged = memory.len() == self.applied.memory.len()
            && memory.iter().zip(&self.applied.memory).all(same)
            && absent.is_empty();
        if !unchanged {
            (self.applied.memory, self.applied.absent) = (memory, absent);
            self.moved = true;
        }
    }

    /// Whether a device that may have changed has another shape, or shares something else.
    pub(super) fn look_for_changes(&mut self, index: u16) {
        let Some(function) = self.get_mut(index) else { return };
        if function.as_device().is_some_and(|device| device.take_changed()) {
            function.grow();
            self.applied.waiting.insert(index);
            self.stale.insert(index);
            self.rearrange();
        }
    }

    /// Core has done what was asked for, except for these windows.
    pub fn carried_out(&mut self, refused: &[u16]) {
        for index in std::mem::take(&mut self.applied.waiting) {
            let numbers = std::mem::take(&mut self.applied.numbers);
            let is_refused =
                |id: u64| numbers.get(&(index, id)).is_none_or(|number| refused.contains(number));
            if let Some(device) = self.get_mut(index).and_then(|function| function.as_device()) {
                device.carried_out(&is_refused);
            }
            self.applied.numbers = numbers;
        }
    }

    /// What is to be where.
    fn wanted_windows(&mut self) -> BTreeMap<u16, Placed> {
        let mut wanted = BTreeMap::new();
        for (page, index) in &self.pages {
            if self.get(*index).is_some_and(|function| !function.exits) {
                let offset = u64::from(*page) * PAGE;
                let place = Window { gpa: ECAM.base + offset, len: PAGE, offset, writable: false };
                wanted.insert(*index, Placed { place, file: None });
            }
        }
        let of = |(index, function): (u16, &crate::function::Function)| {
            let shared = function.device_ref().map_or(Vec::new(), |device| device.shared().to_vec());
            shared.into_iter().map(move |piece| (index, piece))
        };
        let shared: Vec<(u16, Shared)> = self.functions().flat_map(of).collect();
        let exists = |key: &(u16, u64)| shared.iter().any(|(index, piece)| *key == (*index, piece.id));
        self.applied.numbers.retain(|key, _| exists(key));
        for (index, piece) in shared {
            let Some(number) = self.applied.number(index, piece.id) else { continue };
            let Some(gpa) = self.place_of(index, &piece) else { continue };
            let Shared { len, file_offset: offset, writable, file, .. } = piece;
            let place = Window { gpa, len, offset, writable };
            wanted.insert(number, Placed { place, file: Some(file) });
        }
        wanted.extend(self.applied.memory.clone());
        wanted
    }

    /// Where a piece is to be: in its BAR, if that answers and no other one does so in the same place.
    fn place_of(&self, index: u16, piece: &Shared) -> Option<u64> {
        let start = self.address(index, piece.bar)?.checked_add(piece.offset)?;
        let end = start.checked_add(piece.len)?;
        let own = |other: &super::Decoded| other.index == index && other.bar == piece.bar;
        let apart = |other: &super::Decoded| other.base + (other.size - 1) < start || end <= other.base;
        self.decoded.iter().all(|other| own(other) || apart(other)).then_some(start)
    }

    /// Takes windows away, then puts them where they are to be.
    pub(super) fn window_changes(&mut self) -> (Vec<Change>, Vec<Change>) {
        let wanted = self.wanted_windows();
        let differs = |a: &BTreeMap<u16, Placed>, window: &u16, placed: &Placed| {
            !a.get(window).is_some_and(|other| other.is(placed))
        };
        let had = &self.applied.placed;
        let gone = had.iter().filter(|(window, placed)| differs(&wanted, window, placed));
        let new = wanted.iter().filter(|(window, placed)| differs(had, window, placed));
        let gone = gone.map(|(window, _)| *window);
        let absent = self.applied.absent.iter().copied().filter(|window| !wanted.contains_key(window));
        let off = gone.chain(absent).map(|window| Change::Window { window, to: None }).collect();
        let on = new.map(|(window, placed)| Change::Window { window: *window, to: Some(placed.place) });
        let changes = (off, on.collect());
        self.applied.placed = wanted;
        self.applied.absent.clear();
        changes
    }
}
