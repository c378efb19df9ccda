//! What the opener holds for one life of core: everything that the machine file names, opened once, and the
//! listeners of the links between the processes.
//!
//! All of it is in the unit's descriptor store, too, so that an opener that is started anew goes on with it
//! (`docs/decisions/0005-restarts-and-units.md`).

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use bulkhead_control_api::config;
use bulkhead_control_api::plug::Settings;
use bulkhead_jail::starter::Starter;
use bulkhead_jail::topology::{Boots, LINKS, Link, PROCESSES, Process};
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::socket::SockType;
use nix::sys::stat::Mode;

use crate::config_blob;
use crate::machine::{DaemonConfig, Plan, What};
use crate::opener;
use crate::rendezvous;
use crate::supervise::parts;

/// How often the service manager is asked to keep something, and the pause before it is asked again; the same for what
/// it still has of a former life.
const TRIES: u32 = 250;
const PAUSE: Duration = Duration::from_millis(20);
/// Beginnings of names in the store.
const GIVEN: &str = "given.";
const LISTENING: &str = "listen.";
const CONFIGURED: &str = "config.";
/// Name in the store of where others' back ends listen.
const PATHS: &str = "paths";
/// Where the unit has the FIFOs that ask for a loader and for a dump.
const FIFOS: &str = "/run/bulkhead";

/// Where the opener finds what.
#[derive(Debug)]
pub struct Places {
    /// The VM's directory.
    pub state: OwnedFd,
    /// A directory of the opener's own, for the listeners.
    pub links: PathBuf,
    /// Where others' back ends listen.
    pub others: PathBuf,
}

/// What the opener gives.
#[derive(Debug)]
pub struct Life {
    /// By [`Member::name`].
    configs: BTreeMap<String, OwnedFd>,
    fds: BTreeMap<String, OwnedFd>,
    /// By the name of the link, or `vhost.` or `side.` and the device.
    listeners: BTreeMap<String, OwnedFd>,
    /// Where others' back ends listen, by the name under which pci asks for them.
    paths: BTreeMap<String, String>,
}

/// A process of the VM.
#[derive(Clone, Debug)]
pub struct Member {
    /// Which.
    pub process: &'static Process,
    /// Its device, if there is one such process for each.
    pub device: Option<String>,
}

impl Member {
    /// The one of that name.
    pub fn find(name: &str) -> Option<Self> {
        PROCESSES.iter().copied().find_map(|process| {
            let rest = name.strip_prefix(process.name)?;
            match rest.strip_prefix('-') {
                Some(device) if process.per_device => Some(Self { process, device: Some(device.to_owned()) }),
                None if rest.is_empty() && !process.per_device => Some(Self { process, device: None }),
                _ => None,
            }
        })
    }

    /// Its name in a VM.
    pub fn name(&self) -> String {
        match &self.device {
            Some(device) => format!("{}-{device}", self.process.name),
            None => self.process.name.to_owned(),
        }
    }

    /// Its own name for something that was opened for its device.
    fn own_name(&self, opened: &str) -> Option<String> {
        let device = self.device.as_ref()?;
        let (kind, rest) = opened.split_once('.')?;
        match rest.strip_prefix(device.as_str())? {
            "" => Some(kind.to_owned()),
            number => Some(format!("{kind}{}", number.strip_prefix('.').map(|_| number)?)),
        }
        .filter(|name| self.process.may_have(name))
    }
}

/// The kind of socket that a listener is.
fn kind_of(listener: &str) -> SockType {
    if listener.starts_with("vhost.") { SockType::Stream } else { SockType::SeqPacket }
}

/// Names of all listeners of a VM.
fn listeners(plan: &Plan) -> Vec<String> {
    let residents = parts::all(&plan.bus);
    let links = parts::links(&residents).map(|link| link.name.to_owned());
    let devices =
        plan.bus.daemons.iter().flat_map(|d| ["vhost", "side"].map(|kind| format!("{kind}.{}", d.key)));
    links.chain(devices).collect()
}

