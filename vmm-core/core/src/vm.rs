//! The VM in KVM: memory slots, interrupt controllers and timer, interrupt routes, doorbells.

use std::os::fd::{IntoRawFd as _, OwnedFd};

use bulkhead_bus_api::platform::{KVM_IDENTITY_MAP, KVM_TSS};
use kvm_bindings::{
    KVM_API_VERSION, KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KVM_PIT_SPEAKER_DUMMY, KvmIrqRouting, kvm_irq_routing_entry,
    kvm_irq_routing_irqchip, kvm_pit_config,
};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, NoDatamatch, VmFd};
use vmm_sys_util::eventfd::EventFd;

use crate::error::{Error, Result, io, kvm};
use crate::memory::{PAGE, Ram};
use crate::sys::{self, Mapping};

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
    /// Read-only windows, by address.
    windows: Vec<(u64, Mapping)>,
    /// Room that KVM needs for a vCPU's extended state, in bytes.
    pub xsave_size: usize,
}

impl Vm {
    /// Makes the VM around its RAM.
    pub fn new(host: &Kvm, ram: Vec<Ram>) -> Result<Self> {
        let fd = host.create_vm().map_err(kvm("KVM_CREATE_VM"))?;
        // Before the chips: after their ports are registered KVM takes milliseconds for a slot.
        for (slot, ram) in (0..).zip(&ram) {
            ram.mapping
                .set_slot(&fd, slot, ram.region.gpa, false)
                .map_err(kvm("KVM_SET_USER_MEMORY_REGION"))?;
        }
        let tss = usize::try_from(KVM_TSS).map_err(|_| Error::Config("TSS address"))?;
        fd.set_identity_map_address(KVM_IDENTITY_MAP).map_err(kvm("KVM_SET_IDENTITY_MAP_ADDR"))?;
        fd.set_tss_address(tss).map_err(kvm("KVM_SET_TSS_ADDR"))?;
        fd.create_irq_chip().map_err(kvm("KVM_CREATE_IRQCHIP"))?;
        let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        fd.create_pit2(pit).map_err(kvm("KVM_CREATE_PIT2"))?;
        let xsave_size = usize::try_from(fd.check_extension_int(Cap::Xsave2)).unwrap_or(0);
        let vm = Self { fd, ram, windows: Vec::new(), xsave_size };
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
    pub fn check_addresses(&self, bits: u32) -> Result<()> {
        let end = self.ram.last().map_or(0, |ram| ram.region.gpa + ram.region.len);
        if bits < 64 && end > 1 << bits { Err(Error::AddressWidth(bits)) } else { Ok(()) }
    }

    /// Maps memory that the guest may read at `gpa`, without exits; a write exits.
    ///
    /// # Errors
    /// The window is not page aligned or lies over RAM or another window; KVM's.
    #[cfg_attr(not(test), expect(dead_code, reason = "its caller, the pci daemon's link, comes with PCI"))]
    pub fn map_readonly(&mut self, gpa: u64, mapping: Mapping) -> Result<()> {
        let end = gpa.checked_add(mapping.len()).ok_or(Error::Config("window beyond all addresses"))?;
        let overlaps = |base: u64, len: u64| gpa < base + len && base < end;
        let taken = self.ram.iter().any(|ram| overlaps(ram.region.gpa, ram.region.len))
            || self.windows.iter().any(|(base, window)| overlaps(*base, window.len()));
        if !gpa.is_multiple_of(PAGE) || taken {
            return Err(Error::Config("a window is not page aligned or lies over another"));
        }
        let slot = u32::try_from(self.ram.len() + self.windows.len())
            .map_err(|_| Error::Config("too many windows"))?;
        mapping.set_slot(&self.fd, slot, gpa, true).map_err(kvm("KVM_SET_USER_MEMORY_REGION"))?;
        self.windows.push((gpa, mapping));
        Ok(())
    }

    /// Makes a write of any width and value to `addr` ring `bell` instead of an exit.
    ///
    /// # Errors
    /// The address is RAM; KVM's.
    #[cfg_attr(not(test), expect(dead_code, reason = "its caller, the pci daemon's link, comes with PCI"))]
    pub fn doorbell(&self, bell: &EventFd, addr: IoEventAddress) -> Result<()> {
        if let IoEventAddress::Mmio(gpa) = addr {
            if self.ram.iter().any(|ram| gpa >= ram.region.gpa && gpa - ram.region.gpa < ram.region.len) {
                return Err(Error::Config("a doorbell lies over RAM"));
            }
        }
        self.fd.register_ioevent(bell, &addr, NoDatamatch).map_err(kvm("KVM_IOEVENTFD"))
    }

    /// An eventfd that raises `gsi` (edge) when it is written.
    pub fn interrupt(&self, gsi: u32) -> Result<OwnedFd> {
        let event = EventFd::new(libc::EFD_CLOEXEC | libc::EFD_NONBLOCK).map_err(io("eventfd"))?;
        self.fd.register_irqfd(&event, gsi).map_err(kvm("KVM_IRQFD"))?;
        Ok(sys::own(event.into_raw_fd()))
    }
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

    use bulkhead_control_api::loader::Start;

    use super::*;
    use crate::registers;
    use crate::sys::Exit;

    fn machine() -> (Kvm, Vm) {
        let kvm = File::options().read(true).write(true).open("/dev/kvm");
        let host =
            open(kvm.expect("/dev/kvm cannot be opened: run these tests in the lab").into(), 1).unwrap();
        let vm = Vm::new(&host, crate::memory::create(1 << 20).unwrap()).unwrap();
        (host, vm)
    }

    /// Runs 32-bit code until an exit that `f` makes something of.
    fn run<T>(vm: &Vm, code: &[u8], f: impl FnOnce(Exit<'_>) -> T) -> T {
        use std::os::unix::fs::FileExt;
        let file = File::from(vm.ram[0].fd.try_clone().unwrap());
        file.write_all_at(code, 0x1000).unwrap();
        let mut vcpu = vm.fd.create_vcpu(0).unwrap();
        registers::apply(&vcpu, &Start::Pvh32 { eip: 0x1000, ebx: 0 }).unwrap();
        f(sys::run(&mut vcpu))
    }

    #[test]
    fn a_read_only_window_is_read_without_an_exit() {
        let (_host, mut vm) = machine();
        let fd = crate::memory::create(crate::memory::PAGE).unwrap().remove(0);
        let page = File::from(fd.fd.try_clone().unwrap());
        std::os::unix::fs::FileExt::write_all_at(&page, &[0x78, 0x56, 0x34, 0x12], 0).unwrap();
        vm.map_readonly(0xd000_0000, fd.mapping).unwrap();
        // mov eax, [0xd0000000]; mov [0xd0000004], eax
        run(&vm, &[0xa1, 0, 0, 0, 0xd0, 0xa3, 4, 0, 0, 0xd0], |exit| match exit {
            Exit::MmioWrite(0xd000_0004, data) => assert_eq!(data, [0x78, 0x56, 0x34, 0x12]),
            other => panic!("{other:?}"),
        });
    }

    #[test]
    fn a_window_over_ram_or_another_is_refused() {
        let (_host, mut vm) = machine();
        let window = || crate::memory::create(crate::memory::PAGE * 2).unwrap().remove(0).mapping;
        for gpa in [0, 0xf_f000, 0xd000_0800, u64::MAX - 4095] {
            assert!(vm.map_readonly(gpa, window()).is_err(), "{gpa:#x}");
        }
        vm.map_readonly(0xd000_0000, window()).unwrap();
        assert!(vm.map_readonly(0xd000_1000, window()).is_err());
        vm.map_readonly(0xd000_2000, window()).unwrap();
    }

    #[test]
    fn a_doorbell_rings_without_an_exit() {
        let (_host, vm) = machine();
        let bell = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        vm.doorbell(&bell, IoEventAddress::Mmio(0xd000_0000)).unwrap();
        assert!(vm.doorbell(&bell, IoEventAddress::Mmio(0x1000)).is_err());
        // mov [0xd0000000], eax; mov [0xd0000008], eax
        run(&vm, &[0xa3, 0, 0, 0, 0xd0, 0xa3, 8, 0, 0, 0xd0], |exit| {
            assert!(matches!(exit, Exit::MmioWrite(0xd000_0008, _)), "{exit:?}");
        });
        assert_eq!(bell.read().unwrap(), 1);
    }

    #[test]
    fn the_timer_is_on_pin_two() {
        let routes = default_routes();
        assert_eq!(routes.len(), 15 + 23);
        assert!(routes.iter().all(|r| r.gsi != 2 && r.type_ == KVM_IRQ_ROUTING_IRQCHIP));
    }

    #[test]
    fn ram_beyond_the_address_width_is_refused() {
        let (_host, vm) = machine();
        assert!(vm.check_addresses(20).is_ok());
        assert!(matches!(vm.check_addresses(19), Err(Error::AddressWidth(19))));
    }
}
