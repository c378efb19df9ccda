//! The machine's state right after power-on, to which a reset returns.

use std::ops::RangeInclusive;

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_VCPUEVENT_VALID_NMI_PENDING,
    KVM_VCPUEVENT_VALID_SHADOW, KVM_VCPUEVENT_VALID_SIPI_VECTOR, KVM_VCPUEVENT_VALID_SMM, Msrs, Xsave,
    kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_pit_state2, kvm_regs,
    kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};

use crate::error::{Error, Result, kvm};
use crate::sys;

/// Time stamp counter: a reset sets it to 0.
const MSR_TSC: u32 = 0x10;
/// IA32_FEATURE_CONTROL: KVM leaves VMX operation when it becomes 0.
const MSR_FEATURE_CONTROL: u32 = 0x3a;
/// IA32_MISC_ENABLE; bit 0: fast string operations.
const MSR_MISC_ENABLE: u32 = 0x1a0;
/// IA32_MTRR_DEF_TYPE: MTRRs on, write-back where none says otherwise, as firmware leaves it.
const MTRR_DEF_TYPE: (u32, u64) = (0x2ff, 1 << 11 | 6);
/// MTRRs that a guest can write: eight variable ranges of two, the fixed ranges, the default type
/// (Intel SDM vol. 3A, 11.11). KVM has them all, but does not list them.
const MTRRS: [RangeInclusive<u32>; 5] =
    [0x200..=0x20f, 0x250..=0x250, 0x258..=0x259, 0x268..=0x26f, 0x2ff..=0x2ff];
/// Offsets of the local interrupt pins in the local APIC's page.
const LVT_LINT0: usize = 0x350;
const LVT_LINT1: usize = 0x360;

/// Interrupt controllers and timer after power-on.
#[derive(Debug)]
pub struct Chips {
    irqchips: Vec<kvm_irqchip>,
    pit: kvm_pit_state2,
}

impl Chips {
    /// Reads the state.
    pub fn take(vm: &VmFd) -> Result<Self> {
        let mut irqchips = Vec::new();
        for chip_id in [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC] {
            let mut chip = kvm_irqchip { chip_id, ..Default::default() };
            vm.get_irqchip(&mut chip).map_err(kvm("KVM_GET_IRQCHIP"))?;
            irqchips.push(chip);
        }
        Ok(Self { irqchips, pit: vm.get_pit2().map_err(kvm("KVM_GET_PIT2"))? })
    }

    /// Sets the state. No vCPU runs.
    pub fn restore(&self, vm: &VmFd) -> Result<()> {
        for chip in &self.irqchips {
            vm.set_irqchip(chip).map_err(kvm("KVM_SET_IRQCHIP"))?;
        }
        vm.set_pit2(&self.pit).map_err(kvm("KVM_SET_PIT2"))
    }
}

/// The MSRs that this KVM lets us read and write.
#[derive(Debug)]
pub struct MsrSet(Vec<u32>);

/// `entries` in calls of at most what KVM takes at once; the call stops at the first MSR that it
/// refuses, which is then dropped.
fn each_accepted(
    entries: &[kvm_msr_entry],
    mut call: impl FnMut(&mut Msrs) -> std::result::Result<usize, kvm_ioctls::Error>,
) -> Result<Vec<kvm_msr_entry>> {
    let mut accepted = Vec::with_capacity(entries.len());
    let mut rest = entries;
    while !rest.is_empty() {
        let batch = rest.get(..rest.len().min(kvm_bindings::KVM_MAX_MSR_ENTRIES)).unwrap_or(rest);
        let mut msrs = Msrs::from_entries(batch).map_err(|_| Error::Capability("room for all MSRs"))?;
        let done = call(&mut msrs).map_err(kvm("MSRs"))?;
        accepted.extend(msrs.as_slice().iter().take(done));
        let skip = if done < batch.len() { done + 1 } else { done };
        rest = rest.get(skip..).unwrap_or_default();
    }
    Ok(accepted)
}

impl MsrSet {
    /// Tries all that KVM lists, and the MTRRs, on a fresh vCPU.
    pub fn probe(host: &Kvm, vcpu: &VcpuFd) -> Result<Self> {
        let list = host.get_msr_index_list().map_err(kvm("KVM_GET_MSR_INDEX_LIST"))?;
        let wanted: Vec<_> = list
            .as_slice()
            .iter()
            .copied()
            .filter(|index| *index != MSR_TSC && !MTRRS.iter().any(|range| range.contains(index)))
            .chain(MTRRS.into_iter().flatten())
            .map(|index| kvm_msr_entry { index, ..Default::default() })
            .collect();
        let readable = each_accepted(&wanted, |msrs| vcpu.get_msrs(msrs))?;
        let writable = each_accepted(&readable, |msrs| vcpu.set_msrs(msrs))?;
        Ok(Self(writable.iter().map(|entry| entry.index).collect()))
    }
}

