//! What KVM can do: its capabilities, and a trial VM that tells hardware from emulation.

use std::fs;

use bulkhead_control_api::config::CpuTopology;
use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_segment};
use kvm_ioctls::{Cap, VcpuExit};

use super::sys::{self, Pages};
use crate::opener;

/// What was found out about KVM.
#[derive(Debug)]
pub struct Kvm {
    /// API version.
    pub api: i32,
    /// Needed capabilities that it lacks.
    pub missing: Vec<&'static str>,
    /// Useful ones that it lacks.
    pub lacking: Vec<&'static str>,
    /// Most vCPUs of a VM: KVM's limit or ours.
    pub max_cpus: usize,
    /// The CPU's flag for hardware virtualization.
    pub flag: Option<&'static str>,
    /// How it runs a guest's kernel.
    pub ring0: Ring0,
}

/// How a guest's ring 0 runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ring0 {
    /// On the CPU.
    Native,
    /// By an emulator that lacks instructions which kernels use.
    Emulated,
    /// Not at all.
    Failed(String),
}

/// `KVM_API_VERSION` of linux/kvm.h.
const API_VERSION: i32 = 12;

/// What core refuses to run without.
const NEEDED: [(Cap, &str); 14] = [
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::IrqRouting, "KVM_CAP_IRQ_ROUTING"),
    (Cap::PitState2, "KVM_CAP_PIT_STATE2"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::ReadonlyMem, "KVM_CAP_READONLY_MEM"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::SetIdentityMapAddr, "KVM_CAP_SET_IDENTITY_MAP_ADDR"),
    (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK"),
    (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::Xsave2, "KVM_CAP_XSAVE2"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
];

/// What makes a VM faster or its clocks more exact.
const USEFUL: [(Cap, &str); 3] = [
    (Cap::CoalescedPio, "KVM_CAP_COALESCED_PIO"),
    (Cap::TscDeadlineTimer, "KVM_CAP_TSC_DEADLINE_TIMER"),
    (Cap::KvmclockCtrl, "KVM_CAP_KVMCLOCK_CTRL"),
];

/// Opens KVM and looks at it.
///
/// # Errors
/// One line with cause and remedy, if it cannot be opened.
pub fn look() -> Result<Kvm, String> {
    let fd = opener::kvm().map_err(|e| format!("/dev/kvm: {e}"))?;
    let kvm = sys::adopt_kvm(fd);
    let lacks = |caps: &[(Cap, &'static str)]| {
        caps.iter().filter(|(cap, _)| !kvm.check_extension(*cap)).map(|(_, name)| *name).collect()
    };
    let api = kvm.get_api_version();
    let mut missing: Vec<&'static str> = lacks(&NEEDED);
    if api != API_VERSION {
        missing.push("API 12");
    }
    let ring0 = match trial(&kvm) {
        Ok(ring0) => ring0,
        Err(error) => Ring0::Failed(error.to_string()),
    };
    let max_cpus = kvm.get_max_vcpus().min(CpuTopology::MAX_CPUS as usize);
    Ok(Kvm { api, missing, lacking: lacks(&USEFUL), max_cpus, flag: flag(), ring0 })
}

fn flag() -> Option<&'static str> {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").ok()?;
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags"))?;
    ["vmx", "svm"].into_iter().find(|flag| flags.split_whitespace().any(|word| word == *flag))
}

/// Size of the trial VM's memory in bytes.
const RAM: usize = 0x5000;
const PML4: usize = 0x1000;
const PDPT: usize = 0x2000;
const PD: usize = 0x3000;
const CODE: usize = 0x4000;
/// Where the code finds 16 aligned bytes (RDI).
const DATA: usize = 0x4800;
/// `lock cmpxchg16b [rdi]; hlt`. Kernels use this instruction early; KVM's emulator lacks it.
const PROGRAM: [u8; 6] = [0xf0, 0x48, 0x0f, 0xc7, 0x0f, 0xf4];

/// The program, and page tables that map the first 2 MiB one to one.
fn guest_memory() -> Box<Pages<RAM>> {
    const PRESENT_WRITABLE: u64 = 3;
    const LARGE: u64 = 0x80;
    let mut ram = Box::new(Pages([0; RAM]));
    let mut put = |at: usize, bytes: &[u8]| {
        if let Some(slot) = ram.0.get_mut(at..at + bytes.len()) {
            slot.copy_from_slice(bytes);
        }
    };
    put(PML4, &(PDPT as u64 | PRESENT_WRITABLE).to_le_bytes());
    put(PDPT, &(PD as u64 | PRESENT_WRITABLE).to_le_bytes());
    put(PD, &(LARGE | PRESENT_WRITABLE).to_le_bytes());
    put(CODE, &PROGRAM);
    ram
}

/// Runs the program in 64-bit ring 0.
fn trial(kvm: &kvm_ioctls::Kvm) -> Result<Ring0, kvm_ioctls::Error> {
    let vm = kvm.create_vm()?;
    sys::give_memory(&vm, Box::leak(guest_memory()))?;
    let mut vcpu = vm.create_vcpu(0)?;
    vcpu.set_cpuid2(&kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?)?;
    enter_long_mode(&vcpu)?;
    Ok(match vcpu.run()? {
        VcpuExit::Hlt => Ring0::Native,
        VcpuExit::InternalError => Ring0::Emulated,
        other => Ring0::Failed(format!("unexpected exit {other:?}")),
    })
}

fn enter_long_mode(vcpu: &kvm_ioctls::VcpuFd) -> Result<(), kvm_ioctls::Error> {
    /// PE, MP, ET, NE, WP and PG.
    const CR0: u64 = 0x8001_0033;
    const CR4_PAE: u64 = 1 << 5;
    /// LME and LMA.
    const EFER: u64 = 1 << 8 | 1 << 10;
    let mut sregs = vcpu.get_sregs()?;
    let data = kvm_segment {
        limit: u32::MAX,
        selector: 0x18,
        type_: 3,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    sregs.cs = kvm_segment { selector: 0x10, type_: 11, db: 0, l: 1, ..data };
    (sregs.ds, sregs.es, sregs.ss, sregs.fs, sregs.gs) = (data, data, data, data, data);
    (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (CR0, PML4 as u64, CR4_PAE, EFER);
    vcpu.set_sregs(&sregs)?;
    let mut regs = vcpu.get_regs()?;
    (regs.rip, regs.rdi, regs.rflags) = (CODE as u64, DATA as u64, 2);
    vcpu.set_regs(&regs)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Processes share no code beside their APIs, so that this list is core's by test.
    #[test]
    fn what_is_needed_is_what_core_needs() {
        let source = include_str!("../../../../vmm-core/core/src/vm.rs");
        let list = source.split_once("const NEEDED").and_then(|(_, rest)| rest.split_once("];")).unwrap().0;
        let core: Vec<&str> = list.split('"').skip(1).step_by(2).collect();
        assert_eq!(NEEDED.map(|(_, name)| name).as_slice(), core);
    }

    #[test]
    fn the_program_is_where_the_vcpu_starts() {
        let ram = guest_memory();
        assert!(ram.0[CODE..].starts_with(&PROGRAM));
        assert_eq!((ram.0[PML4..].first(), DATA % 16), (Some(&3), 0));
    }
}
