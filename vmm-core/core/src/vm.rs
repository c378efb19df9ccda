//! The VM in KVM: memory slots, interrupt controllers and timer, interrupt routes, doorbells.

use std::os::fd::OwnedFd;

use bulkhead_bus_api::pci::MAX_WINDOWS;
use bulkhead_bus_api::platform::{KVM_IDENTITY_MAP, KVM_TSS, Range, device_memory};
use kvm_bindings::{
    KVM_API_VERSION, KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KVM_MEM_LOG_DIRTY_PAGES, KVM_PIT_SPEAKER_DUMMY, KvmIrqRouting,
    kvm_irq_routing_entry, kvm_irq_routing_irqchip, kvm_pit_config,
};
use kvm_ioctls::{Cap, Kvm, VmFd};
use vmm_sys_util::eventfd::EventFd;

use crate::error::{Error, Result, io, kvm};
use crate::memory::Ram;
use crate::sys;

/// Pins of the I/O APIC; each is the GSI of the same number.
pub const IOAPIC_PINS: u32 = 24;
/// Slots of RAM.
const RAM_SLOTS: usize = 2;
/// ISA interrupts, which the two PICs see as well.
const PIC_PINS: u32 = 16;

/// What a VM cannot do without, by the name that the message gives it.
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

/// Takes over /dev/kvm and checks what it can do.
///
/// # Errors
/// [`Error::Capability`] or [`Error::TooManyCpus`].
pub fn open(fd: OwnedFd, cpus: u32) -> Result<Kvm> {
    let host = sys::adopt_kvm(fd);
    if u32::try_from(host.get_api_version()) != Ok(KVM_API_VERSION) {
        return Err(Error::Capability("KVM_GET_API_VERSION 12"));
    }
    if let Some((_, name)) = NEEDED.iter().find(|(cap, _)| !host.check_extension(*cap)) {
        return Err(Error::Capability(name));
    }
    if host.get_nr_memslots() < RAM_SLOTS + usize::from(MAX_WINDOWS) {
        return Err(Error::Capability("KVM_CAP_NR_MEMSLOTS of 1026"));
    }
    let max = host.get_max_vcpus();
    if usize::try_from(cpus).is_ok_and(|n| n <= max) { Ok(host) } else { Err(Error::TooManyCpus(max)) }
}

/// The VM with its memory and interrupt controllers, before the first vCPU.
#[derive(Debug)]
pub struct Vm {
    /// The VM.
    pub fd: VmFd,
    /// Guest RAM; the slots point into it.
    pub ram: Vec<Ram>,
    /// Length in bytes of the range for memory devices.
    pub device_memory: u64,
    /// Room that KVM needs for a vCPU's extended state, in bytes.
    pub xsave_size: usize,
}

impl Vm {
    /// Makes the VM around its RAM.
    pub fn new(host: &Kvm, ram: Vec<Ram>) -> Result<Self> {
        let fd = host.create_vm().map_err(kvm("KVM_CREATE_VM"))?;
        // Before the chips: after their ports are registered KVM takes milliseconds for a slot.
        set_ram(&fd, &ram, 0).map_err(kvm("KVM_SET_USER_MEMORY_REGION"))?;
        let tss = usize::try_from(KVM_TSS).map_err(|_| Error::Config("TSS address"))?;
        fd.set_identity_map_address(KVM_IDENTITY_MAP).map_err(kvm("KVM_SET_IDENTITY_MAP_ADDR"))?;
        fd.set_tss_address(tss).map_err(kvm("KVM_SET_TSS_ADDR"))?;
        fd.create_irq_chip().map_err(kvm("KVM_CREATE_IRQCHIP"))?;
        let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        fd.create_pit2(pit).map_err(kvm("KVM_CREATE_PIT2"))?;
        let xsave_size = usize::try_from(fd.check_extension_int(Cap::Xsave2)).unwrap_or(0);
        let vm = Self { fd, ram, device_memory: 0, xsave_size };
        vm.route_interrupts([]).map_err(kvm("KVM_SET_GSI_ROUTING"))?;
        Ok(vm)
    }

    /// KVM notes from now on which pages of RAM the guest writes, or no longer.
    pub fn log_dirty(&self, on: bool) -> std::result::Result<(), kvm_ioctls::Error> {
        set_ram(&self.fd, &self.ram, if on { KVM_MEM_LOG_DIRTY_PAGES } else { 0 })
    }

    /// Sets all interrupt routes: each GSI to its I/O APIC pin, the ISA ones to the PICs as well, and `others`.
    pub fn route_interrupts(
        &self,
        others: impl IntoIterator<Item = kvm_irq_routing_entry>,
    ) -> std::result::Result<(), kvm_ioctls::Error> {
        let routes: Vec<_> = default_routes().into_iter().chain(others).collect();
        let table = KvmIrqRouting::from_entries(&routes);
        self.fd.set_gsi_routing(&table.map_err(|_| kvm_ioctls::Error::new(libc::E2BIG))?)
    }

    /// End of guest RAM.
    pub fn ram_end(&self) -> u64 {
        self.ram.last().map_or(0, |ram| ram.region.gpa + ram.region.len)
    }

    /// Where memory devices are, behind RAM and the PCI window.
    pub fn device_memory(&self) -> Range {
        device_memory(self.ram_end(), self.device_memory)
    }

