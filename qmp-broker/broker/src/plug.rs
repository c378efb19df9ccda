//! `device_add`, `device_del`, and what pci tells of devices.

use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Duration;

use bulkhead_control_api::config::{PciDevice, PciKind, PciPlace, Virtio};
use bulkhead_control_api::pci::{Event, FromPci, Function, Op, Refusal};
use bulkhead_jail::link::LinkError;
use bulkhead_qapi::types::qdev::{
    DeviceBackEndData, DeviceDelArg, DeviceDeletedData, DeviceUnplugRefusedData,
};
use bulkhead_qapi::{Error, table};
use serde_json::{Map, Value, json};
use tokio::task::spawn_local;
use tokio::time::sleep;

use crate::commands::Reply;
use crate::hub::Hub;
use crate::memory;
use crate::models::{Model, Properties};
use crate::own::{self, Given, Wanted};
use crate::qom::{PERIPHERAL, Tree};
use crate::registry::{MAX_ID, is_identifier, socket_name};

/// The root bus.
pub const ROOT_BUS: &str = "pcie.0";
/// Models that a machine may have from its start only.
const FROM_THE_START: [&str; 3] = ["pcie-root-port", "virtio-mem-pci", "virtio-pmem-pci"];
/// Properties that all devices have.
const COMMON: [&str; 5] = ["driver", "id", "bus", "addr", "multifunction"];
/// How long a device that pci was asked for, and that it said nothing of, may still come.
const UNSURE: Duration = Duration::from_secs(10);

/// What a client gave, as QEMU's option parser has it: numbers as text, flags as `on` and `off`. It leaves everything
/// else out.
fn options(args: Map<String, Value>) -> Vec<(String, String)> {
    let option = |(name, value)| {
        let text = match value {
            Value::String(text) => text,
            Value::Number(number) => number.to_string(),
            Value::Bool(true) => "on".to_owned(),
            Value::Bool(false) => "off".to_owned(),
            Value::Null | Value::Array(_) | Value::Object(_) => return None,
        };
        Some((name, text))
    };
    args.into_iter().filter_map(option).collect()
}

/// Device number, dot, function number, both hexadecimal.
fn address(driver: &str, text: &str) -> Result<(u8, u8), Error> {
    let number = |text: &str| {
        let digits = text.strip_prefix("0x").unwrap_or(text);
        let plain = digits.bytes().all(|byte| byte.is_ascii_hexdigit());
        u8::from_str_radix(digits, 16).ok().filter(|_| plain)
    };
    let (slot, function) = text.split_once('.').unwrap_or((text, "0"));
    match (number(slot), number(function)) {
        (Some(slot @ 0..=31), Some(function @ 0..=7)) => Ok((slot, function)),
        _ => Err(Error::generic(format!("Property '{driver}.addr' doesn't take value '{text}'"))),
    }
}

/// A flag.
pub(crate) fn flag(properties: &Properties<'_>, name: &str, default: bool) -> Result<bool, Error> {
    match properties.text(name) {
        None => Ok(default),
        Some("off" | "no" | "false") => Ok(false),
        Some("on" | "yes" | "true") => Ok(true),
        Some(_) => Err(Error::generic(format!("Parameter '{name}' expects 'on' or 'off'"))),
    }
}

fn no_hotplug(bus: &str) -> Error {
    Error::generic(format!("Bus '{bus}' does not support hotplugging"))
}

/// The port that is a bus of this name, unless it is the root bus.
fn check_bus(bus: Option<&str>, functions: &[Function]) -> Result<(), Error> {
    match bus.unwrap_or(ROOT_BUS) {
        ROOT_BUS => Err(no_hotplug(ROOT_BUS)),
        bus if !bus.is_empty()
            && functions.iter().any(|port| port.bridge.is_some() && port.qdev_id == bus) =>
        {
            Ok(())
        }
        bus => Err(Error::generic(format!("Bus '{bus}' not found"))),
    }
}

/// A device that a client wants to plug in, and its daemon, if it is one of ours.
type Wish = (PciDevice, Option<Wanted>);

