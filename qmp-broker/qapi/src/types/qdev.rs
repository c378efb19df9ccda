//! `qapi/qdev.json`.

use crate::schema::{Described, qapi_struct};

qapi_struct! {
    /// Arguments of `device_add`; the others are properties of the device.
    DeviceAddArg {
        /// The device model.
        "driver" driver: String,
        /// The bus that it is plugged into.
        "bus" bus: Option<String>,
        /// Its id.
        "id" id: Option<String>,
    }
}

qapi_struct! {
    /// Arguments of `device_del`.
    DeviceDelArg {
        /// Id, or path, of the device.
        "id" id: String,
    }
}

qapi_struct! {
    /// Data of `DEVICE_DELETED`.
    DeviceDeletedData {
        /// The device's id.
        "device" device: Option<String>,
        /// Its path.
        "path" path: String,
    }
}

qapi_struct! {
    /// Data of `__org.bulkhead_DEVICE_UNPLUG_REFUSED`.
    DeviceUnplugRefusedData {
        /// The device's id.
        "device" device: Option<String>,
        /// Its path.
        "path" path: String,
    }
}

qapi_struct! {
    /// Data of `__org.bulkhead_DEVICE_BACK_END`.
    DeviceBackEndData {
        /// The device's id.
        "device" device: Option<String>,
        /// Its path.
        "path" path: String,
        /// Whether its back end is there.
        "connected" connected: bool,
    }
}
