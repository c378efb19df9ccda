//! The option table: parsing, `-h`, error messages and the manual page come from it.
//!
//! Names, groups and parameter types are QEMU's: `query-command-line-options` answers from it.

use bulkhead_control_api::config::{OptionGroup, Parameter, ParameterType};

use super::devices::{BLOCKDEV, DEVICE, DRIVE, NETDEV, OBJECT};
use super::kinds::Kinds;

/// Identity of an option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Opt {
    Help,
    Version,
    Machine,
    Accel,
    EnableKvm,
    Cpu,
    Smp,
    Memory,
    Name,
    Uuid,
    Kernel,
    Initrd,
    Append,
    Serial,
    Chardev,
    Monitor,
    Qmp,
    Stopped,
    Preconfig,
    NoReboot,
    NoShutdown,
    NoDefaults,
    NoUserConfig,
    Display,
    NoGraphic,
    PidFile,
    AddFd,
    AcpiTable,
    Device,
    Drive,
    BlockDev,
    NetDev,
    Object,
}

/// An option.
#[derive(Debug)]
pub struct Spec {
    /// Identity.
    pub opt: Opt,
    /// Names without dashes, the usual one first.
    pub names: &'static [&'static str],
    /// Its value.
    pub takes: Takes,
    /// Syntax of the value, empty if it takes none.
    pub syntax: &'static str,
    /// One or a few sentences for `-h` and the manual.
    pub help: &'static str,
}

