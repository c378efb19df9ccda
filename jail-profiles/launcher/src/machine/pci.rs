//! The PCI bus of a plan: which device is where, what is behind it, and the daemons that this needs.

mod memory;

pub use memory::{back_ends as memory_back_ends, device_memory};

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;

use bulkhead_control_api::config::{self, PciDevice, PciKind, PciPlace, Virtio};
use bulkhead_control_api::plug;
use bulkhead_jail::topology::{self, Process};

use super::{Chardevs, Open, Owner, What};
use crate::cli::{Error, Problem};
use crate::config_blob;
use crate::options::{
    At, Balloon, Below, Block, Device, IoThread, Model, Net, NetBackend, NetDev, Options, Target, VhostUser,
};
use crate::supervise::Part;

/// Devices of a VM.
const MAX_DEVICES: usize = 255;
/// Interrupts of all devices, and doorbells.
const MAX_VECTORS: usize = bulkhead_bus_api::pci::MAX_VECTORS as usize;
const MAX_BELLS: usize = bulkhead_bus_api::pci::MAX_BELLS as usize;
/// The longest id of a device or of its character device: names with it are asked for.
const MAX_ID: usize = 200;
/// The root bus.
const ROOT_BUS: &str = "pcie.0";
/// What has device number 0 there, under QEMU's name.
const HOST_BRIDGE: &str = "mch";
/// The first network device's MAC address, as in QEMU.
const FIRST_MAC: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];

/// The bus.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bus {
    /// Configuration of pci.
    pub config: config::Pci,
    /// The daemons of ours that its devices need, or may need when they are plugged in.
    pub daemons: Vec<Daemon>,
    /// Where back ends listen, by the name under which pci asks for a connection.
    pub paths: BTreeMap<String, String>,
    /// Memory devices in the order of the command line.
    pub memory: Vec<config::MemoryDeviceInfo>,
}

/// A daemon of ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Daemon {
    /// Its device in names: the id, or a number.
    pub key: String,
    /// Its configuration.
    pub config: DaemonConfig,
    /// What was opened for it, and the daemon's own name for that.
    pub fds: Vec<(String, String)>,
    /// What it serves.
    pub what: plug::What,
    /// A device of the command line uses it, so that it is started with the machine.
    pub used: bool,
}

/// Configuration of a daemon.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DaemonConfig {
    /// Of a disk.
    Block(config::Block),
    /// Of a network device.
    Net(config::Net),
    /// Of the balloon.
    Balloon(config::Balloon),
    /// Of virtio-mem.
    Mem(config::Mem),
    /// Of virtio-pmem.
    Pmem(config::Pmem),
}

impl Bus {
    /// Names of the sockets on which pci listens for back ends.
    pub fn listeners(&self) -> impl Iterator<Item = &str> {
        self.config.devices.iter().filter_map(|device| match &device.kind {
            PciKind::Virtio(virtio) if virtio.listens => Some(virtio.socket.as_str()),
            PciKind::Virtio(_) | PciKind::RootPort { .. } => None,
        })
    }
}

impl Bus {
    /// The daemon that a compartment is.
    pub fn daemon(&self, part: Part) -> Option<&Daemon> {
        self.daemons.get(part.device?)
    }

    /// What the broker may ask a daemon for.
    pub fn declared(&self) -> Vec<plug::Declared> {
        let declared = |daemon: &Daemon| plug::Declared {
            what: daemon.what.clone(),
            key: daemon.key.clone(),
            thread: daemon.thread().id.clone(),
        };
        self.daemons.iter().map(declared).collect()
    }
}

impl Daemon {
    /// What is given to it of that which was opened.
    pub fn given(&self) -> Vec<(String, String)> {
        let own = |name: &String| match &self.config {
            DaemonConfig::Net(config) => config.taps.contains(name),
            DaemonConfig::Block(_)
            | DaemonConfig::Balloon(_)
            | DaemonConfig::Mem(_)
            | DaemonConfig::Pmem(_) => true,
        };
        self.fds.iter().filter(|(_, name)| own(name)).cloned().collect()
    }

