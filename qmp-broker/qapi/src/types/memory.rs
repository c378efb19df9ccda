//! The memory devices of `qapi/machine.json` and `qapi/misc.json`.

use crate::schema::{Described, qapi_enum, qapi_struct};

qapi_struct! {
    /// A DIMM.
    PCDIMMDeviceInfo {
        /// Its id.
        "id" id: Option<String>,
        /// Guest physical address.
        "addr" addr: i64,
        /// Bytes.
        "size" size: i64,
        /// Its slot.
        "slot" slot: i64,
        /// NUMA node.
        "node" node: i64,
        /// Path of its memory back end.
        "memdev" memdev: String,
        /// It came while the machine ran.
        "hotplugged" hotplugged: bool,
        /// It can be taken out.
        "hotpluggable" hotpluggable: bool,
    }
}

qapi_struct! {
    /// A virtio-pmem device.
    VirtioPMEMDeviceInfo {
        /// Its id.
        "id" id: Option<String>,
        /// Guest physical address.
        "memaddr" memaddr: i64,
        /// Bytes.
        "size" size: i64,
        /// Path of its memory back end.
        "memdev" memdev: String,
    }
}

qapi_struct! {
    /// A virtio-mem device.
    VirtioMEMDeviceInfo {
        /// Its id.
        "id" id: Option<String>,
        /// Guest physical address.
        "memaddr" memaddr: i64,
        /// Bytes that the guest is to plug.
        "requested-size" requested_size: i64,
        /// Bytes that it has plugged.
        "size" size: i64,
        /// Bytes that it could plug.
        "max-size" max_size: i64,
        /// Bytes of a block.
        "block-size" block_size: i64,
        /// NUMA node.
        "node" node: i64,
        /// Path of its memory back end.
        "memdev" memdev: String,
    }
}

qapi_enum! {
    /// Kind of a memory device.
    MemoryDeviceInfoKind {
        /// A DIMM.
        "dimm" Dimm,
        /// A non-volatile DIMM.
        "nvdimm" Nvdimm,
        /// virtio-pmem.
        "virtio-pmem" VirtioPmem,
        /// virtio-mem.
        "virtio-mem" VirtioMem,
    }
}

qapi_struct! {
    /// Wraps a DIMM.
    PCDIMMDeviceInfoWrapper {
        /// It.
        "data" data: PCDIMMDeviceInfo,
    }
}

qapi_struct! {
    /// Wraps a virtio-pmem device.
    VirtioPMEMDeviceInfoWrapper {
        /// It.
        "data" data: VirtioPMEMDeviceInfo,
    }
}

qapi_struct! {
    /// Wraps a virtio-mem device.
    VirtioMEMDeviceInfoWrapper {
        /// It.
        "data" data: VirtioMEMDeviceInfo,
    }
}

qapi_struct! {
    /// A memory device.
    MemoryDeviceInfo {
        /// Its kind.
        "type" kind: MemoryDeviceInfoKind,
    } by "type" {
        "dimm" => PCDIMMDeviceInfoWrapper,
        "nvdimm" => PCDIMMDeviceInfoWrapper,
        "virtio-pmem" => VirtioPMEMDeviceInfoWrapper,
        "virtio-mem" => VirtioMEMDeviceInfoWrapper,
    }
}

qapi_struct! {
    /// Data of `MEMORY_DEVICE_SIZE_CHANGE`.
    MemoryDeviceSizeChangeData {
        /// The device's id.
        "id" id: Option<String>,
        /// Bytes that are plugged now.
        "size" size: i64,
    }
}
