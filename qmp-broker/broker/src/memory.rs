//! Memory devices: what they are, what they have, and what they are to have.

use std::rc::Rc;

use bulkhead_control_api::config::MemoryDeviceInfo;
use bulkhead_control_api::pci::{Answer, Function, Op, Refusal};
use bulkhead_control_api::side::MemorySizes;
use bulkhead_qapi::types::memory::{
    MemoryDeviceInfoKind, MemoryDeviceSizeChangeData, VirtioMEMDeviceInfo, VirtioPMEMDeviceInfo,
};
use bulkhead_qapi::types::misc::MemoryInfo;
use bulkhead_qapi::{Error, table};
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use crate::commands::{Reply, reply};
use crate::hub::{Hub, away};
use crate::pci::{DAEMON, GLANCE};
use crate::peer::NoAnswer;
use crate::throttle::Throttle;

/// Devices whose events are held back each for itself.
const MAX_DEVICES: usize = 256;
/// The property that says how much the guest is to plug.
pub const REQUESTED: &str = "requested-size";

/// A memory device that is there.
pub struct Present<'a> {
    /// What it is.
    pub info: &'a MemoryDeviceInfo,
    /// On the bus.
    pub function: &'a Function,
    /// What its daemon has said last.
    pub sizes: MemorySizes,
}

/// The memory device behind a function.
pub fn of<'a>(function: &'a Function, devices: &'a [MemoryDeviceInfo]) -> Option<Present<'a>> {
    let end = function.back_end.as_ref()?;
    let info = devices.iter().find(|device| device.socket == end.socket)?;
    let unknown =
        MemorySizes { plugged: if info.block_size.is_some() { 0 } else { info.size }, requested: 0 };
    Some(Present { info, function, sizes: end.memory.unwrap_or(unknown) })
}

/// The path of a memory back end.
pub fn path_of(memdev: &str) -> String {
    format!("/objects/{memdev}")
}

fn int(bytes: u64) -> i64 {
    bytes.cast_signed()
}

fn shown(device: &Present<'_>) -> Value {
    let Present { info, function, sizes } = device;
    let id = Some(function.qdev_id.clone()).filter(|id| !id.is_empty());
    let (memaddr, memdev) = (int(info.addr), path_of(&info.memdev));
    let (kind, data) = match info.block_size {
        Some(block_size) => {
            let data = VirtioMEMDeviceInfo {
                id,
                memaddr,
                requested_size: int(sizes.requested),
                size: int(sizes.plugged),
                max_size: int(info.size),
                block_size: int(block_size),
                node: info.node.into(),
                memdev,
            };
            (MemoryDeviceInfoKind::VirtioMem, serde_json::to_value(data))
        }
        None => {
            let data = VirtioPMEMDeviceInfo { id, memaddr, size: int(info.size), memdev };
            (MemoryDeviceInfoKind::VirtioPmem, serde_json::to_value(data))
        }
    };
    json!({ "type": kind, "data": data.unwrap_or_default() })
}

impl Hub {
    fn present<'a>(&'a self, functions: &'a [Function]) -> Vec<Present<'a>> {
        let devices = &self.config.memory_devices;
        let mut all: Vec<_> = functions.iter().filter_map(|function| of(function, devices)).collect();
        all.sort_by_key(|device| device.info.addr);
        all
    }

    /// All functions, once the daemons of memory devices have told their sizes: one that is started anew is waited for.
    pub(crate) async fn functions_with_sizes(&self) -> Result<Vec<Function>, Error> {
        let devices = &self.config.memory_devices;
        let end = Instant::now() + DAEMON;
        loop {
            let functions = self.functions().await?;
            let is_silent = |function: &Function| {
                let back_end = function.back_end.as_ref();
                back_end.is_some_and(|back_end| back_end.memory.is_none()) && of(function, devices).is_some()
            };
            if !functions.iter().any(is_silent) {
                return Ok(functions);
            }
            if Instant::now() >= end {
                return Err(away("A memory device's daemon", NoAnswer::Late(DAEMON)));
            }
            sleep(GLANCE).await;
        }
    }

