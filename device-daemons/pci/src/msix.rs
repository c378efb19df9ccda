//! MSI-X of a function: table, pending bits, masks (PCI 3.0, 6.8.2).

use bulkhead_bus_api::pci::{MSI_WINDOW, MSI_WINDOW_MASK, Msi};

use crate::device::Msix;
use crate::space::{Space, all_ones};

/// Capability id.
pub const ID: u8 = 0x11;
/// The most vectors of one function.
pub const MAX_VECTORS: u16 = 256;
/// Message control: enable and function mask are bits 15 and 14, the table's size less one is below.
const ENABLE: u16 = 1 << 15;
const FUNCTION_MASK: u16 = 1 << 14;
/// Bytes of an entry: address, upper address, data, control.
const ENTRY: usize = 16;
/// Control word of an entry: masked.
const MASKED: u8 = 1;

/// MSI-X structures of a function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    place: Msix,
    /// Offset of the capability.
    cap: u8,
    entries: Vec<u8>,
}

/// What a part of the BAR is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Bytes of the table from this one on.
    Table(usize),
    /// Bytes of the pending bits from this one on.
    Pending(usize),
}

/// Where an entry's message goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// The vector is masked.
    Masked,
    /// The message is no interrupt of this platform.
    Foreign,
    /// To the local APICs.
    To(Msi),
}

impl Table {
    /// Adds the capability; none if there is no room for it or the structures make no sense.
    pub fn new(space: &mut Space, place: Msix) -> Option<Self> {
        let fits = (1..=MAX_VECTORS).contains(&place.vectors) && place.bar < 6;
        if !fits || !place.table.is_multiple_of(8) || !place.pba.is_multiple_of(8) {
            return None;
        }
        let bir = u32::from(place.bar);
        let control = (place.vectors - 1).to_le_bytes();
        let (table, pba) = ((place.table | bir).to_le_bytes(), (place.pba | bir).to_le_bytes());
        let body = [&control[..], &table, &pba].concat();
        let cap = space.add_capability(ID, &body, &(ENABLE | FUNCTION_MASK).to_le_bytes())?;
        let mut new = Self { place, cap, entries: vec![0; usize::from(place.vectors) * ENTRY] };
        new.reset();
        Some(new)
    }

    /// The state after power-on: every vector masked.
    pub fn reset(&mut self) {
        for entry in self.entries.chunks_exact_mut(ENTRY) {
            entry.fill(0);
            if let Some(control) = entry.get_mut(12) {
                *control = MASKED;
            }
        }
    }

    /// Whether the guest has it on.
    #[must_use]
    pub fn is_enabled(&self, space: &Space) -> bool {
        space.u16(self.cap + 2) & ENABLE != 0
    }

    /// Number of vectors.
    #[must_use]
    pub const fn vectors(&self) -> u16 {
        self.place.vectors
    }

    /// What is at an offset of a BAR.
    #[must_use]
    pub fn part(&self, bar: u8, offset: u64) -> Option<Part> {
        let within = |from: u32, len: usize| {
            let at = usize::try_from(offset.checked_sub(u64::from(from))?).ok()?;
            (bar == self.place.bar && at < len).then_some(at)
        };
        let pending = usize::from(self.place.vectors).div_ceil(64) * 8;
        within(self.place.table, self.entries.len())
            .map(Part::Table)
            .or_else(|| within(self.place.pba, pending).map(Part::Pending))
    }

    /// Reads the table.
    #[must_use]
    pub fn read(&self, at: usize, size: u8) -> u64 {
        let mut value = [0; 8];
        let bytes = self.entries.get(at..).unwrap_or_default();
        value.iter_mut().zip(bytes).take(usize::from(size)).for_each(|(to, from)| *to = *from);
        u64::from_le_bytes(value)
    }

    /// Writes the table; only whole and half entries' words may be written.
    pub fn write(&mut self, at: usize, size: u8, value: u64) {
        if !matches!(size, 4 | 8) {
            return;
        }
        for (at, new) in (at..).zip(value.to_le_bytes()).take(usize::from(size)) {
            // Of the control word only the mask is there.
            let new = match at % ENTRY {
                0 => new & !3,
                12 => new & MASKED,
                13..=15 => 0,
                _ => new,
            };
            if let Some(byte) = self.entries.get_mut(at) {
                *byte = new;
            }
        }
    }

    /// Reads pending bits; `is_pending` tells of a vector that is masked whether its interrupt waits.
    pub fn read_pending(&self, at: usize, size: u8, is_pending: impl Fn(u16) -> bool) -> u64 {
        let first = at.saturating_mul(8);
        let mut bits = 0;
        for bit in 0..(8 * usize::from(size.min(8))) {
            let vector = u16::try_from(first + bit).unwrap_or(u16::MAX);
            if vector < self.place.vectors && is_pending(vector) {
                bits |= 1 << bit;
            }
        }
        bits & all_ones(size)
    }