    /// Its configuration for a device of these settings; none if they are not of such a device, or out of range.
    pub fn configured(&self, settings: &plug::Settings) -> Option<DaemonConfig> {
        self.config.with(settings, u16::try_from(self.fds.len()).unwrap_or(u16::MAX))
    }

    const fn thread(&self) -> &config::IoThread {
        match &self.config {
            DaemonConfig::Block(config) => &config.iothread,
            DaemonConfig::Net(config) => &config.iothread,
            DaemonConfig::Balloon(config) => &config.iothread,
            DaemonConfig::Mem(config) => &config.iothread,
            DaemonConfig::Pmem(config) => &config.iothread,
        }
    }

    /// Its process in the topology.
    pub const fn process(&self) -> &'static Process {
        match self.config {
            DaemonConfig::Block(_) => &topology::BLOCK,
            DaemonConfig::Net(_) => &topology::NET,
            DaemonConfig::Balloon(_) => &topology::BALLOON,
            DaemonConfig::Mem(_) => &topology::MEM,
            DaemonConfig::Pmem(_) => &topology::PMEM,
        }
    }

    /// Its configuration as a descriptor.
    ///
    /// # Errors
    /// One line.
    pub fn seal(&self) -> Result<OwnedFd, String> {
        self.config.seal()
    }

    /// The same for another life of core.
    pub const fn renew(&mut self, life: u64) {
        match &mut self.config {
            DaemonConfig::Block(config) => config.life = life,
            DaemonConfig::Net(config) => config.life = life,
            DaemonConfig::Balloon(config) => config.life = life,
            DaemonConfig::Mem(config) => config.life = life,
            DaemonConfig::Pmem(config) => config.life = life,
        }
    }
}

impl DaemonConfig {
    /// The same with other settings; none if they are not of such a device, or out of range. `pairs` queue pairs are open.
    pub fn with(&self, settings: &plug::Settings, pairs: u16) -> Option<Self> {
        if !settings.is_plausible(pairs) {
            return None;
        }
        let iothread = settings.iothread().clone();
        match (self.clone(), settings.clone()) {
            (Self::Block(old), plug::Settings::Block { serial, queues, discard, .. }) => {
                Some(Self::Block(config::Block { serial, queues, discard, iothread, ..old }))
            }
            (Self::Net(old), plug::Settings::Net { mac, pairs, .. }) => {
                let taps = (0..pairs).map(tap_name).collect();
                Some(Self::Net(config::Net { taps, mac, iothread, ..old }))
            }
            (
                Self::Balloon(old),
                plug::Settings::Balloon { deflate_on_oom, free_page_reporting, page_poison, .. },
            ) => {
                let own =
                    config::Balloon { deflate_on_oom, free_page_reporting, page_poison, iothread, ..old };
                Some(Self::Balloon(own))
            }
            _ => None,
        }
    }

    /// It as a descriptor.
    ///
    /// # Errors
    /// One line.
    pub fn seal(&self) -> Result<OwnedFd, String> {
        match self {
            Self::Block(config) => config_blob::seal(config),
            Self::Net(config) => config_blob::seal(config),
            Self::Balloon(config) => config_blob::seal(config),
            Self::Mem(config) => config_blob::seal(config),
            Self::Pmem(config) => config_blob::seal(config),
        }
    }
}

/// The daemon's own name for a queue pair of a TAP interface.
fn tap_name(index: u16) -> String {
    format!("tap.{index}")
}

/// A drive or a block node.
struct Disk {
    name: String,
    /// The option that it came from.
    at: String,
    path: Option<String>,
    read_only: bool,
    used: bool,
    is_node: bool,
    /// Another node is on it, which has the file.
    below: bool,
}

