//! A function on the bus: configuration space, what is behind it, and the wires that core gives it.

use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Instant;

use bulkhead_bus_api::pci::Msi;
use bulkhead_control_api::config::{PciDevice, PciKind, PciPlace};
use bulkhead_jail::error;
use serde::{Deserialize, Serialize};

use crate::device::{Bar, Capability, Device, Identity, Wires};
use crate::event::{drain, is_signalled};
use crate::msix::{self, Table};
use crate::port::{self, Port};
use crate::space::{Header, LEN, Space};

/// The host bridge; the ids are QEMU's for its generic one.
const HOST: Identity =
    Identity { vendor: 0x1b36, device: 0x0008, class: 0x06_00_00, revision: 0, subsystem: (0x1af4, 0x1100) };
/// Name of the host bridge's model.
pub const HOST_DRIVER: &str = "gpex-root";
/// Name of the root bus.
pub const ROOT_BUS: &str = "pcie.0";
/// The smallest BAR: a page, so that no two functions share one.
const MIN_BAR: u64 = 4096;

/// What a function is.
pub enum Kind {
    /// The host bridge.
    Host,
    /// A root port.
    Port(Port),
    /// A device.
    Device(Box<dyn Device>),
}

/// An MSI-X vector.
#[derive(Debug)]
pub struct Vector {
    /// Its number at core.
    pub number: u16,
    /// Its eventfd.
    pub fd: Rc<OwnedFd>,
    /// Where core sends it.
    pub applied: Option<Msi>,
}

/// A doorbell.
#[derive(Debug)]
pub struct Bell {
    /// Its number at core.
    pub number: u16,
    /// Its eventfd.
    pub fd: Rc<OwnedFd>,
    /// Its BAR.
    pub bar: u8,
    /// Its offset there.
    pub offset: u64,
    /// Where core has it.
    pub applied: Option<u64>,
}

/// A function.
pub struct Function {
    /// What the user asked for.
    pub config: PciDevice,
    /// Index of the port that it is behind.
    pub parent: Option<u16>,
    /// Device number << 3 | function number.
    pub devfn: u8,
    /// What it is.
    pub kind: Kind,
    /// Its configuration space.
    pub space: Space,
    /// Its base address registers.
    pub bars: Vec<Bar>,
    /// Its MSI-X structures.
    pub msix: Option<Table>,
    /// Its vectors, by number in its table.
    pub vectors: Vec<Vector>,
    /// Its doorbells.
    pub bells: Vec<Bell>,
    /// Reads of its configuration space exit.
    pub exits: bool,
    /// Its configuration space is complete and the guest may see it; else it is being added.
    pub plugged: bool,
    /// When the guest was asked to give it up, if this process did.
    pub asked: Option<Instant>,
    /// Under which number something of its back end is kept.
    pub kept: Option<u32>,
    /// What that is.
    pub kept_fd: Option<Rc<OwnedFd>>,
    /// What is to be kept if it lasts, and since when.
    pub to_keep: Option<(Rc<OwnedFd>, Instant)>,
    /// What was said last of its back end's presence.
    pub connected: Option<bool>,
    /// Page of the configuration window and what is there.
    pub shown: Option<(u16, [u8; LEN])>,
    /// That a vector's message is foreign has been logged.
    pub warned: bool,
}

/// State of a function.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Saved {
    /// As in [`Function`]; none of the host bridge.
    pub config: Option<PciDevice>,
    /// As in [`Function`].
    pub parent: Option<u16>,
    /// As in [`Function`].
    pub devfn: u8,
    /// Numbers of its vectors.
    pub vectors: Vec<u16>,
    /// Numbers of its doorbells.
    pub bells: Vec<u16>,
    /// As in [`Function`].
    pub exits: bool,
    /// As in [`Function`].
    pub kept: Option<u32>,
    /// Configuration space.
    space: Vec<u8>,
    /// MSI-X table.
    table: Vec<u8>,
    /// A port's.
    port: port::Saved,
    /// A device's own.
    device: Vec<u8>,
}

/// Why a device cannot be a function.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BuildError {
    /// No room in configuration space.
    #[error("no room for a capability")]
    Capability,
    /// Base address registers overlap or have a size that none can have.
    #[error("impossible base address registers")]
    Bars,
    /// The MSI-X structures cannot be.
    #[error("impossible MSI-X structures")]
    Msix,
    /// A doorbell is outside every BAR.
    #[error("impossible doorbells")]
    Bells,
}

