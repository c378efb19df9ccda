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
    let mut segments = Vec::new();
    let mut claims = Claims::new(ram_end);
    let mut entry = None;
    for index in 0..u64::from(count) {
        let mut header = [0; PHDR_SIZE];
        source.read_at(table + index * PHDR_SIZE as u64, &mut header)?;
        match u32_at(&header, 0) {
            PT_LOAD => segments.extend(load(&header, size, &mut claims)?),
            PT_NOTE if entry.is_none() => entry = note(source, &header, size)?,
            _ => {}
        }
    }
    let entry = entry.ok_or(Error::Unsupported(
        "the ELF file has no PVH entry note: build the kernel with CONFIG_PVH=y, or give its bzImage",
    ))?;
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
