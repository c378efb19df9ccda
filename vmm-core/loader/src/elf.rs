//! ELF kernels with a PVH entry note (`XEN_ELFNOTE_PHYS32_ENTRY`), loaded at their physical addresses.

use crate::bytes::{u16_at, u32_at, u64_at};
use crate::image::{Plan, Protocol, Segment};
use crate::layout::{CMDLINE_MAX, Claims};
use crate::{Error, Source};

/// First bytes of an ELF file.
pub const MAGIC: &[u8] = b"\x7fELF";

const CLASS_64: u8 = 2;
const LITTLE_ENDIAN: u8 = 1;
const MACHINE_X86_64: u16 = 62;
const PHDR_SIZE: usize = 56;
/// The most program headers; real kernels have fewer than ten.
const MAX_PHDRS: u16 = 64;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
const NOTE_HEADER: usize = 12;
/// The most notes that are looked at in a segment.
const MAX_NOTES: usize = 256;
const PHYS32_ENTRY: u32 = 18;
const XEN: &[u8] = b"Xen\0";

/// Checks headers and notes.
pub fn plan<S: Source + ?Sized>(source: &S, head: &[u8], size: u64, ram_end: u64) -> Result<Plan, Error> {
    if head.get(4) != Some(&CLASS_64)
        || head.get(5) != Some(&LITTLE_ENDIAN)
        || u16_at(head, 18) != MACHINE_X86_64
    {
        return Err(Error::Unsupported("the ELF file is not for x86-64"));
    }
    let (table, entry_size, count) = (u64_at(head, 32), u16_at(head, 54), u16_at(head, 56));
    if usize::from(entry_size) != PHDR_SIZE || count == 0 || count > MAX_PHDRS {
        return Err(Error::Malformed("the ELF program header table"));
    }
    inside("the ELF program header table", table, u64::from(count) * PHDR_SIZE as u64, size)?;
    let headers = (0..u64::from(count)).map(|index| {
        let mut header = [0; PHDR_SIZE];
        source.read_at(table + index * PHDR_SIZE as u64, &mut header).map(|()| header)
    });
    let (mut segments, mut entry) = (Vec::new(), None);
    let mut claims = Claims::new(ram_end);
    // The note first: an ELF file without it is no kernel, whatever else is wrong with it.
    for header in headers.clone() {
        let header = header?;
        if u32_at(&header, 0) == PT_NOTE && entry.is_none() {
            entry = note(source, &header, size)?;
        }
    }
    let entry = entry.ok_or(Error::Unsupported(
        "the ELF file has no PVH entry note: build the kernel with CONFIG_PVH=y, or give its bzImage",
    ))?;
    for header in headers {
        let header = header?;
        if u32_at(&header, 0) == PT_LOAD {
            segments.extend(load(&header, size, &mut claims)?);
        }
    }
    let holds = |s: &Segment| (s.gpa..s.gpa + s.file_len).contains(&u64::from(entry));
    if !segments.iter().any(holds) {
        return Err(Error::Malformed("the PVH entry point is outside of all segments"));
    }
    let protocol = Protocol::Pvh { entry };
    Ok(Plan { protocol, segments, claims, initrd_limit: ram_end, cmdline_max: CMDLINE_MAX })
}

/// Refuses what does not lie inside the file.
fn inside(what: &'static str, offset: u64, len: u64, size: u64) -> Result<(), Error> {
    match offset.checked_add(len) {
        Some(end) if end <= size => Ok(()),
        end => Err(Error::Truncated { what, end: end.unwrap_or(u64::MAX), size }),
    }
}

fn load(header: &[u8], size: u64, claims: &mut Claims) -> Result<Option<Segment>, Error> {
    let (offset, gpa) = (u64_at(header, 8), u64_at(header, 24));
    let (file_len, memory_len) = (u64_at(header, 32), u64_at(header, 40));
    if memory_len == 0 {
        return Ok(None);
    }
    inside("an ELF segment", offset, file_len, size)?;
    let zero_len = memory_len
        .checked_sub(file_len)
        .ok_or(Error::Malformed("an ELF segment is longer in the file than in memory"))?;
    claims.take("an ELF segment", gpa, memory_len)?;
    Ok(Some(Segment { offset, file_len, gpa, zero_len }))
}