/// One vCPU after power-on.
#[derive(Debug)]
pub struct VcpuState {
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: Xsave,
    /// Empty on a host without XSAVE, which cannot be set.
    xcrs: kvm_xcrs,
    debug: kvm_debugregs,
    msrs: Vec<kvm_msr_entry>,
    lapic: kvm_lapic_state,
    events: kvm_vcpu_events,
    mp_state: kvm_mp_state,
}

/// Sets what firmware would have set before it starts a kernel.
pub fn power_on(vcpu: &VcpuFd, first: bool) -> Result<()> {
    let mut misc = Msrs::from_entries(&[kvm_msr_entry { index: MSR_MISC_ENABLE, ..Default::default() }])
        .map_err(|_| Error::Capability("MSRs"))?;
    vcpu.get_msrs(&mut misc).map_err(kvm("KVM_GET_MSRS"))?;
    let enable = misc.as_slice().first().map_or(0, |e| e.data) | 1;
    let entry = |(index, data)| kvm_msr_entry { index, data, ..Default::default() };
    let entries = [(MSR_MISC_ENABLE, enable), MTRR_DEF_TYPE].map(entry);
    each_accepted(&entries, |msrs| vcpu.set_msrs(msrs))?;
    if first {
        // Virtual wire mode of the first processor: PIC on LINT0, NMI on LINT1 (MP specification 3.6.2.1).
        /// Register, delivery mode ExtINT or NMI.
        const WIRES: [(usize, i8); 2] = [(LVT_LINT0, 7), (LVT_LINT1, 4)];
        let mut lapic = vcpu.get_lapic().map_err(kvm("KVM_GET_LAPIC"))?;
        for (at, mode) in WIRES {
            for (slot, byte) in lapic.regs.iter_mut().skip(at).zip([0, mode, 0, 0]) {
                *slot = byte;
            }
        }
        vcpu.set_lapic(&lapic).map_err(kvm("KVM_SET_LAPIC"))?;
    }
    Ok(())
}

/// Whether an external NMI reaches this vCPU: LINT1 is unmasked and in NMI mode.
pub fn takes_nmi(vcpu: &VcpuFd) -> Result<bool> {
    let lapic = vcpu.get_lapic().map_err(kvm("KVM_GET_LAPIC"))?;
    let byte = |at: usize| lapic.regs.get(at).copied().unwrap_or(0);
    // Bits 8 to 10: delivery mode 4 is NMI; bit 16: masked.
    Ok(byte(LVT_LINT1 + 1) & 7 == 4 && byte(LVT_LINT1 + 2) & 1 == 0)
}

impl VcpuState {
    /// Reads the state; `xsave_size` is what KVM_CAP_XSAVE2 says.
    pub fn take(vcpu: &VcpuFd, msrs: &MsrSet, xsave_size: usize) -> Result<Self> {
        let extra = xsave_size.saturating_sub(size_of::<kvm_xsave>()).div_ceil(size_of::<u32>());
        let mut xsave = Xsave::new(extra).map_err(|_| Error::Capability("room for XSAVE"))?;
        sys::get_xsave(vcpu, &mut xsave).map_err(kvm("KVM_GET_XSAVE2"))?;
        let wanted: Vec<_> =
            msrs.0.iter().map(|index| kvm_msr_entry { index: *index, ..Default::default() }).collect();
        let mut msrs = each_accepted(&wanted, |list| vcpu.get_msrs(list))?;
        msrs.push(kvm_msr_entry { index: MSR_TSC, ..Default::default() });
        Ok(Self {
            regs: vcpu.get_regs().map_err(kvm("KVM_GET_REGS"))?,
            sregs: vcpu.get_sregs().map_err(kvm("KVM_GET_SREGS"))?,
            xsave,
            xcrs: vcpu.get_xcrs().map_err(kvm("KVM_GET_XCRS"))?,
            debug: vcpu.get_debug_regs().map_err(kvm("KVM_GET_DEBUGREGS"))?,
            msrs,
            lapic: vcpu.get_lapic().map_err(kvm("KVM_GET_LAPIC"))?,
            events: vcpu.get_vcpu_events().map_err(kvm("KVM_GET_VCPU_EVENTS"))?,
            mp_state: vcpu.get_mp_state().map_err(kvm("KVM_GET_MP_STATE"))?,
        })
    }

