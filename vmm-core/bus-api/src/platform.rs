//! The platform map: where a Bulkhead VM has its memory, ports and interrupts.
//!
//! Core routes by it, the loader writes it into the ACPI tables, the daemons answer at it.

/// A half-open range of I/O ports or guest physical addresses: `base..base + len`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// First address.
    pub base: u64,
    /// Length in bytes.
    pub len: u64,
}

impl Range {
    /// Whether an access of `size` bytes at `addr` lies wholly inside.
    #[must_use]
    pub const fn contains(&self, addr: u64, size: u64) -> bool {
        match (addr.checked_sub(self.base), addr.checked_add(size)) {
            (Some(_), Some(end)) => end <= self.base + self.len,
            _ => false,
        }
    }
}

/// End of the RAM below the 32-bit hole; RAM beyond it goes on at [`HIGH_RAM_START`].
pub const LOW_RAM_END: u64 = 0xc000_0000;
/// Start of the RAM above the 32-bit hole.
pub const HIGH_RAM_START: u64 = 0x1_0000_0000;
/// The PCI windows below 4 GiB: memory that bridges and devices may decode, not prefetchable.
pub const PCI_MEM32: Range = Range { base: 0xc000_0000, len: 0x2000_0000 };
/// Length of the PCI window above RAM, see [`pci_mem64`].
pub const PCI_MEM64_LEN: u64 = 32 << 30;
/// The PCI Express configuration window (ECAM) of segment 0, buses 0 to 255: a page per function.
pub const ECAM: Range = Range { base: 0xe000_0000, len: 0x1000_0000 };
/// The I/O APIC (in the kernel).
pub const IOAPIC_BASE: u64 = 0xfec0_0000;
/// The local APICs (in the kernel).
pub const LAPIC_BASE: u64 = 0xfee0_0000;
/// One page for KVM's identity map of a vCPU in real mode (Intel), then three for its TSS.
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// Three pages for KVM's real-mode TSS (Intel).
pub const KVM_TSS: u64 = 0xfffb_d000;

/// Where `ram` bytes of RAM end: what does not fit below the PCI windows lies above 4 GiB.
#[must_use]
pub const fn ram_end(ram: u64) -> u64 {
    if ram <= LOW_RAM_END { ram } else { HIGH_RAM_START.saturating_add(ram - LOW_RAM_END) }
}

/// The PCI window above 4 GiB, for prefetchable 64-bit BARs, of a VM whose RAM ends at `ram_end`.
#[must_use]
pub const fn pci_mem64(ram_end: u64) -> Range {
    let start = if ram_end < HIGH_RAM_START { HIGH_RAM_START } else { ram_end };
    let gib = 1u64 << 30;
    Range { base: start.saturating_add(gib - 1) / gib * gib, len: PCI_MEM64_LEN }
}

/// Where pci decodes memory in a VM whose RAM ends at `ram_end`: the configuration window and both PCI windows. None of it
/// is RAM, interrupt controllers or KVM's own.
#[must_use]
pub const fn pci_ranges(ram_end: u64) -> [Range; 3] {
    [ECAM, PCI_MEM32, pci_mem64(ram_end)]
}

/// Where memory devices are in a VM whose RAM ends at `ram_end`: `len` bytes behind the PCI window.
#[must_use]
pub const fn device_memory(ram_end: u64, len: u64) -> Range {
    let window = pci_mem64(ram_end);
    Range { base: window.base.saturating_add(window.len), len }
}

/// First serial port, a 16550A.
pub const COM1: Range = Range { base: 0x3f8, len: 8 };
/// Interrupt of COM1: ISA, edge.
pub const COM1_GSI: u32 = 4;
/// i8042 data port (answers the reset and self-test protocol only).
pub const I8042_DATA: Range = Range { base: 0x60, len: 1 };
/// i8042 status and command port.
pub const I8042_COMMAND: Range = Range { base: 0x64, len: 1 };
/// MC146818 RTC: index and data.
pub const RTC: Range = Range { base: 0x70, len: 2 };
/// Interrupt of the RTC: ISA, edge.
pub const RTC_GSI: u32 = 8;
/// Reset control register: 0x06 resets (also the FADT's reset register).
pub const RESET_CONTROL: Range = Range { base: 0xcf9, len: 1 };
/// The value that the FADT names for [`RESET_CONTROL`].
pub const RESET_VALUE: u8 = 0x06;
/// PM1a event block: status (2 bytes), enable (2 bytes).
pub const PM1_EVENT: Range = Range { base: 0x600, len: 4 };
/// PM1a control block.
pub const PM1_CONTROL: Range = Range { base: 0x604, len: 2 };
/// ACPI PM timer: 32 bits at 3.579545 MHz.
pub const PM_TIMER: Range = Range { base: 0x608, len: 4 };
/// `SLP_TYP` of S5 in PM1 control, as the DSDT's `_S5` says.
pub const SLP_TYP_S5: u8 = 5;
/// System control interrupt; edge, active high by a MADT override.
pub const SCI_GSI: u32 = 9;
/// Power button, announced by a generic event device (GED); edge, active high.
pub const POWER_BUTTON_GSI: u32 = 20;

/// Port ranges that the console claims on the bus.
pub const CONSOLE_PORTS: [Range; 8] =
    [COM1, I8042_DATA, I8042_COMMAND, RTC, RESET_CONTROL, PM1_EVENT, PM1_CONTROL, PM_TIMER];
/// Interrupts of the console, in the order in which core hands out their eventfds.
pub const CONSOLE_GSIS: [u32; 4] = [COM1_GSI, RTC_GSI, SCI_GSI, POWER_BUTTON_GSI];
/// A port to which single-byte writes may be collected before the daemon sees them (COM1's
/// transmit register; see `docs/decisions/0002-links.md`).
pub const COALESCED_PORT: u16 = 0x3f8;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_holds_whole_accesses_only() {
        assert!(COM1.contains(0x3f8, 1) && COM1.contains(0x3fc, 4));
        assert!(!COM1.contains(0x3fd, 4) && !COM1.contains(0x3f7, 1) && !COM1.contains(u64::MAX, 8));
    }

    #[test]
    fn the_pci_windows_lie_beside_ram() {
        assert_eq!(PCI_MEM32.base, LOW_RAM_END);
        assert_eq!(PCI_MEM32.base + PCI_MEM32.len, ECAM.base);
        assert_eq!(pci_mem64(1 << 20).base, HIGH_RAM_START);
        assert_eq!(pci_mem64(0x1_4000_0001).base, 0x1_8000_0000);
    }

    #[test]
    fn the_console_ranges_do_not_overlap() {
        for (i, a) in CONSOLE_PORTS.iter().enumerate() {
            for b in CONSOLE_PORTS.iter().skip(i + 1) {
                assert!(a.base + a.len <= b.base || b.base + b.len <= a.base, "{a:?} {b:?}");
            }
        }
    }
}
