//! A kernel image after all checks: what goes where, and where it starts.

use crate::layout::Claims;
use crate::{Error, Source, bzimage, elf};

/// Bytes of the file that are looked at to tell what it is: all of a bzImage's setup header.
pub const HEAD: usize = 0x290;

/// One piece of the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Offset in the file.
    pub offset: u64,
    /// Bytes from the file.
    pub file_len: u64,
    /// Guest physical address.
    pub gpa: u64,
    /// Bytes in memory that must be zero behind those from the file.
    pub zero_len: u64,
}

/// How the kernel is started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// Linux x86 64-bit boot protocol.
    Linux64 {
        /// Entry point.
        entry: u64,
        /// The file's first bytes, with the setup header in them.
        head: Box<[u8; HEAD]>,
    },
    /// Xen PVH.
    Pvh {
        /// Entry point.
        entry: u32,
    },
}

/// What is to be done with an image.
#[derive(Debug)]
pub struct Plan {
    /// How to start it.
    pub protocol: Protocol,
    /// Its pieces; their memory is in [`Plan::claims`].
    pub segments: Vec<Segment>,
    /// Memory taken so far.
    pub claims: Claims,
    /// First address that the initrd must not reach.
    pub initrd_limit: u64,
    /// The longest command line, without its NUL.
    pub cmdline_max: usize,
}

/// Checks an image against RAM that ends at `ram_end`. Reads headers only.
pub fn plan<S: Source + ?Sized>(source: &S, ram_end: u64) -> Result<Plan, Error> {
    let size = source.size()?;
    let mut head = Box::new([0; HEAD]);
    if size < HEAD as u64 {
        return Err(Error::Truncated { what: "the smallest kernel header", end: HEAD as u64, size });
    }
    source.read_at(0, &mut head[..])?;
    if head.starts_with(elf::MAGIC) {
        elf::plan(source, &head[..], size, ram_end)
    } else if bzimage::is_one(&head[..]) {
        bzimage::plan(head, size, ram_end)
    } else {
        Err(Error::NotAKernel)
    }
}
