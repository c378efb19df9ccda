//! bzImage, Linux x86 64-bit boot protocol (Documentation/arch/x86/boot.rst), version 2.12 or later.

use crate::Error;
use crate::bytes::{u16_at, u32_at, u64_at};
use crate::image::{HEAD, Plan, Protocol, Segment};
use crate::layout::{CMDLINE_MAX, Claims};

const SETUP_SECTS: usize = 0x1f1;
const SYSSIZE: usize = 0x1f4;
const BOOT_FLAG: usize = 0x1fe;
const HEADER: usize = 0x202;
const VERSION: usize = 0x206;
const LOADFLAGS: usize = 0x211;
const INITRD_ADDR_MAX: usize = 0x22c;
const XLOADFLAGS: usize = 0x236;
const CMDLINE_SIZE: usize = 0x238;
const PREF_ADDRESS: usize = 0x258;
const INIT_SIZE: usize = 0x260;

const SECTOR: u64 = 512;
const LOADED_HIGH: u8 = 1;
const XLF_KERNEL_64: u16 = 1;
/// First protocol version with `xloadflags`.
const VERSION_MIN: u16 = 0x020c;
/// The 64-bit entry point, from where the kernel is loaded.
const ENTRY_64: u64 = 0x200;
const PAGE: u64 = 4096;

/// Whether `head` is that of a bzImage.
pub fn is_one(head: &[u8]) -> bool {
    u16_at(head, BOOT_FLAG) == 0xaa55 && u32_at(head, HEADER) == u32::from_le_bytes(*b"HdrS")
}

