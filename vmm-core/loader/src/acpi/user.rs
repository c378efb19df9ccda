//! Tables that the user gives (`-acpitable`), by QEMU's rules: the header comes from the contents or is made, fields that
//! the option names replace its own, length and checksum are right whatever the contents say.
//!
//! Only the size of the contents is looked at, and the header's place: what a table means is the guest's to find out.

use bulkhead_control_api::config::AcpiTable;
use bulkhead_jail::warn;

use super::ALIGN;
use crate::bytes::{put, u32_at};
use crate::{Error, Source};

/// Size of a header.
const HEADER: usize = 36;
/// The largest table with its header, as in QEMU.
const MAX: u64 = 0xffff;
/// Where fields are (ACPI specification 6.4, table 5.4).
const LENGTH: usize = 4;
const REVISION: usize = 8;
const CHECKSUM: usize = 9;
const OEM_ID: usize = 10;
const OEM_TABLE_ID: usize = 16;
const OEM_REVISION: usize = 24;
const COMPILER_ID: usize = 28;
const COMPILER_REVISION: usize = 32;

/// The header of a table whose contents have none: QEMU's, less what is set in any case.
const DEFAULT: [u8; HEADER] = *b"QEMU\0\0\0\0\x01\0QEMUQEQEMUQEMU\x01\0\0\0QEMU\x01\0\0\0";

/// One table: the contents of its files, one after the other, with the header that the option asks for.
///
/// # Errors
/// [`Error::TableTooShort`], [`Error::TableTooBig`], [`Error::Read`].
pub fn table<S: Source + ?Sized>(option: &AcpiTable, files: &[&S]) -> Result<Vec<u8>, Error> {
    let sizes = files.iter().map(|file| file.size()).collect::<Result<Vec<u64>, Error>>()?;
    let contents = sizes.iter().fold(0u64, |sum, size| sum.saturating_add(*size));
    let made = if option.has_header { 0 } else { HEADER };
    if option.has_header && contents < HEADER as u64 {
        return Err(Error::TableTooShort { available: contents, expected: HEADER as u64 });
    }
    let size = contents.saturating_add(made as u64);
    if size > MAX {
        return Err(Error::TableTooBig { requested: size, max: MAX });
    }
    let mut table = vec![0; usize::try_from(size).unwrap_or(0)];
    put(&mut table, 0, DEFAULT.get(..made).unwrap_or_default());
    let mut rest = table.get_mut(made..).unwrap_or_default();
    for (file, size) in files.iter().zip(&sizes) {
        let len = usize::try_from(*size).unwrap_or(usize::MAX).min(rest.len());
        let (part, after) = rest.split_at_mut(len);
        file.read_at(0, part)?;
        rest = after;
    }
    let length = u32_at(&table, LENGTH);
    if option.has_header && u64::from(length) != size {
        let at = &option.at;
        warn!("{at}: ACPI table has wrong length, header says {length}, actual size {size} bytes");
    } else if !option.has_header && option.header.is_empty() {
        warn!("{}: ACPI table: no headers are specified", option.at);
    }
    finish(option, &mut table);
    Ok(table)
}

/// Sets the header's fields.
fn finish(option: &AcpiTable, table: &mut [u8]) {
    let header = &option.header;
    let rev = header.rev.map(u8::to_le_bytes);
    let [oem_rev, compiler_rev] =
        [header.oem_rev, header.asl_compiler_rev].map(|rev| rev.map(u32::to_le_bytes));
    let fields: [(usize, Option<&[u8]>); 7] = [
        (0, header.sig.as_ref().map(|sig| &sig[..])),
        (REVISION, rev.as_ref().map(|rev| &rev[..])),
        (OEM_ID, header.oem_id.as_ref().map(|id| &id[..])),
        (OEM_TABLE_ID, header.oem_table_id.as_ref().map(|id| &id[..])),
        (OEM_REVISION, oem_rev.as_ref().map(|rev| &rev[..])),
        (COMPILER_ID, header.asl_compiler_id.as_ref().map(|id| &id[..])),
        (COMPILER_REVISION, compiler_rev.as_ref().map(|rev| &rev[..])),
    ];
    for (at, value) in fields {
        put(table, at, value.unwrap_or_default());
    }
    let length = u32::try_from(table.len()).unwrap_or(0);
    put(table, LENGTH, &length.to_le_bytes());
    put(table, CHECKSUM, &[0]);
    let sum = table.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
    put(table, CHECKSUM, &[sum.wrapping_neg()]);
}

/// Bytes that the tables take together.
pub fn area(tables: &[Vec<u8>]) -> u64 {
    tables.iter().map(|table| (table.len() as u64).next_multiple_of(ALIGN)).sum()
}

