//! Where devices go. The words are QEMU's where it has any.

use bulkhead_control_api::config::{PciDevice, PciKind};

use crate::function::ROOT_BUS;

/// The most functions, the host bridge among them.
pub const MAX_FUNCTIONS: usize = 256;
const SLOTS: u8 = 32;
const FUNCTIONS: u8 = 8;

/// What is on a bus already.
#[derive(Clone, Copy, Debug)]
pub struct Taken<'a> {
    /// Index of the function.
    pub index: u16,
    /// As configured.
    pub config: &'a PciDevice,
    /// Index of the port that it is behind.
    pub parent: Option<u16>,
    /// Device and function number.
    pub devfn: u8,
    /// It is a port.
    pub port: bool,
}

/// Where a device goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Index of the port that it is behind.
    pub parent: Option<u16>,
    /// Device number << 3 | function number.
    pub devfn: u8,
}

/// Why it cannot go there.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlaceError {
    /// There is no such bus.
    #[error("Bus '{0}' not found")]
    NoBus(String),
    /// The bus takes nothing while the machine runs.
    #[error("Bus '{0}' does not support hotplugging")]
    NoHotplug(String),
    /// The id is taken.
    #[error("Duplicate ID '{0}' for device")]
    IdTaken(String),
    /// Something is there.
    #[error("PCI: slot {slot} function {function} not available for {driver}, in use by {by}")]
    InUse {
        /// Device number.
        slot: u8,
        /// Function number.
        function: u8,
        /// The device that finds no place.
        driver: String,
        /// The one that has it.
        by: String,
        /// Its id.
        id: String,
    },
    /// The bus is full.
    #[error("PCI: no slot/function available for {0}, all in use or reserved")]
    Full(String),
    /// Function 0 is there and may have been looked at.
    #[error(
        "PCI: slot {slot} function 0 already occupied by {by}, new func {driver} cannot be exposed to guest."
    )]
    TooLate {
        /// Device number.
        slot: u8,
        /// The device that came first.
        by: String,
        /// The one that is too late.
        driver: String,
    },
    /// Function 0 says that there are no others.
    #[error("PCI: single function device can't be populated in function {0:x}.{1:x}")]
    SingleFunction(u8, u8),
    /// There are others already.
    #[error("PCI: {0:x}.0 indicates single function, but {0:x}.{1:x} is already populated.")]
    OthersThere(u8, u8),
    /// A port has one slot.
    #[error("PCI: slot {0} is not valid for {1}, parent device only allows plugging into slot 0.")]
    OneSlot(u8, String),
    /// A root port is not on the root bus.
    #[error("{0} can only be plugged into bus '{ROOT_BUS}'")]
    NotOnRoot(String),
    /// Two ports with the same numbers.
    #[error("Can't add chassis slot, error -16")]
    ChassisSlot,
    /// Another device has its back end.
    #[error("back end {0:?} serves another device")]
    BackEndTaken(String),
    /// A device or function number that does not exist.
    #[error("PCI: slot {0} function {1} does not exist")]
    NoSlot(u8, u8),
    /// There are too many functions.
    #[error("PCI: at most {MAX_FUNCTIONS} functions")]
    TooMany,
}

/// Names by which the opener is asked for the device's back end.
fn back_ends(device: &PciDevice) -> impl Iterator<Item = &str> {
    let virtio = if let PciKind::Virtio(virtio) = &device.kind { Some(virtio) } else { None };
    virtio.into_iter().flat_map(|virtio| [Some(virtio.socket.as_str()), virtio.side.as_deref()]).flatten()
}

/// Whether the device has a back end of this name.
fn has(device: &PciDevice, name: &str) -> bool {
    back_ends(device).any(|own| own == name)
}

