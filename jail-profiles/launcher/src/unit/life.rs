//! What the opener holds for one life of core: everything that the machine file names, opened once, and the
//! listeners of the links between the processes.
//!
//! All of it is in the unit's descriptor store, too, so that an opener that is started anew goes on with it
//! (`docs/decisions/0005-restarts-and-units.md`).

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use bulkhead_control_api::config;
use bulkhead_jail::starter::Starter;
use bulkhead_jail::topology::{LINKS, Link, PROCESSES, Process};
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::socket::SockType;
use nix::sys::stat::Mode;

use crate::config_blob;
use crate::machine::{Plan, What};
use crate::opener;
use crate::rendezvous;

/// How often the service manager is asked to keep something, and the pause before it is asked again.
const KEEP_TRIES: u32 = 250;
const KEEP_PAUSE: Duration = Duration::from_millis(20);
/// Where the unit has the FIFO that asks for a loader.
const BOOT: &str = "/run/bulkhead/boot";

/// Where the opener finds what.
#[derive(Debug)]
pub struct Places {
    /// The VM's directory.
    pub state: OwnedFd,
    /// A directory of the opener's own, for the listeners.
    pub links: PathBuf,
}

/// What the opener gives.
#[derive(Debug)]
pub struct Life {
    configs: BTreeMap<&'static str, OwnedFd>,
    fds: BTreeMap<String, OwnedFd>,
    listeners: BTreeMap<&'static str, OwnedFd>,
}

/// The processes that have units: not yet pci and the device daemons.
fn started() -> impl Iterator<Item = &'static Process> {
    PROCESSES.iter().copied().filter(|process| process.name != "pci" && !process.per_device)
}

/// The links between them.
pub fn links() -> impl Iterator<Item = &'static Link> {
    let is_started = |name: &str| started().any(|process| process.name == name);
    LINKS.iter().copied().filter(move |link| is_started(link.listener) && is_started(link.connector))
}

/// Name in the store of something opened.
fn given(name: &str) -> String {
    format!("given.{name}")
}

/// Name in the store of a listener.
fn listening(link: &Link) -> String {
    format!("listen.{}", link.name)
}

