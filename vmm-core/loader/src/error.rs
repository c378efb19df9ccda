//! Everything that can be wrong with what the loader is given.

use std::io;

/// Why there is no boot. One line; the caller puts the file's name before it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Neither a bzImage nor an ELF file.
    #[error("not a kernel: neither a bzImage nor an ELF file with a PVH note")]
    NotAKernel,
    /// The file is shorter than its own header says.
    #[error("truncated: {what} ends at byte {end} but the file has {size}")]
    Truncated {
        /// What does not fit.
        what: &'static str,
        /// Where it would end.
        end: u64,
        /// Size of the file.
        size: u64,
    },
    /// A header field that no kernel has.
    #[error("malformed: {0}")]
    Malformed(&'static str),
    /// A kernel of a kind that is not booted here.
    #[error("cannot be booted: {0}")]
    Unsupported(&'static str),
    /// Does not fit into the RAM below the 32-bit hole.
    #[error("{what} needs memory up to {end:#x} but RAM ends at {limit:#x}: give the VM more memory (-m)")]
    BeyondRam {
        /// What does not fit.
        what: &'static str,
        /// Where it would end.
        end: u64,
        /// End of the RAM below the 32-bit hole.
        limit: u64,
    },
    /// Two things want the same memory.
    #[error("{what} at {start:#x} overlaps {other}")]
    Overlap {
        /// The later one.
        what: &'static str,
        /// Where it begins.
        start: u64,
        /// The earlier one.
        other: &'static str,
    },
    /// There is no room left for the initrd.
    #[error(
        "{size} bytes do not fit into the memory between the kernel's end ({from:#x}) and {to:#x}: \
             give the VM more memory (-m) or make it smaller"
    )]
    NoRoomForInitrd {
        /// Its size.
        size: u64,
        /// First address behind the kernel.
        from: u64,
        /// First address that it must not reach.
        to: u64,
    },
    /// The initrd has no contents.
    #[error("the file is empty")]
    EmptyInitrd,
    /// The command line is too long for this kernel.
    #[error("the command line has {size} bytes, this kernel takes {limit}: shorten -append")]
    CommandLine {
        /// Its length.
        size: usize,
        /// The longest that is accepted.
        limit: usize,
    },
    /// The command line has a NUL in it.
    #[error("the command line contains a NUL character")]
    CommandLineNul,
    /// A file cannot be read.
    #[error("cannot be read: {0}")]
    Read(io::Error),
    /// Core's memory map is none.
    #[error("guest memory: {0}")]
    Ram(&'static str),
    /// Guest memory cannot be mapped or written.
    #[error("guest memory: {0}")]
    Memory(String),
    /// The ACPI tables outgrew the space that is set aside for them.
    #[error("ACPI tables of {0} bytes do not fit into their area")]
    AcpiTooLarge(usize),
    /// The SMBIOS structures outgrew theirs.
    #[error("SMBIOS structures of {0} bytes do not fit into their area")]
    SmbiosTooLarge(usize),
    /// A table of the user is said to have a header, but is shorter than one.
    #[error("ACPI table claiming to have header is too short, available: {available}, expected: {expected}")]
    TableTooShort {
        /// Its size.
        available: u64,
        /// The size of a header.
        expected: u64,
    },
    /// A table of the user is too long.
    #[error("ACPI table too big, requested: {requested}, max: {max}")]
    TableTooBig {
        /// Its size, with its header.
        requested: u64,
        /// The largest.
        max: u64,
    },
    /// There is no room for the user's tables.
    #[error("ACPI tables of {0} bytes do not fit into the guest's memory: give the VM more memory (-m)")]
    NoRoomForTables(u64),
    /// A mode that is reserved.
    #[error("waking a suspended guest is not implemented in this version: reset the VM instead")]
    Wake,
}