/// The value of an option.
#[derive(Clone, Copy, Debug)]
pub enum Takes {
    /// None.
    Nothing,
    /// Text that is taken as it is.
    Text,
    /// `key=value,...`
    Params(&'static Group),
    /// The same, of a group of which `query-command-line-options` names no parameter.
    Unlisted(&'static Group),
    /// The same, where one key decides about the others.
    Kinds(&'static Kinds),
}

/// A group of parameters, under QEMU's name.
#[derive(Debug)]
pub struct Group {
    /// QEMU's name for it.
    pub name: &'static str,
    /// The parameter whose name may be left out if it comes first.
    pub implied: Option<&'static str>,
    /// The parameters.
    pub params: &'static [Param],
}

/// A parameter.
#[derive(Debug)]
pub struct Param {
    /// Its name.
    pub name: &'static str,
    /// Its type.
    pub kind: Kind,
    /// What it is for.
    pub help: &'static str,
}

/// Type of a parameter (QAPI `CommandLineParameterType`, plus the identifier of an object).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The object's identifier, which QEMU does not list as a parameter.
    Id,
    /// Any text.
    Text,
    /// `on` or `off`.
    Flag,
    /// An unsigned integer.
    Number,
    /// The same, taken as a signed one: its upper half is negative.
    Signed,
    /// A number of bytes with an optional suffix.
    Size,
}

/// The option of that name (without dashes).
pub fn find(name: &str) -> Option<&'static Spec> {
    OPTIONS.iter().find(|spec| spec.names.contains(&name))
}

/// The groups that options have, as `query-command-line-options` shows them.
pub fn groups() -> Vec<OptionGroup> {
    let groups = OPTIONS.iter().filter_map(|spec| match spec.takes {
        Takes::Params(group) => Some((group.name, group.params)),
        Takes::Unlisted(group) => Some((group.name, &[][..])),
        Takes::Kinds(kinds) if kinds.listed => Some((kinds.name, &[][..])),
        Takes::Nothing | Takes::Text | Takes::Kinds(_) => None,
    });
    groups
        .map(|(name, params)| OptionGroup {
            name: name.to_owned(),
            parameters: params.iter().filter_map(Param::described).collect(),
        })
        .collect()
}

impl Param {
    fn described(&self) -> Option<Parameter> {
        let kind = match self.kind {
            Kind::Id => return None,
            Kind::Text => ParameterType::Text,
            Kind::Flag => ParameterType::Flag,
            Kind::Number | Kind::Signed => ParameterType::Number,
            Kind::Size => ParameterType::Size,
        };
        Some(Parameter { name: self.name.to_owned(), kind, help: self.help.to_owned() })
    }
}

/// A parameter.
pub const fn param(name: &'static str, kind: Kind, help: &'static str) -> Param {
    Param { name, kind, help }
}

static MACHINE: Group = Group {
    name: "machine",
    implied: Some("type"),
    params: &[
        param("type", Kind::Text, "machine type: bulkhead"),
        param("accel", Kind::Text, "accelerator: kvm"),
    ],
};

static ACCEL: Group = Group {
    name: "accel",
    implied: Some("accel"),
    params: &[param("accel", Kind::Text, "accelerator: kvm")],
};

static SMP: Group = Group {
    name: "smp-opts",
    implied: Some("cpus"),
    params: &[
        param("cpus", Kind::Number, "number of vCPUs, 1 to 64"),
        param("sockets", Kind::Number, "number of sockets"),
        param("dies", Kind::Number, "dies per socket: 1"),
        param("cores", Kind::Number, "cores per socket"),
        param("threads", Kind::Number, "threads per core"),
        param("maxcpus", Kind::Number, "places in the topology; those beyond cpus stay empty"),
    ],
};

static MEMORY: Group = Group {
    name: "memory",
    implied: Some("size"),
    params: &[
        param("size", Kind::Size, "initial memory; a plain number is MiB"),
        param("slots", Kind::Number, "slots for DIMMs, which are empty: there are no DIMMs yet"),
        param("maxmem", Kind::Size, "memory with all memory devices; a plain number is bytes"),
    ],
};

static NAME: Group = Group {
    name: "name",
    implied: Some("guest"),
    params: &[
        param("guest", Kind::Text, "name of the VM, as query-name answers it"),
        param("debug-threads", Kind::Flag, "accepted; threads always bear their names"),
    ],
};

/// Parameters of a character device.
pub static CHARDEV: Group = Group {
    name: "chardev",
    implied: Some("backend"),
    params: &[
        param("backend", Kind::Text, "socket, stdio, file or null"),
        param("id", Kind::Id, "its identifier"),
        param("path", Kind::Text, "socket, file: path"),
        param("fd", Kind::Text, "socket: number of an inherited socket instead of a path"),
        param("server", Kind::Flag, "socket: listen (default off: connect)"),
        param("wait", Kind::Flag, "socket: start the VM when a client has connected (default on)"),
        param(
            "reconnect",
            Kind::Number,
            "socket: seconds between attempts to connect; only for sockets of back ends, which are always tried again",
        ),
        param("append", Kind::Flag, "file: keep what is there (default off: truncate)"),
        param("signal", Kind::Flag, "stdio: control keys send signals to the VM's processes (default on)"),
    ],
};

/// Parameters of a monitor.
pub static MON: Group = Group {
    name: "mon",
    implied: Some("chardev"),
    params: &[
        param("id", Kind::Id, "its identifier"),
        param("mode", Kind::Text, "control: QMP"),
        param("chardev", Kind::Text, "identifier of its character device"),
        param("pretty", Kind::Flag, "off"),
        param(
            "role",
            Kind::Text,
            "operator (default): everything; monitor: queries and events; console: add_client",
        ),
        param("uid", Kind::Number, "user that may connect; may be given several times (default: every user)"),
        param(
            "gid",
            Kind::Number,
            "group that may connect; may be given several times (default: every group)",
        ),
    ],
};

/// Parameters of a member of an fd set.
pub static ADD_FD: Group = Group {
    name: "add-fd",
    implied: None,
    params: &[
        param(
            "fd",
            Kind::Signed,
            "number of an inherited descriptor, 3 or above; a duplicate of it becomes the member",
        ),
        param("set", Kind::Signed, "number of the set"),
        param("opaque", Kind::Text, "text that query-fdsets shows"),
    ],
};

/// Parameters of an ACPI table. Its numbers are read where they are used, in another way than those of other options.
pub static ACPI: Group = Group {
    name: "acpi",
    implied: Some("data"),
    params: &[
        param("sig", Kind::Text, "signature, 4 characters"),
        param("rev", Kind::Text, "revision, a number of 8 bits"),
        param("oem_id", Kind::Text, "who made the machine, 6 characters"),
        param("oem_table_id", Kind::Text, "which machine, 8 characters"),
        param("oem_rev", Kind::Text, "its revision, a number of 32 bits"),
        param("asl_compiler_id", Kind::Text, "who made the table, 4 characters"),
        param("asl_compiler_rev", Kind::Text, "the revision of that, a number of 32 bits"),
        param("file", Kind::Text, "files with the table, its header included"),
        param("data", Kind::Text, "files with the table but for its header, which is made"),
    ],
};

const fn flag(opt: Opt, names: &'static [&'static str], help: &'static str) -> Spec {
    Spec { opt, names, takes: Takes::Nothing, syntax: "", help }
}

const fn text(opt: Opt, names: &'static [&'static str], syntax: &'static str, help: &'static str) -> Spec {
    Spec { opt, names, takes: Takes::Text, syntax, help }
}

const fn group(
    opt: Opt,
    names: &'static [&'static str],
    group: &'static Group,
    syntax: &'static str,
    help: &'static str,
) -> Spec {
    Spec { opt, names, takes: Takes::Params(group), syntax, help }
}