/// OEM id and OEM table id of the first SLIC among the tables, which those of XSDT and FADT must equal.
pub fn slic_ids(tables: &[Vec<u8>]) -> Option<([u8; 6], [u8; 8])> {
    let slic = tables.iter().find(|table| table.starts_with(b"SLIC"))?;
    Some((*slic.get(OEM_ID..)?.first_chunk()?, *slic.get(OEM_TABLE_ID..)?.first_chunk()?))
}

#[cfg(test)]
mod tests {
    use bulkhead_control_api::config::AcpiHeader;

    use super::*;

    fn option(has_header: bool, header: AcpiHeader) -> AcpiTable {
        AcpiTable { at: "-acpitable".into(), files: Vec::new(), has_header, header }
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    const ALL: AcpiHeader = AcpiHeader {
        sig: Some(*b"TEST"),
        rev: Some(7),
        oem_id: Some(*b"ab\0\0\0\0"),
        oem_table_id: Some(*b"12345678"),
        oem_rev: Some(0x0102_0304),
        asl_compiler_id: Some(*b"ASLC"),
        asl_compiler_rev: Some(0x0506_0708),
    };

    #[test]
    fn contents_without_a_header_get_one() {
        let table = table(&option(false, AcpiHeader::default()), &[&b"some"[..], b"", b"thing"]).unwrap();
        assert_eq!(&table[..8], b"QEMU\x2d\0\0\0");
        assert_eq!(&table[10..], b"QEMUQEQEMUQEMU\x01\0\0\0QEMU\x01\0\0\0something");
        assert_eq!((table[8], sum(&table)), (1, 0));
    }

    #[test]
    fn every_field_is_replaced() {
        for has_header in [false, true] {
            let contents = [0xff; 40];
            let table = table(&option(has_header, ALL), &[&contents[..]]).unwrap();
            assert_eq!(u32_at(&table, 4) as usize, table.len());
            assert_eq!(table.len(), if has_header { 40 } else { 76 });
            assert_eq!((&table[..4], table[8], sum(&table)), (&b"TEST"[..], 7, 0));
            assert_eq!(&table[10..36], b"ab\0\0\0\x0012345678\x04\x03\x02\x01ASLC\x08\x07\x06\x05");
            assert!(table[36..].iter().all(|&byte| byte == 0xff));
        }
    }

    #[test]
    fn a_header_keeps_what_is_not_replaced_but_length_and_checksum() {
        let mut contents = [0x55; 100];
        contents[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
        let header = AcpiHeader { rev: Some(1), ..AcpiHeader::default() };
        let table = table(&option(true, header), &[&contents[..50], &contents[50..]]).unwrap();
        assert_eq!((u32_at(&table, 4), table[8], sum(&table)), (100, 1, 0));
        assert!(table[..4].iter().chain(&table[10..]).all(|&byte| byte == 0x55));
    }

    #[test]
    fn sizes_are_those_of_qemu() {
        let of = |has_header, size: usize| table(&option(has_header, ALL), &[&vec![0; size][..]]);
        assert!(matches!(of(true, 35), Err(Error::TableTooShort { available: 35, expected: 36 })));
        assert!(matches!(of(true, 0x1_0000), Err(Error::TableTooBig { requested: 0x1_0000, max: 0xffff })));
        assert!(matches!(of(false, 0xffff - 35), Err(Error::TableTooBig { requested: 0x1_0000, .. })));
        for (has_header, size) in [(true, 36), (true, 0xffff), (false, 0), (false, 0xffff - 36)] {
            assert_eq!(sum(&of(has_header, size).unwrap()), 0);
        }
    }

    /// A file that says anything of its size, and has another one.
    struct Liar(u64, usize);

    impl Source for Liar {
        fn size(&self) -> Result<u64, Error> {
            Ok(self.0)
        }

        fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), Error> {
            [1; 100][..self.1].read_at(offset, buffer)
        }
    }

    #[test]
    fn files_that_change_or_lie_are_refused() {
        let of = |files: &[&Liar]| table(&option(false, ALL), files);
        assert!(matches!(of(&[&Liar(50, 49)]), Err(Error::Read(_))));
        assert_eq!(of(&[&Liar(50, 51), &Liar(10, 10)]).unwrap().len(), 96);
        let huge = Liar(u64::MAX, 100);
        assert!(matches!(of(&[&huge, &huge]), Err(Error::TableTooBig { requested: u64::MAX, .. })));
    }

    #[test]
    fn a_slic_says_who_made_the_machine() {
        let slic = table(&option(false, AcpiHeader { sig: Some(*b"SLIC"), ..ALL }), &[&b""[..]]).unwrap();
        assert_eq!(slic_ids(&[vec![0; 40], slic]), Some((*b"ab\0\0\0\0", *b"12345678")));
        assert_eq!(slic_ids(&[vec![0; 40]]), None);
    }
}
