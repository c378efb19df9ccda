//! `-m`.

use crate::cli::{Params, Problem};

const MIB: u64 = 1 << 20;
/// Memory of a VM without `-m`, as in QEMU.
const DEFAULT: u64 = 128 * MIB;
/// The least memory: page tables, boot data and a small kernel fit.
const MIN: u64 = 4 * MIB;
/// The most memory.
const MAX: u64 = 1 << 40;
/// QEMU rounds the size up to this.
const ALIGN: u64 = 8192;

/// The most memory with all devices.
const MAX_ALL: u64 = 1 << 44;

/// A `-m`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// Guest memory without memory devices, in bytes.
    pub ram: u64,
    /// What memory devices may have together, in bytes.
    pub room: u64,
}

/// Guest memory.
pub fn memory(params: &Params) -> Result<Memory, Problem> {
    let size = match (params.number("size"), params.text("size")) {
        (Some(0) | None, _) => DEFAULT,
        (Some(size), Some(text)) if text.ends_with(|c: char| c.is_ascii_digit()) => {
            size.checked_mul(MIB).ok_or(Problem::SizeTooLarge)?
        }
        (Some(size), _) => size,
    };
    let size = size.checked_next_multiple_of(ALIGN).ok_or(Problem::SizeTooLarge)?;
    if !(MIN..=MAX).contains(&size) {
        return Err(Problem::MemoryRange(MIN / MIB, MAX / MIB));
    }
    let slots = params.number("slots").unwrap_or(0);
    match params.number("maxmem") {
        Some(maxmem) if maxmem < size => Err(Problem::MaxmemBelowSize { maxmem, size }),
        Some(maxmem) if maxmem == size && slots > 0 => Err(Problem::SlotsWithoutRoom(size)),
        None if params.names().any(|name| name == "slots") => Err(Problem::SlotsWithoutMaxmem),
        Some(maxmem) if maxmem > MAX_ALL => Err(Problem::MaxmemRange(MAX_ALL / MIB)),
        maxmem => Ok(Memory { ram: size, room: maxmem.map_or(0, |maxmem| maxmem - size) }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Takes, table};

    fn parse(text: &str) -> Result<u64, String> {
        let Takes::Params(group) = table::find("m").unwrap().takes else { panic!("-m") };
        Params::parse(group, text)
            .and_then(|params| memory(&params))
            .map(|m| m.ram)
            .map_err(|e| e.to_string())
    }

    #[test]
    fn sizes() {
        for (text, bytes) in [
            ("", 128 * MIB),
            ("0", 128 * MIB),
            ("512", 512 * MIB),
            ("512M", 512 * MIB),
            ("size=1.5g", 1536 * MIB),
            ("4194305b", 4 * MIB + 8192),
            ("1G,slots=2,maxmem=4G", 1024 * MIB),
            ("1G,maxmem=1G", 1024 * MIB),
        ] {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn refused() {
        for (text, error) in [
            (
                "size=x",
                "Parameter 'size' expects a non-negative number below 2^64, with an optional suffix k, M, G, T, P or E",
            ),
            ("18446744073709551615", "too large 'size' option value"),
            ("1", "memory size must be from 4 MiB to 1048576 MiB"),
            ("2T", "memory size must be from 4 MiB to 1048576 MiB"),
            ("64,slots=0", "invalid -m option value: missing 'maxmem' option"),
            (
                "512,maxmem=256M",
                "invalid value of -m option maxmem: maximum memory size (0x10000000) must be at least the initial memory size (0x20000000)",
            ),
            (
                "512,slots=1,maxmem=512M",
                "invalid value of -m option maxmem: memory slots were specified but maximum memory size (0x20000000) is equal to the initial memory size (0x20000000)",
            ),
        ] {
            assert_eq!(parse(text).unwrap_err(), error, "{text}");
        }
    }
}
