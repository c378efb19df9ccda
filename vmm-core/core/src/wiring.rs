//! What pci asks of KVM: interrupt routes of its vectors, doorbells, and windows.
//!
//! Nothing here knows PCI. Numbers and addresses are checked; what is in range is as harmless as what the guest
//! itself may do to its interrupts and addresses.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::os::fd::{BorrowedFd, OwnedFd};

use bulkhead_bus_api::pci::{
    Change, MAX_BELLS, MAX_CHANGES, MAX_EVENTFDS, MAX_VECTORS, MAX_WINDOWS, MSI_WINDOW, MSI_WINDOW_MASK, Msi,
    Refusal,
};
use bulkhead_bus_api::platform::pci_ranges;
use kvm_bindings::{KVM_IRQ_ROUTING_MSI, kvm_irq_routing_entry, kvm_irq_routing_msi};
use kvm_ioctls::{IoEventAddress, NoDatamatch};
use vmm_sys_util::eventfd::EventFd;

use crate::sys;
use crate::vm::{IOAPIC_PINS, Vm};
use crate::windows::Windows;

type Result<T> = std::result::Result<T, Refusal>;

/// An eventfd, and where it leads or comes from.
#[derive(Debug)]
struct Wire<T> {
    event: EventFd,
    /// Of a vector, its message, which it keeps while masked; of a bell, its present address.
    to: Option<T>,
    /// A vector that is not masked.
    wanted: bool,
    /// KVM waits for the vector's eventfd.
    live: bool,
}

/// The wires of one VM, and its windows.
#[derive(Debug)]
pub struct Wiring {
    /// The memfd of the configuration window.
    pub ecam: OwnedFd,
    vectors: BTreeMap<u16, Wire<Msi>>,
    bells: BTreeMap<u16, Wire<u64>>,
    /// A vector has another message than KVM knows.
    routes_due: bool,
    /// What the guest reaches without an exit, and where bells may be.
    pub windows: Windows,
}

fn host(error: kvm_ioctls::Error) -> Refusal {
    Refusal::Host(error.errno())
}

/// The wire of a number; its eventfd is made when it is first named.
fn wire<T>(wires: &mut BTreeMap<u16, Wire<T>>, number: u16) -> Result<&mut Wire<T>> {
    Ok(match wires.entry(number) {
        Entry::Occupied(entry) => entry.into_mut(),
        Entry::Vacant(entry) => {
            let event = EventFd::new(libc::EFD_CLOEXEC | libc::EFD_NONBLOCK);
            let event = event.map_err(|error| Refusal::Host(error.raw_os_error().unwrap_or(libc::EIO)))?;
            entry.insert(Wire { event, to: None, wanted: false, live: false })
        }
    })
}

const fn gsi(vector: u16) -> u32 {
    IOAPIC_PINS + vector as u32
}

