//! `hvm_start_info` of the Xen PVH start of day, version 1, with its module list and memory map.

use bulkhead_control_api::loader::Start;

use crate::Error;
use crate::bytes::put;
use crate::e820::Entry;
use crate::layout::{ACPI, CMDLINE, START_INFO};
use crate::ram::Ram;

const MAGIC: u32 = 0x336e_c578;
const VERSION: u32 = 1;
const MODULE_AT: usize = 64;
const MAP_AT: usize = 128;
const MAP_ENTRY: usize = 24;

/// Writes the structures; `initrd` is address and size.
pub fn write(ram: &Ram, entry: u32, initrd: Option<(u64, u64)>, map: &[Entry]) -> Result<Start, Error> {
    let address = |offset: usize| START_INFO + offset as u64;
    let mut info = vec![0; MAP_AT + map.len() * MAP_ENTRY];
    put(&mut info, 0, &MAGIC.to_le_bytes());
    put(&mut info, 4, &VERSION.to_le_bytes());
    if let Some((start, len)) = initrd {
        put(&mut info, 12, &1u32.to_le_bytes());
        put(&mut info, 16, &address(MODULE_AT).to_le_bytes());
        put(&mut info, MODULE_AT, &start.to_le_bytes());
        put(&mut info, MODULE_AT + 8, &len.to_le_bytes());
    }
    put(&mut info, 24, &CMDLINE.to_le_bytes());
    put(&mut info, 32, &ACPI.to_le_bytes());
    put(&mut info, 40, &address(MAP_AT).to_le_bytes());
    put(&mut info, 48, &u32::try_from(map.len()).unwrap_or(0).to_le_bytes());
    for (index, entry) in map.iter().enumerate() {
        let at = MAP_AT + index * MAP_ENTRY;
        put(&mut info, at, &entry.start.to_le_bytes());
        put(&mut info, at + 8, &entry.len.to_le_bytes());
        put(&mut info, at + 16, &entry.kind.to_le_bytes());
    }
    ram.write(START_INFO, &info)?;
    let ebx = u32::try_from(START_INFO).map_err(|_| Error::Malformed("the start info is above 4 GiB"))?;
    Ok(Start::Pvh32 { eip: entry, ebx })
}