/// The registers as a set of numbers, if they can be.
fn check_bars(bars: &[Bar]) -> Result<(), BuildError> {
    let mut used = 0u8;
    for bar in bars {
        let most = if bar.wide { 1 << 62 } else { 1 << 31 };
        let bits = if bar.wide { 3 } else { 1 };
        let good = bar.size.is_power_of_two() && (MIN_BAR..=most).contains(&bar.size);
        if !good || bar.index > 5 || (bar.wide && bar.index > 4) || used & bits << bar.index != 0 {
            return Err(BuildError::Bars);
        }
        used |= bits << bar.index;
    }
    Ok(())
}

impl Function {
    fn new(config: PciDevice, parent: Option<u16>, devfn: u8, kind: Kind, space: Space) -> Self {
        Self {
            config,
            parent,
            devfn,
            kind,
            space,
            bars: Vec::new(),
            msix: None,
            vectors: Vec::new(),
            bells: Vec::new(),
            exits: false,
            plugged: true,
            asked: None,
            kept: None,
            kept_fd: None,
            to_keep: None,
            connected: None,
            shown: None,
            warned: false,
        }
    }

    /// The host bridge.
    #[must_use]
    pub fn host() -> Self {
        let place = PciPlace { bus: ROOT_BUS.to_owned(), addr: Some((0, 0)), multifunction: false };
        // Of the kind only `Kind::Host` counts.
        let kind = PciKind::RootPort { chassis: 0, slot: 0 };
        let config = PciDevice { id: String::new(), driver: HOST_DRIVER.to_owned(), place, kind };
        let space = Space::new(&HOST, Header::Endpoint, false);
        Self::new(config, None, 0, Kind::Host, space)
    }

    /// A root port.
    ///
    /// # Errors
    /// [`BuildError`].
    pub fn port(config: PciDevice, devfn: u8, slot: u16) -> Result<Self, BuildError> {
        let mut space = port::space(config.place.multifunction);
        let mut port = Port::new(&mut space, devfn, slot).ok_or(BuildError::Capability)?;
        space.add_bar(&port::BAR);
        let table = Table::new(&mut space, port::MSIX).ok_or(BuildError::Msix)?;
        port.power_on(&mut space, false);
        let mut new = Self::new(config, None, devfn, Kind::Port(port), space);
        (new.bars, new.msix) = (vec![port::BAR], Some(table));
        Ok(new)
    }

    /// A device.
    ///
    /// # Errors
    /// [`BuildError`]: it says of itself what cannot be.
    pub fn device(
        config: PciDevice,
        parent: Option<u16>,
        devfn: u8,
        mut device: Box<dyn Device>,
    ) -> Result<Self, BuildError> {
        let mut space = Space::new(&device.identity(), Header::Endpoint, config.place.multifunction);
        let bars = device.bars();
        check_bars(&bars)?;
        bars.iter().for_each(|bar| space.add_bar(bar));
        let (body, writable) = port::endpoint_capability(parent.is_none());
        space.add_capability(port::EXPRESS, &body, &writable).ok_or(BuildError::Capability)?;
        let holds = |index: u8, end: u64| bars.iter().any(|bar| bar.index == index && end <= bar.size);
        let msix = match device.msix() {
            None => None,
            Some(place) => {
                let table = u64::from(place.table) + u64::from(place.vectors) * 16;
                let pending = u64::from(place.pba) + u64::from(place.vectors).div_ceil(64) * 8;
                if !holds(place.bar, table) || !holds(place.bar, pending) {
                    return Err(BuildError::Msix);
                }
                Some(Table::new(&mut space, place).ok_or(BuildError::Msix)?)
            }
        };
        let mut offsets = Vec::new();
        for capability in device.capabilities() {
            let at = space.add_capability(capability.id, &capability.body, &capability.writable);
            offsets.push(at.ok_or(BuildError::Capability)?);
        }
        device.placed(&offsets);
        if device.bells().iter().any(|(bar, at)| at.checked_add(1).is_none_or(|end| !holds(*bar, end))) {
            return Err(BuildError::Bells);
        }
        let mut new = Self::new(config, parent, devfn, Kind::Device(device), space);
        (new.bars, new.msix) = (bars, msix);
        Ok(new)
    }

    /// Takes on what its device has beside the rest since it knows its back end.
    pub fn grow(&mut self) {
        let Some((bars, capabilities)) = self.device_ref().map(Device::late) else { return };
        if bars.iter().all(|bar| self.bars.contains(bar)) {
            return;
        }
        let all = [self.bars.clone(), bars.clone()].concat();
        let add = |capability: &Capability| {
            self.space.add_capability(capability.id, &capability.body, &capability.writable).is_some()
        };
        if check_bars(&all).is_err() || !capabilities.iter().all(add) {
            error!("device {:?}: no room for what its back end adds", self.config.id);
            return;
        }
        bars.iter().for_each(|bar| self.space.add_bar(bar));
        self.bars = all;
    }

