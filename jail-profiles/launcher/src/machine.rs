//! From options to a plan: what each process is configured with and what is to be opened for it.
//!
//! A pure function; `opener` carries the plan out.

mod pci;

pub use pci::{Bus, Daemon, DaemonConfig};

use std::hash::{BuildHasher as _, RandomState};

use bulkhead_control_api::config;
use bulkhead_control_api::plug::What as Declared;

use crate::cli::{Error, Problem, table};
use crate::opener;
use crate::options::{AcpiTable, AddFd, At, Backend, Backing, Monitor, Options, Place, Target};
use crate::terminal::Terminal;

/// The most ACPI tables of the user, and files of all of them: the loader holds them.
const MAX_TABLES: usize = 32;
const MAX_TABLE_FILES: usize = 64;
/// Name of the native guest in messages.
const NATIVE_GUEST: &str = "the native guest";

/// A VM as the command line describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Configuration of core.
    pub core: config::Core,
    /// Configuration of the loader.
    pub loader: config::Loader,
    /// Configuration of the console.
    pub console: config::Console,
    /// Configuration of the broker.
    pub broker: config::Broker,
    /// The PCI bus.
    pub bus: Bus,
    /// What to open, in this order: what changes nothing comes first.
    pub opens: Vec<Open>,
    /// How the user's terminal is to behave, if a character device is connected to it.
    pub terminal: Option<Terminal>,
}

/// A descriptor to open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Open {
    /// Its name, unique in the VM: by it the topology and the configurations say whose it is.
    pub name: String,
    /// The option that asks for it, for messages.
    pub at: String,
    /// What it is.
    pub what: What,
}

/// What to open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum What {
    /// /dev/kvm.
    Kvm,
    /// A regular file to read.
    Input(String),
    /// A regular file that an ACPI table is made of.
    Table(String),
    /// The embedded native guest.
    NativeGuest,
    /// Standard input.
    StandardInput,
    /// Standard output.
    StandardOutput,
    /// A disk: a regular file or a block device.
    Disk {
        /// Where.
        path: String,
        /// Only to read.
        read_only: bool,
    },
    /// Memory of a memory device.
    Memory {
        /// What it is in.
        backing: Backing,
        /// Length in bytes, a multiple of the page.
        size: u64,
        /// All of it is taken from the host at once.
        prealloc: bool,
    },
    /// A queue pair of a TAP interface.
    Tap {
        /// Which network back end's.
        netdev: String,
        /// The interface's name; none if the host chooses one.
        name: Option<String>,
        /// It has several queue pairs.
        several: bool,
    },
    /// An inherited descriptor of a TAP interface.
    TapFd(u32),
    /// A file to write.
    Output {
        /// Where.
        path: String,
        /// Keep what is there.
        append: bool,
    },
    /// A descriptor that was inherited and becomes a member of an fd set.
    Member {
        /// Its number.
        fd: i32,
        /// The set.
        set: i64,
    },
    /// A unix socket to listen on.
    Listener(String),
    /// A unix socket to connect to.
    Connection(String),
    /// A socket that was inherited.
    Inherited {
        /// Its number.
        fd: u32,
        /// It listens.
        listening: bool,
    },
    /// The file that holds the launcher's process id; stays with the launcher.
    PidFile(String),
}

/// Which process has a character device.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Owner {
    Console,
    Broker,
    Pci,
}

/// Makes the plan.
///
/// # Errors
/// The first option that contradicts another one.
pub fn plan(options: &Options) -> Result<Plan, Error> {
    let mut devices = Chardevs::of(options)?;
    let monitors = options.monitors.iter().map(|target| monitor(target, &mut devices));
    let monitors = monitors.collect::<Result<Vec<_>, _>>()?;
    let serial = match &options.serial {
        Some(target) => devices.take(target, Owner::Console)?,
        None => default_serial(options, &mut devices)?,
    };
    let autostart = !options.stopped;
    let life = new_life();
    let mut behind = Vec::new();
    let bus = pci::bus(options, &mut devices, life, &mut behind)?;
    Ok(Plan {
        core: config::Core {
            ram: options.memory.ram,
            cpus: options.cpus,
            no_reboot: options.no_reboot,
            no_shutdown: options.no_shutdown,
            autostart,
            device_memory: pci::device_memory(options).len,
        },
        loader: loader(options)?,
        console: config::Console {
            life,
            chardevs: devices.all.iter().filter(|d| d.owner == Owner::Console).map(Device::config).collect(),
            serial: serial.map(|device| device.id),
        },
        broker: broker(options, life, monitors, (&devices, &bus)),
        terminal: devices.terminal(),
        opens: opens(options, &devices, behind),
        bus,
    })
}