/// Name in the store of something opened.
fn given(name: &str) -> String {
    format!("{GIVEN}{name}")
}

/// Closes what a predecessor has left; returns the names of what it had opened.
pub fn given_of(store: BTreeMap<String, OwnedFd>) -> Vec<String> {
    store.into_keys().filter(|name| name.starts_with(GIVEN)).collect()
}

/// Name in the store of a listener.
fn listening(listener: &str) -> String {
    format!("{LISTENING}{listener}")
}

/// Name in the store of a configuration.
fn configured(process: &str) -> String {
    format!("{CONFIGURED}{process}")
}

/// Roles and lists of a new configuration, for the monitors that there are.
fn admit_as(config: &mut config::Broker, new: &config::Broker) {
    for monitor in &mut config.monitors {
        if let Some(new) = new.monitors.iter().find(|new| new.chardev.id == monitor.chardev.id) {
            monitor.role = new.role;
            monitor.uids.clone_from(&new.uids);
            monitor.gids.clone_from(&new.gids);
        }
    }
}

/// Tries something again and again while its error is one that passes.
fn patiently<T, E>(passes: impl Fn(&E) -> bool, mut act: impl FnMut() -> Result<T, E>) -> Result<T, E> {
    let mut tries = 0;
    loop {
        match act() {
            Err(error) if tries < TRIES && passes(&error) => std::thread::sleep(PAUSE),
            result => return result,
        }
        tries += 1;
    }
}

/// Keeps a descriptor in the store, in place of a former one. Waits for a service manager that has much to read.
pub fn keep(starter: &Starter, name: &str, fd: BorrowedFd<'_>) -> Result<(), String> {
    let kept = patiently(is_busy, || starter.forget(name).and_then(|()| starter.keep(name, fd)));
    kept.map_err(|e| format!("cannot keep {name} in the descriptor store: {e}"))
}

/// The service manager has much to read.
fn is_busy(errno: &Errno) -> bool {
    *errno == Errno::EAGAIN
}

impl Life {
    /// Opens and binds everything for a new life of core. What a former one had opened, by its names in the store, is
    /// forgotten first: a disk is locked, and a TAP interface taken, as long as anybody has it.
    ///
    /// # Errors
    /// One line.
    pub fn begin(plan: &Plan, places: &Places, starter: &Starter, former: &[String]) -> Result<Self, String> {
        for name in former {
            let forgotten = patiently(is_busy, || starter.forget(name));
            forgotten.map_err(|e| format!("cannot take {name} out of the descriptor store: {e}"))?;
        }
        let may_pass = |error: &opener::Error| !former.is_empty() && error.is_taken();
        let mut fds = BTreeMap::new();
        for request in &plan.opens {
            // Core alone holds the device, from the moment when it asks for it.
            if matches!(request.what, What::Kvm) {
                continue;
            }
            let opened = patiently(may_pass, || opener::open_beneath(places.state.as_fd(), request));
            let fd = opened.map_err(|e| e.to_string())?;
            keep(starter, &given(&request.name), fd.as_fd())?;
            fds.insert(request.name.clone(), fd);
        }
        plan.bus.daemons.iter().for_each(|daemon| opener::leave_unused(daemon, &fds));
        let mut listeners = BTreeMap::new();
        for name in self::listeners(plan) {
            let fd = listener(kind_of(&name), &places.links.join(&name))
                .map_err(|e| format!("cannot listen in {}: {e}", places.links.display()))?;
            keep(starter, &listening(&name), fd.as_fd())?;
            listeners.insert(name, fd);
        }
        let configs = configs(plan)?;
        for (process, config) in &configs {
            keep(starter, &configured(process), config.as_fd())?;
        }
        let paths = plan.bus.paths.clone();
        keep(starter, PATHS, config_blob::seal(&paths)?.as_fd())?;
        Ok(Self { configs, fds, listeners, paths })
    }

