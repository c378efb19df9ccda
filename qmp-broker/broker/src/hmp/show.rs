//! Prints what QMP commands returned, in QEMU's words.

use bulkhead_qapi::types::balloon::BalloonInfo;
use bulkhead_qapi::types::char::ChardevInfo;
use bulkhead_qapi::types::control::VersionInfo;
use bulkhead_qapi::types::machine::CpuInfoFast;
use bulkhead_qapi::types::misc::{KvmInfo, MemoryInfo, NameInfo, UuidInfo};
use bulkhead_qapi::types::pci::{PciBridgeInfo, PciDeviceInfo, PciInfo, PciMemoryRange};
use bulkhead_qapi::types::qom::IOThreadInfo;
use bulkhead_qapi::types::run_state::{RunState, StatusInfo};
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::pci::MAX_DEPTH;

/// Of the type that the command returns; the words of an error otherwise.
fn with<T: DeserializeOwned>(value: Value, print: impl FnOnce(T) -> String) -> String {
    serde_json::from_value(value).map_or_else(|error| format!("Error: {error}\n"), print)
}

/// The command returned nothing.
pub fn nothing(_: Value, _: i64) -> String {
    String::new()
}

/// `info balloon`.
pub fn balloon(value: Value, _: i64) -> String {
    with(value, |info: BalloonInfo| format!("balloon: actual={}\n", info.actual >> 20))
}

/// `info chardev`.
pub fn chardevs(value: Value, _: i64) -> String {
    with(value, |chardevs: Vec<ChardevInfo>| {
        let line = |chardev: &ChardevInfo| format!("{}: filename={}\n", chardev.label, chardev.filename);
        chardevs.iter().map(line).collect()
    })
}

/// `info cpus`.
pub fn cpus(value: Value, chosen: i64) -> String {
    with(value, |cpus: Vec<CpuInfoFast>| {
        let line = |cpu: &CpuInfoFast| {
            let mark = if cpu.cpu_index == chosen { '*' } else { ' ' };
            format!("{mark} CPU #{}: thread_id={}\n", cpu.cpu_index, cpu.thread_id)
        };
        cpus.iter().map(line).collect()
    })
}

/// `info iothreads`.
pub fn iothreads(value: Value, _: i64) -> String {
    with(value, |threads: Vec<IOThreadInfo>| {
        let lines = |thread: &IOThreadInfo| {
            let IOThreadInfo { id, thread_id, poll_max_ns, poll_grow, poll_shrink } = thread;
            format!(
                "{id}:\n  thread_id={thread_id}\n  poll-max-ns={poll_max_ns}\n  poll-grow={poll_grow}\n  poll-shrink={poll_shrink}\n"
            )
        };
        threads.iter().map(lines).collect()
    })
}

/// `info kvm`.
pub fn kvm(value: Value, _: i64) -> String {
    with(value, |kvm: KvmInfo| {
        let state = match (kvm.present, kvm.enabled) {
            (false, _) => "not compiled",
            (true, false) => "disabled",
            (true, true) => "enabled",
        };
        format!("kvm support: {state}\n")
    })
}

/// `info memory-devices`: of DIMMs there are none.
pub fn memory_devices(value: Value, _: i64) -> String {
    let device = |device: &Value| {
        let data = |name: &str| device["data"].get(name).cloned().unwrap_or_default();
        let text = |name: &str| data(name).as_str().unwrap_or_default().to_owned();
        let kind = device["type"].as_str().unwrap_or_default();
        let mut lines = format!("Memory device [{kind}]: \"{}\"\n", text("id"));
        lines += &format!("  memaddr: {:#x}\n", data("memaddr").as_i64().unwrap_or_default());
        for name in ["node", "requested-size", "size", "max-size", "block-size"] {
            if let Some(number) = data(name).as_i64() {
                lines += &format!("  {name}: {number}\n");
            }
        }
        lines + &format!("  memdev: {}\n", text("memdev"))
    };
    value.as_array().map_or_else(String::new, |devices| devices.iter().map(device).collect())
}

/// `info memory_size_summary`.
pub fn memory(value: Value, _: i64) -> String {
    with(value, |info: MemoryInfo| {
        let plugged = info.plugged_memory.map(|bytes| format!("plugged memory: {bytes}\n"));
        format!("base memory: {}\n{}", info.base_memory, plugged.unwrap_or_default())
    })
}

