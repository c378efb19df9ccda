//! The PCI part of `qapi/misc.json`, a module of its own later.

use serde::{Deserialize, Serialize};

use crate::schema::{Described, Object, Type, qapi_struct};

qapi_struct! {
    /// A window of guest addresses, both ends inclusive.
    PciMemoryRange {
        /// First address.
        "base" base: i64,
        /// Last address; below the first one if the window is closed.
        "limit" limit: i64,
    }
}

qapi_struct! {
    /// A base address register.
    PciMemoryRegion {
        /// Its number.
        "bar" bar: i64,
        /// `io` or `memory`.
        "type" kind: String,
        /// Where the guest has put it, -1 while it has not.
        "address" address: i64,
        /// Size in bytes.
        "size" size: i64,
        /// Whether it is prefetchable, if it is memory.
        "prefetch" prefetch: Option<bool>,
        /// Whether it is 64 bits wide, if it is memory.
        "mem_type_64" mem_type_64: Option<bool>,
    }
}

qapi_struct! {
    /// What a bridge's registers say.
    PciBusInfo {
        /// Primary bus number.
        "number" number: i64,
        /// Secondary bus number.
        "secondary" secondary: i64,
        /// Subordinate bus number.
        "subordinate" subordinate: i64,
        /// I/O window.
        "io_range" io_range: PciMemoryRange,
        /// Memory window.
        "memory_range" memory_range: PciMemoryRange,
        /// Prefetchable memory window.
        "prefetchable_range" prefetchable_range: PciMemoryRange,
    }
}

/// The devices behind a bridge, which may be bridges.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PciDevices(pub Vec<PciDeviceInfo>);

impl Described for PciDevices {
    const TYPE: Type = {
        fn device() -> &'static Object {
            PciDeviceInfo::DESCRIPTION
        }
        Type::Array(&Type::Recursive(device))
    };
}

qapi_struct! {
    /// A bridge.
    PciBridgeInfo {
        /// Its registers.
        "bus" bus: PciBusInfo,
        /// The devices behind it, once the guest has given it a bus number.
        "devices" devices: Option<PciDevices>,
    }
}

qapi_struct! {
    /// Class of a device.
    PciDeviceClass {
        /// In words.
        "desc" desc: Option<String>,
        /// Base class and subclass.
        "class" class: i64,
    }
}

qapi_struct! {
    /// Who made a device.
    PciDeviceId {
        /// Device id.
        "device" device: i64,
        /// Vendor id.
        "vendor" vendor: i64,
        /// Subsystem id.
        "subsystem" subsystem: Option<i64>,
        /// Subsystem vendor id.
        "subsystem-vendor" subsystem_vendor: Option<i64>,
    }
}

qapi_struct! {
    /// A function on the bus.
    PciDeviceInfo {
        /// Bus number.
        "bus" bus: i64,
        /// Device number.
        "slot" slot: i64,
        /// Function number.
        "function" function: i64,
        /// Its class.
        "class_info" class_info: PciDeviceClass,
        /// Who made it.
        "id" id: PciDeviceId,
        /// Interrupt line, if it has an interrupt pin.
        "irq" irq: Option<i64>,
        /// Interrupt pin, 0 for none.
        "irq_pin" irq_pin: i64,
        /// Its id on the command line, empty without.
        "qdev_id" qdev_id: String,
        /// Of a bridge.
        "pci_bridge" pci_bridge: Option<PciBridgeInfo>,
        /// Its base address registers.
        "regions" regions: Vec<PciMemoryRegion>,
    }
}

qapi_struct! {
    /// A bus without a bridge before it.
    PciInfo {
        /// Its number.
        "bus" bus: i64,
        /// The devices on it.
        "devices" devices: Vec<PciDeviceInfo>,
    }
}
