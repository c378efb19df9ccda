//! ACPI tables: RSDP, XSDT, FADT, FACS, DSDT, MADT, MCFG (ACPI specification 6.4).
//!
//! ACPI is always enabled (no SMI command port). The power button is a control-method device notified
//! by a generic event device with an interrupt of its own.

mod pci;
pub mod user;

use acpi_tables::Aml;
use acpi_tables::aml::{
    Arg, Device, EISAName, Equal, IO, If, Interrupt, Method, Name, Notify, Package, Path, ResourceTemplate,
    Scope,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use bulkhead_bus_api::platform::{
    COM1, COM1_GSI, IOAPIC_BASE, LAPIC_BASE, PM_TIMER, PM1_CONTROL, PM1_EVENT, POWER_BUTTON_GSI,
    RESET_CONTROL, RESET_VALUE, RTC, RTC_GSI, Range, SCI_GSI, SLP_TYP_S5,
};
use bulkhead_control_api::config::CpuTopology;

use crate::Error;
use crate::layout::{ACPI, ACPI_END, FACS};

const OEM: [u8; 6] = *b"BULKHD";
const OEM_TABLE: [u8; 8] = *b"BULKHEAD";
const OEM_REVISION: u32 = 1;
const HEADER: u32 = 36;
const FACS_SIZE: usize = 64;
/// Tables begin on such boundaries.
const ALIGN: u64 = 16;

/// Fixed feature flags (table 5.10).
mod flag {
    /// WBINVD works.
    pub const WBINVD: u32 = 1;
    /// C1 on all processors.
    pub const PROC_C1: u32 = 1 << 2;
    /// The power button is a control-method device.
    pub const PWR_BUTTON: u32 = 1 << 4;
    /// There is no fixed sleep button.
    pub const SLP_BUTTON: u32 = 1 << 5;
    /// The RTC's alarm has no fixed status bit.
    pub const FIX_RTC: u32 = 1 << 6;
    /// The PM timer has 32 bits.
    pub const TMR_VAL_EXT: u32 = 1 << 8;
    /// The reset register works.
    pub const RESET_REG_SUP: u32 = 1 << 10;
    /// No display, keyboard or mouse.
    pub const HEADLESS: u32 = 1 << 12;
}

/// IA-PC boot architecture (table 5.11): ISA devices, no VGA; no bit for an 8042, of which only the
/// reset protocol exists.
const BOOT_ARCH: u16 = 1 | 1 << 2;
/// MADT: there is an 8259 as well.
const PCAT_COMPAT: u32 = 1;
/// Local APIC entry: enabled.
const ENABLED: u32 = 1;
/// The highest id that an xAPIC entry can carry.
const XAPIC_MAX: u32 = 254;
/// Interrupt source override: edge, active high.
const EDGE_HIGH: u16 = 0b0101;

/// A port range's base, for tables in which ports have 16 bits.
fn port(range: Range) -> u16 {
    u16::try_from(range.base).unwrap_or(0)
}

fn length(range: Range) -> u8 {
    u8::try_from(range.len).unwrap_or(0)
}

fn table(signature: &[u8; 4], size: u32, revision: u8) -> Sdt {
    Sdt::new(*signature, size, revision, OEM, OEM_TABLE, OEM_REVISION)
}

/// Who made the machine, and which machine.
type Ids = ([u8; 6], [u8; 8]);

fn io(range: Range) -> IO {
    IO::new(port(range), port(range), 1, length(range))
}

/// An edge-triggered, active-high, exclusive interrupt.
fn irq(gsi: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, gsi)
}

