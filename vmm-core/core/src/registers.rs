//! Initial registers of the first vCPU, built from what the loader found.

use bulkhead_control_api::loader::Start;
use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;

use crate::error::{Result, kvm};

/// CR0: protected mode, extension type (always 1 on 64-bit processors).
const CR0_PE_ET: u64 = 1 << 0 | 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
/// EFER: long mode enabled and active.
const EFER_LME_LMA: u64 = 1 << 8 | 1 << 10;
/// RFLAGS: bit 1 is always set; interrupts are off.
const RFLAGS: u64 = 1 << 1;
/// Segment types (Intel SDM vol. 3A, 3.4.5): execute/read accessed, read/write accessed, busy TSS.
const CODE: u8 = 0xb;
const DATA: u8 = 0x3;
const TSS_BUSY: u8 = 0xb;

/// A flat segment; in a 64-bit code segment L is set and D must be clear.
fn flat(selector: u16, type_: u8, long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        dpl: 0,
        db: u8::from(!long),
        s: 1,
        l: u8::from(long),
        g: 1,
        ..Default::default()
    }
}

fn set_segments(sregs: &mut kvm_sregs, code: kvm_segment, data: kvm_segment) {
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.ss, sregs.fs, sregs.gs) = (data, data, data, data, data);
    sregs.tr = kvm_segment { limit: 0x67, type_: TSS_BUSY, present: 1, ..Default::default() };
    sregs.ldt = kvm_segment { unusable: 1, ..Default::default() };
}

/// The registers at `start`, on top of `sregs` of a vCPU after its reset.
fn at(start: &Start, mut sregs: kvm_sregs) -> (kvm_sregs, kvm_regs) {
    let mut regs = kvm_regs { rflags: RFLAGS, ..Default::default() };
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    match *start {
        Start::Long64 { rip, rsp, rsi, cr3, gdt_base, gdt_limit } => {
            set_segments(&mut sregs, flat(0x10, CODE, true), flat(0x18, DATA, false));
            sregs.gdt.base = gdt_base;
            sregs.gdt.limit = gdt_limit;
            sregs.cr0 = CR0_PE_ET | CR0_PG;
            sregs.cr3 = cr3;
            sregs.cr4 = CR4_PAE;
            sregs.efer = EFER_LME_LMA;
            (regs.rip, regs.rsp, regs.rsi) = (rip, rsp, rsi);
        }
        Start::Pvh32 { eip, ebx } => {
            set_segments(&mut sregs, flat(0x8, CODE, false), flat(0x10, DATA, false));
            sregs.cr0 = CR0_PE_ET;
            sregs.cr4 = 0;
            sregs.efer = 0;
            (regs.rip, regs.rbx) = (u64::from(eip), u64::from(ebx));
        }
    }
    (sregs, regs)
}

/// Puts a vCPU that is in its reset state at `start`.
///
/// # Errors
/// KVM finds the values impossible.
pub fn apply(vcpu: &VcpuFd, start: &Start) -> Result<()> {
    let (sregs, regs) = at(start, vcpu.get_sregs().map_err(kvm("KVM_GET_SREGS"))?);
    vcpu.set_sregs(&sregs).map_err(kvm("KVM_SET_SREGS"))?;
    vcpu.set_regs(&regs).map_err(kvm("KVM_SET_REGS"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_mode_as_the_linux_boot_protocol_says() {
        let start = Start::Long64 {
            rip: 0x100_0200,
            rsp: 0,
            rsi: 0x7000,
            cr3: 0x9000,
            gdt_base: 0x500,
            gdt_limit: 31,
        };
        let (sregs, regs) = at(&start, kvm_sregs::default());
        assert_eq!((regs.rip, regs.rsi, regs.rflags), (0x100_0200, 0x7000, 2));
        assert_eq!((sregs.cs.selector, sregs.cs.l, sregs.cs.db), (0x10, 1, 0));
        assert_eq!((sregs.ds.selector, sregs.ss.selector, sregs.ds.type_), (0x18, 0x18, 3));
        assert_eq!((sregs.cr3, sregs.gdt.base, sregs.gdt.limit), (0x9000, 0x500, 31));
        assert_eq!((sregs.cr0, sregs.cr4, sregs.efer), (0x8000_0011, 0x20, 0x500));
    }

    #[test]
    fn pvh_starts_flat_without_paging() {
        let (sregs, regs) = at(&Start::Pvh32 { eip: 0x10_0000, ebx: 0x6000 }, kvm_sregs::default());
        assert_eq!((regs.rip, regs.rbx), (0x10_0000, 0x6000));
        assert_eq!((sregs.cs.db, sregs.cs.l, sregs.cs.limit, sregs.ds.db), (1, 0, u32::MAX, 1));
        assert_eq!((sregs.cr0, sregs.cr4, sregs.efer), (0x11, 0, 0));
    }
}
