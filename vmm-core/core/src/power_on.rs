//! Making the machine, in the order that lets the loader work at the same time.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Barrier};

use bulkhead_bus_api::platform::CONSOLE_GSIS;
use bulkhead_control_api::config::{Core, CpuTopology};
use kvm_ioctls::{Cap, Kvm};

use crate::boot::Boot;
use crate::bus::{AccessLink, Bus, Links};
use crate::coalesce::Coalescer;
use crate::cpuid::Template;
use crate::error::{Error, Result, kvm, system};
use crate::gate::{Gate, lock};
use crate::machine::{Host, Machine, Now, PowerOn};
use crate::notice::Notices;
use crate::peer::{Gifts, Peer};
use crate::snapshot::{self, Chips, MsrSet, VcpuState};
use crate::state::State;
use crate::sys::Ring;
use crate::vcpu::{self, Shared, Vcpu};
use crate::vm::{self, Vm};
use crate::wiring::Wiring;
use crate::{memory, signals, threads};
use bulkhead_jail::door::Door;

/// What core is started with.
#[derive(Debug)]
pub struct Parts {
    /// Configuration.
    pub config: Core,
    /// /dev/kvm.
    pub kvm: OwnedFd,
    /// Listener for the console.
    pub console: OwnedFd,
    /// Listener for pci, in a machine that has it.
    pub pci: Option<OwnedFd>,
    /// Listener for the broker.
    pub broker: OwnedFd,
    /// Listener for loaders.
    pub loader: OwnedFd,
    /// Listener for dumps.
    pub dump: OwnedFd,
    /// Connected socket; one packet on it asks for a loader.
    pub boot: OwnedFd,
    /// This process's `task` directory in the host's procfs.
    pub tasks: Option<OwnedFd>,
    /// Whether console output is collected.
    pub coalesce: bool,
}

/// Makes everything up to vCPU threads that wait at the gate.
pub fn power_on(parts: Parts) -> Result<Machine> {
    let signals = signals::set_up()?;
    let config = parts.config;
    config.cpus.check().map_err(Error::Config)?;
    let ram = memory::create(config.ram)?;
    let loader = Door::new("loader", bulkhead_control_api::VERSION, parts.loader);
    let boot = Boot::new(loader, parts.boot).map_err(Error::Loader)?;

    let host = vm::open(parts.kvm, config.cpus.cpus)?;
    let vm = Vm { device_memory: config.device_memory, ..Vm::new(&host, ram)? };
    let template = Template::new(&host, config.cpus)?;
    vm.check_addresses(template.physical_bits())?;
    let vcpus = make_vcpus(&vm, &template, config.cpus)?;
    let power_on = read_power_on(&host, &vm, &vcpus)?;
    let ring = make_ring(&host, &vcpus, parts.coalesce)?;

    let notices = Arc::new(Notices::new()?);
    let bus = Bus::new(Arc::clone(&notices), Coalescer::new(ring), vm.ram_end());
    let shared = Arc::new(Shared { gate: Gate::default(), notices, bus });
    let (to_console, mut ends) = access_links(vcpus.len())?;
    let (drainer, end) = AccessLink::pair()?;
    ends.push(end);
    let interrupts = CONSOLE_GSIS.iter().map(|gsi| vm.interrupt(*gsi)).collect::<Result<Vec<_>>>()?;
    let door = Door::new("bus-console", bulkhead_bus_api::VERSION, parts.console);
    let console = Peer::new(door, Arc::clone(&shared.bus.console), ends, Gifts::Interrupts(interrupts));
    let pci = parts.pci.map(|listener| make_pci(listener, &vm, &shared.bus, vcpus.len())).transpose()?;
    let (pci, to_pci) = pci.unzip();
    let mut to_pci = to_pci.into_iter().flatten();
    let links = to_console.into_iter().map(|console| Links { console, pci: to_pci.next() }).collect();
    start_threads(&vcpus, &shared, links)?;
    let threads = thread_ids(&vcpus, parts.tasks)?;
    let door = |name, listener| Door::new(name, bulkhead_control_api::VERSION, listener);
    Ok(Machine {
        host: Host { signals, threads, process: nix::unistd::getpid().as_raw() },
        vm,
        vcpus,
        shared,
        power_on,
        boot,
        peers: std::iter::once(console).chain(pci).collect(),
        broker: door("control-broker", parts.broker),
        dump: door("dump", parts.dump),
        state: State::new(config.autostart, config.no_reboot, config.no_shutdown),
        drainer,
        now: Now::default(),
    })
}

