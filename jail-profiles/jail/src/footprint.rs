//! Memory that only the start of a process has used is given back.
//!
//! Most of a process's own memory is what the kernel has mapped of its executable, in pieces of 64 KiB: most of that is the
//! start's, and of the C library around it. What is still used comes back from the page cache, page fault by page fault.
#![expect(unsafe_code, reason = "program headers, madvise and malloc_trim")]

use std::ffi::c_void;
use std::ptr::{self, NonNull};

use nix::sys::mman::{MmapAdvise, madvise};

/// Memory is mapped in units of this size on x86-64.
const PAGE: usize = 4096;

/// Gives it back: to be called when the process has everything that it needs.
pub fn shrink() {
    // SAFETY: the C library is glibc (the binaries are linked for it), whose trim may be called at any time.
    unsafe { libc::malloc_trim(0) };
    for (start, end) in read_only() {
        let Some(start) = NonNull::new(ptr::with_exposed_provenance_mut::<c_void>(start)) else { continue };
        // SAFETY: whole pages of a segment of the executable that is mapped from its file and cannot be written, so
        // that they hold what the file holds and come back with the same content.
        // What the kernel refuses stays as it is.
        let _ = unsafe { madvise(start, end - start.addr().get(), MmapAdvise::MADV_DONTNEED) };
    }
}

/// First address and end of the whole pages of each segment that is only read or executed.
fn read_only() -> Vec<(usize, usize)> {
    // SAFETY: getauxval has no preconditions.
    let at = |kind| unsafe { libc::getauxval(kind) };
    let (headers, count) = (at(libc::AT_PHDR), at(libc::AT_PHNUM));
    let (Ok(address), Ok(count)) = (usize::try_from(headers), usize::try_from(count)) else {
        return Vec::new();
    };
    let pointer = ptr::with_exposed_provenance::<libc::Elf64_Phdr>(address);
    if pointer.is_null() || !pointer.is_aligned() {
        return Vec::new();
    }
    // SAFETY: the kernel has put the address and the number of the executable's program headers, which stay mapped,
    // into the auxiliary vector.
    let headers = unsafe { std::slice::from_raw_parts(pointer, count) };
    // The headers' own entry says how far from its file's addresses the executable was mapped.
    let Some(own) = headers.iter().find(|header| header.p_type == libc::PT_PHDR) else { return Vec::new() };
    let bias = at(libc::AT_PHDR).wrapping_sub(own.p_vaddr);
    let segments = headers.iter().filter(|h| h.p_type == libc::PT_LOAD && h.p_flags & libc::PF_W == 0);
    let ranges = segments.filter_map(|header| {
        let start = usize::try_from(header.p_vaddr.wrapping_add(bias)).ok()?;
        let end = start.checked_add(usize::try_from(header.p_memsz).ok()?)?;
        // The last page may begin the next segment.
        Some((start / PAGE * PAGE, end / PAGE * PAGE))
    });
    ranges.filter(|(start, end)| start < end).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_program_goes_on_without_what_it_has_read() {
        let ranges = read_only();
        let code = (shrink as fn() as usize, "text".as_ptr().expose_provenance());
        for address in [code.0, code.1] {
            assert!(ranges.iter().any(|(start, end)| (*start..*end).contains(&address)), "{ranges:x?}");
        }
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        for (start, end) in ranges {
            let mapping = maps.lines().find(|line| line.starts_with(&format!("{start:x}-"))).unwrap();
            let limit = mapping.split(['-', ' ']).nth(1).unwrap();
            assert!(end <= usize::from_str_radix(limit, 16).unwrap(), "{end:x}: {mapping}");
            assert!(!mapping.split(' ').nth(1).unwrap().contains('w'), "{mapping}");
        }
        shrink();
        assert_eq!("12".repeat(3).parse(), Ok(121_212));
    }
}
