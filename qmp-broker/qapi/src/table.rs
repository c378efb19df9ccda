//! The one table of commands, and the table of events.

use serde_json::Value;

use crate::schema::{Described, EMPTY, Object, Type};
use crate::types::{balloon, char, control, introspect, machine, memory, misc, pci, qdev, qom, run_state};

/// What a client may do, and what it must be allowed to do for a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Of a command: every client may. Of a client: nothing else.
    Any,
    /// Reads state: monitors and operators.
    Monitor,
    /// Connects itself to a character device: consoles and operators.
    Console,
    /// Changes state: operators only.
    Operator,
}

impl Role {
    /// Whether a client of this role may execute a command.
    #[must_use]
    pub fn may(self, command: &Command) -> bool {
        command.role == Self::Any || command.role == self || self == Self::Operator
    }

    /// Whether a client of this role gets events. A console gets none: they tell the state of the machine,
    /// for which it may not ask either.
    #[must_use]
    pub const fn gets_events(self) -> bool {
        matches!(self, Self::Monitor | Self::Operator)
    }
}

/// What carries out a command. The broker matches on it, so a command cannot be listed without
/// being implemented.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "each is the command of its name")]
pub enum Handler {
    QmpCapabilities,
    QueryVersion,
    QueryCommands,
    QueryEvents,
    QueryQmpSchema,
    QueryStatus,
    QueryName,
    QueryUuid,
    QueryMemorySizeSummary,
    QueryMemoryDevices,
    QueryKvm,
    QueryCpusFast,
    QueryChardev,
    Stop,
    Cont,
    SystemReset,
    SystemPowerdown,
    Quit,
    InjectNmi,
    Getfd,
    Closefd,
    AddFd,
    RemoveFd,
    QueryFdsets,
    AddClient,
    QueryCommandLineOptions,
    XExitPreconfig,
    HumanMonitorCommand,
    Change,
    SystemWakeup,
    XenLoadDevicesState,
    XenSetGlobalDirtyLog,
    QueryPci,
    QueryBalloon,
    Balloon,
    DeviceAdd,
    DeviceDel,
    QomList,
    QomGet,
    QomSet,
    ObjectAdd,
    ObjectDel,
    QueryIothreads,
    ChardevAdd,
    ChardevChange,
    ChardevRemove,
    Memsave,
    Pmemsave,
}

/// A command.
#[derive(Debug)]
pub struct Command {
    /// Its name on the wire.
    pub name: &'static str,
    /// What it does, for the documentation.
    pub doc: &'static str,
    /// Its arguments.
    pub args: &'static Object,
    /// What it returns; `None` is an empty object.
    pub returns: Option<Type>,
    /// May be executed out of band.
    pub allow_oob: bool,
    /// May be executed in run state `preconfig`.
    pub allow_preconfig: bool,
    /// Its handler checks the arguments, of which the schema names some only (`'gen': false`).
    pub open: bool,
    /// Is deprecated.
    pub deprecated: bool,
    /// Who may execute it.
    pub role: Role,
    /// What carries it out.
    pub handler: Handler,
}

impl Command {
    /// Whether it changes something of the machine or of what clients share. What `human-monitor-command`
    /// does is done, and judged, by the command that its line stands for.
    #[must_use]
    pub const fn changes_state(&self) -> bool {
        matches!(self.role, Role::Console | Role::Operator)
            && !matches!(self.handler, Handler::HumanMonitorCommand | Handler::QomList | Handler::QomGet)
    }

    const fn new(name: &'static str, handler: Handler, role: Role, doc: &'static str) -> Self {
        Self {
            name,
            doc,
            args: &EMPTY,
            returns: None,
            allow_oob: false,
            allow_preconfig: false,
            open: false,
            deprecated: false,
            role,
            handler,
        }
    }

    const fn args(mut self, args: &'static Object) -> Self {
        self.args = args;
        self
    }

    const fn returns<T: Described>(mut self) -> Self {
        self.returns = Some(T::TYPE);
        self
    }

    const fn preconfig(mut self) -> Self {
        self.allow_preconfig = true;
        self
    }

    const fn open(mut self) -> Self {
        self.open = true;
        self
    }

    const fn deprecated(mut self) -> Self {
        self.deprecated = true;
        self
    }
}