/// Puts the bus together; `opens` gets what is to be opened for it.
///
/// # Errors
/// The first option that contradicts another one.
pub fn bus(
    options: &Options,
    chardevs: &mut Chardevs,
    life: u64,
    opens: &mut Vec<Open>,
) -> Result<Bus, Error> {
    unique("object", &options.iothreads, |thread| Some(&thread.id))?;
    unique("object", &options.memory_back_ends, |back_end| Some(&back_end.id))?;
    memory::check_ids(options)?;
    unique("netdev", &options.netdevs, |netdev| Some(&netdev.id))?;
    let (disks, added) = disks(options)?;
    let mut planner = Planner {
        options,
        chardevs,
        opens,
        disks,
        slots: Slots::default(),
        bus: Bus {
            config: config::Pci { life, devices: Vec::new() },
            daemons: Vec::new(),
            paths: BTreeMap::new(),
            memory: Vec::new(),
        },
        room: memory::Room::of(options),
        ports: Vec::new(),
        netdevs: Vec::new(),
        nics: 0,
    };
    unique("device", &options.devices, |device| device.id.as_ref())?;
    for device in options.devices.iter().chain(&added) {
        planner.add(device).map_err(|problem| device.error(problem))?;
    }
    planner.spare()?;
    planner.finish()
}

/// An I/O thread as its daemon and the broker know it.
pub fn io_thread(thread: &IoThread) -> config::IoThread {
    let IoThread { id, poll_max_ns, poll_grow, poll_shrink } = thread.clone();
    config::IoThread { id, poll_max_ns, poll_grow, poll_shrink }
}

fn unique<T>(kind: &'static str, list: &[At<T>], id: impl Fn(&T) -> Option<&String>) -> Result<(), Error> {
    for (index, option) in list.iter().enumerate() {
        let Some(own) = id(&option.value) else { continue };
        if own.len() > MAX_ID {
            return Err(option.error(Problem::IdTooLong(MAX_ID)));
        }
        if list.iter().take(index).any(|other| id(&other.value) == Some(own)) {
            return Err(option.error(Problem::DuplicateId(kind, own.clone())));
        }
    }
    Ok(())
}

/// Drives and block nodes, and the devices that come with drives.
fn disks(options: &Options) -> Result<(Vec<Disk>, Vec<At<Device>>), Error> {
    unique("drive", &options.drives, |drive| drive.id.as_ref())?;
    let (mut disks, mut added) = (Vec::new(), Vec::new());
    for (index, drive) in options.drives.iter().enumerate() {
        let id = drive.value.id.clone().unwrap_or_else(|| format!("virtio{index}"));
        let (path, read_only) = (drive.value.file.clone(), drive.value.read_only);
        let at = drive.at.clone();
        disks.push(Disk { name: id.clone(), at, path, read_only, used: false, is_node: false, below: false });
        if drive.value.with_device {
            let value = Device::of_drive(id);
            added.push(At { at: drive.at.clone(), value });
        }
    }
    for node in &options.nodes {
        let name = &node.value.name;
        if disks.iter().any(|disk| disk.name == *name) {
            return Err(node.error(Problem::DuplicateNode(name.clone())));
        }
        let (path, below_is_read_only) = match &node.value.below {
            Below::Path(path) => (Some(path.clone()), false),
            Below::Node(below) => match disks.iter_mut().find(|disk| disk.name == *below) {
                None => return Err(node.error(Problem::NodeNotFound(below.clone()))),
                Some(disk) => {
                    disk.below = true;
                    (disk.path.clone(), disk.read_only)
                }
            },
        };
        let read_only = node.value.read_only || below_is_read_only;
        let (name, at) = (name.clone(), node.at.clone());
        disks.push(Disk { name, at, path, read_only, used: false, is_node: true, below: false });
    }
    Ok((disks, added))
}

struct Planner<'a> {
    options: &'a Options,
    chardevs: &'a mut Chardevs,
    opens: &'a mut Vec<Open>,
    disks: Vec<Disk>,
    slots: Slots,
    room: memory::Room,
    bus: Bus,
    /// Chassis and slot numbers.
    ports: Vec<(u8, u16)>,
    /// Network back ends in use.
    netdevs: Vec<String>,
    nics: u8,
}

/// A device whose place is known.
struct Placed<'a> {
    at: &'a str,
    key: String,
    /// It is one of the command line.
    used: bool,
}