/// Checks the header; the kernel goes to its preferred address (a relocatable one would move itself
/// there from any lower place).
pub fn plan(head: Box<[u8; HEAD]>, size: u64, ram_end: u64) -> Result<Plan, Error> {
    let h = &head[..];
    if u16_at(h, VERSION) < VERSION_MIN {
        return Err(Error::Unsupported("its boot protocol is older than 2.12 (Linux 3.8)"));
    }
    let loadflags = h.get(LOADFLAGS).copied().unwrap_or(0);
    if loadflags & LOADED_HIGH == 0 || u16_at(h, XLOADFLAGS) & XLF_KERNEL_64 == 0 {
        return Err(Error::Unsupported("it has no 64-bit entry point"));
    }
    let sectors = match h.get(SETUP_SECTS).copied().unwrap_or(0) {
        0 => 4,
        count => u64::from(count),
    };
    let offset = (sectors + 1) * SECTOR;
    let payload = u64::from(u32_at(h, SYSSIZE)) * 16;
    // The last paragraph may be incomplete in the file.
    let end = offset + payload;
    if end - end.min(15) > size || offset >= size {
        return Err(Error::Truncated { what: "the kernel", end, size });
    }
    let payload = payload.min(size - offset);
    if payload <= ENTRY_64 {
        return Err(Error::Malformed("the kernel is shorter than its entry point"));
    }
    let gpa = u64_at(h, PREF_ADDRESS);
    if !gpa.is_multiple_of(PAGE) {
        return Err(Error::Malformed("its load address is not on a page boundary"));
    }
    let mut claims = Claims::new(ram_end);
    claims.take("the kernel", gpa, payload.max(u32_at(h, INIT_SIZE).into()))?;
    let cmdline_max = usize::try_from(u32_at(h, CMDLINE_SIZE)).unwrap_or(CMDLINE_MAX).min(CMDLINE_MAX);
    Ok(Plan {
        segments: vec![Segment { offset, file_len: payload, gpa, zero_len: 0 }],
        claims,
        initrd_limit: ram_end.min(u64::from(u32_at(h, INITRD_ADDR_MAX)) + 1),
        cmdline_max,
        protocol: Protocol::Linux64 { entry: gpa + ENTRY_64, head },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bytes::put;

    const RAM: u64 = 256 << 20;
    const SIZE: u64 = 5 * SECTOR + 0x10_0000;

    fn head() -> Box<[u8; HEAD]> {
        let mut head = Box::new([0; HEAD]);
        put(&mut head[..], SETUP_SECTS, &[4]);
        put(&mut head[..], SYSSIZE, &0x1_0000u32.to_le_bytes());
        put(&mut head[..], BOOT_FLAG, &[0x55, 0xaa]);
        put(&mut head[..], HEADER, b"HdrS");
        put(&mut head[..], VERSION, &0x020fu16.to_le_bytes());
        put(&mut head[..], LOADFLAGS, &[LOADED_HIGH]);
        put(&mut head[..], XLOADFLAGS, &[1]);
        put(&mut head[..], INITRD_ADDR_MAX, &0x7fff_ffffu32.to_le_bytes());
        put(&mut head[..], CMDLINE_SIZE, &2047u32.to_le_bytes());
        put(&mut head[..], PREF_ADDRESS, &0x100_0000u64.to_le_bytes());
        put(&mut head[..], INIT_SIZE, &0x200_0000u32.to_le_bytes());
        head
    }

    fn with(at: usize, value: &[u8]) -> Result<Plan, Error> {
        let mut head = head();
        put(&mut head[..], at, value);
        plan(head, SIZE, RAM)
    }

    #[test]
    fn a_good_header_gives_a_plan() {
        let plan = plan(head(), SIZE, RAM).unwrap();
        let file_len = 0x10_0000;
        assert_eq!(plan.segments, [Segment { offset: 2560, file_len, gpa: 0x100_0000, zero_len: 0 }]);
        assert_eq!((plan.claims.end(), plan.initrd_limit, plan.cmdline_max), (0x300_0000, RAM, 2047));
        assert!(matches!(plan.protocol, Protocol::Linux64 { entry: 0x100_0200, .. }));
        let low = with(INITRD_ADDR_MAX, &0x37ff_ffffu32.to_le_bytes()).unwrap();
        assert_eq!(low.initrd_limit, RAM);
        assert_eq!(with(INITRD_ADDR_MAX, &0x7ff_ffffu32.to_le_bytes()).unwrap().initrd_limit, 0x800_0000);
    }

    #[test]
    fn each_bad_field_has_its_error() {
        assert!(matches!(with(VERSION, &[0x0b, 2]), Err(Error::Unsupported(_))));
        assert!(matches!(with(LOADFLAGS, &[0]), Err(Error::Unsupported(_))));
        assert!(matches!(with(XLOADFLAGS, &[0]), Err(Error::Unsupported(_))));
        assert!(matches!(with(PREF_ADDRESS, &[1]), Err(Error::Malformed(_))));
    }

    #[test]
    fn a_kernel_lies_inside_its_file_and_inside_ram() {
        assert!(matches!(with(SYSSIZE, &0x1_0002u32.to_le_bytes()), Err(Error::Truncated { .. })));
        assert!(matches!(with(SYSSIZE, &[0xff; 4]), Err(Error::Truncated { .. })));
        assert!(matches!(with(SYSSIZE, &[0; 4]), Err(Error::Malformed(_))));
        assert!(matches!(with(PREF_ADDRESS, &[0; 8]), Err(Error::Overlap { .. })));
        assert!(matches!(with(PREF_ADDRESS, &[0, 0xf0, 0, 0, 0, 0, 0, 0]), Err(Error::Overlap { .. })));
        assert!(matches!(with(PREF_ADDRESS, &(!0xfffu64).to_le_bytes()), Err(Error::Malformed(_))));
        assert!(matches!(with(PREF_ADDRESS, &(1u64 << 32).to_le_bytes()), Err(Error::BeyondRam { .. })));
        assert!(matches!(with(INIT_SIZE, &[0xff; 4]), Err(Error::BeyondRam { .. })));
        assert!(matches!(plan(head(), SIZE, 16 << 20), Err(Error::BeyondRam { .. })));
        assert!(matches!(with(SETUP_SECTS, &[0xff]), Err(Error::Truncated { .. })));
    }
}