/// All commands.
pub static COMMANDS: &[Command] = &[
    // control
    Command::new("qmp_capabilities", Handler::QmpCapabilities, Role::Any, "Ends negotiation.")
        .args(control::QmpCapabilitiesArg::DESCRIPTION)
        .preconfig(),
    Command::new("query-version", Handler::QueryVersion, Role::Any, "The version served.")
        .returns::<control::VersionInfo>()
        .preconfig(),
    Command::new(
        "query-commands",
        Handler::QueryCommands,
        Role::Any,
        "The commands that the client may use.",
    )
    .returns::<Vec<control::CommandInfo>>()
    .preconfig(),
    Command::new("query-events", Handler::QueryEvents, Role::Any, "The events that the client gets.")
        .returns::<Vec<control::EventInfo>>()
        .preconfig()
        .deprecated(),
    Command::new("quit", Handler::Quit, Role::Operator, "Ends the machine and all its processes.")
        .preconfig(),
    // introspect
    Command::new(
        "query-qmp-schema",
        Handler::QueryQmpSchema,
        Role::Any,
        "The schema of what the client may use.",
    )
    .returns::<Vec<introspect::SchemaInfo>>()
    .preconfig(),
    // run-state
    Command::new("query-status", Handler::QueryStatus, Role::Monitor, "The run state.")
        .returns::<run_state::StatusInfo>()
        .preconfig(),
    // misc
    Command::new("query-name", Handler::QueryName, Role::Monitor, "The guest's name.")
        .returns::<misc::NameInfo>()
        .preconfig(),
    Command::new("query-uuid", Handler::QueryUuid, Role::Monitor, "The guest's UUID.")
        .returns::<misc::UuidInfo>()
        .preconfig(),
    Command::new("query-kvm", Handler::QueryKvm, Role::Monitor, "Whether KVM is used: always.")
        .returns::<misc::KvmInfo>(),
    Command::new(
        "query-memory-size-summary",
        Handler::QueryMemorySizeSummary,
        Role::Monitor,
        "How much memory the guest has from the start, and how much was plugged in.",
    )
    .returns::<misc::MemoryInfo>(),
    Command::new(
        "query-memory-devices",
        Handler::QueryMemoryDevices,
        Role::Monitor,
        "The memory devices, and what the guest has of them.",
    )
    .returns::<Vec<memory::MemoryDeviceInfo>>(),
    Command::new("stop", Handler::Stop, Role::Operator, "Stops all vCPUs."),
    Command::new("cont", Handler::Cont, Role::Operator, "Lets the vCPUs run on."),
    Command::new("system_reset", Handler::SystemReset, Role::Operator, "Resets the machine."),
    Command::new("system_powerdown", Handler::SystemPowerdown, Role::Operator, "Presses the power button."),
    Command::new("inject-nmi", Handler::InjectNmi, Role::Operator, "Injects an NMI into every vCPU."),
    Command::new("getfd", Handler::Getfd, Role::Console, "Names a descriptor that the client sent.")
        .args(misc::GetfdArg::DESCRIPTION),
    Command::new("closefd", Handler::Closefd, Role::Console, "Closes a named descriptor.")
        .args(misc::ClosefdArg::DESCRIPTION),
    Command::new(
        "add-fd",
        Handler::AddFd,
        Role::Operator,
        "Adds a descriptor that the client sent to a set.",
    )
    .args(misc::AddFdArg::DESCRIPTION)
    .returns::<misc::AddfdInfo>(),
    Command::new("remove-fd", Handler::RemoveFd, Role::Operator, "Closes descriptors of a set.")
        .args(misc::RemoveFdArg::DESCRIPTION),
    Command::new("query-fdsets", Handler::QueryFdsets, Role::Monitor, "The sets of descriptors.")
        .returns::<Vec<misc::FdsetInfo>>(),
    Command::new("add_client", Handler::AddClient, Role::Console, "Gives a named descriptor to a server.")
        .args(misc::AddClientArg::DESCRIPTION),
    Command::new(
        "query-command-line-options",
        Handler::QueryCommandLineOptions,
        Role::Monitor,
        "The parameters of the command line.",
    )
    .args(misc::QueryCommandLineOptionsArg::DESCRIPTION)
    .returns::<Vec<misc::CommandLineOptionInfo>>()
    .preconfig(),
    Command::new(
        "x-exit-preconfig",
        Handler::XExitPreconfig,
        Role::Operator,
        "Leaves run state `preconfig`: the machine starts if it is to.",
    )
    .preconfig(),
    Command::new(
        "human-monitor-command",
        Handler::HumanMonitorCommand,
        Role::Operator,
        "Executes a line that a person would type.",
    )
    .args(misc::HumanMonitorCommandArg::DESCRIPTION)
    .returns::<String>(),
    Command::new("change", Handler::Change, Role::Operator, "Changes a medium, or VNC. There is neither.")
        .args(misc::ChangeArg::DESCRIPTION)
        .deprecated(),
    Command::new(
        "system_wakeup",
        Handler::SystemWakeup,
        Role::Operator,
        "Wakes a suspended guest. None can be suspended.",
    ),
    Command::new(
        "xen-load-devices-state",
        Handler::XenLoadDevicesState,
        Role::Operator,
        "Loads the state of devices from a file. No file is within reach.",
    )
    .args(misc::XenLoadDevicesStateArg::DESCRIPTION),
    Command::new(
        "xen-set-global-dirty-log",
        Handler::XenSetGlobalDirtyLog,
        Role::Operator,
        "Makes KVM note which pages of RAM the guest writes, or no longer.",
    )
    .args(misc::XenSetGlobalDirtyLogArg::DESCRIPTION),
    Command::new(
        "query-pci",
        Handler::QueryPci,
        Role::Monitor,
        "The PCI devices, from live configuration space.",
    )
    .returns::<Vec<pci::PciInfo>>(),
    Command::new("memsave", Handler::Memsave, Role::Operator, "Saves memory as a vCPU sees it to a file.")
        .args(misc::MemsaveArg::DESCRIPTION),
    Command::new("pmemsave", Handler::Pmemsave, Role::Operator, "Saves physical memory to a file.")
        .args(misc::PmemsaveArg::DESCRIPTION),
    Command::new("query-balloon", Handler::QueryBalloon, Role::Monitor, "How much memory the guest has.")
        .returns::<balloon::BalloonInfo>(),
    Command::new(
        "balloon",
        Handler::Balloon,
        Role::Operator,
        "Asks the guest to give memory back, or take it.",
    )
    .args(balloon::BalloonArg::DESCRIPTION),
    Command::new(
        "query-iothreads",
        Handler::QueryIothreads,
        Role::Monitor,
        "The I/O threads that devices use, with their host threads.",
    )
    .returns::<Vec<qom::IOThreadInfo>>()
    .preconfig(),
    // qdev
    Command::new("device_add", Handler::DeviceAdd, Role::Operator, "Plugs a device in.")
        .args(qdev::DeviceAddArg::DESCRIPTION)
        .open(),
    Command::new("device_del", Handler::DeviceDel, Role::Operator, "Asks the guest to give a device up.")
        .args(qdev::DeviceDelArg::DESCRIPTION),
    // qom
    Command::new("qom-list", Handler::QomList, Role::Operator, "The properties of an object.")
        .args(qom::QomListArg::DESCRIPTION)
        .returns::<Vec<qom::ObjectPropertyInfo>>()
        .preconfig(),
    Command::new("qom-get", Handler::QomGet, Role::Operator, "The value of a property.")
        .args(qom::QomGetArg::DESCRIPTION)
        .returns::<Value>()
        .preconfig(),
    Command::new("qom-set", Handler::QomSet, Role::Operator, "Changes a property.")
        .args(qom::QomSetArg::DESCRIPTION)
        .preconfig(),
    Command::new("object-add", Handler::ObjectAdd, Role::Operator, "Makes an object: a memory back end.")
        .args(qom::ObjectAddArg::DESCRIPTION)
        .open(),
    Command::new("object-del", Handler::ObjectDel, Role::Operator, "Removes an object.")
        .args(qom::ObjectDelArg::DESCRIPTION),
    // machine
    Command::new("query-cpus-fast", Handler::QueryCpusFast, Role::Monitor, "The vCPUs and their threads.")
        .returns::<Vec<machine::CpuInfoFast>>(),
    // char
    Command::new("query-chardev", Handler::QueryChardev, Role::Monitor, "The character devices.")
        .returns::<Vec<char::ChardevInfo>>()
        .preconfig(),
    Command::new("chardev-add", Handler::ChardevAdd, Role::Operator, "Adds a character device.")
        .args(char::ChardevAddArg::DESCRIPTION)
        .returns::<char::ChardevReturn>(),
    Command::new("chardev-change", Handler::ChardevChange, Role::Operator, "Changes one that nothing uses.")
        .args(char::ChardevAddArg::DESCRIPTION)
        .returns::<char::ChardevReturn>(),
    Command::new("chardev-remove", Handler::ChardevRemove, Role::Operator, "Removes a character device.")
        .args(char::ChardevRemoveArg::DESCRIPTION),
];