/// `info name`.
pub fn name(value: Value, _: i64) -> String {
    with(value, |info: NameInfo| info.name.map_or_else(String::new, |name| format!("{name}\n")))
}

/// `info pci`.
pub fn pci(value: Value, _: i64) -> String {
    with(value, |buses: Vec<PciInfo>| {
        buses.iter().flat_map(|bus| &bus.devices).map(|device| pci_device(device, 0)).collect()
    })
}

/// A device and those behind it, down to a depth that a reply may have.
fn pci_device(device: &PciDeviceInfo, depth: u32) -> String {
    let class = match &device.class_info.desc {
        Some(desc) => desc.clone(),
        None => format!("Class {:04}", device.class_info.class),
    };
    let mut text =
        format!("  Bus {:2}, device {:3}, function {}:\n", device.bus, device.slot, device.function);
    text += &format!("    {class}: PCI device {:04x}:{:04x}\n", device.id.vendor, device.id.device);
    if let (Some(vendor), Some(id)) = (device.id.subsystem_vendor, device.id.subsystem) {
        text += &format!("      PCI subsystem {vendor:04x}:{id:04x}\n");
    }
    if let Some(PciBridgeInfo { bus, .. }) = &device.pci_bridge {
        text += &format!("      BUS {}.\n", bus.number);
        text +=
            &format!("      secondary bus {}.\n      subordinate bus {}.\n", bus.secondary, bus.subordinate);
        let window = |range: &PciMemoryRange, width| {
            format!("[0x{:0width$x}, 0x{:0width$x}]\n", range.base, range.limit)
        };
        text += &format!("      IO range {}", window(&bus.io_range, 4));
        text += &format!("      memory range {}", window(&bus.memory_range, 8));
        text += &format!("      prefetchable memory range {}", window(&bus.prefetchable_range, 8));
    }
    for region in &device.regions {
        let bits = if region.mem_type_64 == Some(true) { 64 } else { 32 };
        let prefetch = if region.prefetch == Some(true) { " prefetchable" } else { "" };
        let last = region.address.wrapping_add(region.size).wrapping_sub(1);
        text += &format!("      BAR{}: {bits} bit{prefetch} memory at ", region.bar);
        text += &format!("0x{:08x} [0x{last:08x}].\n", region.address);
    }
    text += &format!("      id \"{}\"\n", device.qdev_id);
    let behind = device.pci_bridge.as_ref().and_then(|bridge| bridge.devices.as_ref());
    for device in behind.iter().flat_map(|devices| &devices.0).filter(|_| depth < MAX_DEPTH) {
        text += &pci_device(device, depth + 1);
    }
    text
}

/// `info status`.
pub fn status(value: Value, _: i64) -> String {
    with(value, |status: StatusInfo| match (status.running, status.status) {
        (true, _) => "VM status: running\n".to_owned(),
        (false, RunState::Paused) => "VM status: paused\n".to_owned(),
        (false, state) => {
            let state = serde_json::to_value(state).unwrap_or_default();
            format!("VM status: paused ({})\n", state.as_str().unwrap_or_default())
        }
    })
}

/// `info uuid`.
pub fn uuid(value: Value, _: i64) -> String {
    with(value, |info: UuidInfo| format!("{}\n", info.uuid))
}

/// `info version`.
pub fn version(value: Value, _: i64) -> String {
    with(value, |VersionInfo { qemu, package }: VersionInfo| {
        format!("{}.{}.{}{package}\n", qemu.major, qemu.minor, qemu.micro)
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn memory_devices_in_qemus_lines() {
        let mem = json!({ "type": "virtio-mem", "data": {
            "id": "v", "memaddr": 1u64 << 32, "requested-size": 128, "size": 0, "max-size": 512, "block-size": 2,
            "node": 0, "memdev": "/objects/m",
        } });
        let pmem =
            json!({ "type": "virtio-pmem", "data": { "memaddr": 4096, "size": 64, "memdev": "/objects/n" } });
        let text = "Memory device [virtio-mem]: \"v\"\n  memaddr: 0x100000000\n  node: 0\n  requested-size: 128\n  size: 0\n  \
                    max-size: 512\n  block-size: 2\n  memdev: /objects/m\nMemory device [virtio-pmem]: \"\"\n  \
                    memaddr: 0x1000\n  size: 64\n  memdev: /objects/n\n";
        assert_eq!(memory_devices(json!([mem, pmem]), 0), text);
    }
}
