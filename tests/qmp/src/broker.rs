//! Our broker in a thread of the test, between a fake core and a fake console.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::thread::JoinHandle;
use std::time::Duration;

use bulkhead_broker::descriptors::Descriptors;
use bulkhead_broker::fd::watch;
use bulkhead_broker::hub::Hub;
use bulkhead_broker::monitor;
use bulkhead_broker::policy::Policy;
use bulkhead_broker::run::{Callers, Sources, run};
use bulkhead_broker::store::{Store, restore};
use bulkhead_control_api::config;
use bulkhead_control_api::plug::{Declared, What};
use bulkhead_framework::{Result, Scratch};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, listen, socket, socketpair,
};
use std::os::fd::AsRawFd;
use tokio::runtime::Runtime;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use crate::fake;
use crate::fake_bus::Bus;
use crate::fake_dump::Starter;

/// A running broker with one or more monitors.
pub struct Broker {
    scratch: Scratch,
    /// The fake core.
    pub core: fake::Core,
    /// The fake pci and balloon.
    pub bus: Option<Bus>,
    /// The starter of dump processes.
    pub dumps: Starter,
    unlimited: Vec<config::Monitor>,
    policy: UnboundedSender<Policy>,
    thread: Option<JoinHandle<std::result::Result<(), String>>>,
}

/// Role, user ids and group ids of a monitor.
pub type Limit<'a> = (config::Role, &'a [u32], &'a [u32]);

fn set_limits(monitors: &mut [config::Monitor], limits: &[Limit<'_>]) {
    for (monitor, (role, uids, gids)) in monitors.iter_mut().zip(limits) {
        (monitor.role, monitor.uids, monitor.gids) = (*role, uids.to_vec(), gids.to_vec());
    }
}

/// How a monitor of a test gets its clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `server=on,wait=off` on a path.
    Server,
    /// `server=on,wait=on` on a path.
    Waiting,
    /// An inherited listener: `fd=N,server=on`.
    Inherited,
}

impl Default for Setup<'_> {
    fn default() -> Self {
        Self {
            limits: &[],
            connected: None,
            autostart: false,
            console: true,
            preconfig: false,
            former: None,
            devices: Some(false),
        }
    }
}

/// What a broker is started with.
#[derive(Debug)]
pub struct Setup<'a> {
    /// Limits of the first monitors.
    pub limits: &'a [Limit<'a>],
    /// One more monitor, over this stream.
    pub connected: Option<UnixStream>,
    /// The machine is to start by itself.
    pub autostart: bool,
    /// There is a console.
    pub console: bool,
    /// It begins in run state `preconfig`.
    pub preconfig: bool,
    /// It takes over from one that died while the machine ran, and core takes so long for each request.
    pub former: Option<Duration>,
    /// There is a PCI bus, with or without devices.
    pub devices: Option<bool>,
}

impl Broker {
    /// Starts a broker that starts the machine by itself if `autostart`. Monitor `n` is at
    /// [`Self::path`]`(n)`.
    ///
    /// # Errors
    /// Sockets cannot be made.
    pub fn start(kinds: &[Kind], autostart: bool) -> Result<Self> {
        Self::start_with(kinds, None, autostart, true)
    }

    /// Starts a broker that, too, has a monitor over `connected` (`server=off`), with or without a
    /// console.
    ///
    /// # Errors
    /// Sockets cannot be made.
    pub fn start_with(
        kinds: &[Kind],
        connected: Option<UnixStream>,
        autostart: bool,
        console: bool,
    ) -> Result<Self> {
        Self::start_limited(kinds, &[], connected, autostart, console)
    }

    /// Starts a broker of a machine with the devices of [`Bus`].
    ///
    /// # Errors
    /// Sockets cannot be made.
    pub fn with_devices() -> Result<Self> {
        Self::start_as(&[Kind::Server], Setup { devices: Some(true), ..Setup::default() })
    }

    /// Starts a broker of a machine without a PCI bus.
    ///
    /// # Errors
    /// Sockets cannot be made.
    pub fn without_bus(kinds: &[Kind]) -> Result<Self> {
        Self::start_as(kinds, Setup { devices: None, ..Setup::default() })
    }