/// Finds a command by name.
#[must_use]
pub fn command(name: &str) -> Option<&'static Command> {
    COMMANDS.iter().find(|command| command.name == name)
}

/// The commands that a client of a role may execute.
pub fn commands(role: Role) -> impl Iterator<Item = &'static Command> {
    COMMANDS.iter().filter(move |command| role.may(command))
}

/// The events that a client of a role gets.
#[must_use]
pub fn events(role: Role) -> &'static [&'static Event] {
    if role.gets_events() { EVENTS } else { &[] }
}

/// An event.
#[derive(Debug)]
pub struct Event {
    /// Its name on the wire.
    pub name: &'static str,
    /// When it is sent, for the documentation.
    pub doc: &'static str,
    /// Its data.
    pub data: &'static Object,
}

/// `SHUTDOWN`.
pub static SHUTDOWN: Event =
    Event { name: "SHUTDOWN", doc: "The machine shuts down.", data: run_state::ShutdownData::DESCRIPTION };
/// `POWERDOWN`.
pub static POWERDOWN: Event =
    Event { name: "POWERDOWN", doc: "The power button was pressed by `system_powerdown`.", data: &EMPTY };
/// `RESET`.
pub static RESET: Event =
    Event { name: "RESET", doc: "The machine was reset.", data: run_state::ResetData::DESCRIPTION };