    pub(crate) async fn query_memory_devices(&self) -> Reply {
        let functions = self.functions_with_sizes().await?;
        reply(self.present(&functions).iter().map(shown).collect::<Vec<_>>())
    }

    pub(crate) async fn query_memory_size_summary(&self) -> Reply {
        let has_devices = !self.config.memory_devices.is_empty();
        let functions = if has_devices { self.functions_with_sizes().await? } else { Vec::new() };
        let plugged =
            self.present(&functions).iter().map(|device| device.sizes.plugged).fold(0, u64::saturating_add);
        reply(MemoryInfo { base_memory: int(self.config.ram), plugged_memory: Some(int(plugged)) })
    }

    /// `qom-set` of [`REQUESTED`].
    pub(crate) async fn request_memory(&self, function: &Function, value: &Value) -> Reply {
        let device = of(function, &self.config.memory_devices);
        let info = device.map(|device| device.info);
        let (info, block) =
            info.and_then(|info| Some((info, info.block_size?))).ok_or_else(crate::pci::unexpected)?;
        let bytes = requested(value, block, info.size)?;
        let id = function.qdev_id.clone();
        match self.ask_pci(Op::RequestMemory { id, bytes }).await? {
            Ok(Answer::Done) => Ok(json!({})),
            Err(Refusal::BackEnd(text) | Refusal::NoRoom(text)) => Err(Error::generic(text)),
            Err(Refusal::NoDevice) => {
                Err(Error::device_not_found(format!("Device '{}' not found", function.qdev_id)))
            }
            _ => Err(crate::pci::unexpected()),
        }
    }

    /// The guest has plugged or unplugged memory.
    pub(crate) fn memory_size_changed(self: &Rc<Self>, id: String, plugged: u64) {
        let throttle = {
            let mut all = self.size_changes.borrow_mut();
            // More devices than there can be are pci's invention: they share one.
            let key =
                if all.len() < MAX_DEVICES || all.contains_key(&id) { id.clone() } else { String::new() };
            Rc::clone(all.entry(key).or_insert_with(|| Rc::new(Throttle::default())))
        };
        let id = Some(id).filter(|id| !id.is_empty());
        let data = MemoryDeviceSizeChangeData { id, size: int(plugged) };
        let data = serde_json::to_value(data).unwrap_or_default();
        self.emit_throttled(throttle, &table::MEMORY_DEVICE_SIZE_CHANGE, data);
    }
}

/// The size that a client asks for. QEMU takes a negative number as a large one.
fn requested(value: &Value, block: u64, most: u64) -> Result<u64, Error> {
    let number = value.as_u64().or_else(|| value.as_i64().map(i64::cast_unsigned));
    let bytes = number.ok_or_else(|| Error::generic(format!("Parameter '{REQUESTED}' expects uint64")))?;
    if !bytes.is_multiple_of(block) {
        return Err(Error::generic(format!(
            "'{REQUESTED}' has to be multiples of 'block-size' ({block:#x})"
        )));
    }
    if bytes > most {
        return Err(Error::generic(format!(
            "'{REQUESTED}' cannot exceed the memory backend size({most:#x})"
        )));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_multiples_of_the_block_within_the_region() {
        let text = |value: Value| requested(&value, 2 << 20, 64 << 20).map_err(|error| error.desc);
        assert_eq!(text(json!(0)), Ok(0));
        assert_eq!(text(json!(64 << 20)), Ok(64 << 20));
        for (value, error) in [
            (json!(3 << 20), "'requested-size' has to be multiples of 'block-size' (0x200000)"),
            (json!(-1), "'requested-size' has to be multiples of 'block-size' (0x200000)"),
            (json!(66 << 20), "'requested-size' cannot exceed the memory backend size(0x4000000)"),
            (json!(-2 << 20), "'requested-size' cannot exceed the memory backend size(0x4000000)"),
            (json!("64M"), "Parameter 'requested-size' expects uint64"),
            (json!(1.5), "Parameter 'requested-size' expects uint64"),
        ] {
            assert_eq!(text(value).unwrap_err(), error);
        }
    }
}
