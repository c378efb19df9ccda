//! `qapi/misc.json`.

use crate::schema::{Described, qapi_enum, qapi_struct};

qapi_struct! {
    /// Name of the guest.
    NameInfo {
        /// As given with `-name`.
        "name" name: Option<String>,
    }
}

qapi_struct! {
    /// UUID of the guest.
    UuidInfo {
        /// In hexadecimal with dashes, all zero if none was given.
        "UUID" uuid: String,
    }
}

qapi_struct! {
    /// Memory of the guest, in bytes.
    MemoryInfo {
        /// What it has from the start (`-m`).
        "base-memory" base_memory: i64,
        /// What was plugged in; left out by machines that cannot have such memory.
        "plugged-memory" plugged_memory: Option<i64>,
    }
}

qapi_struct! {
    /// KVM acceleration.
    KvmInfo {
        /// Whether it is active.
        "enabled" enabled: bool,
        /// Whether it is built in.
        "present" present: bool,
    }
}

qapi_struct! {
    /// Arguments of `getfd`.
    GetfdArg {
        /// The descriptor's name from now on.
        "fdname" fdname: String,
    }
}

qapi_struct! {
    /// Arguments of `closefd`.
    ClosefdArg {
        /// The descriptor's name.
        "fdname" fdname: String,
    }
}

qapi_struct! {
    /// Arguments of `add_client`.
    AddClientArg {
        /// `spice`, `vnc`, or the id of a character device.
        "protocol" protocol: String,
        /// Name of the connection's descriptor.
        "fdname" fdname: String,
        /// The client need not authenticate itself (`spice`, `vnc`).
        "skipauth" skipauth: Option<bool>,
        /// The connection begins with TLS (`spice`).
        "tls" tls: Option<bool>,
    }
}

qapi_struct! {
    /// Arguments of `add-fd`.
    AddFdArg {
        /// The set; without it a new one.
        "fdset-id" fdset_id: Option<i64>,
        /// What the client wants to remember of it.
        "opaque" opaque: Option<String>,
    }
}

qapi_struct! {
    /// A descriptor that was added to a set.
    AddfdInfo {
        /// The set.
        "fdset-id" fdset_id: i64,
        /// The descriptor's number in `remove-fd`.
        "fd" fd: i64,
    }
}

qapi_struct! {
    /// Arguments of `remove-fd`.
    RemoveFdArg {
        /// The set.
        "fdset-id" fdset_id: i64,
        /// The descriptor; without it all of the set.
        "fd" fd: Option<i64>,
    }
}

qapi_struct! {
    /// A descriptor of a set.
    FdsetFdInfo {
        /// Its number in `remove-fd`.
        "fd" fd: i64,
        /// As given when it was added.
        "opaque" opaque: Option<String>,
    }
}

qapi_struct! {
    /// A set of descriptors.
    FdsetInfo {
        /// Its id.
        "fdset-id" fdset_id: i64,
        /// Its descriptors.
        "fds" fds: Vec<FdsetFdInfo>,
    }
}

qapi_enum! {
    /// Type of a parameter of the command line.
    CommandLineParameterType {
        /// Any text.
        "string" String,
        /// `on` or `off`.
        "boolean" Boolean,
        /// An unsigned integer.
        "number" Number,
        /// A number of bytes with an optional suffix.
        "size" Size,
    }
}

qapi_struct! {
    /// A parameter of the command line.
    CommandLineParameterInfo {
        /// Its name.
        "name" name: String,
        /// Its type.
        "type" kind: CommandLineParameterType,
        /// What it is for.
        "help" help: Option<String>,
        /// Its value if it is not given.
        "default" default: Option<String>,
    }
}

qapi_struct! {
    /// A group of parameters of the command line.
    CommandLineOptionInfo {
        /// Its name.
        "option" option: String,
        /// The parameters.
        "parameters" parameters: Vec<CommandLineParameterInfo>,
    }
}

qapi_struct! {
    /// Arguments of `query-command-line-options`.
    QueryCommandLineOptionsArg {
        /// The group; without it all.
        "option" option: Option<String>,
    }
}

qapi_struct! {
    /// Arguments of `human-monitor-command`.
    HumanMonitorCommandArg {
        /// What a person would type.
        "command-line" command_line: String,
        /// The vCPU that it is about, if it is about one.
        "cpu-index" cpu_index: Option<i64>,
    }
}

qapi_struct! {
    /// Arguments of `change`.
    ChangeArg {
        /// `vnc`, or a block device.
        "device" device: String,
        /// `password`, or where to listen, or the new medium.
        "target" target: String,
        /// The password, or the medium's format.
        "arg" arg: Option<String>,
    }
}

qapi_struct! {
    /// Arguments of `xen-set-global-dirty-log`.
    XenSetGlobalDirtyLogArg {
        /// On or off.
        "enable" enable: bool,
    }
}

qapi_struct! {
    /// Arguments of `xen-load-devices-state`.
    XenLoadDevicesStateArg {
        /// The file with the state.
        "filename" filename: String,
    }
}

qapi_struct! {
    /// Arguments of `memsave`.
    MemsaveArg {
        /// The first address, as the vCPU sees it; those from 2^63 on are negative.
        "val" val: i64,
        /// Bytes.
        "size" size: i64,
        /// The file.
        "filename" filename: String,
        /// The vCPU, 0 without.
        "cpu-index" cpu_index: Option<i64>,
    }
}

qapi_struct! {
    /// Arguments of `pmemsave`.
    PmemsaveArg {
        /// The first guest physical address; those from 2^63 on are negative.
        "val" val: i64,
        /// Bytes.
        "size" size: i64,
        /// The file.
        "filename" filename: String,
    }
}

qapi_struct! {
    /// Data of `__org.bulkhead_DUMP_PROGRESS`.
    DumpProgressData {
        /// The file.
        "filename" filename: String,
        /// Bytes that are there, holes included.
        "saved" saved: i64,
        /// Bytes that it is to have.
        "size" size: i64,
    }
}