/// Devices, and the PCI bus of a VM whose RAM ends at `ram_end`.
fn dsdt(ram_end: u64) -> Sdt {
    let name = |name: &str, value: &dyn Aml| Name::new(Path::new(name), value);
    let s5 = name("_S5_", &Package::new(vec![&SLP_TYP_S5, &SLP_TYP_S5, &0u8, &0u8]));

    let (com1_io, com1_irq, rtc_io, rtc_irq) = (io(COM1), irq(COM1_GSI), io(RTC), irq(RTC_GSI));
    let com1_hid = name("_HID", &EISAName::new("PNP0501"));
    let com1_uid = name("_UID", &0u8);
    let com1_crs = name("_CRS", &ResourceTemplate::new(vec![&com1_io, &com1_irq]));
    let com1 = Device::new(Path::new("COM1"), vec![&com1_hid, &com1_uid, &com1_crs]);

    let rtc_hid = name("_HID", &EISAName::new("PNP0B00"));
    let rtc_crs = name("_CRS", &ResourceTemplate::new(vec![&rtc_io, &rtc_irq]));
    let rtc = Device::new(Path::new("RTC_"), vec![&rtc_hid, &rtc_crs]);

    let button_hid = name("_HID", &EISAName::new("PNP0C0C"));
    let button = Device::new(Path::new("PWRB"), vec![&button_hid]);

    let event_irq = irq(POWER_BUTTON_GSI);
    let event_hid = name("_HID", &"ACPI0013");
    let event_uid = name("_UID", &0u8);
    let event_crs = name("_CRS", &ResourceTemplate::new(vec![&event_irq]));
    let (target, pressed) = (Path::new("\\_SB_.PWRB"), 0x80u8);
    let notify = Notify::new(&target, &pressed);
    let is_button = Equal::new(&Arg(0), &POWER_BUTTON_GSI);
    let when = If::new(&is_button, vec![&notify]);
    let event = Method::new(Path::new("_EVT"), 1, true, vec![&when]);
    let ged = Device::new(Path::new("GED_"), vec![&event_hid, &event_uid, &event_crs, &event]);

    let mut table = table(b"DSDT", HEADER, 2);
    let mut aml = Vec::new();
    Scope::new(Path::new("\\_SB_"), vec![&com1, &rtc, &button, &ged]).to_aml_bytes(&mut aml);
    s5.to_aml_bytes(&mut aml);
    table.append_slice(&aml);
    table.append_slice(&pci::scope(ram_end));
    table
}

/// A generic address structure for I/O ports; `access` is 1 for bytes, 2 for words, 3 for dwords.
fn gas(range: Range, access: u8) -> [u8; 12] {
    let [a, b, ..] = range.base.to_le_bytes();
    [1, length(range) * 8, 0, access, a, b, 0, 0, 0, 0, 0, 0]
}

fn fadt(dsdt: u64, (oem, oem_table): Ids) -> Sdt {
    let low = |address: u64| u32::try_from(address).unwrap_or(0);
    let flags = flag::WBINVD
        | flag::PROC_C1
        | flag::PWR_BUTTON
        | flag::SLP_BUTTON
        | flag::FIX_RTC
        | flag::TMR_VAL_EXT
        | flag::RESET_REG_SUP
        | flag::HEADLESS;
    let mut table = Sdt::new(*b"FACP", 276, 6, oem, oem_table, OEM_REVISION);
    table.write_u32(36, low(FACS));
    table.write_u32(40, low(dsdt));
    table.write_u16(46, u16::try_from(SCI_GSI).unwrap_or(0));
    table.write_u32(56, port(PM1_EVENT).into());
    table.write_u32(64, port(PM1_CONTROL).into());
    table.write_u32(76, port(PM_TIMER).into());
    table.write_u8(88, length(PM1_EVENT));
    table.write_u8(89, length(PM1_CONTROL));
    table.write_u8(91, length(PM_TIMER));
    // C2 and C3 latencies beyond the limits: there are none.
    table.write_u16(96, 0xfff);
    table.write_u16(98, 0xfff);
    // The RTC's century register.
    table.write_u8(108, 0x32);
    table.write_u16(109, BOOT_ARCH);
    table.write_u32(112, flags);
    table.write_bytes(116, &gas(RESET_CONTROL, 1));
    table.write_u8(128, RESET_VALUE);
    // Minor version of 6.4.
    table.write_u8(131, 4);
    table.write_u64(140, dsdt);
    table.write_bytes(148, &gas(PM1_EVENT, 2));
    table.write_bytes(172, &gas(PM1_CONTROL, 2));
    table.write_bytes(208, &gas(PM_TIMER, 3));
    table.write_bytes(268, &OEM_TABLE);
    table
}

