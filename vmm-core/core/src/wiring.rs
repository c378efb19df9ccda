//! What pci asks of KVM: interrupt routes of its vectors, doorbells, and which pages of configuration space the guest
//! reads without an exit.
//!
//! Nothing here knows PCI. Numbers and addresses are checked; what is in range is as harmless as what the guest
//! itself may do to its interrupts and addresses.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::os::fd::BorrowedFd;

use bulkhead_bus_api::pci::{
    Change, MAX_BELLS, MAX_CHANGES, MAX_EVENTFDS, MAX_VECTORS, MSI_WINDOW, MSI_WINDOW_MASK, Msi, Refusal,
};
use bulkhead_bus_api::platform::{PCI_MEM32, Range, pci_mem64};
use kvm_bindings::{KVM_IRQ_ROUTING_MSI, kvm_irq_routing_entry, kvm_irq_routing_msi};
use kvm_ioctls::{IoEventAddress, NoDatamatch};
use vmm_sys_util::eventfd::EventFd;

use crate::memory::{PAGE, Ram};
use crate::sys;
use crate::vm::{IOAPIC_PINS, MAX_WINDOWS, Vm};

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

/// The wires of one VM, and its configuration window.
#[derive(Debug)]
pub struct Wiring {
    /// The configuration window.
    pub ecam: Ram,
    vectors: BTreeMap<u16, Wire<Msi>>,
    bells: BTreeMap<u16, Wire<u64>>,
    /// Where bells may be.
    ranges: [Range; 2],
    /// A vector has another message than KVM knows.
    routes_due: bool,
    /// Each page of the window: whether pci wants it read from memory.
    pages: Vec<bool>,
    /// What is mapped: first page and number of pages, by slot.
    windows: BTreeMap<u32, (u64, u64)>,
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

/// First page and number of pages of each run of mapped pages.
fn runs(pages: &[bool]) -> impl Iterator<Item = (u64, u64)> {
    let mut end = 0;
    pages.chunk_by(|a, b| a == b).filter_map(move |run| {
        let (first, count) = (end, run.len() as u64);
        end += count;
        run.first().is_some_and(|mapped| *mapped).then_some((first, count))
    })
}

impl Wiring {
    /// Nothing is wired, nothing is mapped.
    pub fn new(ecam: Ram, ram_end: u64) -> Self {
        let pages = usize::try_from(ecam.region.len / PAGE).unwrap_or(0);
        Self {
            ecam,
            vectors: BTreeMap::new(),
            bells: BTreeMap::new(),
            ranges: [PCI_MEM32, pci_mem64(ram_end)],
            routes_due: false,
            pages: vec![false; pages],
            windows: BTreeMap::new(),
        }
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

    /// Makes changes in order, up to the first that fails.
    pub fn apply(&mut self, vm: &Vm, changes: &[Change]) -> Result<()> {
        if changes.len() > MAX_CHANGES {
            return Err(Refusal::NotPermitted);
        }
        let changed = changes.iter().try_for_each(|change| match *change {
            Change::Vector { vector, to } => self.set_vector(vm, vector, to),
            Change::Bell { bell, at } => self.set_bell(vm, bell, at),
            Change::Pages { first, count, mapped } => {
                let (first, count) = (usize::from(first), usize::from(count));
                let pages = self.pages.get_mut(first..first + count).ok_or(Refusal::NotPermitted)?;
                pages.fill(mapped);
                Ok(())
            }
        });
        // Also after an error: what came before it is done.
        let settled = self.settle_vectors(vm).and_then(|()| self.settle_pages(vm));
        changed.and(settled)
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
        let inside = |at| self.ranges.iter().any(|range| range.contains(at, 1));
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

    /// Changes the slots that differ. A slot cannot grow: while a run changes, its pages are read by exits.
    fn settle_pages(&mut self, vm: &Vm) -> Result<()> {
        // What is beyond the bound is read by exits, which is slower and not wrong.
        let wanted: Vec<_> = runs(&self.pages).take(MAX_WINDOWS).collect();
        let Ram { region, mapping, .. } = &self.ecam;
        for (slot, run) in self.windows.clone() {
            if !wanted.contains(&run) {
                mapping.set_slot(&vm.fd, slot, region.gpa, 0..0, true).map_err(host)?;
                self.windows.remove(&slot);
            }
        }
        let first_slot = u32::try_from(vm.ram.len()).unwrap_or(0);
        for run in wanted {
            if self.windows.values().any(|mapped| *mapped == run) {
                continue;
            }
            let Some(slot) = (first_slot..).find(|slot| !self.windows.contains_key(slot)) else { break };
            let part = run.0 * PAGE..(run.0 + run.1) * PAGE;
            mapping.set_slot(&vm.fd, slot, region.gpa + part.start, part, true).map_err(host)?;
            self.windows.insert(slot, run);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use kvm_ioctls::{Kvm, VcpuFd};

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
        let wiring = Wiring::new(crate::memory::create_ecam().unwrap(), vm.ram_end());
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
        wiring.apply(vm, &[Change::Vector { vector, to }]).unwrap();
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
    fn masked_and_unmasked_in_one_go_loses_nothing() {
        let (_host, vm, vcpu, mut wiring) = machine();
        set(&mut wiring, &vm, 0, Some(MESSAGE));
        let go = [Change::Vector { vector: 0, to: None }, Change::Vector { vector: 0, to: Some(OTHER) }];
        wiring.apply(&vm, &go).unwrap();
        wiring.vectors[&0].event.write(1).unwrap();
        wait_requested(&vcpu, &OTHER);
        let back = [go[1], go[0]];
        wiring.apply(&vm, &back).unwrap();
        wiring.vectors[&0].event.write(1).unwrap();
        assert_eq!(wiring.vectors[&0].event.read().unwrap(), 1);
    }

    #[test]
    fn what_came_before_an_error_is_done() {
        let (_host, vm, vcpu, mut wiring) = machine();
        let page = Change::Pages { first: 3, count: 1, mapped: true };
        let vector = Change::Vector { vector: 0, to: Some(MESSAGE) };
        let late = Change::Vector { vector: 1, to: Some(OTHER) };
        let bad = Change::Bell { bell: 0, at: Some(0) };
        assert_eq!(wiring.apply(&vm, &[page, vector, bad, late]), Err(Refusal::NotPermitted));
        wiring.vectors[&0].event.write(1).unwrap();
        wait_requested(&vcpu, &MESSAGE);
        assert!(wiring.windows.values().eq(&[(3, 1)]));
        assert!(!wiring.vectors.contains_key(&1) && !wiring.bells.contains_key(&0));
    }

    #[test]
    fn pages_side_by_side_are_one_slot() {
        let (_host, vm, _vcpu, mut wiring) = machine();
        let mut pages = |first, count, mapped| {
            wiring.apply(&vm, &[Change::Pages { first, count, mapped }]).unwrap();
            wiring.windows.clone().into_iter().collect::<Vec<_>>()
        };
        assert_eq!(pages(8, 1, true), [(1, (8, 1))]);
        assert_eq!(pages(16, 2, true), [(1, (8, 1)), (2, (16, 2))]);
        assert_eq!(pages(9, 1, true), [(1, (8, 2)), (2, (16, 2))]);
        assert_eq!(pages(10, 6, true), [(1, (8, 10))]);
        assert_eq!(pages(12, 1, false), [(1, (8, 4)), (2, (13, 5))]);
        assert_eq!(pages(8, 4, false), [(2, (13, 5))]);
        assert_eq!(pages(65535, 1, true), [(1, (65535, 1)), (2, (13, 5))]);
        assert_eq!(pages(0, 65535, false), [(1, (65535, 1))]);
        assert_eq!(pages(0, 65535, true), [(1, (0, 65536))]);
    }
}