    /// How many vectors and doorbells it needs.
    #[must_use]
    pub fn needs(&self) -> (usize, usize) {
        let bells = if let Kind::Device(device) = &self.kind { device.bells().len() } else { 0 };
        (self.msix.as_ref().map_or(0, |table| usize::from(table.vectors())), bells)
    }

    /// Connects it with the numbers and eventfds that are its own from now on.
    pub fn wire(&mut self, vectors: Vec<(u16, Rc<OwnedFd>)>, bells: Vec<(u16, Rc<OwnedFd>)>) {
        let wires = Wires {
            vectors: vectors.iter().map(|(_, fd)| Rc::clone(fd)).collect(),
            bells: bells.iter().map(|(_, fd)| Rc::clone(fd)).collect(),
        };
        self.vectors = vectors.into_iter().map(|(number, fd)| Vector { number, fd, applied: None }).collect();
        if let Kind::Device(device) = &mut self.kind {
            let places = device.bells();
            let bells = bells.into_iter().zip(places);
            self.bells = bells
                .map(|((number, fd), (bar, offset))| Bell { number, fd, bar, offset, applied: None })
                .collect();
            device.wire(wires);
        }
    }

    /// What does the work, if it is a device.
    pub fn as_device(&mut self) -> Option<&mut dyn Device> {
        match &mut self.kind {
            Kind::Device(device) => Some(device.as_mut()),
            Kind::Host | Kind::Port(_) => None,
        }
    }

    /// The same to look at.
    #[must_use]
    pub fn device_ref(&self) -> Option<&dyn Device> {
        match &self.kind {
            Kind::Device(device) => Some(device.as_ref()),
            Kind::Host | Kind::Port(_) => None,
        }
    }

    /// The state after power-on; of a port, `present` tells whether its slot is taken.
    pub fn reset(&mut self, present: bool) {
        self.space.reset();
        if let Some(table) = &mut self.msix {
            table.reset();
        }
        self.exits = false;
        match &mut self.kind {
            Kind::Host => {}
            Kind::Port(port) => port.power_on(&mut self.space, present),
            Kind::Device(device) => {
                device.set_master(false);
                device.reset();
            }
        }
    }

    /// Whether a vector's interrupt waits while it is masked.
    #[must_use]
    pub fn is_pending(&self, vector: u16) -> bool {
        let found = self.vectors.get(usize::from(vector));
        found.is_some_and(|vector| vector.applied.is_none() && is_signalled(&vector.fd))
    }

    /// Forgets interrupts from before MSI-X was on.
    pub fn drain_vectors(&self) {
        self.vectors.iter().for_each(|vector| drain(&vector.fd));
    }

    /// Whether MSI-X is on.
    #[must_use]
    pub fn has_msix_on(&self) -> bool {
        self.msix.as_ref().is_some_and(|table| table.is_enabled(&self.space))
    }

    /// Where core is to send a vector.
    #[must_use]
    pub fn route(&self, vector: u16) -> msix::Route {
        let master = self.space.commands(crate::space::MASTER);
        match &self.msix {
            // A message is a write to memory.
            Some(table) if master && self.plugged => table.route(&self.space, vector),
            _ => msix::Route::Masked,
        }
    }

    /// Its state.
    #[must_use]
    pub fn save(&self) -> Saved {
        Saved {
            config: (!matches!(self.kind, Kind::Host)).then(|| self.config.clone()),
            parent: self.parent,
            devfn: self.devfn,
            vectors: self.vectors.iter().map(|vector| vector.number).collect(),
            bells: self.bells.iter().map(|bell| bell.number).collect(),
            exits: self.exits,
            kept: self.kept,
            space: self.space.bytes().to_vec(),
            table: self.msix.as_ref().map_or(Vec::new(), |table| table.entries().to_vec()),
            port: if let Kind::Port(port) = &self.kind { port.saved } else { port::Saved::default() },
            device: self.device_ref().map_or(Vec::new(), Device::save),
        }
    }

    /// Goes on from a saved state, after it has been wired; false if it is none of this function.
    pub fn restore(&mut self, saved: &Saved) -> bool {
        self.exits = saved.exits;
        self.kept = saved.kept;
        let table = self.msix.as_mut().is_none_or(|table| table.restore(&saved.table));
        let kind = match &mut self.kind {
            Kind::Host => true,
            Kind::Port(port) => {
                port.saved = saved.port;
                true
            }
            Kind::Device(device) => device.restore(&saved.device),
        };
        self.grow();
        let space = self.space.restore(&saved.space);
        let master = self.space.commands(crate::space::MASTER);
        if let Some(device) = self.as_device() {
            device.set_master(master);
        }
        table && space && kind
    }
}