    /// The same, and the first monitors of all have these limits.
    ///
    /// # Errors
    /// Sockets cannot be made.
    pub fn start_limited(
        kinds: &[Kind],
        limits: &[Limit<'_>],
        connected: Option<UnixStream>,
        autostart: bool,
        console: bool,
    ) -> Result<Self> {
        let devices = Some(false);
        let (preconfig, former) = (false, None);
        Self::start_as(kinds, Setup { limits, connected, autostart, console, preconfig, former, devices })
    }

    /// Starts a broker.
    ///
    /// # Errors
    /// Sockets cannot be made.
    pub fn start_as(kinds: &[Kind], setup: Setup<'_>) -> Result<Self> {
        let Setup { limits, connected, autostart, console, preconfig, former, devices } = setup;
        let scratch = Scratch::new()?;
        let mut fds: BTreeMap<String, OwnedFd> = BTreeMap::new();
        let mut monitors = Vec::new();
        for (number, kind) in kinds.iter().enumerate() {
            let path = socket_path(scratch.path(), number);
            let name = format!("chardev.{number}");
            fds.insert(name.clone(), UnixListener::bind(&path)?.into());
            let address =
                if *kind == Kind::Inherited { "fd:7".to_owned() } else { path.display().to_string() };
            monitors.push(socket_monitor(number, name, address, true, *kind == Kind::Waiting));
        }
        if let Some(stream) = connected {
            fds.insert("chardev.client".to_owned(), stream.into());
            let (number, address) = (kinds.len(), "/client".to_owned());
            monitors.push(socket_monitor(number, "chardev.client".to_owned(), address, false, false));
        }
        let unlimited = monitors.clone();
        set_limits(&mut monitors, limits);
        let config = config::Broker {
            monitors,
            autostart,
            preconfig,
            ram: 16 << 20,
            options: vec![memory_options(), acpi_options()],
            back_ends: if devices == Some(true) { vec![back_end()] } else { Vec::new() },
            iothreads: vec![io_thread()],
            declared: if devices == Some(true) { declared() } else { Vec::new() },
            ..config::Broker::default()
        };
        let (ours, theirs) = seqpacket_pair()?;
        let core = fake::Core::start(theirs.try_clone()?, theirs);
        if let Some(slow) = former {
            core.set_running(slow);
        }
        let (listener, to_console) = meeting(scratch.path(), "console", console)?;
        to_console.into_iter().for_each(fake::console);
        let (pci, to_pci) = meeting(scratch.path(), "pci", devices.is_some())?;
        let (balloon, to_balloon) = meeting(scratch.path(), "balloon", devices.is_some())?;
        let bus = devices.map(|with_devices| Bus::start(with_devices, to_pci, to_balloon));
        let (to_opener, opener) = seqpacket_pair()?;
        if let Some(bus) = &bus {
            bus.serve_opener(opener);
        }
        let (dump, _) = meeting(scratch.path(), "dump", false)?;
        let (job, starter) = seqpacket_pair()?;
        let dumps = Starter::start(starter, scratch.path().join("dump"));
        let listeners = (listener, bus.is_some().then_some((pci, balloon, to_opener)));
        let (policy, policies) = unbounded_channel();
        let thread = std::thread::spawn(move || {
            serve(config, (ours, listeners, (dump, job)), fds, (policies, former.is_some()))
        });
        Ok(Self { scratch, core, bus, dumps, unlimited, policy, thread: Some(thread) })
    }

    /// Replaces the limits of the first monitors while the broker runs; the others have none then.
    pub fn limit(&self, limits: &[Limit<'_>]) {
        let mut monitors = self.unlimited.clone();
        set_limits(&mut monitors, limits);
        // One that has ended needs no policy.
        let _ = self.policy.send(Policy::new(&monitors));
    }

    /// Path of monitor `number`.
    #[must_use]
    pub fn path(&self, number: usize) -> PathBuf {
        socket_path(self.scratch.path(), number)
    }

    /// Whether the broker has ended.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Waits for the broker's end.
    ///
    /// # Errors
    /// It failed.
    pub fn join(mut self) -> Result<()> {
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(ended)) => Ok(ended?),
            Some(Err(_)) => Err("the broker panicked".into()),
            None => Ok(()),
        }
    }
}

/// `-object iothread,id=io0`, used by the disk of a machine with devices.
fn io_thread() -> config::IoThread {
    config::IoThread { id: "io0".to_owned(), poll_max_ns: 32768, ..config::IoThread::default() }
}

/// What [`crate::qemu`]'s machine has for devices of ours: the balloon and the disk that there are, and what no device uses.
fn declared() -> Vec<Declared> {
    let own =
        |what, key: &str, thread: &str| Declared { what, key: key.to_owned(), thread: thread.to_owned() };
    let drive = |id: &str, is_node| What::Drive { id: id.to_owned(), is_node };
    let net = What::Net { id: "hn".to_owned(), mac: [0x52, 0x54, 0, 0x12, 0x34, 0x56], pairs: 2 };
    vec![
        own(What::Balloon, "b0", ""),
        own(drive("d0", false), "disk", "io0"),
        own(drive("hd", false), "hd", ""),
        own(drive("hnode", true), "hnode", ""),
        own(net, "hn", ""),
    ]
}

/// `-chardev socket,id=sk,path=/sk`.
fn back_end() -> config::Chardev {
    let (fd, address) = ("chardev.sk".to_owned(), "/sk".to_owned());
    let kind = config::ChardevKind::Socket { fd, address, server: false, wait: false };
    config::Chardev { id: "sk".to_owned(), kind }
}