fn route(vector: u16, msi: &Msi) -> kvm_irq_routing_entry {
    let mut entry =
        kvm_irq_routing_entry { gsi: gsi(vector), type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
    entry.u.msi = kvm_irq_routing_msi { address_lo: msi.address, data: msi.data, ..Default::default() };
    entry
}

impl Wiring {
    /// Nothing is wired, nothing is mapped.
    pub fn new(ecam: OwnedFd, vm: &Vm) -> Self {
        let first_slot = u32::try_from(vm.ram.len()).unwrap_or(0);
        let ranges = pci_ranges(vm.ram_end()).into_iter().chain([vm.device_memory()]).collect();
        let windows = Windows::new(first_slot, MAX_WINDOWS, ranges);
        let (vectors, bells, routes_due) = Default::default();
        Self { ecam, vectors, bells, routes_due, windows }
    }

    /// The eventfds of vectors and bells.
    pub fn eventfds(&mut self, vectors: &[u16], bells: &[u16]) -> Result<Vec<BorrowedFd<'_>>> {
        let too_many = vectors.len().saturating_add(bells.len()) > MAX_EVENTFDS;
        if too_many || vectors.iter().any(|v| *v >= MAX_VECTORS) || bells.iter().any(|b| *b >= MAX_BELLS) {
            return Err(Refusal::NotPermitted);
        }
        vectors.iter().try_for_each(|vector| wire(&mut self.vectors, *vector).map(drop))?;
        bells.iter().try_for_each(|bell| wire(&mut self.bells, *bell).map(drop))?;
        let vectors = vectors.iter().filter_map(|v| self.vectors.get(v)).map(|wire| &wire.event);
        let bells = bells.iter().filter_map(|b| self.bells.get(b)).map(|wire| &wire.event);
        Ok(vectors.chain(bells).map(sys::borrow).collect())
    }

    /// Makes changes in order, up to the first that fails; with the descriptors that come with them.
    pub fn apply(&mut self, vm: &Vm, changes: &[Change], fds: Vec<OwnedFd>) -> Result<()> {
        if changes.len() > MAX_CHANGES {
            return Err(Refusal::NotPermitted);
        }
        let mut fds = fds.into_iter();
        let changed = changes.iter().try_for_each(|change| match *change {
            Change::Vector { vector, to } => self.set_vector(vm, vector, to),
            Change::Bell { bell, at } => self.set_bell(vm, bell, at),
            Change::NoVector { vector } => {
                self.set_vector(vm, vector, None)?;
                self.routes_due |= self.vectors.remove(&vector).is_some_and(|wire| wire.to.is_some());
                Ok(())
            }
            Change::NoBell { bell } => {
                self.set_bell(vm, bell, None)?;
                self.bells.remove(&bell);
                Ok(())
            }
            Change::Window { window, to } => {
                self.windows.set(&vm.fd, window, to.and_then(|to| Some((to, fds.next()?))))
            }
        });
        // Also after an error: what came before it is done.
        changed.and(self.settle_vectors(vm))
    }

    fn set_vector(&mut self, vm: &Vm, vector: u16, to: Option<Msi>) -> Result<()> {
        let foreign = to.is_some_and(|msi| msi.address & MSI_WINDOW_MASK != MSI_WINDOW);
        if vector >= MAX_VECTORS || foreign {
            return Err(Refusal::NotPermitted);
        }
        if to.is_some() {
            let wire = wire(&mut self.vectors, vector)?;
            self.routes_due |= wire.to != to;
            (wire.to, wire.wanted) = (to, true);
        } else if let Some(wire) = self.vectors.get_mut(&vector) {
            wire.wanted = false;
            if wire.live {
                // KVM empties the eventfd on the way: what it has counted so far was sent.
                vm.fd.unregister_irqfd(&wire.event, gsi(vector)).map_err(host)?;
                wire.live = false;
            }
        }
        Ok(())
    }

    /// First the routes, all at once; then KVM may take what eventfds have counted meanwhile.
    fn settle_vectors(&mut self, vm: &Vm) -> Result<()> {
        if self.routes_due {
            let routes = self.vectors.iter().filter_map(|(v, wire)| Some(route(*v, wire.to.as_ref()?)));
            vm.route_interrupts(routes).map_err(host)?;
            self.routes_due = false;
        }
        for (vector, wire) in self.vectors.iter_mut().filter(|(_, wire)| wire.wanted && !wire.live) {
            vm.fd.register_irqfd(&wire.event, gsi(*vector)).map_err(host)?;
            wire.live = true;
        }
        Ok(())
    }

    fn set_bell(&mut self, vm: &Vm, bell: u16, at: Option<u64>) -> Result<()> {
        let [_, ranges @ ..] = pci_ranges(vm.ram_end());
        let inside = |at| ranges.iter().any(|range| range.contains(at, 1));
        let taken = |at| self.bells.iter().any(|(other, wire)| *other != bell && wire.to == Some(at));
        if bell >= MAX_BELLS || at.is_some_and(|at| !inside(at) || taken(at)) {
            return Err(Refusal::NotPermitted);
        }
        let wire = match at {
            None if !self.bells.contains_key(&bell) => return Ok(()),
            _ => wire(&mut self.bells, bell)?,
        };
        if let Some(old) = wire.to.take_if(|old| Some(*old) != at) {
            let old = IoEventAddress::Mmio(old);
            vm.fd.unregister_ioevent(&wire.event, &old, NoDatamatch).map_err(host)?;
        }
        if let (None, Some(new)) = (wire.to, at) {
            vm.fd.register_ioevent(&wire.event, &IoEventAddress::Mmio(new), NoDatamatch).map_err(host)?;
            wire.to = at;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use bulkhead_bus_api::pci::Window;
    use kvm_ioctls::{Kvm, VcpuFd};

    use bulkhead_bus_api::platform::ECAM;

    use super::*;

    const MESSAGE: Msi = Msi { address: 0xfee0_0000, data: 0x41 };
    const OTHER: Msi = Msi { address: 0xfee0_0000, data: 0x62 };

    fn machine() -> (Kvm, Vm, VcpuFd, Wiring) {
        let kvm = std::fs::File::options().read(true).write(true).open("/dev/kvm");
        let kvm = kvm.expect("/dev/kvm cannot be opened: run these tests in the lab");
        let host = crate::vm::open(kvm.into(), 1).unwrap();
        let vm = Vm::new(&host, crate::memory::create(1 << 20).unwrap()).unwrap();
        let vcpu = vm.fd.create_vcpu(0).unwrap();
        // The local APIC is on (spurious interrupt vector register, bit 8).
        let mut lapic = vcpu.get_lapic().unwrap();
        lapic.regs[0xf1] |= 1;
        vcpu.set_lapic(&lapic).unwrap();
        let wiring = Wiring::new(crate::memory::create_ecam().unwrap(), &vm);
        (host, vm, vcpu, wiring)
    }

    /// Whether the interrupt waits in the local APIC (interrupt request register).
    fn is_requested(vcpu: &VcpuFd, msi: &Msi) -> bool {
        let (vector, regs) = (msi.data as usize, vcpu.get_lapic().unwrap().regs);
        regs[0x200 + vector / 32 * 16 + vector % 32 / 8].cast_unsigned() & 1 << (vector % 8) != 0
    }

    fn wait_requested(vcpu: &VcpuFd, msi: &Msi) {
        let start = Instant::now();
        while !is_requested(vcpu, msi) {
            assert!(start.elapsed() < Duration::from_secs(5), "{msi:?} did not come");
        }
    }

    fn set(wiring: &mut Wiring, vm: &Vm, vector: u16, to: Option<Msi>) {
        wiring.apply(vm, &[Change::Vector { vector, to }], vec![]).unwrap();
    }

    #[test]
    fn a_masked_vector_counts_and_its_count_is_one_interrupt_at_unmask() {
        let (_host, vm, vcpu, mut wiring) = machine();
        wiring.eventfds(&[1023], &[]).unwrap();
        let event = wiring.vectors[&1023].event.try_clone().unwrap();
        event.write(1).unwrap();
        event.write(1).unwrap();
        assert!(!is_requested(&vcpu, &MESSAGE));
        set(&mut wiring, &vm, 1023, Some(MESSAGE));
        wait_requested(&vcpu, &MESSAGE);
        // Masked again nothing is left of what was sent.
        set(&mut wiring, &vm, 1023, None);
        assert!(event.read().is_err());
        event.write(1).unwrap();
        std::thread::sleep(Duration::from_millis(50));
        assert!(!is_requested(&vcpu, &OTHER));
        // What waits goes to where the vector leads when it is unmasked.
        set(&mut wiring, &vm, 1023, Some(OTHER));
        wait_requested(&vcpu, &OTHER);
    }

    #[test]
    fn an_unmasked_vector_is_an_interrupt_and_takes_another_message() {
        let (_host, vm, vcpu, mut wiring) = machine();
        for vector in [0, 7] {
            set(&mut wiring, &vm, vector, Some(MESSAGE));
            set(&mut wiring, &vm, vector, Some(MESSAGE));
        }
        set(&mut wiring, &vm, 7, Some(OTHER));
        wiring.vectors[&7].event.write(1).unwrap();
        wait_requested(&vcpu, &OTHER);
        assert!(!is_requested(&vcpu, &MESSAGE));
        wiring.vectors[&0].event.write(1).unwrap();
        wait_requested(&vcpu, &MESSAGE);
    }

    #[test]
    fn a_number_that_was_given_back_has_another_eventfd() {
        let (_host, vm, vcpu, mut wiring) = machine();
        wiring.eventfds(&[5], &[6]).unwrap();
        set(&mut wiring, &vm, 5, Some(MESSAGE));
        let old = (wiring.vectors[&5].event.try_clone(), wiring.bells[&6].event.try_clone());
        let (old_vector, old_bell) = (old.0.unwrap(), old.1.unwrap());
        let gone = [Change::NoVector { vector: 5 }, Change::NoBell { bell: 6 }];
        wiring.apply(&vm, &gone, vec![]).unwrap();
        wiring.apply(&vm, &gone, vec![]).unwrap();
        wiring.eventfds(&[5], &[6]).unwrap();
        old_bell.write(1).unwrap();
        assert!(wiring.bells[&6].event.read().is_err(), "it is another one");
        set(&mut wiring, &vm, 5, Some(OTHER));
        old_vector.write(1).unwrap();
        wiring.vectors[&5].event.write(1).unwrap();
        wait_requested(&vcpu, &OTHER);
        assert!(!is_requested(&vcpu, &MESSAGE));
        assert_eq!(old_vector.read().unwrap(), 1, "nobody hears it");
    }

    #[test]
    fn masked_and_unmasked_in_one_go_loses_nothing() {
        let (_host, vm, vcpu, mut wiring) = machine();
        set(&mut wiring, &vm, 0, Some(MESSAGE));
        let go = [Change::Vector { vector: 0, to: None }, Change::Vector { vector: 0, to: Some(OTHER) }];
        wiring.apply(&vm, &go, vec![]).unwrap();
        wiring.vectors[&0].event.write(1).unwrap();
        wait_requested(&vcpu, &OTHER);
        let back = [go[1], go[0]];
        wiring.apply(&vm, &back, vec![]).unwrap();
        wiring.vectors[&0].event.write(1).unwrap();
        assert_eq!(wiring.vectors[&0].event.read().unwrap(), 1);
    }

    #[test]
    fn what_came_before_an_error_is_done() {
        let (_host, vm, vcpu, mut wiring) = machine();
        let window = Window { gpa: ECAM.base + 0x3000, len: 0x1000, offset: 0x3000, writable: false };
        let page = Change::Window { window: 7, to: Some(window) };
        let vector = Change::Vector { vector: 0, to: Some(MESSAGE) };
        let late = Change::Vector { vector: 1, to: Some(OTHER) };
        let bad = Change::Bell { bell: 0, at: Some(0) };
        let changes = [page, vector, bad, late];
        let one = vec![wiring.ecam.try_clone().unwrap()];
        assert_eq!(wiring.apply(&vm, &changes, one), Err(Refusal::NotPermitted));
        wiring.vectors[&0].event.write(1).unwrap();
        wait_requested(&vcpu, &MESSAGE);
        assert_eq!(wiring.windows.count(), 1);
        assert!(!wiring.vectors.contains_key(&1) && !wiring.bells.contains_key(&0));
    }

    #[test]
    fn the_dirty_log_is_of_all_windows_that_the_guest_writes() {
        let (_host, vm, _vcpu, mut wiring) = machine();
        let base = pci_ranges(vm.ram_end())[1].base;
        let map = |wiring: &mut Wiring, number: u16, writable| {
            let window = Window { gpa: base + u64::from(number) * 0x1000, len: 0x1000, offset: 0, writable };
            let fd = vec![wiring.ecam.try_clone().unwrap()];
            wiring.apply(&vm, &[Change::Window { window: number, to: Some(window) }], fd).unwrap();
        };
        let first_slot = u32::try_from(vm.ram.len()).unwrap();
        let logged = || [0, 1, 2].map(|window| vm.fd.get_dirty_log(first_slot + window, 0x1000).is_ok());
        map(&mut wiring, 0, true);
        map(&mut wiring, 1, false);
        assert_eq!(logged(), [false; 3]);
        wiring.windows.log_dirty(&vm.fd, true).unwrap();
        map(&mut wiring, 2, true);
        assert_eq!(logged(), [true, false, true]);
        wiring.windows.log_dirty(&vm.fd, false).unwrap();
        assert_eq!(logged(), [false; 3]);
    }
}
