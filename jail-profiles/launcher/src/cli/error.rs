//! What can be wrong with a command line: one line each, in QEMU's words where it has them.

/// A refused option: what the user wrote, then what is wrong with it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{at}: {problem}")]
pub struct Error {
    /// The option as given.
    pub at: String,
    /// What is wrong.
    pub problem: Problem,
}

impl Error {
    /// A problem at a place of the command line.
    pub fn at(at: &str, problem: Problem) -> Self {
        Self { at: at.to_owned(), problem }
    }
}

impl Problem {
    /// A `type` that there is not.
    pub const fn type_value(value: String) -> Self {
        Self::BadValue("type", value)
    }

    /// A `qom-type` that there is not.
    pub const fn qom_type_value(value: String) -> Self {
        Self::BadValue("qom-type", value)
    }

    /// A `driver` that there is not.
    pub const fn driver_value(value: String) -> Self {
        Self::BadValue("driver", value)
    }

    /// A parameter of another kind of object.
    pub const fn foreign_parameter(_: &'static str, name: String) -> Self {
        Self::InvalidParameter(name)
    }

    /// A parameter of another kind of block node.
    pub const fn unexpected_parameter(_: &'static str, name: String) -> Self {
        Self::UnexpectedParameter(name)
    }
}

/// What is wrong with an option.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    // Shape.
    #[error("a command is missing: run, doctor, --help or --version")]
    NoCommand,
    #[error("unknown command: run, doctor, --help and --version exist")]
    UnknownCommand,
    #[error("unexpected argument")]
    UnexpectedArgument,
    #[error("invalid option")]
    InvalidOption,
    #[error("requires an argument")]
    RequiresArgument,
    // Parameters.
    #[error("Invalid parameter '{0}'")]
    InvalidParameter(String),
    #[error("Parameter '{0}' is missing")]
    MissingParameter(&'static str),
    #[error("Parameter '{0}' expects 'on' or 'off'")]
    ExpectsFlag(&'static str),
    #[error("Parameter '{0}' expects a number")]
    ExpectsNumber(&'static str),
    #[error(
        "Parameter '{0}' expects a non-negative number below 2^64, with an optional suffix k, M, G, T, P or E"
    )]
    ExpectsSize(&'static str),
    #[error("Value '{1}' is too large for parameter '{0}'")]
    TooLarge(&'static str, String),
    #[error("Value '{1}' is out of range for parameter '{0}'")]
    OutOfRange(&'static str, String),
    #[error("Parameter '{0}' expects an identifier: letters, digits, '-', '.', '_', starting with a letter")]
    ExpectsIdentifier(&'static str),
    #[error("Parameter '{0}' does not accept value '{1}'")]
    BadValue(&'static str, String),
    #[error("Parameter '{0}' is unexpected")]
    UnexpectedParameter(String),
    // Machine.
    #[error("unsupported machine type '{0}': only 'bulkhead' exists")]
    MachineType(String),
    #[error("invalid accelerator {0}: only kvm exists")]
    Accelerator(String),
    #[error("unable to find CPU model '{0}': only 'host' exists")]
    CpuModel(String),
    #[error("failed to parse UUID string: wrong format")]
    Uuid,
    // Memory.
    #[error("too large 'size' option value")]
    SizeTooLarge,
    #[error("memory size must be from {0} MiB to {1} MiB")]
    MemoryRange(u64, u64),
    #[error("invalid -m option value: missing 'maxmem' option")]
    SlotsWithoutMaxmem,
    #[error(
        "invalid value of -m option maxmem: maximum memory size ({maxmem:#x}) must be at least the initial \
         memory size ({size:#x})"
    )]
    MaxmemBelowSize { maxmem: u64, size: u64 },
    #[error(
        "invalid value of -m option maxmem: memory slots were specified but maximum memory size ({0:#x}) is \
         equal to the initial memory size ({0:#x})"
    )]
    SlotsWithoutRoom(u64),
    #[error("maxmem must be at most {0} MiB")]
    MaxmemRange(u64),
    // Memory back ends and devices.
    #[error("property '{0}' of {1} doesn't take value '{2}'")]
    ObjectValue(&'static str, &'static str, String),
    #[error("'{0}' of memory-backend-file: only share=on is available: what the guest writes is in the file")]
    PrivateFile(&'static str),
    #[error("Hugepage size must be a power of 2")]
    HugePageSize,
    #[error("'{0}' property must be set")]
    PropertyMustBeSet(&'static str),
    #[error("'{0}' property has to be at least {1:#x}")]
    LeastValue(&'static str, u64),
    #[error("'{0}' property has to be at least the page size ({1:#x})")]
    BelowPage(&'static str, u64),
    #[error("'{0}' property has to be a power of two")]
    NoPowerOfTwo(&'static str),
    #[error("'node' property has value '{0}', which exceeds the number of numa nodes: 1")]
    NoNode(u64),
    #[error("'memdev' property specifies a busy memdev: {0}")]
    BusyMemdev(String),
    #[error("can't use already busy memdev: {0}")]
    AlreadyBusyMemdev(String),
    #[error("'{0}' property has to be multiples of '{1}' ({2:#x})")]
    NotMultiple(&'static str, &'static str, u64),
    #[error("'{0}' cannot exceed the memory backend size({1:#x})")]
    AboveMemdev(&'static str, u64),
    #[error("memory devices (e.g. for memory hotplug) are not enabled, please specify the maxmem option")]
    NoMemoryDevices,
    #[error("not enough space, currently {used:#x} in use of total space for memory devices {room:#x}")]
    NoMemoryRoom { used: u64, room: u64 },
    #[error("address must be aligned to {0:#x} bytes")]
    AddressAlignment(u64),
    #[error("backend memory size must be multiple of {0:#x}")]
    MemdevAlignment(u64),
    #[error(
        "can't add memory device [{addr:#x}:{size:#x}], usable range for memory devices [{base:#x}:{len:#x}]"
    )]
    OutsideDeviceMemory { addr: u64, size: u64, base: u64, len: u64 },
    #[error("address range conflicts with memory device id='{0}'")]
    MemoryConflict(String),
    #[error(
        "could not find position in guest address space for memory device - memory fragmented due to alignments"
    )]
    MemoryFragmented,
    #[error(
        "all memory devices together have at most {0} pieces: use larger memory back ends, and fewer of them"
    )]
    TooManyPieces(u16),
    // vCPUs.
    #[error("maxcpus must be equal to or greater than smp")]
    MaxcpusBelowCpus,
    #[error("Invalid SMP CPUs {0}. The max CPUs supported by machine 'bulkhead' is {1}")]
    TooManyCpus(u64, u32),
    #[error("dies not supported by this machine's CPU topology")]
    Dies,
    #[error(
        "Invalid CPU topology: product of the hierarchy must match maxcpus: sockets ({0}) * cores ({1}) * \
         threads ({2}) != maxcpus ({3})"
    )]
    Topology(u64, u64, u64, u64),
    // Character devices.
    #[error("chardev: no id specified")]
    ChardevNoId,
    #[error("chardev: \"{0}\" missing backend")]
    ChardevNoBackend(String),
    #[error("'{0}' is not a valid char driver name: socket, stdio, file and null exist")]
    ChardevBackend(String),
    #[error("'{0}' is not a valid char driver: stdio, null, file:PATH, unix:PATH and chardev:ID exist")]
    CharDriver(String),
    #[error("Duplicate ID '{0}' for chardev")]
    DuplicateChardev(String),
    #[error("chardev: file: no filename given")]
    FileNoPath,
    #[error("one of 'path' and 'fd' is required")]
    SocketPlace,
    #[error("'wait' option is incompatible with socket in client connect mode")]
    WaitOnClient,
    #[error("'reconnect' option is incompatible with socket in server listen mode")]
    ReconnectOnServer,
    #[error("Unable to parse FD number {0}")]
    FdNumber(String),
    #[error("file descriptor {0} is used twice")]
    FdTwice(u32),
    #[error("cannot use stdio by multiple character devices")]
    StdioTwice,
    #[error("mon: is not available: there is no human monitor; use -qmp")]
    MuxedMonitor,
    #[error("this machine has one serial port")]
    OneSerialPort,
    #[error("chardev \"{0}\" not found")]
    ChardevNotFound(String),
    #[error("Device '{0}' is in use")]
    ChardevInUse(String),
    // Members of fd sets.
    #[error("{0} option is required and must be non-negative")]
    RequiredNumber(&'static str),
    #[error("fd cannot be a standard I/O stream")]
    AddFdStandardStream,
    #[error("fd is not valid or already in use")]
    AddFdInvalid,
    // ACPI tables.
    #[error("Parameter '{0}' expects {1}")]
    ExpectsValue(&'static str, &'static str),
    #[error("'-acpitable' requires one of 'data' or 'file'")]
    TableSource,
    #[error("'-acpitable' requires at least one pathname")]
    TableWithoutPath,
    #[error("at most {0} tables with {1} files together")]
    TooManyTables(usize, usize),
    // Monitors.
    #[error("mode=readline is not available: there is no human monitor; use mode=control")]
    ReadlineMonitor,
    #[error("pretty=on is not available")]
    PrettyMonitor,
    #[error("a QMP monitor needs a character device of type socket or stdio")]
    MonitorBackend,
    // Devices.
    #[error("'{0}' is not a valid device model name")]
    DeviceModel(String),
    #[error("Property '{0}.{1}' not found")]
    NoProperty(&'static str, String),
    #[error("Property '{0}.{1}' doesn't take value '{2}'")]
    PropertyValue(&'static str, &'static str, String),
    #[error("Property '{0}.{1}' can't find value '{2}'")]
    PropertyTarget(&'static str, &'static str, String),
    #[error("Property '{0}.{1}' can't take value '{2}', it's in use")]
    PropertyTaken(&'static str, &'static str, String),
    #[error("an identifier has at most {0} bytes here")]
    IdTooLong(usize),
    #[error("all devices together have {0} queues, at most {1} fit")]
    TooManyQueues(usize, usize),
    #[error("{0} must be from {1} to {2}")]
    Range(&'static str, u64, u64),
    #[error("{0} must be a power of two from {1} to {2}")]
    PowerOfTwo(&'static str, u64, u64),
    #[error("Duplicate ID '{1}' for {0}")]
    DuplicateId(&'static str, String),
    #[error("Bus '{0}' not found")]
    BusNotFound(String),
    #[error("PCI: slot {slot} function {function} not available for {driver}, in use by {by},id={id}")]
    SlotInUse { slot: u8, function: u8, driver: &'static str, by: &'static str, id: String },
    #[error("PCI: no slot/function available for {0}, all in use or reserved")]
    NoSlot(&'static str),
    #[error("PCI: slot {0} is not valid for {1}, parent device only allows plugging into slot 0.")]
    OnlySlotZero(u8, &'static str),
    #[error("PCI: {0} is plugged into pcie.0 only")]
    OnlyRootBus(&'static str),
    #[error("PCI: {0:x}.0 indicates single function, but {0:x}.{1:x} is already populated.")]
    SingleFunction(u8, u8),
    #[error("PCI: single function device can't be populated in function {0:x}.{1:x}")]
    BesideSingleFunction(u8, u8),
    #[error("Can't add chassis slot, error -16")]
    ChassisSlot,
    #[error("a VM has at most {0} devices")]
    TooManyDevices(usize),
    #[error("drive property not set")]
    DriveNotSet,
    #[error("Device needs media, but drive is empty")]
    EmptyDrive,
    #[error("Drive '{0}' is already in use by another device")]
    DriveInUse(String),
    #[error("unsupported bus type '{0}'")]
    DriveInterface(String),
    #[error("Unknown driver '{0}'")]
    DriveFormat(String),
    #[error("'node-name' must be specified for the root node")]
    NoNodeName,
    #[error("Duplicate nodes with node-name='{0}'")]
    DuplicateNode(String),
    #[error("Cannot find device='{0}' nor node-name='{0}'")]
    NodeNotFound(String),
    #[error("Only one balloon device is supported")]
    OneBalloon,
    #[error("Device '{0}' not found")]
    IoThreadNotFound(String),
    #[error("netdev property not set: there is no device without a back end")]
    NetdevNotSet,
    #[error("chardev is mandatory")]
    ChardevMandatory,
    #[error("missing chardev")]
    ChardevMissing,
    #[error("missing tag property")]
    TagMissing,
    #[error("tag property must be 36 bytes or less")]
    TagTooLong,
    #[error("chardev \"{0}\" is not a unix socket")]
    ChardevNotASocket(String),
    #[error(
        "ifname=, script=, downscript=, vnet_hdr=, helper=, queues=, fds=, and vhostfds= are invalid with fd="
    )]
    TapFdAlone,
    #[error("ifname=, script=, downscript=, vnet_hdr=, helper=, queues=, and vhostfd= are invalid with fds=")]
    TapFdsAlone,
    // Kernel.
    #[error("-initrd only allowed with -kernel option")]
    InitrdWithoutKernel,
}