    /// Goes on with what the store has. Of a new plan only who may connect counts: the rest is for the next life.
    ///
    /// # Errors
    /// Something is missing: the store was lost.
    pub fn go_on(plan: Option<&Plan>, mut store: BTreeMap<String, OwnedFd>) -> Result<Self, String> {
        let under = |prefix: &str| -> Vec<String> {
            store.keys().filter_map(|name| name.strip_prefix(prefix)).map(str::to_owned).collect()
        };
        let (processes, sockets) = (under(CONFIGURED), under(LISTENING));
        let mut take =
            |name: String| store.remove(&name).ok_or_else(|| format!("{name} is not in the store"));
        let mut configs = BTreeMap::new();
        // What every VM has must be there, devices as the life has them.
        let basic = PROCESSES
            .iter()
            .filter(|p| p.name != "pci" && !p.per_device && p.may_have("config"))
            .map(|p| p.name.to_owned());
        for process in basic.chain(processes).collect::<BTreeSet<_>>() {
            let config = take(configured(&process))?;
            configs.insert(process, config);
        }
        let configured =
            |end: &str| configs.keys().any(|name| Member::find(name).is_some_and(|m| m.process.name == end));
        let has = |end: &str| configured(end) || parts::JOBS.iter().any(|part| part.process.name == end);
        let links = LINKS.iter().filter(|link| has(link.listener) && has(link.connector));
        let links = links.map(|link| link.name.to_owned());
        let mut listeners = BTreeMap::new();
        for name in links.chain(sockets).collect::<BTreeSet<_>>() {
            let listener = take(listening(&name))?;
            listeners.insert(name, listener);
        }
        let paths = config_blob::read(&take(PATHS.to_owned())?)?;
        if let (Some(plan), Some(broker)) = (plan, configs.get_mut("broker")) {
            let mut config: config::Broker = config_blob::read(broker)?;
            admit_as(&mut config, &plan.broker);
            *broker = config_blob::seal(&config)?;
        }
        let given = |(name, fd): (String, OwnedFd)| Some((name.strip_prefix(GIVEN)?.to_owned(), fd));
        Ok(Self { configs, fds: store.into_iter().filter_map(given).collect(), listeners, paths })
    }

    /// Closes all that was opened; returns its names in the store.
    pub fn let_go(&mut self) -> Vec<String> {
        std::mem::take(&mut self.fds).keys().map(|name| given(name)).collect()
    }

    /// What a process is started with: names and copies of its descriptors.
    ///
    /// # Errors
    /// One line.
    pub fn for_process(&self, member: &Member, places: &Places) -> Result<Vec<(String, OwnedFd)>, String> {
        let copy = |fd: &OwnedFd| fd.try_clone().map_err(|e| format!("dup: {e}"));
        let process = member.process;
        let mut all = Vec::new();
        if process.may_have("config") {
            let config = self.configs.get(&member.name()).ok_or("the machine has no such process")?;
            all.push(("config".to_owned(), copy(config)?));
        }
        for (name, fd) in &self.listeners {
            if process.may_have(name) {
                all.push((name.clone(), copy(fd)?));
            } else if let Some(own) = member.own_name(name) {
                all.push((own, copy(fd)?));
            }
        }
        for link in LINKS.iter().filter(|link| link.connector == process.name) {
            if self.listeners.contains_key(link.name) {
                all.push((link.as_name.to_owned(), self.connection(link, places)?));
            }
        }
        for (name, fd) in &self.fds {
            // A character device has one owner.
            let foreign = name.starts_with("chardev.") && process.name != "console";
            if let Some(own) = member.own_name(name) {
                all.push((own, copy(fd)?));
            } else if member.device.is_none() && process.may_have(name) && !foreign {
                all.push((name.clone(), copy(fd)?));
            }
        }
        if process.may_have("kvm") {
            all.push(("kvm".to_owned(), opener::kvm().map_err(|e| format!("/dev/kvm: {e}"))?));
        }
        for trigger in parts::JOBS.iter().filter_map(|part| part.process.boots.trigger()) {
            if process.boots == Boots::Vm && process.may_have(trigger) {
                let flags = OFlag::O_WRONLY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
                let path = format!("{FIFOS}/{trigger}");
                let fifo = open(path.as_str(), flags, Mode::empty()).map_err(|e| format!("{path}: {e}"))?;
                all.push((trigger.to_owned(), fifo));
            }
        }
        Ok(all)
    }