    /// Where a vector's message goes, as the masks and the entry say.
    #[must_use]
    pub fn route(&self, space: &Space, vector: u16) -> Route {
        let control = space.u16(self.cap + 2);
        let at = usize::from(vector) * ENTRY;
        if control & ENABLE == 0 || control & FUNCTION_MASK != 0 || vector >= self.place.vectors {
            return Route::Masked;
        }
        if self.read(at + 12, 1) & u64::from(MASKED) != 0 {
            return Route::Masked;
        }
        let word = |at| u32::try_from(self.read(at, 4)).unwrap_or(0);
        let (address, high, data) = (word(at), word(at + 4), word(at + 8));
        if high == 0 && address & MSI_WINDOW_MASK == MSI_WINDOW {
            Route::To(Msi { address, data })
        } else {
            Route::Foreign
        }
    }

    /// The table, to be saved.
    #[must_use]
    pub fn entries(&self) -> &[u8] {
        &self.entries
    }

    /// Takes over a saved table; false if it has another length.
    pub fn restore(&mut self, entries: &[u8]) -> bool {
        let fits = entries.len() == self.entries.len();
        if fits {
            self.entries.copy_from_slice(entries);
        }
        fits
    }
}

#[cfg(test)]
mod tests {
    use crate::device::Identity;
    use crate::space::Header;

    use super::*;

    fn table(vectors: u16) -> (Space, Table) {
        let identity = Identity { vendor: 1, device: 2, class: 3, revision: 4, subsystem: (5, 6) };
        let mut space = Space::new(&identity, Header::Endpoint, false);
        let place = Msix { vectors, bar: 1, table: 0x1000, pba: 0x3000 };
        let table = Table::new(&mut space, place).unwrap();
        (space, table)
    }

    #[test]
    fn the_capability_says_where_the_structures_are() {
        let (mut space, table) = table(3);
        assert_eq!(space.read(0x40, 4), 0x0002_0011);
        assert_eq!((space.read(0x44, 4), space.read(0x48, 4)), (0x1001, 0x3001));
        space.write(0x40, 4, 0xffff_ffff);
        space.write(0x44, 4, 0xffff_ffff);
        assert_eq!((space.read(0x40, 4), space.read(0x44, 4)), (0xc002_0011, 0x1001));
        assert!(table.is_enabled(&space));
    }

    #[test]
    fn parts_end_where_they_end() {
        let (_, table) = table(65);
        assert_eq!(table.part(1, 0x1000), Some(Part::Table(0)));
        assert_eq!(table.part(1, 0x1000 + 65 * 16 - 1), Some(Part::Table(65 * 16 - 1)));
        assert_eq!(table.part(1, 0x3000 + 15), Some(Part::Pending(15)));
        for (bar, offset) in [(0, 0x1000), (1, 0xfff), (1, 0x1000 + 65 * 16), (1, 0x3010), (1, u64::MAX)] {
            assert_eq!(table.part(bar, offset), None, "{bar} {offset:#x}");
        }
    }

    #[test]
    fn a_vector_is_routed_if_nothing_masks_it() {
        let (mut space, mut table) = table(2);
        let to = Route::To(Msi { address: 0xfee0_1004, data: 0x4041 });
        table.write(16, 8, 0xfee0_1007);
        table.write(24, 8, 0x4041);
        assert_eq!(table.route(&space, 1), Route::Masked, "not enabled");
        space.write(0x42, 2, 0xc000);
        assert_eq!(table.route(&space, 1), Route::Masked, "function mask");
        space.write(0x42, 2, 0x8000);
        assert_eq!(table.route(&space, 1), to);
        assert_eq!(table.route(&space, 0), Route::Masked, "its own mask");
        assert_eq!(table.route(&space, 2), Route::Masked, "no such vector");
        table.write(28, 4, 0xffff_ffff);
        assert_eq!((table.read(28, 4), table.route(&space, 1)), (1, Route::Masked));
        table.write(28, 4, 0);
        table.write(20, 4, 1);
        assert_eq!(table.route(&space, 1), Route::Foreign);
        table.write(16, 8, 0x1000);
        assert_eq!(table.route(&space, 1), Route::Foreign);
    }

    #[test]
    fn narrow_writes_and_writes_beyond_the_end_change_nothing() {
        let (_, mut table) = table(1);
        let before = table.clone();
        for at in 0..16 {
            table.write(at, 1, u64::MAX);
            table.write(at, 2, u64::MAX);
        }
        table.write(16, 8, u64::MAX);
        table.write(usize::MAX - 8, 8, u64::MAX);
        assert_eq!(table, before);
        assert_eq!(table.read(16, 8), 0);
    }

    #[test]
    fn pending_bits_are_those_of_vectors_that_exist() {
        let (_, table) = table(65);
        assert_eq!(table.read_pending(0, 8, |_| true), u64::MAX);
        assert_eq!(table.read_pending(8, 8, |_| true), 1);
        assert_eq!(table.read_pending(4, 4, |v| v == 33), 2);
        assert_eq!(table.read_pending(8, 4, |v| v == 63), 0);
    }
}
