//! What the machine tells of itself in memory: all ACPI tables, and SMBIOS found as an operating system without EFI finds it.

use crate::acpi::{Table, Tables, number};
use crate::println;
use crate::pvh::StartInfo;

/// Where the entry point is looked for.
const FIRST: usize = 0xf_0000;
const LAST: usize = 0x10_0000;

/// `test=tables`: one line for each ACPI table that the root lists, and one for each SMBIOS structure.
pub fn list(info: &StartInfo) {
    let Some(tables) = Tables::find(info.rsdp) else { return println!("no ACPI tables") };
    for table in tables.all() {
        let text = |range: core::ops::Range<usize>| table.get(range).unwrap_or_default().escape_ascii();
        println!(
            "table {} len={} rev={} oem={},{},{} compiler={},{} body={:x}",
            text(0..4),
            table.len(),
            number(table, 8, 1),
            text(10..16),
            text(16..24),
            number(table, 24, 4),
            text(28..32),
            number(table, 32, 4),
            hash(table.get(36..).unwrap_or_default()),
        );
    }
    match structures() {
        None => println!("no SMBIOS"),
        Some(structures) => each(structures),
    }
    println!("end of the tables");
}

/// FNV-1a, 32 bits.
fn hash(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193))
}

/// The structures that the 64-bit entry point leads to.
fn structures() -> Option<Table> {
    let entry = (FIRST..LAST).step_by(16).find_map(|at| {
        // SAFETY: 24 bytes below 1 MiB, which is mapped memory.
        let entry = unsafe { core::slice::from_raw_parts(at as *const u8, 24) };
        let sum = entry.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
        (entry.starts_with(b"_SM3_") && sum == 0).then_some(entry)
    })?;
    let (size, at) = (number(entry, 12, 4) as usize, number(entry, 16, 8) as usize);
    if at + size > LAST {
        return None;
    }
    // SAFETY: it lies below 1 MiB, which is mapped memory.
    Some(unsafe { core::slice::from_raw_parts(at as *const u8, size) })
}

fn each(mut rest: Table) {
    while let (Some(&kind), Some(&size)) = (rest.first(), rest.get(1)) {
        let Some((fields, after)) = rest.split_at_checked(usize::from(size)) else { break };
        let Some(end) = after.windows(2).position(|pair| pair == [0, 0]) else { break };
        match kind {
            1 => println!(
                "smbios 1 uuid={:08x}-{:04x}-{:04x}-{:04x}-{:012x}",
                number(fields, 8, 4),
                number(fields, 12, 2),
                number(fields, 14, 2),
                number(fields, 16, 2).swap_bytes() >> 48,
                number(fields, 18, 6).swap_bytes() >> 16,
            ),
            16 => println!("smbios 16 bytes={}", number(fields, 15, 8)),
            19 => println!("smbios 19 from={:#x} to={:#x}", number(fields, 15, 8), number(fields, 23, 8)),
            other => println!("smbios {other}"),
        }
        rest = &after[end + 2..];
    }
}