    /// Whether a daemon, which is started with the machine here, serves a device of these settings: one that was there, or
    /// is yet to come.
    ///
    /// # Errors
    /// EPERM: the machine has no such daemon; EINVAL: it cannot have these settings; EOPNOTSUPP: it has others, or it is the
    /// balloon's, which goes on where it was.
    pub fn may_begin(&self, device: &str, settings: &Settings) -> Result<(), Errno> {
        let mut known = self.configs.iter().filter_map(|(name, fd)| Some((Member::find(name)?, fd)));
        let (member, fd) =
            known.find(|(member, _)| member.device.as_deref() == Some(device)).ok_or(Errno::EPERM)?;
        let read = match member.process.name {
            "block" => config_blob::read(fd).map(DaemonConfig::Block),
            "net" => config_blob::read(fd).map(DaemonConfig::Net),
            _ => return Err(Errno::EOPNOTSUPP),
        };
        let own = read.map_err(|_| Errno::EIO)?;
        let pairs = self
            .fds
            .keys()
            .filter_map(|name| member.own_name(name))
            .filter(|n| n.starts_with("tap."))
            .count();
        let wanted = own.with(settings, u16::try_from(pairs).unwrap_or(u16::MAX)).ok_or(Errno::EINVAL)?;
        if wanted == own { Ok(()) } else { Err(Errno::EOPNOTSUPP) }
    }

    /// The configuration of a process, for one that is to read it again.
    #[must_use]
    pub fn config(&self, process: &str) -> Option<BorrowedFd<'_>> {
        self.configs.get(process).map(AsFd::as_fd)
    }

    /// The file of a dump, in the VM's directory.
    ///
    /// # Errors
    /// See [`opener::output_now_beneath`].
    pub fn output(&self, path: &str, places: &Places) -> Result<OwnedFd, Errno> {
        let in_use: Vec<BorrowedFd<'_>> = self.fds.values().map(AsFd::as_fd).collect();
        opener::output_now_beneath(places.state.as_fd(), path, &in_use)
    }

    /// A new connection for `link`.
    ///
    /// # Errors
    /// Nobody listens.
    pub fn connection(&self, link: &Link, places: &Places) -> Result<OwnedFd, String> {
        self.reach(link.name, places)
            .map_err(|e| format!("cannot connect to {} in {}: {e}", link.name, places.links.display()))
    }

    fn reach(&self, listener: &str, places: &Places) -> Result<OwnedFd, Errno> {
        let fd = self.listeners.get(listener).ok_or(Errno::EPERM)?;
        rendezvous::connect(kind_of(listener), fd.as_fd(), &places.links.join(listener))
    }

    /// A new connection to a back end for pci, at once.
    ///
    /// # Errors
    /// EPERM: the machine has no such back end; the kernel's.
    pub fn back_end(&self, name: &str, places: &Places) -> Result<OwnedFd, Errno> {
        match self.paths.get(name) {
            Some(path) => opener::connect_now(&format!("{}/{path}", places.others.display())),
            None if name.starts_with("vhost.") || name.starts_with("side.") => self.reach(name, places),
            None => Err(Errno::EPERM),
        }
    }
}

