//! Where things go in guest memory, and that no two of them overlap.
//!
//! Everything of the loader's own lies below 1 MiB; an image may only use what is above.

use crate::Error;

/// Descriptor table for the 64-bit boot protocol.
pub const GDT: u64 = 0x500;
/// `hvm_start_info`, its module list and memory map (PVH).
pub const START_INFO: u64 = 0x6000;
/// `boot_params` (bzImage), one page.
pub const BOOT_PARAMS: u64 = 0x7000;
/// Page tables for the 64-bit boot protocol: one PML4, one PDPT, four page directories.
pub const PAGE_TABLES: u64 = 0x9000;
/// Command line.
pub const CMDLINE: u64 = 0x2_0000;
/// The longest command line without its NUL.
pub const CMDLINE_MAX: usize = 0xffff;
/// End of conventional memory; the rest up to [`VGA_HOLE`] is for an EBDA, as on a PC.
pub const LOW_END: u64 = 0x9_fc00;
/// Start of what is display memory and option ROMs on a PC.
pub const VGA_HOLE: u64 = 0xa_0000;
/// ACPI tables, the RSDP first: inside the area where a BIOS has it, 16-byte aligned.
pub const ACPI: u64 = 0xe_0000;
/// End of the ACPI tables.
pub const ACPI_END: u64 = 0xf_0000;
/// The FACS, in a page of its own: the guest writes to it.
pub const FACS: u64 = 0xf_0000;
/// End of the page of the FACS.
pub const FACS_END: u64 = 0xf_1000;
/// Entry point and structures of SMBIOS: in the last 64 KiB below 1 MiB, where an operating system without EFI looks for the
/// entry point (SMBIOS 3.0, 5.2.2).
pub const SMBIOS: u64 = FACS_END;
/// End of the room for SMBIOS.
pub const SMBIOS_END: u64 = IMAGE_START;
/// Start of the memory for images.
pub const IMAGE_START: u64 = 0x10_0000;

/// A half-open range of guest physical addresses that something occupies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Claim {
    /// What it is, for messages.
    pub what: &'static str,
    /// First address.
    pub start: u64,
    /// First address behind it.
    pub end: u64,
}

/// The memory that is already spoken for.
#[derive(Debug)]
pub struct Claims {
    taken: Vec<Claim>,
    limit: u64,
}

impl Claims {
    /// Nothing but the loader's own area; RAM ends at `limit`.
    pub fn new(limit: u64) -> Self {
        let own = Claim { what: "the boot data below 1 MiB", start: 0, end: IMAGE_START };
        Self { taken: vec![own], limit }
    }

    /// Takes `len` bytes at `start`.
    pub fn take(&mut self, what: &'static str, start: u64, len: u64) -> Result<(), Error> {
        let end = start.checked_add(len).ok_or(Error::Malformed("a memory range has no end"))?;
        if let Some(other) = self.taken.iter().find(|claim| start < claim.end && claim.start < end) {
            return Err(Error::Overlap { what, start, other: other.what });
        }
        if end > self.limit {
            return Err(Error::BeyondRam { what, end, limit: self.limit });
        }
        self.taken.push(Claim { what, start, end });
        Ok(())
    }

    /// First address behind everything that is taken.
    pub fn end(&self) -> u64 {
        self.taken.iter().map(|claim| claim.end).max().unwrap_or(IMAGE_START)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn claims_do_not_overlap_or_leave_ram() {
        let mut claims = Claims::new(0x100_0000);
        claims.take("a", 0x20_0000, 0x1000).unwrap();
        claims.take("b", 0x20_1000, 0x1000).unwrap();
        assert_eq!(claims.end(), 0x20_2000);
        for (start, len) in [(0x20_0fff, 1), (0x1f_0000, 0x10_0000), (0x20_0001, 1), (0xf_ffff, 2), (0, 1)] {
            assert!(matches!(claims.take("c", start, len), Err(Error::Overlap { .. })), "{start:x}");
        }
        assert!(matches!(claims.take("d", 0xff_ffff, 2), Err(Error::BeyondRam { .. })));
        assert!(matches!(claims.take("e", u64::MAX, 2), Err(Error::Malformed(_))));
        claims.take("f", 0xff_ffff, 1).unwrap();
    }

    #[test]
    fn own_areas_are_in_order() {
        let order = [
            GDT + 32,
            START_INFO,
            BOOT_PARAMS,
            BOOT_PARAMS + 0x1000,
            PAGE_TABLES,
            PAGE_TABLES + 6 * 0x1000,
            CMDLINE,
            CMDLINE + CMDLINE_MAX as u64 + 1,
            LOW_END,
            VGA_HOLE,
            ACPI,
            ACPI_END,
            FACS,
            FACS_END,
            SMBIOS,
            SMBIOS_END,
            IMAGE_START,
        ];
        assert!(order.is_sorted(), "{order:x?}");
    }
}
