//! Devices that daemons of ours serve, plugged in while the machine runs: what was declared for them at the start, the
//! daemon's beginning and end.
//!
//! ```text
//! declared --device_add: Begin, then pci's Add--> used --DEVICE_DELETED: End--> declared
//! ```
//! A daemon that no device has is ended whenever pci comes or a device goes ([`Hub::sweep`]), so nothing is left of a
//! `device_add` that a death cut off. The word of who is used is pci's.

use std::time::Duration;

use bulkhead_control_api::config::IoThread;
use bulkhead_control_api::pci::Function;
use bulkhead_control_api::plug::{self, Declared, MAX_QUEUES, MAX_SERIAL, Settings, What};
use bulkhead_jail::warn;
use bulkhead_qapi::Error;
use nix::errno::Errno;
use tokio::time::sleep;

use crate::hub::Hub;
use crate::models::Properties;
use crate::opener::Failed;
use crate::plug::flag;

/// How long to wait before pci is asked again.
const RETRY: Duration = Duration::from_secs(1);

/// A model.
#[derive(Debug)]
pub struct Model {
    /// QEMU's name of it.
    pub driver: &'static str,
    /// Its own properties.
    pub properties: &'static [&'static str],
    find: fn(&Given<'_>) -> Result<Wanted, Error>,
}

/// What a device wants of its daemon.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// [`Declared::key`].
    pub key: String,
    /// What it says.
    pub settings: Settings,
}

/// What the wish is measured by.
pub struct Given<'a> {
    /// What a client gave.
    pub properties: Properties<'a>,
    /// What was declared.
    pub declared: &'a [Declared],
    /// What is on the bus.
    pub functions: &'a [Function],
    /// The I/O threads.
    pub threads: &'a [IoThread],
}

/// All models.
pub static MODELS: [Model; 3] = [
    Model {
        driver: "virtio-blk-pci",
        properties: &["drive", "serial", "num-queues", "discard", "iothread"],
        find: block,
    },
    Model { driver: "virtio-net-pci", properties: &["netdev", "mac", "mq", "iothread"], find: net },
    Model {
        driver: crate::balloon::DRIVER,
        properties: &["deflate-on-oom", "free-page-reporting", "page-poison", "iothread"],
        find: balloon,
    },
];

impl Model {
    /// The model of that name.
    #[must_use]
    pub fn find(driver: &str) -> Option<&'static Self> {
        MODELS.iter().find(|model| model.driver == driver)
    }

    /// What a device of these properties wants.
    ///
    /// # Errors
    /// In QEMU's words: nothing of that name was declared, it is in use, or a value is out of range.
    pub fn wanted(&self, given: &Given<'_>) -> Result<Wanted, Error> {
        (self.find)(given)
    }
}

/// The device that has a daemon.
pub fn user<'a>(key: &str, functions: &'a [Function]) -> Option<&'a Function> {
    let uses = |function: &&Function| {
        let socket = function.back_end.as_ref().map(|end| end.socket.as_str());
        socket.and_then(|socket| socket.strip_prefix("vhost.")) == Some(key)
    };
    functions.iter().find(uses)
}

impl Given<'_> {
    fn thread(&self) -> Result<IoThread, Error> {
        let Some(id) = self.properties.text("iothread") else { return Ok(IoThread::default()) };
        let found = self.threads.iter().find(|thread| thread.id == id);
        found.cloned().ok_or_else(|| Error::device_not_found(format!("Device '{id}' not found")))
    }
}

fn wrong_value(property: &str, value: &str) -> Error {
    Error::generic(format!("Property '{property}' doesn't take value '{value}'"))
}

fn not_found(property: &str, value: &str) -> Error {
    Error::generic(format!("Property '{property}' can't find value '{value}'"))
}

fn block(given: &Given<'_>) -> Result<Wanted, Error> {
    let Given { properties, declared, functions, .. } = given;
    let iothread = given.thread()?;
    let serial = properties.text("serial").unwrap_or_default();
    if serial.len() > MAX_SERIAL {
        return Err(wrong_value("virtio-blk-device.serial", serial));
    }
    let drive = properties.text("drive").ok_or_else(|| Error::generic("drive property not set"))?;
    let is_drive = |own: &&Declared| matches!(&own.what, What::Drive { id, .. } if id == drive);
    let own = declared.iter().find(is_drive).ok_or_else(|| not_found("virtio-blk-device.drive", drive))?;
    if let Some(user) = user(&own.key, functions) {
        return Err(taken(own, drive, user));
    }
    let queues = properties.number("num-queues", 1)?;
    if queues == 0 {
        return Err(Error::generic("num-queues property must be larger than 0"));
    }
    if queues > MAX_QUEUES {
        return Err(Error::generic(format!("num-queues must be from 1 to {MAX_QUEUES}")));
    }
    let settings = Settings::Block {
        serial: serial.to_owned(),
        queues,
        discard: flag(properties, "discard", true)?,
        iothread,
    };
    Ok(Wanted { key: own.key.clone(), settings })
}

