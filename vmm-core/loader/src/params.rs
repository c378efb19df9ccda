//! `boot_params`, page tables and descriptor table of the Linux 64-bit boot protocol.

use bulkhead_control_api::loader::Start;

use crate::Error;
use crate::bytes::put;
use crate::e820::Entry;
use crate::image::HEAD;
use crate::layout::{ACPI, BOOT_PARAMS, CMDLINE, GDT, PAGE_TABLES};
use crate::ram::Ram;

const SIZE: usize = 4096;
const ACPI_RSDP_ADDR: usize = 0x070;
const E820_ENTRIES: usize = 0x1e8;
const SETUP_HEADER: usize = 0x1f1;
/// The byte that says how far the setup header reaches beyond [`HEADER_MAGIC`].
const HEADER_LEN: usize = 0x201;
const HEADER_MAGIC: usize = 0x202;
const VID_MODE: usize = 0x1fa;
const TYPE_OF_LOADER: usize = 0x210;
const RAMDISK_IMAGE: usize = 0x218;
const RAMDISK_SIZE: usize = 0x21c;
const CMD_LINE_PTR: usize = 0x228;
const SETUP_DATA: usize = 0x250;
const E820_TABLE: usize = 0x2d0;
const E820_ENTRY: usize = 20;
/// A loader without a number of its own.
const LOADER_UNDEFINED: u8 = 0xff;
const VID_MODE_NORMAL: u16 = 0xffff;

/// Null, null, 0x10 code (64-bit), 0x18 data.
const DESCRIPTORS: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];
/// Present, writable.
const TABLE: u64 = 3;
/// The same, accessed, dirty, 2 MiB.
const LARGE: u64 = 0xe3;
const GIB: u64 = 4;

/// The contents of `boot_params`. `initrd` is address and size.
fn boot_params(head: &[u8; HEAD], initrd: (u32, u32), map: &[Entry]) -> [u8; SIZE] {
    let mut page = [0; SIZE];
    let header_end = HEADER_MAGIC + usize::from(head.get(HEADER_LEN).copied().unwrap_or(0));
    let header = head.get(SETUP_HEADER..header_end.min(HEAD)).unwrap_or_default();
    put(&mut page, SETUP_HEADER, header);
    put(&mut page, ACPI_RSDP_ADDR, &ACPI.to_le_bytes());
    put(&mut page, VID_MODE, &VID_MODE_NORMAL.to_le_bytes());
    put(&mut page, TYPE_OF_LOADER, &[LOADER_UNDEFINED]);
    put(&mut page, RAMDISK_IMAGE, &initrd.0.to_le_bytes());
    put(&mut page, RAMDISK_SIZE, &initrd.1.to_le_bytes());
    put(&mut page, CMD_LINE_PTR, &low32(CMDLINE).to_le_bytes());
    put(&mut page, SETUP_DATA, &[0; 8]);
    put(&mut page, E820_ENTRIES, &[u8::try_from(map.len()).unwrap_or(0)]);
    for (index, entry) in map.iter().enumerate() {
        let at = E820_TABLE + index * E820_ENTRY;
        put(&mut page, at, &entry.start.to_le_bytes());
        put(&mut page, at + 8, &entry.len.to_le_bytes());
        put(&mut page, at + 16, &entry.kind.to_le_bytes());
    }
    page
}

/// An address of the layout, all of which lie below 1 MiB.
const fn low32(address: u64) -> u32 {
    (address & 0xffff_ffff) as u32
}

/// Six pages that map the first 4 GiB one to one.
fn page_tables() -> Vec<u8> {
    let page = |entries: &mut dyn Iterator<Item = u64>| -> Vec<u64> {
        entries.chain(std::iter::repeat(0)).take(SIZE / 8).collect()
    };
    let pml4 = page(&mut std::iter::once(PAGE_TABLES + 0x1000 + TABLE));
    let pointers = page(&mut (0..GIB).map(|gib| PAGE_TABLES + 0x2000 + gib * 0x1000 + TABLE));
    let directories = (0..GIB * 512).map(|large| large << 21 | LARGE);
    pml4.into_iter().chain(pointers).chain(directories).flat_map(u64::to_le_bytes).collect()
}

/// Writes everything but kernel, initrd and command line.
pub fn write(
    ram: &Ram,
    entry: u64,
    head: &[u8; HEAD],
    initrd: (u32, u32),
    map: &[Entry],
) -> Result<Start, Error> {
    ram.write(BOOT_PARAMS, &boot_params(head, initrd, map))?;
    ram.write(PAGE_TABLES, &page_tables())?;
    ram.write(GDT, DESCRIPTORS.map(u64::to_le_bytes).as_flattened())?;
    Ok(Start::Long64 {
        rip: entry,
        rsp: 0,
        rsi: BOOT_PARAMS,
        cr3: PAGE_TABLES,
        gdt_base: GDT,
        gdt_limit: 8 * 4 - 1,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bytes::{u32_at, u64_at};

    #[test]
    fn page_tables_map_four_gib_one_to_one() {
        let tables = page_tables();
        for address in [0, 0x7000, 0x20_0000, 0x4567_8000, 0xffff_f000u64] {
            let table = u64_at(&tables, 0) - TABLE - PAGE_TABLES;
            let pointer = usize::try_from(table + (address >> 30) * 8).unwrap();
            let directory = u64_at(&tables, pointer) - TABLE - PAGE_TABLES;
            let entry = usize::try_from(directory + (address >> 21 & 511) * 8).unwrap();
            assert_eq!(u64_at(&tables, entry), address & !0x1f_ffff | LARGE);
        }
    }

    #[test]
    fn a_hostile_header_stays_within_its_field() {
        let head = [0xff; HEAD];
        let map = [Entry { start: 1, len: 2, kind: 3 }];
        let page = boot_params(&head, (0x1000, 0x2000), &map);
        assert_eq!((u32_at(&page, RAMDISK_IMAGE), u32_at(&page, RAMDISK_SIZE)), (0x1000, 0x2000));
        assert_eq!((u64_at(&page, SETUP_DATA), page[0x1ef], page[E820_ENTRIES]), (0, 0, 1));
        assert!(page[HEAD..E820_TABLE].iter().all(|&byte| byte == 0));
        assert_eq!((u64_at(&page, E820_TABLE + 8), u32_at(&page, E820_TABLE + 16)), (2, 3));
    }
}