    /// Sets the state. The vCPU does not run.
    pub fn restore(&self, vcpu: &VcpuFd) -> Result<()> {
        // First out of the guest's own virtualization, or KVM refuses control registers without VMXE.
        let control = self.msrs.iter().filter(|entry| entry.index == MSR_FEATURE_CONTROL);
        each_accepted(&control.copied().collect::<Vec<_>>(), |msrs| vcpu.set_msrs(msrs))?;
        vcpu.set_mp_state(self.mp_state).map_err(kvm("KVM_SET_MP_STATE"))?;
        sys::set_xsave(vcpu, &self.xsave).map_err(kvm("KVM_SET_XSAVE"))?;
        if self.xcrs.nr_xcrs > 0 {
            vcpu.set_xcrs(&self.xcrs).map_err(kvm("KVM_SET_XCRS"))?;
        }
        // The APIC base in the special registers decides how the APIC's page is read.
        // EFER in them ends the guest's own SVM, which takes other registers along, so these come later.
        vcpu.set_sregs(&self.sregs).map_err(kvm("KVM_SET_SREGS"))?;
        vcpu.set_regs(&self.regs).map_err(kvm("KVM_SET_REGS"))?;
        vcpu.set_lapic(&self.lapic).map_err(kvm("KVM_SET_LAPIC"))?;
        each_accepted(&self.msrs, |msrs| vcpu.set_msrs(msrs))?;
        vcpu.set_debug_regs(&self.debug).map_err(kvm("KVM_SET_DEBUGREGS"))?;
        let mut events = self.events;
        // Pending NMIs, start-up IPIs and INITs are part of what the reset clears.
        events.flags |= KVM_VCPUEVENT_VALID_NMI_PENDING
            | KVM_VCPUEVENT_VALID_SIPI_VECTOR
            | KVM_VCPUEVENT_VALID_SHADOW
            | KVM_VCPUEVENT_VALID_SMM;
        vcpu.set_vcpu_events(&events).map_err(kvm("KVM_SET_VCPU_EVENTS"))
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    fn read(vcpu: &VcpuFd, index: u32) -> u64 {
        let mut msrs = Msrs::from_entries(&[kvm_msr_entry { index, ..Default::default() }]).unwrap();
        assert_eq!(vcpu.get_msrs(&mut msrs).unwrap(), 1, "{index:#x}");
        msrs.as_slice()[0].data
    }

    #[test]
    fn a_reset_takes_back_memory_types_and_what_kvm_writes_to_memory() {
        let kvm = File::options().read(true).write(true).open("/dev/kvm");
        let host =
            crate::vm::open(kvm.expect("/dev/kvm cannot be opened: run these tests in the lab").into(), 1);
        let host = host.unwrap();
        let vm = crate::vm::Vm::new(&host, crate::memory::create(1 << 20).unwrap()).unwrap();
        let vcpu = vm.fd.create_vcpu(0).unwrap();
        let supported = host.get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES).unwrap();
        vcpu.set_cpuid2(&supported).unwrap();
        power_on(&vcpu, true).unwrap();
        let msrs = MsrSet::probe(&host, &vcpu).unwrap();
        let state = VcpuState::take(&vcpu, &msrs, vm.xsave_size).unwrap();
        // kvmclock in both numberings, asynchronous page faults, stolen time, end of interrupt; then a
        // variable range, a fixed range and the default type.
        let dirty = [
            (0x12, 0x8001),
            (0x4b56_4d01, 0x9001),
            (0x4b56_4d03, 0xa001),
            (0x4b56_4d04, 0xb001),
            (0x200, 0xc000_0000),
            (0x201, 0xff_c000_0800),
            (0x250, 0x0606_0606_0606_0606),
            (0x2ff, 0xc00),
        ];
        let mut tried = 0;
        for (index, data) in dirty {
            let before = read(&vcpu, index);
            let entry = Msrs::from_entries(&[kvm_msr_entry { index, data, ..Default::default() }]).unwrap();
            if vcpu.set_msrs(&entry).unwrap() == 1 {
                assert_ne!(read(&vcpu, index), before, "{index:#x}");
                state.restore(&vcpu).unwrap();
                assert_eq!(read(&vcpu, index), before, "{index:#x}");
                tried += 1;
            }
        }
        assert!(tried >= 6, "{tried}");
    }
}