impl Plan {
    /// Without a balloon that may be plugged in: its daemon would have to be started while the machine runs.
    pub fn without_spare_balloon(mut self) -> Self {
        self.bus.daemons.retain(|daemon| daemon.used || daemon.what != Declared::Balloon);
        self.broker.declared = self.bus.declared();
        self
    }

    /// The same machine in another life of core.
    pub fn renew(&mut self) {
        self.broker.life = new_life();
        self.console.life = self.broker.life;
        self.bus.config.life = self.broker.life;
        self.bus.daemons.iter_mut().for_each(|daemon| daemon.renew(self.broker.life));
    }
}

/// A number that no other life of a machine has; keyed at random by the standard library.
fn new_life() -> u64 {
    RandomState::new().hash_one(std::process::id())
}

fn broker(
    options: &Options,
    life: u64,
    monitors: Vec<config::Monitor>,
    (devices, bus): (&Chardevs, &Bus),
) -> config::Broker {
    let member = |(number, option): (usize, &At<AddFd>)| {
        let AddFd { set, opaque, .. } = option.value.clone();
        config::FdsetMember { fd: member_name(number), set, opaque }
    };
    let file = |device: &Device| match &device.backend {
        Backend::File { path, .. } => opener::set_of(path)?.ok(),
        Backend::Null | Backend::Stdio { .. } | Backend::Socket { .. } => None,
    };
    config::Broker {
        life,
        name: options.name.clone(),
        uuid: options.uuid,
        ram: options.memory.ram,
        monitors,
        autostart: !options.stopped,
        fdsets: options.add_fds.iter().enumerate().map(member).collect(),
        used_fdsets: devices.all.iter().filter_map(file).collect(),
        preconfig: options.preconfig,
        options: table::groups(),
        back_ends: devices.all.iter().filter(|d| d.owner == Owner::Pci).map(Device::config).collect(),
        iothreads: options.iothreads.iter().map(|thread| pci::io_thread(&thread.value)).collect(),
        declared: bus.declared(),
        memory_back_ends: pci::memory_back_ends(options),
        memory_devices: bus.memory.clone(),
    }
}

/// Name of the descriptor of an `-add-fd`.
fn member_name(number: usize) -> String {
    format!("fdset.{number}")
}

fn loader(options: &Options) -> Result<config::Loader, Error> {
    if let (None, Some(initrd)) = (&options.kernel, &options.initrd) {
        return Err(initrd.error(Problem::InitrdWithoutKernel));
    }
    Ok(config::Loader {
        kernel: options.kernel.as_ref().map_or_else(|| NATIVE_GUEST.to_owned(), |k| k.value.clone()),
        initrd: options.initrd.as_ref().map(|initrd| initrd.value.clone()),
        cmdline: options.append.clone().unwrap_or_default(),
        cpus: options.cpus,
        uuid: options.uuid,
        tables: tables(options)?,
    })
}

/// What the loader makes ACPI tables of.
fn tables(options: &Options) -> Result<Vec<config::AcpiTable>, Error> {
    let mut files = 0;
    let table = |(number, option): (usize, &At<AcpiTable>)| {
        let AcpiTable { has_header, header, .. } = option.value;
        files += option.value.files.len();
        if number >= MAX_TABLES || files > MAX_TABLE_FILES {
            return Err(option.error(Problem::TooManyTables(MAX_TABLES, MAX_TABLE_FILES)));
        }
        let files = (0..option.value.files.len()).map(|file| table_name(number, file)).collect();
        Ok(config::AcpiTable { at: option.at.clone(), files, has_header, header })
    };
    options.tables.iter().enumerate().map(table).collect()
}

