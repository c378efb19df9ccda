//! What an operating system is told of the PCI bus: MCFG (PCI firmware specification 3.3, 4.1.2) and the host bridge in
//! AML (4.5, 4.6.1; ACPI specification 6.2.11).
//!
//! All functions have MSI-X and no interrupt pin, so there is no `_PRT`.

use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Arg, CreateDWordField, Device, EISAName, Else, Equal, If,
    Local, Memory32Fixed, Method, Name, NotEqual, ONE, Or, Path, ResourceTemplate, Return, Scope, Store,
    Uuid, ZERO,
};
use acpi_tables::mcfg::MCFG;
use bulkhead_bus_api::platform::{ECAM, PCI_MEM32, Range, pci_mem64};

use super::{OEM, OEM_REVISION, OEM_TABLE};

/// Buses of the segment: as many as ECAM has room for.
const LAST_BUS: u8 = 255;
/// `_OSC` of a host bridge.
const OSC: &str = "33DB4D5B-1FF7-401C-9657-7441C03DD766";
/// What the operating system may control: native hot-plug, power management events, advanced error reporting, the PCI
/// Express capability structure. Not SHPC, which no bridge has.
const GRANTED: u8 = 1 | 1 << 2 | 1 << 3 | 1 << 4;
/// First word of the answer: unknown UUID, unknown revision, not all that was asked for is granted.
const UNKNOWN_UUID: u8 = 1 << 2;
const UNKNOWN_REVISION: u8 = 1 << 3;
const MASKED: u8 = 1 << 4;

/// The table that says where configuration space is.
pub fn mcfg() -> Vec<u8> {
    let mut table = MCFG::new(OEM, OEM_TABLE, OEM_REVISION);
    table.add_ecam(ECAM.base, 0, 0, LAST_BUS);
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn low(number: u64) -> u32 {
    u32::try_from(number).unwrap_or(0)
}

/// `_OSC`: which features of PCI Express the operating system controls. `give` takes the method.
fn control(give: impl FnOnce(&dyn Aml)) {
    let (status, asked, third) = (Path::new("CDW1"), Path::new("CDW3"), 8u8);
    let status_field = CreateDWordField::new(&status, &Arg(3), &ZERO);
    let asked_field = CreateDWordField::new(&asked, &Arg(3), &third);

    let grant = And::new(&Local(0), &asked, &GRANTED);
    let is_other_revision = NotEqual::new(&Arg(1), &ONE);
    let revision_bit = Or::new(&status, &status, &UNKNOWN_REVISION);
    let other_revision = If::new(&is_other_revision, vec![&revision_bit]);
    let is_less = NotEqual::new(&Local(0), &asked);
    let masked_bit = Or::new(&status, &status, &MASKED);
    let less = If::new(&is_less, vec![&masked_bit]);
    let answer = Store::new(&asked, &Local(0));

    let uuid = Uuid::new(OSC);
    let is_known = Equal::new(&Arg(0), &uuid);
    let known = If::new(&is_known, vec![&asked_field, &grant, &other_revision, &less, &answer]);
    let unknown_bit = Or::new(&status, &status, &UNKNOWN_UUID);
    let unknown = Else::new(vec![&unknown_bit]);
    let result = Return::new(&Arg(3));
    give(&Method::new(Path::new("_OSC"), 4, true, vec![&status_field, &known, &unknown, &result]));
}

/// The AML of the host bridge, of a VM whose RAM ends at `ram_end`, and of what reserves its configuration space: an
/// operating system trusts MCFG only if something else claims that range, too.
pub fn scope(ram_end: u64) -> Vec<u8> {
    let name = |name: &str, value: &dyn Aml| Name::new(Path::new(name), value);
    let last = |range: Range| range.base + range.len - 1;
    let high = pci_mem64(ram_end);
    let buses = AddressSpace::new_bus_number(0u16, u16::from(LAST_BUS));
    let kind = AddressSpaceCacheable::NotCacheable;
    let memory = AddressSpace::new_memory(kind, true, low(PCI_MEM32.base), low(last(PCI_MEM32)), None);
    let kind = AddressSpaceCacheable::PreFetchable;
    let prefetch = AddressSpace::new_memory(kind, true, high.base, last(high), None);
    let hid = name("_HID", &EISAName::new("PNP0A08"));
    let cid = name("_CID", &EISAName::new("PNP0A03"));
    let (segment, bus, uid) = (name("_SEG", &ZERO), name("_BBN", &ZERO), name("_UID", &ZERO));
    let windows = name("_CRS", &ResourceTemplate::new(vec![&buses, &memory, &prefetch]));

    let ecam = Memory32Fixed::new(true, low(ECAM.base), low(ECAM.len));
    let claim_hid = name("_HID", &EISAName::new("PNP0C02"));
    let claim_window = name("_CRS", &ResourceTemplate::new(vec![&ecam]));
    let claim = Device::new(Path::new("MCFG"), vec![&claim_hid, &uid, &claim_window]);

    let mut aml = Vec::new();
    control(|osc| {
        let children: Vec<&dyn Aml> = vec![&hid, &cid, &segment, &bus, &uid, &windows, osc];
        let bridge = Device::new(Path::new("PCI0"), children);
        Scope::new(Path::new("\\_SB_"), vec![&bridge, &claim]).to_aml_bytes(&mut aml);
    });
    aml
}
