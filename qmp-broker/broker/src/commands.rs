//! What each command does: at once, or through core or console.

use bulkhead_control_api::{config, core};
use bulkhead_qapi::request::{Call, Mode};
use bulkhead_qapi::table::{self, Handler, Role};
use bulkhead_qapi::types::control::{
    CommandInfo, EventInfo, QMPCapability, QmpCapabilitiesArg, VersionInfo, VersionTriple,
};
use bulkhead_qapi::types::machine::{CpuInfoArch, CpuInfoFast, CpuInstanceProperties, SysEmuTarget};
use bulkhead_qapi::types::misc::{
    AddClientArg, HumanMonitorCommandArg, KvmInfo, MemsaveArg, NameInfo, PmemsaveArg,
    QueryCommandLineOptionsArg, UuidInfo, XenSetGlobalDirtyLogArg,
};
use bulkhead_qapi::types::run_state::{RunState, StatusInfo};
use bulkhead_qapi::{Error, introspect};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

use crate::descriptors::Op;
use crate::{absent, devices, options};

/// A reply: the value of `return`, or an error.
pub type Reply = Result<Value, Error>;

/// What a call needs.
#[derive(Debug)]
pub enum Step {
    /// Nothing more: the reply.
    Reply(Reply),
    /// Core's answer.
    Core(core::Op),
    /// The console's press of the power button.
    PowerButton,
    /// The console's character devices.
    Chardevs,
    /// The descriptors that clients passed.
    Descriptors(Op),
    /// Pci, the balloon, and what the broker keeps of devices.
    Devices(devices::Op),
    /// A named descriptor for a character device.
    AddClient(AddClientArg),
    /// Memory as a vCPU sees it, to a file.
    Memsave(MemsaveArg),
    /// Physical memory, to a file.
    Pmemsave(PmemsaveArg),
    /// The end of run state `preconfig`.
    ExitPreconfig,
    /// What a line for people stands for.
    Human(HumanMonitorCommandArg),
    /// The end of the VM, after an empty reply.
    Quit,
}

/// What the broker knows itself.
#[derive(Debug)]
pub struct Known<'a> {
    /// Its configuration.
    pub config: &'a config::Broker,
    /// The run state as core reported it last.
    pub state: core::RunState,
    /// Whether the run state is `preconfig` instead.
    pub preconfig: bool,
    /// The client's role.
    pub role: Role,
}

/// Version of the server: QEMU's whose schema is served, and ours.
#[must_use]
pub fn version() -> VersionInfo {
    let package = format!("bulkhead {}", env!("CARGO_PKG_VERSION"));
    VersionInfo { qemu: VersionTriple { major: 5, minor: 1, micro: 0 }, package }
}

/// The greeting of every client.
#[must_use]
pub fn greeting() -> Value {
    json!({ "QMP": { "version": version(), "capabilities": [QMPCapability::Oob] } })
}

/// Whether a command's answer or effect depends on the run state, as far as the broker knows it.
#[must_use]
pub const fn depends_on_state(handler: Handler) -> bool {
    matches!(handler, Handler::QueryStatus | Handler::SystemPowerdown | Handler::XenLoadDevicesState)
}

