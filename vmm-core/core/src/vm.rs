//! The VM in KVM: memory slots, interrupt controllers and timer, interrupt routes, doorbells.

use std::os::fd::{IntoRawFd as _, OwnedFd};

use bulkhead_bus_api::platform::{KVM_IDENTITY_MAP, KVM_TSS};
use kvm_bindings::{
    KVM_API_VERSION, KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KVM_PIT_SPEAKER_DUMMY, KvmIrqRouting, kvm_irq_routing_entry,
    kvm_irq_routing_irqchip, kvm_pit_config,
};
use kvm_ioctls::{Cap, Kvm, VmFd};
use vmm_sys_util::eventfd::EventFd;

use crate::error::{Error, Result, io, kvm};
use crate::memory::Ram;
use crate::sys;

/// Pins of the I/O APIC; each is the GSI of the same number.
pub const IOAPIC_PINS: u32 = 24;
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
    /// Room that KVM needs for a vCPU's extended state, in bytes.
    pub xsave_size: usize,
}

impl Vm {
    /// Makes the VM around its RAM.
    ///
    /// # Errors
    /// KVM's.
    pub fn new(host: &Kvm, ram: Vec<Ram>) -> Result<Self> {
        let fd = host.create_vm().map_err(kvm("KVM_CREATE_VM"))?;
        let tss = usize::try_from(KVM_TSS).map_err(|_| Error::Config("TSS address"))?;
        fd.set_identity_map_address(KVM_IDENTITY_MAP).map_err(kvm("KVM_SET_IDENTITY_MAP_ADDR"))?;
        fd.set_tss_address(tss).map_err(kvm("KVM_SET_TSS_ADDR"))?;
        fd.create_irq_chip().map_err(kvm("KVM_CREATE_IRQCHIP"))?;
        let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        fd.create_pit2(pit).map_err(kvm("KVM_CREATE_PIT2"))?;
        for (slot, ram) in (0..).zip(&ram) {
            ram.mapping
                .set_slot(&fd, slot, ram.region.gpa, false)
                .map_err(kvm("KVM_SET_USER_MEMORY_REGION"))?;
        }
        let xsave_size = usize::try_from(fd.check_extension_int(Cap::Xsave2)).unwrap_or(0);
        let vm = Self { fd, ram, xsave_size };
        vm.route_interrupts()?;
        Ok(vm)
    }

    /// Sets all interrupt routes: each GSI to its I/O APIC pin, the ISA ones to the PICs as well.
    fn route_interrupts(&self) -> Result<()> {
        let table = KvmIrqRouting::from_entries(&default_routes())
            .map_err(|_| Error::Capability("room for the interrupt routes"))?;
        self.fd.set_gsi_routing(&table).map_err(kvm("KVM_SET_GSI_ROUTING"))
    }

    /// Checks that all RAM has an address in a guest with so many physical address bits.
    ///
    /// # Errors
    /// [`Error::AddressWidth`].
    pub fn check_addresses(&self, bits: u32) -> Result<()> {
        let end = self.ram.last().map_or(0, |ram| ram.region.gpa + ram.region.len);
        if bits < 64 && end > 1 << bits { Err(Error::AddressWidth(bits)) } else { Ok(()) }
    }

    /// An eventfd that raises `gsi` (edge) when it is written.
    ///
    /// # Errors
    /// KVM's.
    pub fn interrupt(&self, gsi: u32) -> Result<OwnedFd> {
        let event = EventFd::new(libc::EFD_CLOEXEC | libc::EFD_NONBLOCK).map_err(io("eventfd"))?;
        self.fd.register_irqfd(&event, gsi).map_err(kvm("KVM_IRQFD"))?;
        Ok(sys::own(event.into_raw_fd()))
    }
}

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
    pic.chain((0..IOAPIC_PINS).map(|gsi| route(gsi, KVM_IRQCHIP_IOAPIC, gsi))).collect()
}