impl Planner<'_> {
    fn add(&mut self, option: &At<Device>) -> Result<(), Problem> {
        let number = self.bus.config.devices.len();
        if number == MAX_DEVICES {
            return Err(Problem::TooManyDevices(MAX_DEVICES));
        }
        let device = &option.value;
        let key = device.id.clone().unwrap_or_else(|| format!("#{number}"));
        let place = self.slots.place(device)?;
        let placed = Placed { at: &option.at, key, used: true };
        let kind = match &device.model {
            Model::RootPort { chassis, slot } => self.root_port(*chassis, *slot)?,
            Model::Block(block) => PciKind::Virtio(self.block(&placed, block)?),
            Model::Net(net) => PciKind::Virtio(self.net(&placed, net)?),
            Model::Balloon(balloon) => PciKind::Virtio(self.balloon(&placed, balloon)?),
            Model::Memory(memory) => PciKind::Virtio(self.memory(&placed, memory)?),
            Model::VhostUser(model) => PciKind::Virtio(self.vhost_user(&placed, model)?),
        };
        if let (PciKind::RootPort { .. }, Some(id)) = (&kind, &device.id) {
            self.slots.buses.push(id.clone());
        }
        let id = device.id.clone().unwrap_or_default();
        self.bus.config.devices.push(PciDevice { id, driver: device.driver.to_owned(), place, kind });
        Ok(())
    }

    /// Checks what all devices need together.
    fn finish(self) -> Result<Bus, Error> {
        let queues = |device: &PciDevice| match &device.kind {
            PciKind::Virtio(virtio) => usize::from(virtio.queues),
            PciKind::RootPort { .. } => 0,
        };
        let bells: usize = self.bus.config.devices.iter().map(queues).sum();
        let vectors = bells + self.bus.config.devices.len();
        if vectors > MAX_VECTORS || bells > MAX_BELLS {
            return Err(Error::at("-device", Problem::TooManyQueues(bells, MAX_BELLS)));
        }
        Ok(self.bus)
    }

    fn root_port(&mut self, chassis: u8, slot: u16) -> Result<PciKind, Problem> {
        if self.ports.contains(&(chassis, slot)) {
            return Err(Problem::ChassisSlot);
        }
        self.ports.push((chassis, slot));
        Ok(PciKind::RootPort { chassis, slot })
    }

    fn iothread(&self, id: Option<&String>) -> Result<config::IoThread, Problem> {
        let Some(id) = id else { return Ok(config::IoThread::default()) };
        let found = self.options.iothreads.iter().find(|thread| thread.value.id == *id);
        let found = found.ok_or_else(|| Problem::IoThreadNotFound(id.clone()))?;
        Ok(io_thread(&found.value))
    }

    /// A daemon of ours and its front end.
    fn daemon(&mut self, daemon: Daemon, settings: &plug::Settings) -> Virtio {
        let virtio = settings.virtio(&daemon.key);
        let config = daemon.configured(settings).unwrap_or_else(|| daemon.config.clone());
        self.bus.daemons.push(Daemon { config, ..daemon });
        virtio
    }

    fn open(&mut self, name: &str, at: &str, what: What) {
        self.opens.push(Open { name: name.to_owned(), at: at.to_owned(), what });
    }

    fn block(&mut self, placed: &Placed<'_>, block: &Block) -> Result<Virtio, Problem> {
        let iothread = self.iothread(block.iothread.as_ref())?;
        let target = || Problem::PropertyTarget("virtio-blk-device", "drive", block.drive.clone());
        let disk = self.disks.iter_mut().find(|disk| disk.name == block.drive).ok_or_else(target)?;
        if std::mem::replace(&mut disk.used, true) {
            return Err(Problem::DriveInUse(block.drive.clone()));
        }
        let path = disk.path.clone().ok_or(Problem::EmptyDrive)?;
        let (id, read_only, is_node) = (disk.name.clone(), disk.read_only, disk.is_node);
        let daemon = self.disk(placed, plug::What::Drive { id, is_node }, (path, read_only));
        let settings = plug::Settings::Block {
            serial: block.serial.clone(),
            queues: block.queues,
            discard: block.discard,
            iothread,
        };
        Ok(self.daemon(daemon, &settings))
    }

    /// Asks for a disk; returns its daemon without settings.
    fn disk(&mut self, placed: &Placed<'_>, what: plug::What, (path, read_only): (String, bool)) -> Daemon {
        let opened = format!("disk.{}", placed.key);
        self.open(&opened, placed.at, What::Disk { path: path.clone(), read_only });
        let config = config::Block {
            life: self.bus.config.life,
            id: placed.key.clone(),
            disk: "disk".to_owned(),
            path,
            read_only,
            serial: String::new(),
            queues: 1,
            discard: true,
            iothread: config::IoThread::default(),
        };
        let fds = vec![(opened, config.disk.clone())];
        Daemon { key: placed.key.clone(), config: DaemonConfig::Block(config), fds, what, used: placed.used }
    }

    /// The address of a network device that names none.
    fn mac(&mut self) -> [u8; 6] {
        let mut mac = FIRST_MAC;
        if let Some(last) = mac.last_mut() {
            *last = last.wrapping_add(self.nics);
        }
        self.nics = self.nics.wrapping_add(1);
        mac
    }

    fn net(&mut self, placed: &Placed<'_>, net: &Net) -> Result<Virtio, Problem> {
        let default = self.mac();
        let mac = net.mac.unwrap_or(default);
        let iothread = self.iothread(net.iothread.as_ref())?;
        let target = || Problem::PropertyTarget("virtio-net-device", "netdev", net.netdev.clone());
        let options = self.options;
        let netdev =
            options.netdevs.iter().find(|option| option.value.id == net.netdev).ok_or_else(target)?;
        if self.netdevs.contains(&net.netdev) {
            return Err(Problem::PropertyTaken("virtio-net-device", "netdev", net.netdev.clone()));
        }
        self.netdevs.push(net.netdev.clone());
        let pairs = |all: u16| if net.multiqueue { all } else { 1 };
        match &netdev.value.backend {
            NetBackend::VhostUser { chardev, queues } => {
                let (all, config) = plug::net_shape(mac, pairs(*queues));
                let model = VhostUser {
                    chardev: chardev.clone(),
                    device_type: 1,
                    queues: all,
                    queue_size: plug::QUEUE_SIZE,
                    config,
                    resumes: true,
                };
                self.vhost_user(placed, &model)
            }
            NetBackend::Tap { .. } | NetBackend::TapFds(_) => {
                let daemon = self.interface(placed, netdev, default);
                let opened = u16::try_from(daemon.fds.len()).unwrap_or(1);
                let settings = plug::Settings::Net { mac, pairs: pairs(opened), iothread };
                Ok(self.daemon(daemon, &settings))
            }
        }
    }

    /// Asks for a TAP interface; returns its daemon, with one queue pair.
    fn interface(&mut self, placed: &Placed<'_>, netdev: &At<NetDev>, mac: [u8; 6]) -> Daemon {
        let fds = self.taps(placed, netdev);
        let pairs = u16::try_from(fds.len()).unwrap_or(u16::MAX);
        let config = config::Net {
            life: self.bus.config.life,
            id: placed.key.clone(),
            taps: vec![tap_name(0)],
            mac,
            iothread: config::IoThread::default(),
        };
        let what = plug::What::Net { id: netdev.value.id.clone(), mac, pairs };
        Daemon { key: placed.key.clone(), config: DaemonConfig::Net(config), fds, what, used: placed.used }
    }

    /// Asks for the descriptors of a TAP interface; returns their names, and the daemon's names for them.
    fn taps(&mut self, placed: &Placed<'_>, netdev: &At<NetDev>) -> Vec<(String, String)> {
        let whats: Vec<What> = match &netdev.value.backend {
            NetBackend::TapFds(fds) => fds.iter().map(|fd| What::TapFd(*fd)).collect(),
            NetBackend::Tap { name, queues } => {
                let tap =
                    What::Tap { netdev: netdev.value.id.clone(), name: name.clone(), several: *queues > 1 };
                vec![tap; usize::from(*queues)]
            }
            NetBackend::VhostUser { .. } => Vec::new(),
        };
        let mut names = Vec::new();
        for (index, what) in (0..).zip(whats) {
            let opened = format!("tap.{}.{index}", placed.key);
            self.open(&opened, &netdev.at, what);
            names.push((opened, tap_name(index)));
        }
        names
    }

    fn balloon(&mut self, placed: &Placed<'_>, balloon: &Balloon) -> Result<Virtio, Problem> {
        if self.bus.daemons.iter().any(|daemon| matches!(daemon.config, DaemonConfig::Balloon(_))) {
            return Err(Problem::OneBalloon);
        }
        let settings = plug::Settings::Balloon {
            deflate_on_oom: balloon.deflate_on_oom,
            free_page_reporting: balloon.free_page_reporting,
            page_poison: balloon.page_poison,
            iothread: self.iothread(balloon.iothread.as_ref())?,
        };
        let daemon = self.inflatable(placed);
        Ok(self.daemon(daemon, &settings))
    }

    /// The balloon's daemon without settings.
    fn inflatable(&self, placed: &Placed<'_>) -> Daemon {
        let config = config::Balloon {
            life: self.bus.config.life,
            id: placed.key.clone(),
            ram: self.options.memory.ram,
            deflate_on_oom: false,
            free_page_reporting: false,
            page_poison: true,
            iothread: config::IoThread::default(),
        };
        let (config, fds) = (DaemonConfig::Balloon(config), Vec::new());
        Daemon { key: placed.key.clone(), config, fds, what: plug::What::Balloon, used: placed.used }
    }

    /// Daemons for what no device of the command line uses but a later one may, in a machine that takes later ones.
    fn spare(&mut self) -> Result<(), Error> {
        let is_port = |device: &PciDevice| matches!(device.kind, PciKind::RootPort { .. });
        if !self.bus.config.devices.iter().any(is_port) {
            return Ok(());
        }
        let disks: Vec<Disk> = self.disks.extract_if(.., |disk| !disk.used && !disk.below).collect();
        for disk in disks {
            let Some(path) = disk.path else { continue };
            let placed = Placed { at: &disk.at, key: self.free_key(&disk.name), used: false };
            let what = plug::What::Drive { id: disk.name, is_node: disk.is_node };
            let daemon = self.disk(&placed, what, (path, disk.read_only));
            self.bus.daemons.push(daemon);
        }
        let options = self.options;
        for netdev in &options.netdevs {
            let id = &netdev.value.id;
            if self.netdevs.contains(id) || matches!(netdev.value.backend, NetBackend::VhostUser { .. }) {
                continue;
            }
            let mac = self.mac();
            let placed = Placed { at: &netdev.at, key: self.free_key(id), used: false };
            let daemon = self.interface(&placed, netdev, mac);
            self.bus.daemons.push(daemon);
        }
        if !self.bus.daemons.iter().any(|daemon| daemon.what == plug::What::Balloon) {
            let placed = Placed { at: "the balloon", key: self.free_key("balloon"), used: false };
            let daemon = self.inflatable(&placed);
            self.bus.daemons.push(daemon);
        }
        match self.bus.daemons.iter().find(|daemon| daemon.key.len() > MAX_ID) {
            Some(_) => Err(Error::at("-drive or -netdev", Problem::IdTooLong(MAX_ID))),
            None => Ok(()),
        }
    }

    /// A name for a daemon that no other one has: `wanted`, or one like it.
    fn free_key(&self, wanted: &str) -> String {
        let free = |key: &String| !self.bus.daemons.iter().any(|daemon| daemon.key == *key);
        let numbered = (2..).map(|number| format!("{wanted}-{number}"));
        std::iter::once(wanted.to_owned()).chain(numbered).find(free).unwrap_or_default()
    }

    fn vhost_user(&mut self, placed: &Placed<'_>, model: &VhostUser) -> Result<Virtio, Problem> {
        let target = At { at: placed.at.to_owned(), value: Target::Chardev(model.chardev.clone()) };
        let chardev = self.chardevs.take(&target, Owner::Pci).map_err(|error| error.problem)?;
        let Some(config::Chardev { id, kind: config::ChardevKind::Socket { fd, address, server, .. } }) =
            chardev
        else {
            return Err(Problem::ChardevNotASocket(model.chardev.clone()));
        };
        if id.len() > MAX_ID {
            return Err(Problem::IdTooLong(MAX_ID));
        }
        if !server && !address.starts_with("fd:") {
            self.bus.paths.insert(fd.clone(), address);
        }
        Ok(Virtio {
            device_type: model.device_type,
            queues: model.queues,
            queue_size: model.queue_size,
            config: model.config.clone(),
            without: 0,
            socket: fd,
            listens: server,
            side: None,
            resumes: model.resumes,
            memory: None,
        })
    }
}