/// Begins a call. Negotiation takes effect in `mode`.
pub fn begin(call: Call, known: &Known<'_>, mode: &mut Mode) -> Step {
    match call.command.handler {
        Handler::QmpCapabilities => Step::Reply(negotiate(call.args, mode)),
        Handler::Quit => Step::Quit,
        Handler::Stop => Step::Core(core::Op::Stop),
        Handler::Cont => Step::Core(core::Op::Cont),
        Handler::SystemReset => Step::Core(core::Op::Reset),
        Handler::InjectNmi => Step::Core(core::Op::InjectNmi),
        Handler::QueryCpusFast => Step::Core(core::Op::Cpus),
        Handler::SystemPowerdown => Step::PowerButton,
        Handler::QueryChardev => Step::Chardevs,
        Handler::Getfd => with(call.args, |args| Step::Descriptors(Op::Getfd(args))),
        Handler::Closefd => with(call.args, |args| Step::Descriptors(Op::Closefd(args))),
        Handler::AddFd => with(call.args, |args| Step::Descriptors(Op::AddFd(args))),
        Handler::RemoveFd => with(call.args, |args| Step::Descriptors(Op::RemoveFd(args))),
        Handler::QueryFdsets => Step::Descriptors(Op::QueryFdsets),
        Handler::AddClient => with(call.args, Step::AddClient),
        Handler::QueryPci => Step::Devices(devices::Op::Pci),
        Handler::QueryMemoryDevices => Step::Devices(devices::Op::MemoryDevices),
        Handler::QueryMemorySizeSummary => Step::Devices(devices::Op::MemorySizes),
        Handler::QueryBalloon => Step::Devices(devices::Op::QueryBalloon),
        Handler::Balloon => with(call.args, |args| Step::Devices(devices::Op::Balloon(args))),
        Handler::DeviceAdd => Step::Devices(devices::Op::DeviceAdd(call.args)),
        Handler::DeviceDel => with(call.args, |args| Step::Devices(devices::Op::DeviceDel(args))),
        Handler::QomList => with(call.args, |args| Step::Devices(devices::Op::QomList(args))),
        Handler::QomGet => with(call.args, |args| Step::Devices(devices::Op::QomGet(args))),
        Handler::QomSet => with(call.args, |args| Step::Devices(devices::Op::QomSet(args))),
        Handler::ObjectAdd => Step::Devices(devices::Op::ObjectAdd(call.args)),
        Handler::ObjectDel => with(call.args, |args| Step::Devices(devices::Op::ObjectDel(args))),
        Handler::QueryIothreads => Step::Devices(devices::Op::IoThreads),
        Handler::ChardevAdd => Step::Devices(devices::Op::ChardevAdd(call.args)),
        Handler::ChardevChange => Step::Devices(devices::Op::ChardevChange(call.args)),
        Handler::ChardevRemove => with(call.args, |args| Step::Devices(devices::Op::ChardevRemove(args))),
        Handler::Memsave => with(call.args, Step::Memsave),
        Handler::Pmemsave => with(call.args, Step::Pmemsave),
        Handler::XExitPreconfig => Step::ExitPreconfig,
        Handler::HumanMonitorCommand => with(call.args, Step::Human),
        Handler::QueryCommandLineOptions => with(call.args, |args: QueryCommandLineOptionsArg| {
            Step::Reply(options::query(&known.config.options, args.option.as_deref()))
        }),
        Handler::Change => with(call.args, |args| Step::Reply(Err(absent::change(&args)))),
        Handler::SystemWakeup => Step::Reply(Err(absent::wakeup())),
        Handler::XenSetGlobalDirtyLog => {
            with(call.args, |args: XenSetGlobalDirtyLogArg| Step::Core(core::Op::LogDirty(args.enable)))
        }
        Handler::XenLoadDevicesState => {
            with(call.args, |args| Step::Reply(Err(absent::load_devices(&args, known.state))))
        }
        query => Step::Reply(answer(query, known)),
    }
}

/// The step that a command's arguments make.
fn with<A: DeserializeOwned>(args: Map<String, Value>, step: impl FnOnce(A) -> Step) -> Step {
    parse(args).map_or_else(|error| Step::Reply(Err(error)), step)
}

/// The arguments of a command, which have been checked against the schema.
pub(crate) fn parse<A: DeserializeOwned>(args: Map<String, Value>) -> Result<A, Error> {
    serde_json::from_value(Value::Object(args)).map_err(|error| Error::generic(error.to_string()))
}