/// The PVH entry point, if the segment has that note.
fn note<S: Source + ?Sized>(source: &S, header: &[u8], size: u64) -> Result<Option<u32>, Error> {
    let (mut at, len) = (u64_at(header, 8), u64_at(header, 32));
    inside("an ELF note segment", at, len, size)?;
    let (end, header_len) = (at + len, NOTE_HEADER as u64);
    for _ in 0..MAX_NOTES {
        if end - at < header_len {
            return Ok(None);
        }
        let mut note = [0; NOTE_HEADER];
        source.read_at(at, &mut note)?;
        let (name_len, value_len) = (u64::from(u32_at(&note, 0)), u64::from(u32_at(&note, 4)));
        let value_at = at + header_len + name_len.next_multiple_of(4);
        let next = value_at + value_len.next_multiple_of(4);
        if value_at + value_len > end {
            return Err(Error::Malformed("an ELF note is longer than its segment"));
        }
        if u32_at(&note, 8) == PHYS32_ENTRY && name_len == XEN.len() as u64 {
            let mut name = [0; XEN.len()];
            source.read_at(at + header_len, &mut name)?;
            if name == XEN {
                return value(source, value_at, value_len).map(Some);
            }
        }
        at = next.min(end);
    }
    Err(Error::Malformed("too many ELF notes"))
}

