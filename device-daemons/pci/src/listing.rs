//! What is on the bus, from live configuration space, for the broker.

use bulkhead_control_api::config::PciKind;
use bulkhead_control_api::pci::{Answer, BackEnd, Bridge, Function as Described, MAX_FUNCTIONS, Region};

use crate::bus::Bus;
use crate::device::{Backed, Device};
use crate::function::{Function, Kind};
use crate::port;

/// The I/O window of a bridge whose registers are 0.
const NO_IO: port::Window = (0, 0xfff);

/// The functions that the guest may see in ascending order: those of the root bus, then those behind its ports.
fn order(bus: &Bus) -> Vec<(u16, &Function)> {
    let mut all: Vec<(u16, &Function)> = bus.functions().filter(|(_, function)| function.plugged).collect();
    let place = |index: u16| bus.get(index).map_or(0, |function| function.devfn);
    all.sort_by_key(|(_, function)| (function.parent.map(place), function.devfn));
    all
}

/// Functions from the number `from` of the whole list on.
#[must_use]
pub fn functions(bus: &Bus, from: u16) -> Answer {
    let all = order(bus);
    let number = |index: u16| all.iter().position(|(i, _)| *i == index).and_then(|at| u16::try_from(at).ok());
    let rest = all.get(usize::from(from)..).unwrap_or_default();
    let functions = rest
        .iter()
        .take(MAX_FUNCTIONS)
        .map(|(index, function)| describe(bus, *index, function, function.parent.and_then(number)))
        .collect();
    Answer::Functions { functions, more: rest.len() > MAX_FUNCTIONS }
}

fn describe(bus: &Bus, index: u16, function: &Function, parent: Option<u16>) -> Described {
    let space = &function.space;
    let is_port = matches!(function.kind, Kind::Port(_));
    let regions = function.bars.iter().map(|bar| Region {
        bar: bar.index,
        address: bus.address(index, bar.index),
        size: bar.size,
        wide: bar.wide,
        prefetch: bar.prefetch,
    });
    let bridge = is_port.then(|| {
        let (primary, secondary, subordinate) = port::buses(space);
        let [memory, prefetchable] = port::windows(space);
        Bridge { primary, secondary, subordinate, io: NO_IO, memory, prefetchable }
    });
    Described {
        bus: bus.bus_number(index),
        parent,
        slot: function.devfn >> 3,
        function: function.devfn & 7,
        qdev_id: function.config.id.clone(),
        driver: function.config.driver.clone(),
        class: space.u16(0x0a),
        vendor: space.u16(0x00),
        device: space.u16(0x02),
        subsystem: (!is_port).then(|| (space.u16(0x2c), space.u16(0x2e))),
        regions: regions.collect(),
        bridge,
        back_end: match &function.config.kind {
            PciKind::Virtio(virtio) => Some(BackEnd {
                socket: virtio.socket.clone(),
                connected: function.device_ref().is_some_and(Backed::is_connected),
                memory: function.device_ref().and_then(Device::sizes).map(|(sizes, _)| sizes),
            }),
            PciKind::RootPort { .. } => None,
        },
    }
}
