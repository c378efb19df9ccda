//! The commands of the human monitor, and the subjects of its command `info`. Names and parameters are
//! those of QEMU 5.1; both tables are in the order in which they are listed.

use serde_json::Value;

use super::show;

/// Prints the value that a QMP command returned; the number is that of the chosen vCPU.
pub type Show = fn(Value, i64) -> String;

/// A command, or a subject of `info`.
#[derive(Debug)]
pub struct Entry {
    /// Its names, the usual one first.
    pub names: &'static [&'static str],
    /// Its parameters, for people.
    pub params: &'static str,
    /// What it does, for people.
    pub help: &'static str,
    /// What it does.
    pub does: Does,
}

/// How a line gives an argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arg {
    /// A word, which may be in double quotes.
    Word,
    /// A number, of MiB; the QMP command takes bytes.
    MiB,
}

/// What a command does.
#[derive(Debug)]
pub enum Does {
    /// Lists commands.
    Help,
    /// Looks further in [`INFO`].
    Info,
    /// Executes a QMP command.
    Qmp {
        /// Its name.
        command: &'static str,
        /// The argument that the rest of the line gives it.
        arg: Option<(&'static str, Arg)>,
        /// Prints what it returned.
        show: Show,
    },
}

impl Entry {
    /// The entry of that name.
    pub fn find(table: &'static [Self], name: &str) -> Option<&'static Self> {
        table.iter().find(|entry| entry.names.contains(&name))
    }

    /// All names, as messages have them.
    pub fn title(&self) -> String {
        self.names.join("|")
    }
}

const fn does(names: &'static [&'static str], command: &'static str, help: &'static str) -> Entry {
    Entry { names, params: "", help, does: Does::Qmp { command, arg: None, show: show::nothing } }
}

const fn descriptor(
    names: &'static [&'static str],
    command: &'static str,
    params: &'static str,
    help: &'static str,
) -> Entry {
    let does = Does::Qmp { command, arg: Some(("fdname", Arg::Word)), show: show::nothing };
    Entry { names, params, help, does }
}

const fn info(
    names: &'static [&'static str],
    command: &'static str,
    help: &'static str,
    show: Show,
) -> Entry {
    Entry { names, params: "", help, does: Does::Qmp { command, arg: None, show } }
}

/// All commands.
pub static COMMANDS: &[Entry] = &[
    Entry {
        names: &["balloon"],
        params: "target",
        help: "asks the guest to have so many MiB of memory",
        does: Does::Qmp { command: "balloon", arg: Some(("value", Arg::MiB)), show: show::nothing },
    },
    descriptor(&["closefd"], "closefd", "closefd name", "closes a descriptor that getfd named"),
    does(&["cont", "c"], "cont", "lets the vCPUs run on"),
    does(&["exit_preconfig"], "x-exit-preconfig", "leaves run state preconfig"),
    descriptor(&["getfd"], "getfd", "getfd name", "names a descriptor that was sent along"),
    Entry { names: &["help", "?"], params: "[cmd]", help: "lists the commands", does: Does::Help },
    Entry {
        names: &["info"],
        params: "[subcommand]",
        help: "tells the state of something",
        does: Does::Info,
    },
    does(&["nmi"], "inject-nmi", "injects an NMI into every vCPU"),
    does(&["quit", "q"], "quit", "ends the machine and all its processes"),
    does(&["stop"], "stop", "stops all vCPUs"),
    does(&["system_powerdown"], "system_powerdown", "presses the power button"),
    does(&["system_reset"], "system_reset", "resets the machine"),
    does(&["system_wakeup"], "system_wakeup", "wakes a suspended guest"),
];

/// All subjects of `info`.
pub static INFO: &[Entry] = &[
    info(&["balloon"], "query-balloon", "how much memory the guest has", show::balloon),
    info(&["chardev"], "query-chardev", "the character devices", show::chardevs),
    info(&["cpus"], "query-cpus-fast", "the vCPUs and their threads", show::cpus),
    info(&["iothreads"], "query-iothreads", "the I/O threads", show::iothreads),
    info(&["kvm"], "query-kvm", "whether KVM is used", show::kvm),
    info(&["memory-devices"], "query-memory-devices", "the memory devices", show::memory_devices),
    info(
        &["memory_size_summary"],
        "query-memory-size-summary",
        "how much memory the guest has from the start, and how much was plugged in",
        show::memory,
    ),
    info(&["name"], "query-name", "the guest's name", show::name),
    info(&["pci"], "query-pci", "the PCI devices", show::pci),
    info(&["status"], "query-status", "the run state", show::status),
    info(&["uuid"], "query-uuid", "the guest's UUID", show::uuid),
    info(&["version"], "query-version", "the version served", show::version),
];

#[cfg(test)]
mod tests {
    use bulkhead_qapi::table;

    use super::*;

    #[test]
    fn every_entry_is_a_qmp_command_and_they_are_in_order() {
        for entries in [COMMANDS, INFO] {
            assert!(entries.is_sorted_by_key(Entry::title));
            for entry in entries {
                let Does::Qmp { command, arg, .. } = &entry.does else { continue };
                let command = table::command(command).unwrap();
                let args: Vec<&str> = command.args.members.iter().map(|member| member.name).collect();
                assert_eq!(args, arg.iter().map(|(name, _)| *name).collect::<Vec<_>>(), "{entry:?}");
            }
        }
    }
}