/// Which places of which bus are taken.
struct Slots {
    /// Identifiers of the buses.
    buses: Vec<String>,
    taken: Vec<Taken>,
}

struct Taken {
    bus: String,
    slot: u8,
    function: u8,
    multifunction: bool,
    driver: &'static str,
    id: Option<String>,
}

impl Default for Slots {
    fn default() -> Self {
        let bridge = Taken {
            bus: ROOT_BUS.to_owned(),
            slot: 0,
            function: 0,
            multifunction: false,
            driver: HOST_BRIDGE,
            id: None,
        };
        Self { buses: vec![ROOT_BUS.to_owned()], taken: vec![bridge] }
    }
}

impl Slots {
    fn find(&self, bus: &str, slot: u8, function: u8) -> Option<&Taken> {
        self.taken.iter().find(|t| t.bus == bus && t.slot == slot && t.function == function)
    }

    /// Takes a place as QEMU does: the first device number whose function 0 is free, or the one that is asked for.
    fn place(&mut self, device: &Device) -> Result<PciPlace, Problem> {
        let bus = device.bus.clone().unwrap_or_else(|| ROOT_BUS.to_owned());
        if !self.buses.contains(&bus) {
            return Err(Problem::BusNotFound(bus));
        }
        let is_root = bus == ROOT_BUS;
        if !is_root && matches!(device.model, Model::RootPort { .. }) {
            return Err(Problem::OnlyRootBus(device.driver));
        }
        let slots = if is_root { 32 } else { 1 };
        let (slot, function) = match device.addr {
            Some((slot, _)) if slot >= slots => return Err(Problem::OnlySlotZero(slot, device.driver)),
            Some(place) => place,
            None => {
                let free = (0..slots).find(|slot| self.find(&bus, *slot, 0).is_none());
                (free.ok_or(Problem::NoSlot(device.driver))?, 0)
            }
        };
        if let Some(other) = self.find(&bus, slot, function) {
            let id = other.id.clone().unwrap_or_else(|| "(null)".to_owned());
            return Err(Problem::SlotInUse { slot, function, driver: device.driver, by: other.driver, id });
        }
        self.check_functions(&bus, (slot, function), device.multifunction)?;
        self.taken.push(Taken {
            bus: bus.clone(),
            slot,
            function,
            multifunction: device.multifunction,
            driver: device.driver,
            id: device.id.clone(),
        });
        Ok(PciPlace { bus, addr: Some((slot, function)), multifunction: device.multifunction })
    }

    /// Function 0 says whether there may be others.
    fn check_functions(
        &self,
        bus: &str,
        (slot, function): (u8, u8),
        multifunction: bool,
    ) -> Result<(), Problem> {
        if function > 0 {
            return match self.find(bus, slot, 0) {
                Some(first) if !first.multifunction => Err(Problem::BesideSingleFunction(slot, function)),
                _ => Ok(()),
            };
        }
        match (1..8).find(|other| self.find(bus, slot, *other).is_some()) {
            Some(other) if !multifunction => Err(Problem::SingleFunction(slot, other)),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests;