/// Name of the descriptor of a file of an `-acpitable`.
fn table_name(table: usize, file: usize) -> String {
    format!("acpi.{table}.{file}")
}

/// There is no graphical console, so that the serial port is the user's, if they let it.
fn default_serial(options: &Options, devices: &mut Chardevs) -> Result<Option<config::Chardev>, Error> {
    if options.nodefaults && !options.nographic {
        return Ok(None);
    }
    let free = devices.terminal().is_none();
    let backend = if free { Backend::Stdio { signal: true } } else { Backend::Null };
    let target = At { at: "default -serial".to_owned(), value: Target::Own(backend) };
    devices.take(&target, Owner::Console)
}

fn monitor(monitor: &At<Monitor>, devices: &mut Chardevs) -> Result<config::Monitor, Error> {
    let Monitor { target, role, uids, gids } = monitor.value.clone();
    let target = At { at: monitor.at.clone(), value: target };
    let target = &target;
    let chardev = devices.take(target, Owner::Broker)?;
    let chardev = chardev.ok_or_else(|| target.error(Problem::MonitorBackend))?;
    match chardev.kind {
        config::ChardevKind::Socket { .. } | config::ChardevKind::Stdio => {
            Ok(config::Monitor { chardev, role, uids, gids })
        }
        config::ChardevKind::Null | config::ChardevKind::File { .. } => {
            Err(target.error(Problem::MonitorBackend))
        }
    }
}

/// A character device, and which process has it.
struct Device {
    at: String,
    id: String,
    backend: Backend,
    owner: Owner,
    in_use: bool,
}

impl Device {
    fn fd(&self) -> String {
        format!("chardev.{}", self.id)
    }

    fn config(&self) -> config::Chardev {
        let kind = match &self.backend {
            Backend::Null => config::ChardevKind::Null,
            Backend::Stdio { .. } => config::ChardevKind::Stdio,
            Backend::File { .. } => config::ChardevKind::File { fd: self.fd() },
            Backend::Socket { place, server, wait, .. } => config::ChardevKind::Socket {
                fd: self.fd(),
                address: match place {
                    Place::Path(path) | Place::Unit(path) => path.clone(),
                    Place::Fd(fd) => format!("fd:{fd}"),
                },
                server: *server,
                wait: *wait,
            },
        };
        config::Chardev { id: self.id.clone(), kind }
    }

    fn opens(&self) -> Vec<Open> {
        let open = |name: String, what| Open { name, at: self.at.clone(), what };
        match &self.backend {
            // A back end's socket is connected to when pci asks for it.
            Backend::Socket { place: Place::Path(_), server: false, .. } if self.owner == Owner::Pci => {
                Vec::new()
            }
            // The service manager gives a unit's listener to the process itself.
            Backend::Null | Backend::Socket { place: Place::Unit(_), .. } => Vec::new(),
            Backend::Stdio { .. } => vec![
                open("stdio.in".to_owned(), What::StandardInput),
                open("stdio.out".to_owned(), What::StandardOutput),
            ],
            Backend::File { path, append } => {
                vec![open(self.fd(), What::Output { path: path.clone(), append: *append })]
            }
            Backend::Socket { place: Place::Fd(fd), server, .. } => {
                vec![open(self.fd(), What::Inherited { fd: *fd, listening: *server })]
            }
            Backend::Socket { place: Place::Path(path), server: true, .. } => {
                vec![open(self.fd(), What::Listener(path.clone()))]
            }
            Backend::Socket { place: Place::Path(path), server: false, .. } => {
                vec![open(self.fd(), What::Connection(path.clone()))]
            }
        }
    }
}

/// The character devices in the order in which they were defined.
struct Chardevs {
    all: Vec<Device>,
    monitors: u32,
}

impl Chardevs {
    fn of(options: &Options) -> Result<Self, Error> {
        let mut devices = Self { all: Vec::new(), monitors: 0 };
        for chardev in &options.chardevs {
            devices.add(&chardev.at, chardev.value.id.clone(), chardev.value.backend.clone())?;
        }
        Ok(devices)
    }