    /// Checks that all that has an address has one in a guest with so many physical address bits.
    pub fn check_addresses(&self, bits: u32) -> Result<()> {
        let Range { base, len } = self.device_memory();
        if bits < 64 && base.checked_add(len).is_none_or(|end| end > 1 << bits) {
            Err(Error::AddressWidth(bits))
        } else {
            Ok(())
        }
    }

    /// An eventfd that raises `gsi` (edge) when it is written.
    pub fn interrupt(&self, gsi: u32) -> Result<EventFd> {
        let event = EventFd::new(libc::EFD_CLOEXEC | libc::EFD_NONBLOCK).map_err(io("eventfd"))?;
        self.fd.register_irqfd(&event, gsi).map_err(kvm("KVM_IRQFD"))?;
        Ok(event)
    }
}

/// Makes the slots of RAM, or changes their flags.
fn set_ram(vm: &VmFd, ram: &[Ram], flags: u32) -> std::result::Result<(), kvm_ioctls::Error> {
    let set = |(slot, Ram { region, mapping, .. }): (u32, &Ram)| {
        mapping.set_slot(vm, slot, region.gpa, region.len, flags)
    };
    (0..).zip(ram).try_for_each(set)
}

/// As the ACPI tables say: GSI n is pin n of the I/O APIC, except that the timer (ISA interrupt 0) is
/// on pin 2, where the PICs are cascaded.
fn default_routes() -> Vec<kvm_irq_routing_entry> {
    let route = |gsi, irqchip, pin| {
        let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_IRQCHIP, ..Default::default() };
        entry.u.irqchip = kvm_irq_routing_irqchip { irqchip, pin };
        entry
    };
    let pic = (0..PIC_PINS).map(|gsi| {
        let chip = if gsi < 8 { KVM_IRQCHIP_PIC_MASTER } else { KVM_IRQCHIP_PIC_SLAVE };
        route(gsi, chip, gsi % 8)
    });
    let ioapic = (0..IOAPIC_PINS).map(|gsi| route(gsi, KVM_IRQCHIP_IOAPIC, if gsi == 0 { 2 } else { gsi }));
    pic.chain(ioapic).filter(|entry| entry.gsi != 2).collect()
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use kvm_ioctls::{VcpuExit, VcpuFd};

    use super::*;

    fn machine() -> (Kvm, Vm) {
        let kvm = File::options().read(true).write(true).open("/dev/kvm");
        let host =
            open(kvm.expect("/dev/kvm cannot be opened: run these tests in the lab").into(), 1).unwrap();
        let vm = Vm::new(&host, crate::memory::create(1 << 20).unwrap()).unwrap();
        (host, vm)
    }

    #[test]
    fn the_timer_is_on_pin_two() {
        let routes = default_routes();
        assert_eq!(routes.len(), 15 + 23);
        assert!(routes.iter().all(|r| r.gsi != 2 && r.type_ == KVM_IRQ_ROUTING_IRQCHIP));
    }

    /// The guest writes at 0x5000 and 0x7000, and says so at a port.
    fn write(vcpu: &mut VcpuFd) {
        let mut sregs = vcpu.get_sregs().unwrap();
        (sregs.cs.base, sregs.cs.selector) = (0, 0);
        vcpu.set_sregs(&sregs).unwrap();
        let regs = kvm_bindings::kvm_regs { rip: 0x1000, rflags: 2, ..Default::default() };
        vcpu.set_regs(&regs).unwrap();
        while !matches!(vcpu.run().unwrap(), VcpuExit::IoOut(0x80, _)) {}
    }

    #[test]
    fn the_dirty_log_has_what_the_guest_writes_while_it_is_on() {
        let (_host, vm) = machine();
        let mut vcpu = vm.fd.create_vcpu(0).unwrap();
        // mov byte [0x5000], 1; mov byte [0x7000], 1; out 0x80, al
        let code = [0xc6, 0x06, 0, 0x50, 1, 0xc6, 0x06, 0, 0x70, 1, 0xe6, 0x80];
        nix::sys::uio::pwrite(&vm.ram[0].fd, &code, 0x1000).unwrap();
        let log = || vm.fd.get_dirty_log(0, 1 << 20).map_err(|e| e.errno());
        write(&mut vcpu);
        assert_eq!(log(), Err(libc::ENOENT));
        for _ in 0..2 {
            vm.log_dirty(true).unwrap();
            write(&mut vcpu);
        }
        let written = |log: Vec<u64>| (log[0] & 0xffff, log[1..].iter().all(|pages| *pages == 0));
        assert_eq!(log().map(written), Ok((1 << 5 | 1 << 7, true)));
        // Nothing since.
        assert_eq!(log().map(written), Ok((0, true)));
        for _ in 0..2 {
            vm.log_dirty(false).unwrap();
            write(&mut vcpu);
            assert_eq!(log(), Err(libc::ENOENT));
        }
    }

    #[test]
    fn ram_and_window_beyond_the_address_width_are_refused() {
        let (_host, vm) = machine();
        // The window above little RAM ends at 36 GiB.
        assert!(vm.check_addresses(36).is_ok());
        assert!(matches!(vm.check_addresses(35), Err(Error::AddressWidth(35))));
    }
}
