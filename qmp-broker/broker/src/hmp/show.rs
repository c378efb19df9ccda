//! Prints what QMP commands returned, in QEMU's words.

use bulkhead_qapi::types::char::ChardevInfo;
use bulkhead_qapi::types::control::VersionInfo;
use bulkhead_qapi::types::machine::CpuInfoFast;
use bulkhead_qapi::types::misc::{KvmInfo, NameInfo, UuidInfo};
use bulkhead_qapi::types::run_state::{RunState, StatusInfo};
use serde::de::DeserializeOwned;
use serde_json::Value;

/// Of the type that the command returns; the words of an error otherwise.
fn with<T: DeserializeOwned>(value: Value, print: impl FnOnce(T) -> String) -> String {
    serde_json::from_value(value).map_or_else(|error| format!("Error: {error}\n"), print)
}

/// The command returned nothing.
pub fn nothing(_: Value, _: i64) -> String {
    String::new()
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

/// `info name`.
pub fn name(value: Value, _: i64) -> String {
    with(value, |info: NameInfo| info.name.map_or_else(String::new, |name| format!("{name}\n")))
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
