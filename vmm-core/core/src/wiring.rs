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
        for vector in vectors {
            wire(&mut self.vectors, *vector)?;
        }
        for bell in bells {
            wire(&mut self.bells, *bell)?;
        }
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
        let gone: Vec<_> = self.windows.iter().filter(|(_, run)| !wanted.contains(run)).collect();
        let gone: Vec<u32> = gone.into_iter().map(|(slot, _)| *slot).collect();
        let Ram { region, mapping, .. } = &self.ecam;
        for slot in gone {
            mapping.set_slot(&vm.fd, slot, region.gpa, 0..0, true).map_err(host)?;
            self.windows.remove(&slot);
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