/// `STOP`.
pub static STOP: Event = Event { name: "STOP", doc: "The vCPUs stopped.", data: &EMPTY };
/// `RESUME`.
pub static RESUME: Event = Event { name: "RESUME", doc: "The vCPUs run.", data: &EMPTY };
/// `GUEST_PANICKED`.
pub static GUEST_PANICKED: Event = Event {
    name: "GUEST_PANICKED",
    doc: "The guest panicked.",
    data: run_state::GuestPanickedData::DESCRIPTION,
};

/// `BALLOON_CHANGE`.
pub static BALLOON_CHANGE: Event = Event {
    name: "BALLOON_CHANGE",
    doc: "The guest has more memory, or less; at most once a second.",
    data: balloon::BalloonChangeData::DESCRIPTION,
};

/// `MEMORY_DEVICE_SIZE_CHANGE`.
pub static MEMORY_DEVICE_SIZE_CHANGE: Event = Event {
    name: "MEMORY_DEVICE_SIZE_CHANGE",
    doc: "The guest has plugged or unplugged memory; at most once a second for each device.",
    data: memory::MemoryDeviceSizeChangeData::DESCRIPTION,
};

/// `DEVICE_DELETED`.
pub static DEVICE_DELETED: Event = Event {
    name: "DEVICE_DELETED",
    doc: "A device is gone: the guest has given it up.",
    data: qdev::DeviceDeletedData::DESCRIPTION,
};
/// QEMU 5.1 has no event for it; its later ones have other names.
pub static DEVICE_UNPLUG_REFUSED: Event = Event {
    name: "__org.bulkhead_DEVICE_UNPLUG_REFUSED",
    doc: "The guest keeps a device that `device_del` asked for. Not of QEMU.",
    data: qdev::DeviceUnplugRefusedData::DESCRIPTION,
};
/// QEMU has no such event.
pub static DEVICE_BACK_END: Event = Event {
    name: "__org.bulkhead_DEVICE_BACK_END",
    doc: "The back end of a device is away, or there again. Not of QEMU.",
    data: qdev::DeviceBackEndData::DESCRIPTION,
};
/// QEMU has no such event: its `memsave` stops everything else until it is done.
pub static DUMP_PROGRESS: Event = Event {
    name: "__org.bulkhead_DUMP_PROGRESS",
    doc: "How far `memsave` or `pmemsave` is, once a second. Not of QEMU.",
    data: misc::DumpProgressData::DESCRIPTION,
};

/// All events.
pub static EVENTS: &[&Event] = &[
    &SHUTDOWN,
    &POWERDOWN,
    &RESET,
    &STOP,
    &RESUME,
    &GUEST_PANICKED,
    &BALLOON_CHANGE,
    &MEMORY_DEVICE_SIZE_CHANGE,
    &DEVICE_DELETED,
    &DEVICE_UNPLUG_REFUSED,
    &DEVICE_BACK_END,
    &DUMP_PROGRESS,
];