fn value<S: Source + ?Sized>(source: &S, at: u64, len: u64) -> Result<u32, Error> {
    let mut bytes = [0; 8];
    match len {
        4 => source.read_at(at, bytes.first_chunk_mut::<4>().unwrap_or(&mut [0; 4]))?,
        8 => source.read_at(at, &mut bytes)?,
        _ => return Err(Error::Malformed("the PVH note is neither 4 nor 8 bytes long")),
    }
    u32::try_from(u64::from_le_bytes(bytes)).map_err(|_| Error::Malformed("the PVH entry is above 4 GiB"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bytes::put;
    use crate::image;

    const RAM: u64 = 64 << 20;
    const NOTE_AT: usize = 0x800;

    /// Header fields: type, offset, physical address, length in the file, length in memory.
    type Header = (u32, u64, u64, u64, u64);

    fn elf(headers: &[Header]) -> Vec<u8> {
        let mut file = vec![0; 0x3000];
        put(&mut file, 0, b"\x7fELF\x02\x01\x01");
        put(&mut file, 16, &[2, 0, 62, 0]);
        put(&mut file, 32, &64u64.to_le_bytes());
        put(&mut file, 54, &56u16.to_le_bytes());
        put(&mut file, 56, &u16::try_from(headers.len()).unwrap().to_le_bytes());
        for (index, (kind, offset, gpa, file_len, memory_len)) in headers.iter().enumerate() {
            let at = 64 + index * PHDR_SIZE;
            put(&mut file, at, &kind.to_le_bytes());
            for (field, value) in [(8, offset), (24, gpa), (32, file_len), (40, memory_len)] {
                put(&mut file, at + field, &value.to_le_bytes());
            }
        }
        // Another note, then ours.
        put(&mut file, NOTE_AT, &[4, 0, 0, 0, 1, 0, 0, 0, 18, 0, 0, 0, b'G', b'N', b'U', 0, 9, 0, 0, 0]);
        put(
            &mut file,
            NOTE_AT + 20,
            &[4, 0, 0, 0, 4, 0, 0, 0, 18, 0, 0, 0, b'X', b'e', b'n', 0, 0, 0, 0x20, 0],
        );
        file
    }

    const NOTE: Header = (PT_NOTE, NOTE_AT as u64, 0, 40, 40);
    const CODE: Header = (PT_LOAD, 0x1000, 0x20_0000, 0x1000, 0x8000);

    fn plan(headers: &[Header]) -> Result<Plan, Error> {
        image::plan(&elf(headers)[..], RAM)
    }

    #[test]
    fn segments_and_entry_are_found() {
        let empty = (PT_LOAD, u64::MAX, 0, 0, 0);
        let plan = plan(&[CODE, empty, NOTE]).unwrap();
        assert_eq!(plan.protocol, Protocol::Pvh { entry: 0x20_0000 });
        let segment = Segment { offset: 0x1000, file_len: 0x1000, gpa: 0x20_0000, zero_len: 0x7000 };
        assert_eq!((plan.segments, plan.claims.end()), (vec![segment], 0x20_8000));
    }

    #[test]
    fn segments_that_do_not_fit_are_refused() {
        let with = |header: Header| plan(&[NOTE, CODE, header]);
        let load = |offset, gpa, file_len, memory_len| with((PT_LOAD, offset, gpa, file_len, memory_len));
        assert!(matches!(load(0x1000, 0x20_7fff, 1, 1), Err(Error::Overlap { .. })));
        assert!(matches!(load(0x1000, 0xf_ffff, 1, 1), Err(Error::Overlap { .. })));
        assert!(matches!(load(0x1000, 0, 1, 1), Err(Error::Overlap { .. })));
        assert!(matches!(load(0x1000, RAM - 1, 1, 2), Err(Error::BeyondRam { .. })));
        assert!(matches!(load(0x1000, 0xd000_0000, 1, 1), Err(Error::BeyondRam { .. })));
        assert!(matches!(load(0x1000, 1 << 32, 1, 1), Err(Error::BeyondRam { .. })));
        assert!(matches!(load(0x1000, u64::MAX, 1, 2), Err(Error::Malformed(_))));
        assert!(matches!(load(0x1000, 0x40_0000, 2, 1), Err(Error::Malformed(_))));
        assert!(matches!(load(0x1000, 0x40_0000, 0x2001, 0x2001), Err(Error::Truncated { .. })));
        assert!(matches!(load(u64::MAX, 0x40_0000, 2, 2), Err(Error::Truncated { .. })));
    }

    #[test]
    fn notes_are_not_trusted() {
        let note = |len: u64| (PT_NOTE, NOTE_AT as u64, 0, len, len);
        assert!(matches!(plan(&[CODE]), Err(Error::Unsupported(_))));
        assert!(matches!(plan(&[CODE, note(20)]), Err(Error::Unsupported(_))));
        assert!(matches!(plan(&[CODE, note(36)]), Err(Error::Malformed(_))));
        assert!(matches!(plan(&[CODE, (PT_NOTE, 0x2ff8, 0, 40, 40)]), Err(Error::Truncated { .. })));
        assert!(matches!(plan(&[CODE, (PT_NOTE, 0x1000, 0, 0x2000, 0)]), Err(Error::Malformed(_))));
        assert!(matches!(plan(&[NOTE]), Err(Error::Malformed(_))), "the entry is in no segment");
        let mut file = elf(&[CODE, NOTE]);
        put(&mut file, NOTE_AT + 20 + 4, &[5]);
        assert!(matches!(image::plan(&file[..], RAM), Err(Error::Malformed(_))));
    }

    #[test]
    fn other_elf_files_are_refused() {
        for (at, value) in [(4, 1), (5, 2), (18, 40)] {
            let mut file = elf(&[CODE, NOTE]);
            put(&mut file, at, &[value]);
            assert!(matches!(image::plan(&file[..], RAM), Err(Error::Unsupported(_))), "{at}");
        }
        for (at, value) in [(54, 57), (56, 0), (56, 65)] {
            let mut file = elf(&[CODE, NOTE]);
            put(&mut file, at, &[value]);
            assert!(matches!(image::plan(&file[..], RAM), Err(Error::Malformed(_))), "{at}");
        }
    }
}