/// Finds the place of a device among what is there; `hot`: the machine runs.
///
/// # Errors
/// [`PlaceError`].
pub fn find(taken: &[Taken<'_>], device: &PciDevice, hot: bool) -> Result<Place, PlaceError> {
    let driver = &device.driver;
    if taken.len() >= MAX_FUNCTIONS {
        return Err(PlaceError::TooMany);
    }
    if !device.id.is_empty() && taken.iter().any(|other| other.config.id == device.id) {
        return Err(PlaceError::IdTaken(device.id.clone()));
    }
    // The launcher's word on the first devices is taken; the broker's on later ones is not.
    let known = |name: &&str| hot && taken.iter().any(|other| has(other.config, name));
    if let Some(name) = back_ends(device).find(known) {
        return Err(PlaceError::BackEndTaken(name.to_owned()));
    }
    let bus = &device.place.bus;
    let parent = if bus == ROOT_BUS {
        None
    } else {
        let port = taken.iter().find(|other| other.port && !bus.is_empty() && other.config.id == *bus);
        Some(port.ok_or_else(|| PlaceError::NoBus(bus.clone()))?.index)
    };
    let is_port = matches!(device.kind, PciKind::RootPort { .. });
    if is_port && parent.is_some() {
        return Err(PlaceError::NotOnRoot(driver.clone()));
    }
    if hot && parent.is_none() {
        return Err(PlaceError::NoHotplug(bus.clone()));
    }
    let same = |other: &&Taken<'_>| other.port && chassis_slot(other.config) == chassis_slot(device);
    if is_port && taken.iter().any(|other| same(&other)) {
        return Err(PlaceError::ChassisSlot);
    }
    let at = |devfn: u8| taken.iter().find(|other| other.parent == parent && other.devfn == devfn);
    let slots = if parent.is_some() { 1 } else { SLOTS };
    let Some((slot, function)) = device.place.addr else {
        let free = (0..slots).find(|slot| at(slot << 3).is_none());
        let Some(slot) = free else {
            // The device that is behind a port, for who is to be told of it.
            return Err(match at(0).filter(|_| parent.is_some()) {
                Some(other) => in_use(other, 0, 0, driver),
                None => PlaceError::Full(driver.clone()),
            });
        };
        return check_functions(device, parent, slot, 0, &at);
    };
    if slot >= SLOTS || function >= FUNCTIONS {
        return Err(PlaceError::NoSlot(slot, function));
    }
    if slot >= slots {
        return Err(PlaceError::OneSlot(slot, driver.clone()));
    }
    if let Some(other) = at(slot << 3 | function) {
        return Err(in_use(other, slot, function, driver));
    }
    if let Some(first) = at(slot << 3).filter(|_| hot) {
        let by = first.config.driver.clone();
        return Err(PlaceError::TooLate { slot, by, driver: driver.clone() });
    }
    check_functions(device, parent, slot, function, &at)
}

fn in_use(other: &Taken<'_>, slot: u8, function: u8, driver: &str) -> PlaceError {
    PlaceError::InUse {
        slot,
        function,
        driver: driver.to_owned(),
        by: other.config.driver.clone(),
        id: other.config.id.clone(),
    }
}

const fn chassis_slot(device: &PciDevice) -> Option<(u8, u16)> {
    match device.kind {
        PciKind::RootPort { chassis, slot } => Some((chassis, slot)),
        PciKind::Virtio(_) => None,
    }
}

/// Whether function 0 and the others agree.
fn check_functions<'a>(
    device: &PciDevice,
    parent: Option<u16>,
    slot: u8,
    function: u8,
    at: &dyn Fn(u8) -> Option<&'a Taken<'a>>,
) -> Result<Place, PlaceError> {
    if function > 0 {
        if at(slot << 3).is_some_and(|first| !first.config.place.multifunction) {
            return Err(PlaceError::SingleFunction(slot, function));
        }
    } else if !device.place.multifunction
        && let Some(other) = (1..FUNCTIONS).find(|function| at(slot << 3 | function).is_some())
    {
        return Err(PlaceError::OthersThere(slot, other));
    }
    Ok(Place { parent, devfn: slot << 3 | function })
}

#[cfg(test)]
mod tests {
    use bulkhead_control_api::config::{PciPlace, Virtio};

    use crate::function::Function;

    use super::*;

    fn device(id: &str, bus: &str, addr: Option<(u8, u8)>, multifunction: bool) -> PciDevice {
        let virtio = Virtio {
            device_type: 2,
            queues: 1,
            queue_size: 256,
            config: Vec::new(),
            without: 0,
            socket: format!("vhost.{id}"),
            listens: false,
            side: None,
            resumes: true,
            memory: None,
        };
        PciDevice {
            id: id.to_owned(),
            driver: "virtio-blk-pci".to_owned(),
            place: PciPlace { bus: bus.to_owned(), addr, multifunction },
            kind: PciKind::Virtio(virtio),
        }
    }

    fn port(id: &str, slot: u16) -> PciDevice {
        let kind = PciKind::RootPort { chassis: 0, slot };
        PciDevice { driver: "pcie-root-port".to_owned(), kind, ..device(id, ROOT_BUS, None, false) }
    }

    /// Places devices one after the other behind the host bridge.
    struct Bus(Vec<(PciDevice, Place, bool)>);

    impl Bus {
        fn new() -> Self {
            Self(vec![(Function::host().config, Place { parent: None, devfn: 0 }, false)])
        }

        fn add(&mut self, device: PciDevice, hot: bool) -> Result<Place, PlaceError> {
            let taken: Vec<Taken<'_>> = (0..)
                .zip(&self.0)
                .map(|(index, (config, place, port))| Taken {
                    index,
                    config,
                    parent: place.parent,
                    devfn: place.devfn,
                    port: *port,
                })
                .collect();
            let place = find(&taken, &device, hot)?;
            let port = matches!(device.kind, PciKind::RootPort { .. });
            self.0.push((device, place, port));
            Ok(place)
        }

        fn error(&mut self, device: PciDevice, hot: bool) -> String {
            self.add(device, hot).unwrap_err().to_string()
        }
    }