/// Name in the store of a configuration.
fn configured(process: &str) -> String {
    format!("config.{process}")
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

/// Keeps a descriptor in the store, in place of a former one. Waits for a service manager that has much to read.
pub fn keep(starter: &Starter, name: &str, fd: BorrowedFd<'_>) -> Result<(), String> {
    let mut tries = 0;
    loop {
        match starter.forget(name).and_then(|()| starter.keep(name, fd)) {
            Err(Errno::EAGAIN) if tries < KEEP_TRIES => std::thread::sleep(KEEP_PAUSE),
            result => return result.map_err(|e| format!("cannot keep {name} in the descriptor store: {e}")),
        }
        tries += 1;
    }
}

impl Life {
    /// Opens and binds everything for a new life of core.
    ///
    /// # Errors
    /// One line.
    pub fn begin(plan: &Plan, places: &Places, starter: &Starter) -> Result<Self, String> {
        let mut fds = BTreeMap::new();
        for request in &plan.opens {
            // Core alone holds the device, from the moment when it asks for it.
            if matches!(request.what, What::Kvm) {
                continue;
            }
            let fd = opener::open_beneath(places.state.as_fd(), request).map_err(|e| e.to_string())?;
            keep(starter, &given(&request.name), fd.as_fd())?;
            fds.insert(request.name.clone(), fd);
        }
        let mut listeners = BTreeMap::new();
        for link in links() {
            let fd = listener(&places.links.join(link.name))
                .map_err(|e| format!("cannot listen in {}: {e}", places.links.display()))?;
            keep(starter, &listening(link), fd.as_fd())?;
            listeners.insert(link.name, fd);
        }
        let configs = configs(plan)?;
        for (process, config) in &configs {
            keep(starter, &configured(process), config.as_fd())?;
        }
        Ok(Self { configs, fds, listeners })
    }

    /// Goes on with what the store has. Of a new plan only who may connect counts: the rest is for the next life.
    ///
    /// # Errors
    /// Something is missing: the store was lost.
    pub fn go_on(plan: Option<&Plan>, mut store: BTreeMap<String, OwnedFd>) -> Result<Self, String> {
        let mut take =
            |name: String| store.remove(&name).ok_or_else(|| format!("{name} is not in the store"));
        let mut configs = BTreeMap::new();
        for process in started() {
            configs.insert(process.name, take(configured(process.name))?);
        }
        let mut listeners = BTreeMap::new();
        for link in links() {
            listeners.insert(link.name, take(listening(link))?);
        }
        if let (Some(plan), Some(broker)) = (plan, configs.get_mut("broker")) {
            let mut config: config::Broker = config_blob::read(broker)?;
            admit_as(&mut config, &plan.broker);
            *broker = config_blob::seal(&config)?;
        }
        let given = |(name, fd): (String, OwnedFd)| Some((name.strip_prefix("given.")?.to_owned(), fd));
        Ok(Self { configs, fds: store.into_iter().filter_map(given).collect(), listeners })
    }

    /// What a process is started with: names and copies of its descriptors.
    ///
    /// # Errors
    /// One line.
    pub fn for_process(&self, process: &Process, places: &Places) -> Result<Vec<(String, OwnedFd)>, String> {
        let copy = |fd: &OwnedFd| fd.try_clone().map_err(|e| format!("dup: {e}"));
        let mut all = Vec::new();
        if let Some(config) = self.configs.get(process.name) {
            all.push(("config".to_owned(), copy(config)?));
        }
        for (name, fd) in self.listeners.iter().filter(|(name, _)| process.may_have(name)) {
            all.push(((*name).to_owned(), copy(fd)?));
        }
        for link in links().filter(|link| link.connector == process.name) {
            all.push((link.as_name.to_owned(), self.connection(link, places)?));
        }
        for (name, fd) in self.fds.iter().filter(|(name, _)| process.may_have(name)) {
            // A character device has one owner.
            if !name.starts_with("chardev.") || process.name == "console" {
                all.push((name.clone(), copy(fd)?));
            }
        }
        if process.may_have("kvm") {
            all.push(("kvm".to_owned(), opener::kvm().map_err(|e| format!("/dev/kvm: {e}"))?));
        }
        if process.name == "core" {
            let flags = OFlag::O_WRONLY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
            let boot = open(BOOT, flags, Mode::empty()).map_err(|e| format!("{BOOT}: {e}"))?;
            all.push(("boot".to_owned(), boot));
        }
        Ok(all)
    }

    /// The configuration of a process, for one that is to read it again.
    #[must_use]
    pub fn config(&self, process: &str) -> Option<BorrowedFd<'_>> {
        self.configs.get(process).map(AsFd::as_fd)
    }

    /// A new connection for `link`.
    ///
    /// # Errors
    /// Nobody listens.
    pub fn connection(&self, link: &Link, places: &Places) -> Result<OwnedFd, String> {
        let path = places.links.join(link.name);
        let listener =
            self.listeners.get(link.name).ok_or_else(|| format!("{} has no listener", link.name))?;
        rendezvous::connect(SockType::SeqPacket, listener.as_fd(), &path)
            .map_err(|e| format!("cannot connect to {}: {e}", path.display()))
    }
}

/// The process of that name.
pub fn process(name: &str) -> Option<&'static Process> {
    PROCESSES.iter().copied().find(|process| process.name == name)
}

fn configs(plan: &Plan) -> Result<BTreeMap<&'static str, OwnedFd>, String> {
    Ok(BTreeMap::from([
        ("core", config_blob::seal(&plan.core)?),
        ("loader", config_blob::seal(&plan.loader)?),
        ("console", config_blob::seal(&plan.console)?),
        ("broker", config_blob::seal(&plan.broker)?),
    ]))
}

fn listener(path: &Path) -> Result<OwnedFd, Errno> {
    // Of a former life: nobody listens there any more, or nobody who could still be meant.
    let _ = fs::remove_file(path);
    rendezvous::listen(SockType::SeqPacket, path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::unit::file;

    fn plan(text: &str) -> Plan {
        crate::machine::plan(&file::parse("vm1", text).unwrap().options).unwrap()
    }

    /// What a machine file says after the start counts from the next life on, but for who may connect.
    #[test]
    fn in_a_life_only_access_changes() {
        let old = plan("append = \"old\"");
        let mut store = BTreeMap::new();
        for (process, config) in configs(&old).unwrap() {
            store.insert(configured(process), config);
        }
        for link in links() {
            store.insert(listening(link), OwnedFd::from(fs::File::open("/dev/null").unwrap()));
        }
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