fn answer(query: Handler, known: &Known<'_>) -> Reply {
    match query {
        Handler::QueryVersion => reply(version()),
        Handler::QueryCommands => {
            let info = |command: &table::Command| CommandInfo { name: command.name.to_owned() };
            reply(table::commands(known.role).map(info).collect::<Vec<_>>())
        }
        Handler::QueryEvents => {
            let info = |event: &&table::Event| EventInfo { name: event.name.to_owned() };
            reply(table::events(known.role).iter().map(info).collect::<Vec<_>>())
        }
        Handler::QueryQmpSchema => Ok(introspect::schema(known.role)),
        Handler::QueryStatus => {
            let running = known.state == core::RunState::Running;
            let status = if known.preconfig { RunState::Preconfig } else { run_state(known.state) };
            reply(StatusInfo { running, singlestep: false, status })
        }
        Handler::QueryName => reply(NameInfo { name: known.config.name.clone() }),
        Handler::QueryUuid => reply(UuidInfo { uuid: uuid(known.config.uuid) }),
        Handler::QueryKvm => reply(KvmInfo { enabled: true, present: true }),
        Handler::QmpCapabilities
        | Handler::Quit
        | Handler::Stop
        | Handler::Cont
        | Handler::SystemReset
        | Handler::InjectNmi
        | Handler::QueryCpusFast
        | Handler::SystemPowerdown
        | Handler::QueryChardev
        | Handler::Getfd
        | Handler::Closefd
        | Handler::AddFd
        | Handler::RemoveFd
        | Handler::QueryFdsets
        | Handler::AddClient
        | Handler::QueryPci
        | Handler::QueryMemoryDevices
        | Handler::QueryMemorySizeSummary
        | Handler::QueryBalloon
        | Handler::Balloon
        | Handler::DeviceAdd
        | Handler::DeviceDel
        | Handler::QomList
        | Handler::QomGet
        | Handler::QomSet
        | Handler::ObjectAdd
        | Handler::ObjectDel
        | Handler::QueryIothreads
        | Handler::ChardevAdd
        | Handler::ChardevChange
        | Handler::ChardevRemove
        | Handler::Memsave
        | Handler::Pmemsave
        | Handler::XExitPreconfig
        | Handler::HumanMonitorCommand
        | Handler::QueryCommandLineOptions
        | Handler::Change
        | Handler::SystemWakeup
        | Handler::XenLoadDevicesState
        | Handler::XenSetGlobalDirtyLog => Err(Error::generic("not a query that the broker answers itself")),
    }
}

/// The reply that carries a value.
///
/// # Errors
/// The value is none of JSON.
pub fn reply(value: impl Serialize) -> Reply {
    serde_json::to_value(value).map_err(|error| Error::generic(error.to_string()))
}

fn negotiate(args: Map<String, Value>, mode: &mut Mode) -> Reply {
    if mode.negotiated {
        return Err(Error::command_not_found(
            "Capabilities negotiation is already complete, command ignored",
        ));
    }
    let args: QmpCapabilitiesArg = parse(args)?;
    *mode =
        Mode { negotiated: true, oob: args.enable.is_some_and(|list| list.contains(&QMPCapability::Oob)) };
    Ok(json!({}))
}

/// The run state by QEMU's name.
#[must_use]
pub const fn run_state(state: core::RunState) -> RunState {
    match state {
        core::RunState::Prelaunch => RunState::Prelaunch,
        core::RunState::Running => RunState::Running,
        core::RunState::Paused => RunState::Paused,
        core::RunState::Shutdown => RunState::Shutdown,
        core::RunState::InternalError => RunState::InternalError,
        core::RunState::GuestPanicked => RunState::GuestPanicked,
    }
}

fn uuid(bytes: [u8; 16]) -> String {
    let mut text = String::with_capacity(36);
    for (index, byte) in bytes.iter().enumerate() {
        if matches!(index, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        text.push_str(&format!("{byte:02x}"));
    }
    text
}

/// The reply that core's answer makes.
///
/// # Errors
/// Core refused, or answered something else than was asked.
pub fn core_reply(op: core::Op, result: Result<core::Answer, core::Refusal>) -> Reply {
    match (op, result) {
        (_, Err(refusal)) => Err(Error::generic(refusal.to_string())),
        (core::Op::Cpus, Ok(core::Answer::Cpus(cpus))) => {
            reply((0..).zip(&cpus).map(|(index, cpu)| cpu_info(index, cpu)).collect::<Vec<_>>())
        }
        (core::Op::Cpus, Ok(_)) | (_, Ok(core::Answer::Cpus(_))) => {
            Err(Error::generic("core answered something else"))
        }
        (_, Ok(_)) => Ok(json!({})),
    }
}

fn cpu_info(index: i64, cpu: &core::Cpu) -> CpuInfoFast {
    CpuInfoFast {
        cpu_index: index,
        qom_path: format!("/machine/unattached/device[{index}]"),
        thread_id: cpu.thread_id.into(),
        props: Some(CpuInstanceProperties {
            node_id: None,
            socket_id: Some(cpu.socket.into()),
            die_id: None,
            core_id: Some(cpu.core.into()),
            thread_id: Some(cpu.thread.into()),
        }),
        arch: CpuInfoArch::X86,
        target: SysEmuTarget::X86_64,
    }
}