fn facs() -> [u8; FACS_SIZE] {
    let mut facs = [0; FACS_SIZE];
    crate::bytes::put(&mut facs, 0, b"FACS");
    crate::bytes::put(&mut facs, 4, &64u32.to_le_bytes());
    // Version 2: there is a 64-bit waking vector.
    crate::bytes::put(&mut facs, 32, &[2]);
    facs
}

fn override_of(source: u8, gsi: u32, flags: u16) -> [u8; 10] {
    let ([a, b, c, d], [e, f]) = (gsi.to_le_bytes(), flags.to_le_bytes());
    [2, 10, 0, source, a, b, c, d, e, f]
}

/// One local APIC entry: xAPIC where the id fits, else x2APIC.
fn cpu(uid: u32, id: u32) -> Vec<u8> {
    match (u8::try_from(uid), u8::try_from(id)) {
        (Ok(uid), Ok(short)) if id <= XAPIC_MAX => [&[0, 8, uid, short], &ENABLED.to_le_bytes()[..]].concat(),
        _ => [[9, 16, 0, 0], id.to_le_bytes(), ENABLED.to_le_bytes(), uid.to_le_bytes()].concat(),
    }
}

fn madt(cpus: &CpuTopology) -> Sdt {
    let mut table = table(b"APIC", HEADER, 5);
    let address = |base: u64| u32::try_from(base).unwrap_or(0).to_le_bytes();
    let mut body = [address(LAPIC_BASE), PCAT_COMPAT.to_le_bytes()].concat();
    for uid in 0..cpus.cpus {
        body.extend(cpu(uid, cpus.place(uid).apic_id));
    }
    // The I/O APIC with id 0, for GSIs from 0.
    body.extend([[1, 12, 0, 0], address(IOAPIC_BASE), [0; 4]].as_flattened());
    body.extend(override_of(0, 2, 0));
    body.extend(override_of(u8::try_from(SCI_GSI).unwrap_or(0), SCI_GSI, EDGE_HIGH));
    // LINT1 of all processors is the NMI.
    body.extend([4, 6, 0xff, 0, 0, 1]);
    table.append_slice(&body);
    table
}