fn configs(plan: &Plan) -> Result<BTreeMap<String, OwnedFd>, String> {
    let mut all = BTreeMap::from([
        ("core".to_owned(), config_blob::seal(&plan.core)?),
        ("loader".to_owned(), config_blob::seal(&plan.loader)?),
        ("console".to_owned(), config_blob::seal(&plan.console)?),
        ("broker".to_owned(), config_blob::seal(&plan.broker)?),
    ]);
    if !plan.bus.config.devices.is_empty() {
        all.insert("pci".to_owned(), config_blob::seal(&plan.bus.config)?);
    }
    for daemon in &plan.bus.daemons {
        let member = Member { process: daemon.process(), device: Some(daemon.key.clone()) };
        all.insert(member.name(), daemon.seal()?);
    }
    Ok(all)
}

fn listener(kind: SockType, path: &Path) -> Result<OwnedFd, Errno> {
    // Of a former life: nobody listens there any more, or nobody who could still be meant.
    let _ = fs::remove_file(path);
    rendezvous::listen(kind, path)
}

#[cfg(test)]
mod tests {
    use bulkhead_jail::link::recv_packet;
    use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, socketpair};

    use super::*;
    use crate::unit::file;

    fn plan(text: &str) -> Plan {
        crate::machine::plan(&file::parse("vm1", text).unwrap().options).unwrap()
    }

    #[test]
    fn a_device_daemon_is_known_by_process_and_device() {
        for name in ["core", "pci", "block-d0", "net-a-b"] {
            assert_eq!(Member::find(name).unwrap().name(), name);
        }
        for name in ["", "core-d0", "block", "kvm", "blocks-d0"] {
            assert!(Member::find(name).is_none(), "{name}");
        }
        let net = Member::find("net-n0").unwrap();
        for (opened, own) in [
            ("tap.n0.0", Some("tap.0")),
            ("tap.n0.12", Some("tap.12")),
            ("vhost.n0", Some("vhost")),
            ("vhost.n00", None),
            ("tap.n1.0", None),
            ("disk.n0", None),
            ("chardev.n0", None),
        ] {
            assert_eq!(net.own_name(opened).as_deref(), own, "{opened}");
        }
    }

    /// An opener that is started anew gives devices what the life has, whatever the machine file says by now.
    #[test]
    fn devices_are_those_of_the_life() {
        let old = plan(
            "drive = { if = \"none\", id = \"d\", file = \"disk\" }\n\
             chardev = { backend = \"socket\", id = \"c\", path = \"c\" }\n\
             device = [{ driver = \"virtio-blk-pci\", id = \"d0\", drive = \"d\" }, \
                       { driver = \"vhost-user-rng-pci\", chardev = \"c\" }]",
        );
        let dir = std::env::temp_dir().join(format!("bulkhead-life-{}", std::process::id()));
        fs::create_dir_all(dir.join("others")).unwrap();
        let null = || OwnedFd::from(fs::File::open("/dev/null").unwrap());
        let opened = ["given.disk.d0", "given.acpi.0.0"];
        let mut store: BTreeMap<_, _> = opened.map(|name| (name.to_owned(), null())).into();
        for (process, config) in configs(&old).unwrap() {
            store.insert(configured(&process), config);
        }
        let names = listeners(&old);
        assert!(
            ["bus-pci", "control-pci", "vhost.d0", "side.d0"]
                .iter()
                .all(|n| names.contains(&(*n).to_owned()))
        );
        assert!(!names.contains(&"control-balloon".to_owned()));
        for name in names {
            let fd = listener(kind_of(&name), &dir.join(&name)).unwrap();
            store.insert(listening(&name), fd);
        }
        store.insert(PATHS.to_owned(), config_blob::seal(&old.bus.paths).unwrap());
        let life = Life::go_on(Some(&plan("")), store).unwrap();
        let places = Places { state: null(), links: dir.clone(), others: dir.join("others") };
        let given = |name: &str| {
            let given = life.for_process(&Member::find(name).unwrap(), &places).unwrap();
            given.into_iter().map(|(name, _)| name).collect::<Vec<_>>()
        };
        assert_eq!(given("block-d0"), ["config", "side", "vhost", "disk"]);
        assert_eq!(given("loader"), ["config", "core", "acpi.0.0"]);
        assert_eq!(given("pci"), ["config", "core", "broker"]);
        assert!(life.for_process(&Member::find("net-n0").unwrap(), &places).is_err());
        assert!(life.back_end("vhost.d0", &places).is_ok() && life.back_end("side.d0", &places).is_ok());
        for name in ["vhost.d1", "control-pci", "chardev.d", "disk.d0"] {
            assert_eq!(life.back_end(name, &places).unwrap_err(), Errno::EPERM, "{name}");
        }
        assert_eq!(life.back_end("chardev.c", &places).unwrap_err(), Errno::ENOENT);
        let _listener = std::os::unix::net::UnixListener::bind(dir.join("others/c")).unwrap();
        assert!(life.back_end("chardev.c", &places).is_ok());
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn a_memory_device_has_its_memory() {
        let plan = plan(
            "m = { size = \"256M\", maxmem = \"2G\" }\n\
             object = { qom-type = \"memory-backend-memfd\", id = \"m\", size = \"1G\" }\n\
             device = { driver = \"virtio-mem-pci\", id = \"v\", memdev = \"m\" }",
        );
        let memory = plan.opens.iter().find(|open| open.name == "memory.v").unwrap();
        let dir = OwnedFd::from(fs::File::open("/").unwrap());
        let fd = opener::open_beneath(dir.as_fd(), memory).unwrap();
        assert_eq!(fs::File::from(fd).metadata().unwrap().len(), 1 << 30);
        let member = Member::find("mem-v").unwrap();
        assert_eq!(member.own_name("memory.v").as_deref(), Some("memory"));
        assert!(configs(&plan).unwrap().contains_key("mem-v"));
    }

    /// Nothing starts a daemon here: one that is there serves a device of its own settings, plugged in again or at last.
    #[test]
    fn a_daemon_serves_a_device_of_its_own_settings() {
        let plan = plan(
            "drive = [{ if = \"none\", id = \"d\", file = \"d\" }, { if = \"none\", id = \"e\", file = \"e\" }]\n\
             netdev = { type = \"tap\", id = \"n\", ifname = \"tap0\", queues = 2 }\n\
             device = [{ driver = \"pcie-root-port\", id = \"rp0\" }, \
                       { driver = \"virtio-blk-pci\", id = \"d0\", drive = \"d\", serial = \"s\" }, \
                       { driver = \"virtio-balloon-pci\", id = \"b0\" }]",
        );
        let null = || OwnedFd::from(fs::File::open("/dev/null").unwrap());
        let fds = ["tap.n.0", "tap.n.1"].map(|name| (name.to_owned(), null()));
        let life = Life {
            configs: configs(&plan).unwrap(),
            fds: fds.into(),
            listeners: BTreeMap::new(),
            paths: BTreeMap::new(),
        };
        let iothread = config::IoThread::default();
        let block = |serial: &str, queues| Settings::Block {
            serial: serial.to_owned(),
            queues,
            discard: true,
            iothread: iothread.clone(),
        };
        let mac = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
        let net = |mac, pairs| Settings::Net { mac, pairs, iothread: iothread.clone() };
        let balloon = Settings::Balloon {
            deflate_on_oom: false,
            free_page_reporting: false,
            page_poison: true,
            iothread: iothread.clone(),
        };
        for (key, settings, answer) in [
            ("d0", block("s", 1), Ok(())),
            ("d0", block("", 1), Err(Errno::EOPNOTSUPP)),
            ("d0", block("s", 65), Err(Errno::EINVAL)),
            ("d0", net(mac, 1), Err(Errno::EINVAL)),
            ("e", block("", 1), Ok(())),
            ("e", block("", 2), Err(Errno::EOPNOTSUPP)),
            ("n", net(mac, 1), Ok(())),
            ("n", net(mac, 2), Err(Errno::EOPNOTSUPP)),
            ("n", net(mac, 3), Err(Errno::EINVAL)),
            ("n", net([2; 6], 1), Err(Errno::EOPNOTSUPP)),
            ("b0", balloon, Err(Errno::EOPNOTSUPP)),
            ("rp0", block("", 1), Err(Errno::EPERM)),
            ("core", block("", 1), Err(Errno::EPERM)),
        ] {
            assert_eq!(life.may_begin(key, &settings), answer, "{key} {settings:?}");
        }
    }

    /// What a former life had opened is in the store until the service manager has heard that it is not to be.
    #[test]
    fn a_new_life_has_the_disk_of_the_last_one() {
        let text = "drive = { if = \"none\", id = \"d\", file = \"disk\" }\n\
                    device = { driver = \"virtio-blk-pci\", id = \"d0\", drive = \"d\" }";
        let plan = plan(text);
        let dir = std::env::temp_dir().join(format!("bulkhead-lives-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("disk"), [0; 512]).unwrap();
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::empty()).unwrap();
        let manager = std::thread::spawn(move || {
            let (mut store, mut words) = (BTreeMap::new(), [0; 512]);
            while let Ok((len @ 1.., fds)) = recv_packet(theirs.as_fd(), &mut words, MsgFlags::empty()) {
                let text = std::str::from_utf8(&words[..len]).unwrap();
                let name = text.lines().find_map(|line| line.strip_prefix("FDNAME=")).unwrap().to_owned();
                if text.starts_with("FDSTOREREMOVE=1") {
                    std::thread::sleep(Duration::from_millis(1));
                    store.remove(&name);
                }
                store.extend(fds.into_iter().map(|fd| (name.clone(), fd)));
            }
        });
        let places = Places {
            state: OwnedFd::from(fs::File::open(&dir).unwrap()),
            links: dir.clone(),
            others: dir.clone(),
        };
        let starter = Starter::new(Some(ours));
        let names = Life::begin(&plan, &places, &starter, &[]).unwrap().let_go();
        assert!(names.contains(&"given.disk.d0".to_owned()));
        let second = Life::begin(&plan, &places, &starter, &names).unwrap();
        // Nobody else gets it.
        let taken = Life::begin(&plan, &places, &starter, &[]).unwrap_err();
        assert!(taken.contains("Failed to get \"write\" lock"), "{taken}");
        drop((second, starter));
        manager.join().unwrap();
        fs::remove_dir_all(dir).unwrap();
    }

    /// What a machine file says after the start counts from the next life on, but for who may connect.
    #[test]
    fn in_a_life_only_access_changes() {
        let old = plan("append = \"old\"");
        let mut store = BTreeMap::new();
        for (process, config) in configs(&old).unwrap() {
            store.insert(configured(&process), config);
        }
        for name in listeners(&old) {
            store.insert(listening(&name), OwnedFd::from(fs::File::open("/dev/null").unwrap()));
        }
        store.insert(PATHS.to_owned(), config_blob::seal(&old.bus.paths).unwrap());
        store.insert("given.kernel".to_owned(), OwnedFd::from(fs::File::open("/dev/null").unwrap()));
        let new = plan(
            "append = \"new\"\nkernel = \"k\"\nchardev = { backend = \"null\", id = \"n\" }\naccess.monitor.uid = 7",
        );
        let life = Life::go_on(Some(&new), store).unwrap();
        let loader: config::Loader = config_blob::read(&life.configs["loader"]).unwrap();
        assert_eq!(loader, old.loader);
        let console: config::Console = config_blob::read(&life.configs["console"]).unwrap();
        assert_eq!(console, old.console);
        let broker: config::Broker = config_blob::read(&life.configs["broker"]).unwrap();
        let uids: Vec<&[u32]> = broker.monitors.iter().map(|monitor| monitor.uids.as_slice()).collect();
        assert_eq!((broker.life, uids), (old.broker.life, vec![&[0][..], &[7], &[0]]));
        assert!(life.fds.contains_key("kernel"));
        assert!(Life::go_on(None, BTreeMap::new()).is_err());
    }
}