    #[test]
    fn the_first_free_slot_is_taken() {
        let mut bus = Bus::new();
        let at = |devfn| Ok(Place { parent: None, devfn });
        assert_eq!(bus.add(device("a", ROOT_BUS, None, false), false), at(8));
        assert_eq!(bus.add(device("b", ROOT_BUS, Some((3, 0)), true), false), at(24));
        assert_eq!(bus.add(device("c", ROOT_BUS, Some((3, 1)), false), false), at(25));
        assert_eq!(bus.add(device("d", ROOT_BUS, None, false), false), at(16));
        assert_eq!(bus.add(device("e", ROOT_BUS, None, false), false), at(32));
        assert_eq!(bus.add(port("p", 1), false), at(40));
        assert_eq!(bus.add(device("f", "p", None, false), true), Ok(Place { parent: Some(6), devfn: 0 }));
        for n in 6..32 {
            assert_eq!(bus.add(device("", ROOT_BUS, None, false), false), at(n << 3));
        }
        let full = "PCI: no slot/function available for virtio-blk-pci, all in use or reserved";
        assert_eq!(bus.error(device("", ROOT_BUS, None, false), false), full);
    }

    #[test]
    fn a_back_end_serves_one_device() {
        let mut bus = Bus::new();
        bus.add(port("p", 1), false).unwrap();
        bus.add(device("a", ROOT_BUS, None, false), false).unwrap();
        let again = PciDevice { id: "b".to_owned(), ..device("a", "p", None, false) };
        assert_eq!(bus.error(again.clone(), true), "back end \"vhost.a\" serves another device");
        let PciKind::Virtio(virtio) = again.kind else { unreachable!() };
        let side = Virtio { socket: "vhost.b".to_owned(), side: Some(virtio.socket.clone()), ..virtio };
        let by_side = PciDevice { kind: PciKind::Virtio(side), ..device("b", "p", None, false) };
        assert_eq!(bus.error(by_side, true), "back end \"vhost.a\" serves another device");
        bus.add(device("b", "p", None, false), true).unwrap();
    }

    #[test]
    fn a_place_that_cannot_be_is_refused_in_known_words() {
        let mut bus = Bus::new();
        for good in [device("a", ROOT_BUS, Some((1, 0)), false), device("b", ROOT_BUS, Some((2, 1)), false)] {
            bus.add(good, false).unwrap();
        }
        let place = PciPlace { addr: Some((3, 0)), ..port("p", 1).place };
        bus.add(PciDevice { place, ..port("p", 1) }, false).unwrap();
        let at = |addr| device("x", ROOT_BUS, Some(addr), false);
        let cases = [
            (
                at((1, 0)),
                false,
                "PCI: slot 1 function 0 not available for virtio-blk-pci, in use by virtio-blk-pci",
            ),
            (
                at((0, 0)),
                false,
                "PCI: slot 0 function 0 not available for virtio-blk-pci, in use by gpex-root",
            ),
            (at((1, 1)), false, "PCI: single function device can't be populated in function 1.1"),
            (at((2, 0)), false, "PCI: 2.0 indicates single function, but 2.1 is already populated."),
            (at((32, 0)), false, "PCI: slot 32 function 0 does not exist"),
            (at((4, 8)), false, "PCI: slot 4 function 8 does not exist"),
            (at((4, 0)), true, "Bus 'pcie.0' does not support hotplugging"),
            (device("x", "q", None, false), false, "Bus 'q' not found"),
            (device("x", "a", None, false), false, "Bus 'a' not found"),
            (device("x", "", None, false), false, "Bus '' not found"),
            (device("a", ROOT_BUS, None, false), false, "Duplicate ID 'a' for device"),
            (port("q", 1), false, "Can't add chassis slot, error -16"),
            (
                device("x", "p", Some((1, 0)), false),
                true,
                "PCI: slot 1 is not valid for virtio-blk-pci, parent device only allows plugging into slot 0.",
            ),
        ];
        for (device, hot, text) in cases {
            assert_eq!(bus.error(device, hot), text);
        }
        let mut behind = port("q", 2);
        behind.place.bus = "p".to_owned();
        assert_eq!(bus.error(behind, false), "pcie-root-port can only be plugged into bus 'pcie.0'");
    }

    #[test]
    fn functions_come_before_function_0_while_the_machine_runs() {
        let mut bus = Bus::new();
        bus.add(port("p", 1), false).unwrap();
        bus.add(device("b", "p", Some((0, 1)), false), true).unwrap();
        bus.add(device("a", "p", Some((0, 0)), true), true).unwrap();
        assert_eq!(
            bus.error(device("c", "p", Some((0, 2)), false), true),
            "PCI: slot 0 function 0 already occupied by virtio-blk-pci, new func virtio-blk-pci cannot be exposed to guest."
        );
        assert!(
            matches!(bus.add(device("d", "p", None, false), true), Err(PlaceError::InUse { id, .. }) if id == "a")
        );
    }
}