/// All tables with their addresses, for a VM whose RAM ends at `ram_end`; the RSDP is the first, at [`ACPI`]. The user's
/// tables are put where they are said to begin, and come last.
///
/// # Errors
/// [`Error::AcpiTooLarge`].
pub fn tables(
    cpus: &CpuTopology,
    ram_end: u64,
    (top, user): (u64, &[Vec<u8>]),
) -> Result<Vec<(u64, Vec<u8>)>, Error> {
    if cpus.cpus > CpuTopology::MAX_CPUS {
        return Err(Error::Unsupported("more vCPUs than a VM can have"));
    }
    let mut next = ACPI + (Rsdp::len() as u64).next_multiple_of(ALIGN);
    let mut place = |bytes: Vec<u8>| {
        let at = next;
        next = (at + bytes.len() as u64).next_multiple_of(ALIGN);
        (at, bytes)
    };
    let dsdt = place(dsdt(ram_end).as_slice().to_vec());
    // An operating system believes a SLIC only if the others are of the same machine.
    let (oem, oem_table) = user::slic_ids(user).unwrap_or((OEM, OEM_TABLE));
    let fadt = place(fadt(dsdt.0, (oem, oem_table)).as_slice().to_vec());
    let madt = place(madt(cpus).as_slice().to_vec());
    let mcfg = place(pci::mcfg());
    let mut root = XSDT::new(oem, oem_table, OEM_REVISION);
    root.add_entry(fadt.0);
    root.add_entry(madt.0);
    root.add_entry(mcfg.0);
    let mut at = top;
    let mut own = Vec::new();
    for table in user {
        root.add_entry(at);
        own.push((at, table.clone()));
        at = (at + table.len() as u64).next_multiple_of(ALIGN);
    }
    let mut bytes = Vec::new();
    root.to_aml_bytes(&mut bytes);
    let xsdt = place(bytes);
    let mut rsdp = Vec::new();
    Rsdp::new(OEM, xsdt.0).to_aml_bytes(&mut rsdp);
    if next > ACPI_END {
        return Err(Error::AcpiTooLarge(usize::try_from(next - ACPI).unwrap_or(usize::MAX)));
    }
    let ours = [(ACPI, rsdp), dsdt, fadt, madt, mcfg, xsdt, (FACS, facs().to_vec())];
    Ok(ours.into_iter().chain(own).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bytes::{u32_at, u64_at};

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    fn of(cpus: u32) -> Vec<(u64, Vec<u8>)> {
        tables(&CpuTopology { cpus, sockets: cpus, cores: 1, threads: 1 }, 128 << 20, (0, &[])).unwrap()
    }

    fn get<'a>(tables: &'a [(u64, Vec<u8>)], signature: &[u8; 4]) -> &'a [u8] {
        &tables.iter().find(|(_, bytes)| bytes.starts_with(signature)).unwrap().1
    }

    #[test]
    fn lengths_and_checksums_are_right() {
        for cpus in [1, 2, 64] {
            for (gpa, bytes) in &of(cpus) {
                assert_eq!(gpa % ALIGN, 0);
                if bytes.starts_with(b"RSD PTR ") {
                    assert_eq!((*gpa, sum(&bytes[..20]), u32_at(bytes, 20)), (ACPI, 0, 36));
                } else {
                    assert_eq!(u32_at(bytes, 4) as usize, bytes.len());
                }
                assert!(bytes.starts_with(b"FACS") || sum(bytes) == 0);
            }
        }
    }

    #[test]
    fn every_table_is_reached_and_none_overlaps() {
        let all = of(64);
        assert!(all.windows(2).all(|pair| pair[0].0 + pair[0].1.len() as u64 <= pair[1].0));
        let at = |gpa: u64| &all.iter().find(|(at, _)| *at == gpa).unwrap().1;
        let xsdt = at(u64_at(&all[0].1, 24));
        assert!(xsdt.starts_with(b"XSDT"));
        assert!(at(u64_at(xsdt, 36)).starts_with(b"FACP") && at(u64_at(xsdt, 44)).starts_with(b"APIC"));
        assert!(at(u64_at(xsdt, 52)).starts_with(b"MCFG"));
        let fadt = get(&all, b"FACP");
        assert!(
            at(u64_at(fadt, 140)).starts_with(b"DSDT") && at(u32_at(fadt, 36).into()).starts_with(b"FACS")
        );
        assert_eq!((FACS % 64, u64::from(u32_at(fadt, 40))), (0, u64_at(fadt, 140)));
    }

    #[test]
    fn the_users_tables_are_listed_behind_ours() {
        let user: Vec<Vec<u8>> = [37, 0xffff, 36].map(|size| vec![0x41; size]).into();
        let top = 0x70_0000;
        let cpus = CpuTopology { cpus: 1, sockets: 1, cores: 1, threads: 1 };
        let all = tables(&cpus, 128 << 20, (top, &user)).unwrap();
        let addresses = [top, top + 48, top + 48 + 0x1_0000];
        assert!(all[7..].iter().map(|(at, bytes)| (at, bytes)).eq(addresses.iter().zip(&user)));
        assert_eq!(user::area(&user), 48 + 0x1_0000 + 48);
        let xsdt = get(&all, b"XSDT");
        assert_eq!((xsdt.len(), sum(xsdt)), (36 + 6 * 8, 0));
        assert!((0..3).all(|n| u64_at(xsdt, 60 + n * 8) == addresses[n]));
        // Who made a machine with a SLIC is the SLIC's to say.
        let mut slic = vec![0; 36];
        slic[..4].copy_from_slice(b"SLIC");
        slic[10..24].copy_from_slice(b"SOMEONSOMETHIN");
        let all = tables(&cpus, 128 << 20, (top, &[slic])).unwrap();
        for signature in [b"XSDT", b"FACP"] {
            let table = get(&all, signature);
            assert_eq!((&table[10..24], sum(table)), (&b"SOMEONSOMETHIN"[..], 0));
        }
        assert_eq!(get(&all, b"APIC")[10..16], OEM);
    }

    #[test]
    fn the_fadt_says_what_the_platform_has() {
        let all = of(1);
        let fadt = get(&all, b"FACP");
        assert_eq!(
            (u32_at(fadt, 48), u32_at(fadt, 56), u32_at(fadt, 64), u32_at(fadt, 76)),
            (0, 0x600, 0x604, 0x608)
        );
        assert_eq!((u32_at(fadt, 112) & 1 << 20, fadt[46], fadt[128]), (0, 9, 6));
        assert_eq!((fadt[116], fadt[117], u64_at(fadt, 120)), (1, 8, 0xcf9));
    }

    #[test]
    fn the_madt_has_one_entry_per_vcpu() {
        let topology = CpuTopology { cpus: 12, sockets: 2, cores: 3, threads: 2 };
        let all = tables(&topology, 128 << 20, (0, &[])).unwrap();
        let cpus: Vec<&[u8]> = get(&all, b"APIC")[44..].chunks(8).take(12).collect();
        let ids: Vec<u8> = cpus.iter().map(|entry| entry[3]).collect();
        assert!(cpus.iter().all(|entry| entry[..2] == [0, 8] && entry[4] == 1));
        assert_eq!(ids, [0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13]);
        assert_eq!(cpu(3, 254)[..4], [0, 8, 3, 254]);
        assert_eq!(cpu(3, 255), [9, 16, 0, 0, 255, 0, 0, 0, 1, 0, 0, 0, 3, 0, 0, 0]);
        assert!(tables(&CpuTopology { cpus: 65, ..topology }, 128 << 20, (0, &[])).is_err());
    }

    #[test]
    fn the_mcfg_has_one_segment_with_all_buses() {
        let all = of(1);
        let mcfg = get(&all, b"MCFG");
        assert_eq!((mcfg.len(), u64_at(mcfg, 44)), (60, 0xe000_0000));
        assert_eq!(mcfg[52..], [0, 0, 0, 255, 0, 0, 0, 0]);
    }

    #[test]
    fn the_dsdt_names_the_windows_of_the_bus() {
        for (ram_end, base) in [(128 << 20, 4u64 << 30), ((5 << 30) + 4096, 6 << 30)] {
            let cpus = CpuTopology { cpus: 1, sockets: 1, cores: 1, threads: 1 };
            let all = tables(&cpus, ram_end, (0, &[])).unwrap();
            let dsdt = get(&all, b"DSDT");
            let has = |wanted: &[u8]| dsdt.windows(wanted.len()).any(|window| window == wanted);
            // Granularity, first and last address, translation, length.
            let high = [0, base, base + (32 << 30) - 1, 0, 32 << 30].map(u64::to_le_bytes).concat();
            let low = [0, 0xc000_0000, 0xdfff_ffff, 0, 0x2000_0000].map(u32::to_le_bytes).concat();
            assert!(has(&[&[0x8a, 43, 0, 0, 0x0c, 7][..], &high].concat()));
            assert!(has(&[&[0x87, 23, 0, 0, 0x0c, 1][..], &low].concat()));
            assert!(has(&[0x88, 13, 0, 2, 0x0c, 0, 0, 0, 0, 0, 255, 0, 0, 0, 0, 1]));
            // A fixed range of 32 bits: the configuration space.
            assert!(has(&[0x86, 9, 0, 1, 0, 0, 0, 0xe0, 0, 0, 0, 0x10]));
        }
    }

    #[test]
    fn the_dsdt_names_s5_and_the_power_button() {
        let all = of(1);
        let dsdt = get(&all, b"DSDT");
        let has = |wanted: &[u8]| dsdt.windows(wanted.len()).any(|window| window == wanted);
        assert!(has(b"_S5_\x12\x08\x04\x0a\x05\x0a\x05"));
        assert!(has(b"ACPI0013") && has(&[0x89, 6, 0, 3, 1, 20, 0, 0, 0]) && has(b"PWRB"));
    }
}
