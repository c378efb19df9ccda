//! The memory map that the guest is told, in the types of e820 (ACPI specification, table 15.4).

use bulkhead_bus_api::platform::ECAM;

use crate::layout::{ACPI, ACPI_END, FACS, FACS_END, IMAGE_START, LOW_END, VGA_HOLE};
use crate::ram::Ram;

/// Usable memory.
pub const RAM: u32 = 1;
/// Not to be used.
pub const RESERVED: u32 = 2;
/// ACPI tables.
pub const ACPI_DATA: u32 = 3;
/// ACPI memory that is kept over suspend.
pub const ACPI_NVS: u32 = 4;

/// One range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// First address.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
    /// One of the types above.
    pub kind: u32,
}

/// All ranges in ascending order. The user's ACPI tables lie between `top` and the end of the low RAM.
pub fn map(ram: &Ram, top: u64) -> Vec<Entry> {
    let range = |start, end, kind| Entry { start, len: end - start, kind };
    let mut entries = vec![
        range(0, LOW_END, RAM),
        range(LOW_END, VGA_HOLE, RESERVED),
        range(ACPI, ACPI_END, ACPI_DATA),
        range(FACS, FACS_END, ACPI_NVS),
        range(FACS_END, IMAGE_START, RESERVED),
        range(IMAGE_START, top, RAM),
    ];
    if top < ram.low_end() {
        entries.push(range(top, ram.low_end(), ACPI_DATA));
    }
    // An operating system that finds it here uses it from early on.
    entries.push(Entry { start: ECAM.base, len: ECAM.len, kind: RESERVED });
    let others = ram.regions().iter().skip(1);
    entries.extend(others.map(|region| Entry { start: region.gpa, len: region.len, kind: RAM }));
    entries
}

#[cfg(test)]
mod tests {
    use bulkhead_control_api::loader::Region;

    use super::*;

    #[test]
    fn the_map_is_sorted_and_has_all_ram() {
        let regions = vec![Region { gpa: 0, len: 3 << 30 }, Region { gpa: 4 << 30, len: 5 << 30 }];
        let all = Ram::anonymous(regions).unwrap();
        let map = map(&all, all.low_end());
        assert!(map.windows(2).all(|pair| pair[0].start + pair[0].len <= pair[1].start), "{map:x?}");
        let ram: u64 = map.iter().filter(|entry| entry.kind == RAM).map(|entry| entry.len).sum();
        assert_eq!(ram, (8 << 30) - (IMAGE_START - LOW_END));
        let with_tables = super::map(&all, (3 << 30) - 0x2000);
        assert_eq!(with_tables.len(), map.len() + 1);
        assert!(with_tables.contains(&Entry { start: (3 << 30) - 0x2000, len: 0x2000, kind: ACPI_DATA }));
        assert!(with_tables.contains(&Entry { start: IMAGE_START, len: (3 << 30) - 0x10_2000, kind: RAM }));
    }
}