/// A model of either kind.
#[derive(Clone, Copy)]
enum Known {
    Others(&'static Model),
    Ours(&'static own::Model),
}

impl Known {
    fn find(driver: &str) -> Option<Self> {
        Model::find(driver).map(Self::Others).or_else(|| own::Model::find(driver).map(Self::Ours))
    }

    fn has(self, property: &str) -> bool {
        match self {
            Self::Others(model) => property == "chardev" || model.properties.contains(&property),
            Self::Ours(model) => model.properties.contains(&property),
        }
    }
}

/// What a client wants to plug in, as far as it can be said before pci is asked. The order of the checks is QEMU's.
fn wanted(given: &Given<'_>, is_socket: impl Fn(&str) -> bool) -> Result<Wish, Error> {
    let Given { properties, functions, .. } = given;
    let id = properties.text("id");
    if id.is_some_and(|id| !is_identifier(id) || id.len() > MAX_ID) {
        return Err(Error::generic("Parameter 'id' expects an identifier"));
    }
    if let Some(id) = id.filter(|id| functions.iter().any(|function| function.qdev_id == **id)) {
        return Err(Error::generic(format!("Duplicate ID '{id}' for device")));
    }
    let driver = properties.text("driver").ok_or_else(|| Error::generic("Parameter 'driver' is missing"))?;
    let model = Known::find(driver);
    if model.is_none() && !FROM_THE_START.contains(&driver) {
        return Err(Error::generic(format!("'{driver}' is not a valid device model name")));
    }
    let bus = properties.text("bus");
    check_bus(bus, functions)?;
    let model = model.ok_or_else(|| {
        Error::generic(format!(
            "Device '{driver}' can be given on the command line only: it is started with the machine"
        ))
    })?;
    let known = |name: &str| COMMON.contains(&name) || model.has(name);
    if let Some((name, _)) = properties.0.iter().find(|(name, _)| !known(name)) {
        return Err(Error::generic(format!("Property '.{name}' not found")));
    }
    let addr = properties.text("addr").map(|text| address(driver, text)).transpose()?;
    let multifunction = flag(properties, "multifunction", false)?;
    let (virtio, daemon) = match model {
        Known::Others(model) => (foreign(model, given, is_socket)?, None),
        Known::Ours(model) => {
            let wanted = model.wanted(given)?;
            (wanted.settings.virtio(&wanted.key), Some(wanted))
        }
    };
    let device = PciDevice {
        id: id.unwrap_or_default().to_owned(),
        driver: driver.to_owned(),
        place: PciPlace { bus: bus.unwrap_or_default().to_owned(), addr, multifunction },
        kind: PciKind::Virtio(virtio),
    };
    Ok((device, daemon))
}

/// A device behind somebody else's back end.
fn foreign(
    model: &Model,
    Given { properties, functions, .. }: &Given<'_>,
    is_socket: impl Fn(&str) -> bool,
) -> Result<Virtio, Error> {
    let Some(chardev) = properties.text("chardev") else { return Err(no_chardev(model)) };
    let about = format!("Property '{}.chardev' can't", model.inner);
    if !is_socket(chardev) {
        return Err(Error::generic(format!("{about} find value '{chardev}'")));
    }
    let socket = socket_name(chardev);
    let uses = |function: &Function| function.back_end.as_ref().is_some_and(|end| end.socket == socket);
    if functions.iter().any(uses) {
        return Err(Error::generic(format!("{about} take value '{chardev}', it's in use")));
    }
    model.device(properties, socket)
}

fn no_chardev(model: &Model) -> Error {
    Error::generic(match model.driver {
        "vhost-user-blk-pci" => "vhost-user-blk: chardev is mandatory",
        _ => "missing chardev",
    })
}

/// What pci refused, in QEMU's words.
fn refused(refusal: Refusal, device: &PciDevice, functions: &[Function]) -> Error {
    let PciPlace { bus, addr, .. } = &device.place;
    let (id, driver) = (&device.id, &device.driver);
    match refusal {
        Refusal::NoDevice => not_found(id),
        Refusal::NoBus => Error::generic(format!("Bus '{bus}' not found")),
        Refusal::NoHotplug => no_hotplug(bus),
        Refusal::IdTaken => Error::generic(format!("Duplicate ID '{id}' for device")),
        Refusal::Pending => pending(id),
        Refusal::BackEnd(text) | Refusal::NoRoom(text) => Error::generic(text),
        Refusal::SlotTaken(by) => {
            let by = functions.iter().find(|function| function.qdev_id == by);
            let by = by.map_or("another device", |function| function.driver.as_str());
            let (slot, function) = addr.unwrap_or_default();
            Error::generic(format!(
                "PCI: slot {slot} function {function} not available for {driver}, in use by {by}"
            ))
        }
    }
}

fn not_found(id: &str) -> Error {
    Error::device_not_found(format!("Device '{id}' not found"))
}

fn pending(id: &str) -> Error {
    Error::generic(format!("Device {id} is already in the process of unplug"))
}

/// Id and path of a device in an event.
fn names(id: String) -> (Option<String>, String) {
    let path = format!("{PERIPHERAL}/{id}");
    (Some(id).filter(|id| !id.is_empty()), path)
}

impl Hub {
    pub(crate) async fn device_add(self: &Rc<Self>, args: Map<String, Value>) -> Reply {
        let functions = self.functions().await?;
        let sockets = self.sockets();
        let is_socket = |id: &str| sockets.iter().any(|socket| socket.id == id && !socket.server);
        let (options, threads) = (options(args), self.threads());
        let given = Given {
            properties: Properties(&options),
            declared: &self.config.declared,
            functions: &functions,
            threads: &threads,
        };
        let (device, daemon) = wanted(&given, is_socket)?;
        if let Some(wanted) = &daemon {
            self.begin_daemon(&device.driver, wanted).await?;
        }
        match self.ask_pci(Op::Add(Box::new(device.clone()))).await {
            Ok(Ok(_)) => Ok(json!({})),
            Ok(Err(refusal)) => {
                if let Some(wanted) = &daemon
                    && !self.end_daemon(&wanted.key).await
                {
                    self.to_sweep.notify_one();
                }
                Err(refused(refusal, &device, &functions))
            }
            // It may be there now, or come yet.
            Err(error) => {
                let hub = Rc::clone(self);
                spawn_local(async move {
                    sleep(UNSURE).await;
                    hub.to_sweep.notify_one();
                });
                Err(error)
            }
        }
    }

    pub(crate) async fn device_del(&self, args: DeviceDelArg) -> Reply {
        let name = args.id;
        let path = if name.starts_with('/') { name.clone() } else { format!("{PERIPHERAL}/{name}") };
        let functions = self.functions().await?;
        let tree = self.tree(&functions);
        let node = tree.absolute(&path).ok_or_else(|| not_found(&name))?;
        let device = node.function.and_then(|index| functions.get(index));
        let device = device.ok_or_else(|| Error::generic(format!("{name} is not a hotpluggable device")))?;
        if device.parent.is_none() {
            return Err(no_hotplug(ROOT_BUS));
        }
        if memory::of(device, &self.config.memory_devices).is_some() {
            return Err(Error::generic("virtio based memory devices cannot be unplugged."));
        }
        if device.qdev_id.is_empty() {
            return Err(Error::generic(format!("{name} has no id by which it could be unplugged")));
        }
        match self.ask_pci(Op::Remove { id: device.qdev_id.clone() }).await? {
            Ok(_) => Ok(json!({})),
            Err(Refusal::Pending) => Err(pending(&name)),
            Err(Refusal::NoDevice) => Err(not_found(&name)),
            Err(Refusal::NoHotplug) => Err(no_hotplug(Tree::bus_of(device, &functions))),
            Err(Refusal::BackEnd(text) | Refusal::NoRoom(text)) => Err(Error::generic(text)),
            Err(Refusal::NoBus | Refusal::SlotTaken(_) | Refusal::IdTaken) => Err(crate::pci::unexpected()),
        }
    }

    /// What pci says.
    pub(crate) fn pci_message(
        self: &Rc<Self>,
        message: FromPci,
        fd: Option<OwnedFd>,
    ) -> Result<(), LinkError> {
        let event = match (message, fd) {
            (FromPci::Reply { id, result }, fd) => {
                self.pci.answer(id, (result, fd));
                return Ok(());
            }
            (FromPci::Event(event), None) => event,
            (FromPci::Event(_), Some(_)) => return Err(LinkError::Malformed),
        };
        let (event, data) = match event {
            Event::Deleted { id } => {
                self.to_sweep.notify_one();
                let (device, path) = names(id);
                (&table::DEVICE_DELETED, serde_json::to_value(DeviceDeletedData { device, path }))
            }
            Event::MemorySize { id, plugged } => {
                self.memory_size_changed(id, plugged);
                return Ok(());
            }
            Event::UnplugRefused { id } => {
                let (device, path) = names(id);
                let data = DeviceUnplugRefusedData { device, path };
                (&table::DEVICE_UNPLUG_REFUSED, serde_json::to_value(data))
            }
            Event::BackEnd { id, connected } => {
                let (device, path) = names(id);
                let data = DeviceBackEndData { device, path, connected };
                (&table::DEVICE_BACK_END, serde_json::to_value(data))
            }
        };
        self.emit(event, data.ok());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_text() {
        let args = json!({ "a": 1, "b": true, "c": [1], "d": null, "e": "x", "f": false });
        let args = args.as_object().cloned().unwrap();
        let given = options(args);
        let expected = [("a", "1"), ("b", "on"), ("e", "x"), ("f", "off")];
        assert_eq!(given, expected.map(|(name, value)| (name.to_owned(), value.to_owned())));
    }

    #[test]
    fn addresses() {
        for (text, expected) in [
            ("1f.7", Some((31, 7))),
            ("0x2", Some((2, 0))),
            ("20", None),
            ("1.8", None),
            ("", None),
            ("+1", None),
            ("1.", None),
        ] {
            assert_eq!(address("d", text).ok(), expected, "{text}");
        }
    }
}
