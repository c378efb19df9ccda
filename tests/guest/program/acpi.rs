//! What this program needs of ACPI: CPUs, PM registers, reset register, `_S5`, the event device.
//!
//! It finds things as an operating system would, so a test of it is a test of the tables. The two AML
//! objects it needs are found by their bytes, not by an interpreter.

use core::sync::atomic::{AtomicBool, Ordering};

/// A table, by its whole contents.
pub type Table = &'static [u8];

/// The tables that the root pointer leads to.
pub struct Tables {
    root: Table,
    entry_size: usize,
}

/// A number of `size` bytes at `offset`; 0 beyond the end.
pub fn number(bytes: &[u8], offset: usize, size: usize) -> u64 {
    let field = bytes.get(offset..offset + size).unwrap_or_default();
    field.iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte))
}

fn table(address: u64) -> Option<Table> {
    if address == 0 || !crate::boot::map(address) {
        return None;
    }
    let size = crate::port::read32(address + 4) as usize;
    // SAFETY: the table's own length; its checksum is verified below.
    let bytes = unsafe { core::slice::from_raw_parts(address as *const u8, size) };
    static WARNED: AtomicBool = AtomicBool::new(false);
    if sum(bytes) != 0 && !WARNED.swap(true, Ordering::SeqCst) {
        crate::println!("ACPI table at {address:#x} has a wrong checksum");
    }
    Some(bytes)
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, &byte| sum.wrapping_add(byte))
}

impl Tables {
    /// Follows the root pointer at `rsdp`.
    pub fn find(rsdp: u64) -> Option<Self> {
        if rsdp == 0 {
            return None;
        }
        // SAFETY: an RSDP has at least 20 bytes; 36 of them are readable memory in any case.
        let pointer = unsafe { core::slice::from_raw_parts(rsdp as *const u8, 36) };
        if &pointer[..8] != b"RSD PTR " || sum(&pointer[..20]) != 0 {
            return None;
        }
        if pointer[15] >= 2 {
            return Some(Self { root: table(number(pointer, 24, 8))?, entry_size: 8 });
        }
        Some(Self { root: table(number(pointer, 16, 4))?, entry_size: 4 })
    }

    /// All tables that the root lists.
    pub fn all(&self) -> impl Iterator<Item = Table> {
        let entries = self.root.get(36..).unwrap_or_default().chunks_exact(self.entry_size);
        entries.filter_map(|entry| table(number(entry, 0, self.entry_size)))
    }

    /// The first table with this signature.
    pub fn get(&self, signature: &[u8; 4]) -> Option<Table> {
        self.all().find(|table| &table[..4] == signature)
    }

    /// Local APIC ids of all enabled CPUs.
    pub fn apic_ids(&self) -> impl Iterator<Item = u32> {
        let mut rest = self.get(b"APIC").and_then(|madt| madt.get(44..)).unwrap_or_default();
        core::iter::from_fn(move || {
            let size = usize::from(*rest.get(1)?).max(2);
            let (entry, after) = rest.split_at_checked(size)?;
            rest = after;
            Some(entry)
        })
        .filter_map(|entry| match entry[0] {
            0 if number(entry, 4, 4) & 1 == 1 => Some(number(entry, 3, 1) as u32),
            9 if number(entry, 8, 4) & 1 == 1 => Some(number(entry, 4, 4) as u32),
            _ => None,
        })
    }

    /// Address of the configuration space of PCI segment 0, buses 0 to the second.
    pub fn ecam(&self) -> Option<(u64, u8)> {
        let mcfg = self.get(b"MCFG")?;
        (mcfg.len() >= 60 && number(mcfg, 54, 1) == 0).then(|| (number(mcfg, 44, 8), mcfg[55]))
    }

    /// The fixed hardware description.
    pub fn fixed(&self) -> Option<Fixed> {
        let fadt = self.get(b"FACP")?;
        Some(Fixed {
            sci: number(fadt, 46, 2) as u8,
            pm1_event: number(fadt, 56, 4) as u16,
            pm1_control: number(fadt, 64, 4) as u16,
            pm_timer: number(fadt, 76, 4) as u16,
            flags: number(fadt, 112, 4) as u32,
            reset_port: number(fadt, 120, 8) as u16,
            reset_value: number(fadt, 128, 1) as u8,
            dsdt: table(match number(fadt, 140, 8) {
                0 => number(fadt, 40, 4),
                address => address,
            })?,
        })
    }
}

/// What the FADT says.
pub struct Fixed {
    /// GSI of the system control interrupt.
    pub sci: u8,
    /// Port of PM1 status; enable is 2 bytes further.
    pub pm1_event: u16,
    /// Port of PM1 control.
    pub pm1_control: u16,
    /// Port of the PM timer.
    pub pm_timer: u16,
    /// Feature flags.
    pub flags: u32,
    /// Port of the reset register.
    pub reset_port: u16,
    /// What to write there.
    pub reset_value: u8,
    /// The AML of the machine.
    pub dsdt: Table,
}

impl Fixed {
    /// `SLP_TYPa` of S5, from the package `_S5_`.
    pub fn s5(&self) -> Option<u8> {
        let name = find(self.dsdt, b"_S5_\x12")?;
        // Package length (its encoding is 1 byte here), element count, first element.
        match *self.dsdt.get(name + 7)? {
            0x0a => self.dsdt.get(name + 8).copied(),
            small @ (0 | 1) => Some(small),
            _ => None,
        }
    }

    /// Memory windows of the PCI host bridge as `(first, end)`: below 4 GiB, above.
    pub fn pci_windows(&self) -> Option<[(u64, u64); 2]> {
        // The id PNP0A08, compressed or (in QEMU) as text; then DWord and QWord address space descriptors of type memory.
        let ids: [&[u8]; 2] = [&[0x41, 0xd0, 0x0a, 0x08], b"PNP0A08\0"];
        let bridge = &self.dsdt[ids.iter().find_map(|id| find(self.dsdt, id))?..];
        let largest = |tag: &[u8], size: usize| {
            let places = (0..bridge.len()).filter(|&at| bridge[at..].starts_with(tag));
            let window = |at: usize| {
                (number(bridge, at + 6 + size, size), number(bridge, at + 6 + 2 * size, size).wrapping_add(1))
            };
            places.map(window).max_by_key(|(first, end)| end.saturating_sub(*first))
        };
        Some([largest(&[0x87, 23, 0, 0], 4)?, largest(&[0x8a, 43, 0, 0], 8)?])
    }

    /// As [`Tables::ecam`], by the bridge's `_CBA`: QEMU's microvm has that in place of an MCFG.
    pub fn ecam(&self) -> Option<(u64, u8)> {
        // Flags of the method, a return, a DWord.
        let base = find(self.dsdt, b"_CBA")? + 4;
        self.dsdt.get(base..)?.starts_with(&[0, 0xa4, 0x0c]).then(|| (number(self.dsdt, base + 3, 4), 255))
    }

    /// GSI of the generic event device, from its extended interrupt descriptor.
    pub fn event_device(&self) -> Option<u8> {
        let device = find(self.dsdt, b"ACPI0013")?;
        let descriptor = device + find(&self.dsdt[device..], &[0x89, 6, 0])?;
        Some(number(self.dsdt, descriptor + 5, 4) as u8)
    }
}

fn find(bytes: &[u8], wanted: &[u8]) -> Option<usize> {
    bytes.windows(wanted.len()).position(|window| window == wanted)
}