const fn kinds(
    opt: Opt,
    names: &'static [&'static str],
    kinds: &'static Kinds,
    syntax: &'static str,
    help: &'static str,
) -> Spec {
    Spec { opt, names, takes: Takes::Kinds(kinds), syntax, help }
}

/// All options in the order of the manual.
pub static OPTIONS: &[Spec] = &[
    flag(Opt::Help, &["h", "help"], "Prints the options and exits."),
    flag(Opt::Version, &["version"], "Prints the version and exits."),
    group(
        Opt::Machine,
        &["machine", "M"],
        &MACHINE,
        "[type=]bulkhead[,accel=kvm]",
        "Selects the machine; there is one.",
    ),
    group(Opt::Accel, &["accel"], &ACCEL, "[accel=]kvm", "Selects the accelerator; there is one."),
    flag(Opt::EnableKvm, &["enable-kvm"], "The same as -accel kvm."),
    text(Opt::Cpu, &["cpu"], "host", "Selects the CPU model; there is one: what KVM offers of the host's."),
    group(
        Opt::Smp,
        &["smp"],
        &SMP,
        "[[cpus=]n][,sockets=n][,dies=1][,cores=n][,threads=n][,maxcpus=n]",
        "Sets the number of vCPUs (default 1) and their topology. What is left out is computed, sockets before \
         cores before threads.",
    ),
    group(
        Opt::Memory,
        &["m"],
        &MEMORY,
        "[size=]megs[,slots=n,maxmem=size]",
        "Sets the guest's memory (default 128 MiB), and with maxmem how much memory devices may add. Suffixes are b, k, M, G, T, P \
         and E.",
    ),
    group(Opt::Name, &["name"], &NAME, "[guest=]string[,debug-threads=on|off]", "Names the VM."),
    text(
        Opt::Uuid,
        &["uuid"],
        "uuid",
        "Sets the UUID of the VM (default all zero), which SMBIOS tells the guest.",
    ),
    text(
        Opt::Kernel,
        &["kernel"],
        "file",
        "Boots this kernel: a bzImage or an ELF file with a PVH note. Without it the native guest boots.",
    ),
    text(Opt::Initrd, &["initrd"], "file", "Gives the kernel this initial RAM disk."),
    text(Opt::Append, &["append"], "cmdline", "Gives the kernel, or the native guest, this command line."),
    Spec {
        opt: Opt::AcpiTable,
        names: &["acpitable"],
        takes: Takes::Unlisted(&ACPI),
        syntax: "[sig=text][,rev=n][,oem_id=text][,oem_table_id=text][,oem_rev=n][,asl_compiler_id=text]\
                 [,asl_compiler_rev=n],file=path[:path]... | [...,][data=]path[:path]...",
        help: "Adds an ACPI table, whose contents are those of its files, one after the other. Fields of its header that are \
               given replace those that it has; length and checksum are made right. A table has at most 65,535 bytes.",
    },
    text(
        Opt::Serial,
        &["serial"],
        "stdio|null|none|file:path|unix:path[,server=on|off][,wait=on|off]|chardev:id",
        "Connects the serial port. Without -serial it is stdio, or with -nodefaults there is no port.",
    ),
    group(
        Opt::Chardev,
        &["chardev"],
        &CHARDEV,
        "socket,id=id,path=path|fd=n[,server=on|off][,wait=on|off][,reconnect=n] | stdio,id=id[,signal=on|off] | \
         file,id=id,path=path[,append=on|off] | null,id=id",
        "Defines a character device for -serial, -mon or a device with a vhost-user back end.",
    ),
    group(
        Opt::Monitor,
        &["mon"],
        &MON,
        "[chardev=]id,mode=control[,pretty=off][,role=operator|monitor|console][,uid=n][,gid=n]",
        "Speaks QMP on a character device of type socket or stdio. Role, users and groups are not QEMU's: see ROLES.",
    ),
    text(
        Opt::Qmp,
        &["qmp"],
        "unix:path[,server=on|off][,wait=on|off]|stdio|chardev:id",
        "Short for -chardev and -mon with mode=control; may be given several times.",
    ),
    kinds(
        Opt::Device,
        &["device"],
        &DEVICE,
        "[driver=]driver[,id=id][,bus=id][,addr=n[.n]][,multifunction=on|off][,property=value] | help | driver,help",
        "Adds a device to the PCI bus.",
    ),
    group(
        Opt::Drive,
        &["drive"],
        &DRIVE,
        "file=path[,if=none|virtio][,id=id][,format=raw][,readonly=on|off][,read-only=on|off]",
        "Defines a drive for a virtio-blk-pci device. While the VM runs no other one, and no QEMU, can write to it.",
    ),
    kinds(
        Opt::BlockDev,
        &["blockdev"],
        &BLOCKDEV,
        "file|host_device,node-name=name,filename=path[,read-only=on|off] | \
         raw,node-name=name,file=name|file.driver=driver,file.filename=path[,read-only=on|off]",
        "Defines a block node, which may stand for a drive.",
    ),
    kinds(
        Opt::NetDev,
        &["netdev"],
        &NETDEV,
        "tap,id=id[,ifname=name[,queues=n]|,fd=n|,fds=n:n][,script=no][,downscript=no] | \
         vhost-user,id=id,chardev=id[,queues=n]",
        "Defines a network back end for a virtio-net-pci device.",
    ),
    kinds(
        Opt::Object,
        &["object"],
        &OBJECT,
        "[qom-type=]iothread,id=id[,poll-max-ns=n][,poll-grow=n][,poll-shrink=n] | \
         memory-backend-ram,id=id,size=size[,share=on|off][,prealloc=on|off] | \
         memory-backend-memfd,id=id,size=size[,share=on|off][,prealloc=on|off][,hugetlb=on|off][,hugetlbsize=size] | \
         memory-backend-file,id=id,size=size,mem-path=path,share=on[,prealloc=on|off]",
        "Defines a thread for the queues of a device, which the device's daemon has, or memory for a virtio-mem-pci or \
         virtio-pmem-pci device.",
    ),
    group(
        Opt::AddFd,
        &["add-fd"],
        &ADD_FD,
        "fd=n,set=n[,opaque=text]",
        "Adds an inherited descriptor to an fd set. The path /dev/fdset/N of a kernel, an initrd, an ACPI table or a file of a character \
         device is the first member of set N that was opened in the same way (to read, or to write).",
    ),
    flag(Opt::Stopped, &["S"], "Does not start the vCPUs: QMP cont does."),
    flag(
        Opt::Preconfig,
        &["preconfig"],
        "Stays in run state preconfig, in which few QMP commands are permitted, until QMP x-exit-preconfig.",
    ),
    flag(Opt::NoReboot, &["no-reboot"], "Shuts down where the guest would reset."),
    flag(Opt::NoShutdown, &["no-shutdown"], "Keeps the VM, stopped, when the guest shuts down."),
    flag(Opt::NoDefaults, &["nodefaults"], "Connects no serial port by default."),
    flag(Opt::NoUserConfig, &["no-user-config"], "Accepted: no configuration file is ever read."),
    text(Opt::Display, &["display"], "none", "Accepted: there is no display."),
    flag(
        Opt::NoGraphic,
        &["nographic"],
        "Connects the serial port to stdio, even with -nodefaults, if there is no -serial.",
    ),
    text(Opt::PidFile, &["pidfile"], "file", "Writes the launcher's process id there and locks the file."),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_parameters_too() {
        let mut names: Vec<&str> = OPTIONS.iter().flat_map(|spec| spec.names).copied().collect();
        let count = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), count);
        for spec in OPTIONS {
            assert_eq!(spec.syntax.is_empty(), matches!(spec.takes, Takes::Nothing), "{spec:?}");
            if let Takes::Params(group) | Takes::Unlisted(group) = spec.takes {
                assert!(group.implied.is_none_or(|name| group.params.iter().any(|p| p.name == name)));
                for (i, param) in group.params.iter().enumerate() {
                    assert!(group.params.iter().skip(i + 1).all(|p| p.name != param.name));
                }
            }
        }
    }

    #[test]
    fn groups_are_described_once_and_without_ids() {
        let groups = groups();
        let mut names: Vec<&str> = groups.iter().map(|group| group.name.as_str()).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), groups.len());
        let smp = groups.iter().find(|group| group.name == "smp-opts").unwrap();
        let first = Parameter {
            name: "cpus".into(),
            kind: ParameterType::Number,
            help: "number of vCPUs, 1 to 64".into(),
        };
        assert_eq!(smp.parameters.first(), Some(&first));
        let acpi = groups.iter().find(|group| group.name == "acpi").unwrap();
        assert!(acpi.parameters.is_empty());
        assert!(groups.iter().flat_map(|group| &group.parameters).all(|param| param.name != "id"));
    }

    #[test]
    fn every_parameter_is_in_the_syntax() {
        for spec in OPTIONS {
            let (Takes::Params(group) | Takes::Unlisted(group)) = spec.takes else { continue };
            for param in group.params.iter().filter(|p| !matches!(p.name, "backend") && p.kind != Kind::Id) {
                assert!(spec.syntax.contains(&format!("{}=", param.name)), "{} {}", spec.syntax, param.name);
            }
        }
    }
}