    fn add(&mut self, at: &str, id: String, backend: Backend) -> Result<(), Error> {
        for other in &self.all {
            let problem = match (&other.backend, &backend) {
                _ if other.id == id => Problem::DuplicateChardev(id),
                (Backend::Stdio { .. }, Backend::Stdio { .. }) => Problem::StdioTwice,
                (
                    Backend::Socket { place: Place::Fd(a), .. },
                    Backend::Socket { place: Place::Fd(b), .. },
                ) if a == b => Problem::FdTwice(*a),
                _ => continue,
            };
            return Err(Error::at(at, problem));
        }
        // One that nobody uses yet is the console's, but for what is to be a back end's.
        let owner = match &backend {
            Backend::Socket { reconnect: true, .. } => Owner::Pci,
            _ => Owner::Console,
        };
        self.all.push(Device { at: at.to_owned(), id, backend, owner, in_use: false });
        Ok(())
    }

    /// Gives the device to `owner`; none if the target is nothing.
    fn take(&mut self, target: &At<Target>, owner: Owner) -> Result<Option<config::Chardev>, Error> {
        let id = match &target.value {
            Target::Nothing => return Ok(None),
            Target::Chardev(id) => id.clone(),
            Target::Own(backend) => {
                let id = self.own_id(owner);
                self.add(&target.at, id.clone(), backend.clone())?;
                id
            }
        };
        let Some(device) = self.all.iter_mut().find(|device| device.id == id) else {
            return Err(target.error(Problem::ChardevNotFound(id)));
        };
        if device.in_use {
            return Err(target.error(Problem::ChardevInUse(id)));
        }
        (device.owner, device.in_use) = (owner, true);
        Ok(Some(device.config()))
    }

    /// QEMU's names for devices that the user gave none.
    fn own_id(&mut self, owner: Owner) -> String {
        if owner == Owner::Console {
            return "serial0".to_owned();
        }
        let id = format!("compat_monitor{}", self.monitors);
        self.monitors += 1;
        id
    }

    fn terminal(&self) -> Option<Terminal> {
        self.all.iter().find_map(|device| match device.backend {
            Backend::Stdio { signal } => Some(Terminal { signals: signal }),
            Backend::Null | Backend::File { .. } | Backend::Socket { .. } => None,
        })
    }
}

/// What changes nothing is opened first, then what another VM could hold, then what truncates.
fn opens(options: &Options, devices: &Chardevs, behind: Vec<Open>) -> Vec<Open> {
    let all = devices.all.iter().flat_map(Device::opens).chain(behind);
    let (mut opens, changing): (Vec<_>, Vec<_>) = all.partition(|open| {
        matches!(
            open.what,
            What::Inherited { .. }
                | What::StandardInput
                | What::StandardOutput
                | What::Disk { .. }
                | What::TapFd(_)
        )
    });
    let open = |name: &str, at: &str, what| Open { name: name.to_owned(), at: at.to_owned(), what };
    // Before what may refer to them, or name the same descriptor.
    let members = options.add_fds.iter().enumerate().map(|(number, option)| {
        let AddFd { fd, set, .. } = option.value;
        open(&member_name(number), &option.at, What::Member { fd, set })
    });
    opens.splice(0..0, members);
    opens.push(match &options.kernel {
        Some(kernel) => open("kernel", &kernel.at, What::Input(kernel.value.clone())),
        None => open("kernel", NATIVE_GUEST, What::NativeGuest),
    });
    if let Some(initrd) = &options.initrd {
        opens.push(open("initrd", &initrd.at, What::Input(initrd.value.clone())));
    }
    for (number, table) in options.tables.iter().enumerate() {
        let files = table.value.files.iter().enumerate();
        opens.extend(
            files.map(|(file, path)| open(&table_name(number, file), &table.at, What::Table(path.clone()))),
        );
    }
    opens.push(open("kvm", "/dev/kvm", What::Kvm));
    if let Some(path) = &options.pidfile {
        opens.push(open("pidfile", &format!("-pidfile {path}"), What::PidFile(path.clone())));
    }
    opens.extend(changing);
    opens
}

#[cfg(test)]
pub mod tests;