fn make_vcpus(vm: &Vm, template: &Template, cpus: CpuTopology) -> Result<Vec<Arc<Vcpu>>> {
    let make = |index| {
        let place = cpus.place(index);
        let fd = vm.fd.create_vcpu(u64::from(place.apic_id)).map_err(kvm("KVM_CREATE_VCPU"))?;
        fd.set_cpuid2(&template.at(place)?).map_err(kvm("KVM_SET_CPUID2"))?;
        snapshot::power_on(&fd, index == 0)?;
        Ok(Arc::new(Vcpu::new(fd, place)))
    };
    (0..cpus.cpus).map(make).collect()
}

fn read_power_on(host: &Kvm, vm: &Vm, vcpus: &[Arc<Vcpu>]) -> Result<PowerOn> {
    let first = vcpus.first().ok_or(Error::Config("no vCPU"))?;
    let msrs = MsrSet::probe(host, &lock(&first.fd))?;
    let states = vcpus.iter().map(|v| VcpuState::take(&lock(&v.fd), &msrs, vm.xsave_size));
    Ok(PowerOn { chips: Chips::take(&vm.fd)?, vcpus: states.collect::<Result<Vec<_>>>()? })
}

fn make_ring(host: &Kvm, vcpus: &[Arc<Vcpu>], wanted: bool) -> Result<Option<Ring>> {
    match vcpus.first() {
        Some(first) if wanted && host.check_extension(Cap::CoalescedPio) => {
            Ring::map(&lock(&first.fd)).map(Some).map_err(system("mmap of the coalesced ring"))
        }
        _ => Ok(None),
    }
}

/// Access links for each vCPU, and the daemon's ends.
fn access_links(vcpus: usize) -> Result<(Vec<AccessLink>, Vec<OwnedFd>)> {
    (0..vcpus).map(|_| AccessLink::pair()).collect()
}

/// Pci, and the vCPUs' links to it.
fn make_pci(listener: OwnedFd, vm: &Vm, bus: &Bus, vcpus: usize) -> Result<(Peer, Vec<AccessLink>)> {
    let (links, ends) = access_links(vcpus)?;
    let door = Door::new("bus-pci", bulkhead_bus_api::VERSION, listener);
    let wiring = Gifts::Wiring(Wiring::new(memory::create_ecam()?, vm));
    Ok((Peer::new(door, Arc::clone(&bus.pci), ends, wiring), links))
}

fn start_threads(vcpus: &[Arc<Vcpu>], shared: &Arc<Shared>, links: Vec<Links>) -> Result<()> {
    // A thread allocates and sets itself up before it waits here: nothing of that is in the filter.
    let ready = Arc::new(Barrier::new(vcpus.len() + 1));
    for (index, (vcpu, link)) in vcpus.iter().zip(links).enumerate() {
        vcpu::spawn(index, Arc::clone(vcpu), Arc::clone(shared), link, Arc::clone(&ready))?;
    }
    ready.wait();
    Ok(())
}

fn thread_ids(vcpus: &[Arc<Vcpu>], tasks: Option<OwnedFd>) -> Result<Vec<u32>> {
    let outside = tasks.map(threads::outside).transpose()?.unwrap_or_default();
    let id = |vcpu: &Arc<Vcpu>| {
        let inside = vcpu.thread();
        outside.get(&inside).copied().unwrap_or(inside.unsigned_abs())
    };
    Ok(vcpus.iter().map(id).collect())
}