/// A drive or node has one writer.
fn taken(own: &Declared, drive: &str, user: &Function) -> Error {
    Error::generic(match own.what {
        What::Drive { is_node: true, .. } if !user.qdev_id.is_empty() => format!(
            "Conflicts with use by /machine/peripheral/{}/virtio-backend as 'root', which does not allow 'write' on {drive}",
            user.qdev_id
        ),
        _ => format!("Drive '{drive}' is already in use by another device"),
    })
}

fn net(given: &Given<'_>) -> Result<Wanted, Error> {
    let Given { properties, declared, functions, .. } = given;
    let iothread = given.thread()?;
    let missing = || Error::generic("netdev property not set: there is no device without a back end");
    let netdev = properties.text("netdev").ok_or_else(missing)?;
    let own = declared.iter().find_map(|own| match &own.what {
        What::Net { id, mac, pairs } if id == netdev => Some((&own.key, *mac, *pairs)),
        _ => None,
    });
    let about = "virtio-net-device.netdev";
    let (key, default, pairs) = own.ok_or_else(|| not_found(about, netdev))?;
    if user(key, functions).is_some() {
        return Err(Error::generic(format!("Property '{about}' can't take value '{netdev}', it's in use")));
    }
    let mac = match properties.text("mac") {
        None => default,
        Some(text) => plug::mac(text).ok_or_else(|| wrong_value("virtio-net-device.mac", text))?,
    };
    let pairs = if flag(properties, "mq", false)? { pairs } else { 1 };
    Ok(Wanted { key: key.clone(), settings: Settings::Net { mac, pairs, iothread } })
}

fn balloon(given: &Given<'_>) -> Result<Wanted, Error> {
    let Given { properties, declared, functions, .. } = given;
    let iothread = given.thread()?;
    let settings = Settings::Balloon {
        deflate_on_oom: flag(properties, "deflate-on-oom", false)?,
        free_page_reporting: flag(properties, "free-page-reporting", false)?,
        page_poison: flag(properties, "page-poison", true)?,
        iothread,
    };
    if functions.iter().any(|function| function.driver == crate::balloon::DRIVER) {
        return Err(Error::generic("Only one balloon device is supported"));
    }
    let own = declared.iter().find(|own| own.what == What::Balloon);
    let own = own.ok_or_else(|| Error::generic(format!("Device '{}' {STARTED}", crate::balloon::DRIVER)))?;
    Ok(Wanted { key: own.key.clone(), settings })
}

/// What a machine of units says: nothing may start a process there but the service manager.
const STARTED: &str =
    "is started with the machine here, with the properties that the machine file gives it: give it there";

impl Hub {
    /// The I/O threads that there are.
    pub(crate) fn threads(&self) -> Vec<IoThread> {
        let registry = self.store.registry.borrow();
        let given =
            self.config.iothreads.iter().filter(|thread| !registry.removed_objects.contains(&thread.id));
        given.chain(&registry.threads).cloned().collect()
    }

    /// The daemon whose queues run on a thread, if a device has it.
    pub(crate) fn daemon_on<'a>(&'a self, thread: &str, functions: &[Function]) -> Option<&'a Declared> {
        let registry = self.store.registry.borrow();
        let own = |declared: &Declared| {
            let begun = registry.begun.iter().find(|begun| begun.key == declared.key);
            begun.map_or(declared.thread == thread, |begun| begun.thread == thread)
        };
        self.config.declared.iter().find(|declared| own(declared) && user(&declared.key, functions).is_some())
    }

    /// Has the daemon of a device started.
    pub(crate) async fn begin_daemon(&self, driver: &str, wanted: &Wanted) -> Result<(), Error> {
        let Wanted { key, settings } = wanted;
        self.store.registry.borrow_mut().begin(key, &settings.iothread().id);
        self.commit().await;
        self.opener.begin_daemon(key, settings).await.map_err(|failed| match failed {
            Failed::Away => Error::generic("there is no opener that would start its daemon"),
            Failed::Refused(Errno::EOPNOTSUPP) => Error::generic(format!("Device '{driver}' {STARTED}")),
            Failed::Refused(errno) => Error::generic(format!("its daemon is not started: {}", errno.desc())),
        })
    }

    /// Has a daemon ended that no device has; false if the opener is there and has not answered.
    pub(crate) async fn end_daemon(&self, key: &str) -> bool {
        match self.opener.end_daemon(key).await {
            Ok(()) => true,
            Err(Failed::Refused(errno)) => {
                warn!("the daemon of {key:?} is not ended: {errno}");
                true
            }
            Err(Failed::Away) => self.opener.link().is_none(),
        }
    }

    /// Has daemons ended that no device has, whenever it is asked for, for ever.
    pub async fn sweep(&self) {
        loop {
            self.to_sweep.notified().await;
            while !self.swept().await {
                sleep(RETRY).await;
            }
        }
    }

    /// False if pci could not be asked, or the opener did not answer.
    async fn swept(&self) -> bool {
        if self.config.declared.is_empty() {
            return true;
        }
        let _turn = self.device_turn.lock().await;
        let Ok(functions) = self.functions().await else { return false };
        for Declared { key, .. } in &self.config.declared {
            if user(key, &functions).is_none() && !self.end_daemon(key).await {
                return false;
            }
        }
        true
    }
}
