//! The microkernel of a VM: vCPUs, memory slots and exits on KVM.
//!
//! It emulates no device and parses nothing that a tenant supplies. Exits go over the bus to the
//! daemon that claims the address; the broker asks for run-state changes; a one-shot loader fills the
//! guest's memory. It is the only process that holds /dev/kvm.

mod boot;
mod bus;
mod coalesce;
mod control;
mod cpuid;
mod error;
mod gate;
mod machine;
mod memory;
mod notice;
mod peer;
mod power_on;
mod presence;
mod registers;
mod signals;
mod snapshot;
mod state;
mod sys;
#[cfg(test)]
mod tests;
mod threads;
mod vcpu;
mod vm;
mod windows;
mod wiring;

use std::process::ExitCode;

use bulkhead_bus_api::platform::ECAM;
use bulkhead_jail::start::Start;
use bulkhead_jail::topology;

use crate::power_on::Parts;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            bulkhead_jail::error!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> error::Result<()> {
    sys::one_heap();
    let mut start = Start::begin(&topology::CORE)?;
    let config: bulkhead_control_api::config::Core = start.config()?;
    let pci = start.take_optional("bus-pci");
    memory::limit_file_size(if pci.is_some() { config.ram.max(ECAM.len) } else { config.ram })?;
    let parts = Parts {
        config,
        kvm: start.take("kvm")?,
        console: start.take("bus-console")?,
        pci,
        broker: start.take("control-broker")?,
        loader: start.take("loader")?,
        dump: start.take("dump")?,
        boot: start.take("boot")?,
        tasks: start.take_optional("proc"),
        coalesce: true,
    };
    // Held until the end: by it the opener knows that this core lives.
    let _life = start.opener();
    let machine = power_on::power_on(parts)?;
    // All threads are made: from here on the filter holds for every one of them.
    start.enter()?;
    machine.run()
}
