//! Which compartments a VM has.

use bulkhead_jail::topology::{self, Boots, Link, Process, Restart};

use crate::machine::Bus;

/// Identity of a compartment: its process in the topology and the place of its device among those with daemons.
pub type Key = (&'static str, Option<usize>);

/// A compartment.
#[derive(Clone, Copy, Debug)]
pub struct Part {
    /// Its process.
    pub process: &'static Process,
    /// Its device, if there is one such compartment for each.
    pub device: Option<usize>,
}

/// Those that come and go.
pub const JOBS: [Part; 2] = [Part::of(&topology::LOADER), Part::of(&topology::DUMP)];

impl Part {
    /// The only one of its process.
    pub const fn of(process: &'static Process) -> Self {
        Self { process, device: None }
    }

    /// Its identity.
    pub const fn key(&self) -> Key {
        (self.process.name, self.device)
    }
}

/// The compartments that a VM has from its start. Without a device there is no bus.
pub fn residents(bus: &Bus) -> Vec<Part> {
    let is_used = |part: &Part| bus.daemon(*part).is_none_or(|daemon| daemon.used);
    all(bus).into_iter().filter(is_used).collect()
}

/// They and the daemons that may be started while it runs.
pub fn all(bus: &Bus) -> Vec<Part> {
    let mut all = vec![Part::of(&topology::CORE), Part::of(&topology::CONSOLE), Part::of(&topology::BROKER)];
    if !bus.config.devices.is_empty() {
        all.push(Part::of(&topology::PCI));
    }
    let daemons = bus.daemons.iter().enumerate();
    all.extend(daemons.map(|(device, daemon)| Part { process: daemon.process(), device: Some(device) }));
    all
}

/// The links between them, and those of the processes that come and go.
pub fn links(residents: &[Part]) -> impl Iterator<Item = &'static Link> {
    let is_there = move |name: &str| JOBS.iter().chain(residents).any(|part| part.process.name == name);
    topology::LINKS.iter().copied().filter(move |link| is_there(link.listener) && is_there(link.connector))
}

/// Whether a compartment keeps its link to the opener: it connects to one that may be started anew, so that it will need
/// another connection, or asks for connections; or, the broker, it says where back ends listen.
pub fn keeps_opener(process: &Process) -> bool {
    // One that comes and goes ends with its links.
    let stays = process.boots == Boots::Vm;
    let restarts = |name| topology::PROCESSES.iter().any(|p| p.name == name && p.restart == Restart::Always);
    process.name == "broker"
        || stays
            && topology::LINKS.iter().any(|link| link.connector == process.name && restarts(link.listener))
}