/// A group that has no parameters.
fn acpi_options() -> config::OptionGroup {
    config::OptionGroup { name: "acpi".to_owned(), parameters: Vec::new() }
}

/// The parameters of `-m`.
fn memory_options() -> config::OptionGroup {
    let parameter = |name: &str, kind| config::Parameter { name: name.to_owned(), kind, help: String::new() };
    let parameters = vec![
        parameter("size", config::ParameterType::Size),
        parameter("slots", config::ParameterType::Number),
        parameter("maxmem", config::ParameterType::Size),
    ];
    config::OptionGroup { name: "memory".to_owned(), parameters }
}

/// A listener, and a connection to it if there is to be one.
fn meeting(dir: &Path, name: &str, connected: bool) -> Result<(OwnedFd, Option<OwnedFd>)> {
    let listener = seqpacket()?;
    // As the process makes it: it accepts until nobody waits.
    fcntl(&listener, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).map_err(std::io::Error::from)?;
    let address = UnixAddr::new(&dir.join(name)).map_err(std::io::Error::from)?;
    bind(listener.as_raw_fd(), &address).map_err(std::io::Error::from)?;
    listen(&listener, Backlog::MAXCONN).map_err(std::io::Error::from)?;
    if !connected {
        return Ok((listener, None));
    }
    let fd = seqpacket()?;
    connect(fd.as_raw_fd(), &address).map_err(std::io::Error::from)?;
    Ok((listener, Some(fd)))
}

fn seqpacket_pair() -> Result<(OwnedFd, OwnedFd)> {
    let pair = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC);
    Ok(pair.map_err(std::io::Error::from)?)
}

fn seqpacket() -> Result<OwnedFd> {
    let fd = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None);
    Ok(fd.map_err(std::io::Error::from)?)
}

fn socket_path(dir: &Path, number: usize) -> PathBuf {
    dir.join(format!("qmp{number}"))
}

fn socket_monitor(number: usize, fd: String, address: String, server: bool, wait: bool) -> config::Monitor {
    let kind = config::ChardevKind::Socket { fd, address, server, wait };
    let chardev = config::Chardev { id: format!("compat_monitor{number}"), kind };
    config::Monitor { chardev, role: config::Role::Operator, uids: Vec::new(), gids: Vec::new() }
}

/// What a broker that died without descriptors of clients has left.
fn former_store(runtime: &Runtime) -> std::result::Result<Store, String> {
    let memfd = memfd_create("state", MFdFlags::MFD_CLOEXEC).map_err(|error| error.to_string())?;
    let copy = memfd.try_clone().map_err(|error| error.to_string())?;
    let (first, ..) = restore(copy, 1, BTreeMap::new());
    runtime.block_on(first.commit(&RefCell::new(Descriptors::default())));
    Ok(restore(memfd, 1, BTreeMap::new()).0)
}

/// What the console connects to, and pci and balloon, and the opener.
type Listeners = (OwnedFd, Option<(OwnedFd, OwnedFd, OwnedFd)>);

/// The life of the process, less its jail.
fn serve(
    config: config::Broker,
    (core, (console, bus), (dump, job)): (OwnedFd, Listeners, (OwnedFd, OwnedFd)),
    mut fds: BTreeMap<String, OwnedFd>,
    (mut policies, restored): (UnboundedReceiver<Policy>, bool),
) -> std::result::Result<(), String> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .build()
        .map_err(|error| error.to_string())?;
    let sources = {
        let _context = runtime.enter();
        let mut take = |name: &str| fds.remove(name);
        let open = |monitor| monitor::open(monitor, &mut take).map_err(|error| error.to_string());
        let monitors = config.monitors.iter().map(open).collect::<std::result::Result<_, _>>()?;
        let watch = |fd| watch(fd).map_err(|(_, error)| error.to_string());
        let console = watch(console)?;
        let (pci, balloon, opener) = match bus {
            Some((pci, balloon, opener)) => (Some(watch(pci)?), Some(watch(balloon)?), Some(watch(opener)?)),
            None => (None, None, None),
        };
        let dump = watch(dump)?;
        Sources { core, callers: Callers { console, pci, balloon, dump }, job, opener, monitors }
    };
    let store = if restored { former_store(&runtime)? } else { Store::default() };
    let hub = Rc::new(Hub::new(config, Descriptors::default(), store));
    let local = tokio::task::LocalSet::new();
    let replaced = Rc::clone(&hub);
    local.spawn_local(async move {
        while let Some(policy) = policies.recv().await {
            replaced.set_policy(policy);
        }
    });
    local.block_on(&runtime, run(hub, sources)).map_err(|error| error.to_string())
}
