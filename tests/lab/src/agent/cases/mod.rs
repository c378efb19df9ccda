//! The cases: each boots its own Debian guest in L1.

mod boot;
mod ceiling;
mod devices;
mod kills;
mod power;
mod restarts;
mod run_state;
mod unit_devices;
mod units;

use bulkhead_framework::{Failure, Result};

use super::Journal;
use crate::host::Kind;

/// One test case.
pub struct Case {
    /// Its name on the command line.
    pub name: &'static str,
    /// What it shows, in a line.
    pub about: &'static str,
    /// The L1 that it needs.
    pub kind: Kind,
    /// What it does. All its waits have limits.
    pub run: fn(&mut Journal) -> Result<()>,
}

/// All cases, the longest first: that keeps several L1s busy to the end.
pub const ALL: &[Case] = &[
    Case {
        name: "units-tenants",
        about: "two tenants' VMs in units: users, roles, nothing within each other's reach, a clean stop",
        kind: Kind::Systemd,
        run: units::tenants,
    },
    Case {
        name: "units-restarts",
        about: "broker and console die under load, the guest resets: it runs on, fd sets stay",
        kind: Kind::Systemd,
        run: units::restarts,
    },
    Case {
        name: "units-names",
        about: "bad names, units started in the wrong order, no journal",
        kind: Kind::Systemd,
        run: units::names,
    },
    Case {
        name: "units-memory",
        about: "one VM hits its memory limit, the other runs on",
        kind: Kind::Systemd,
        run: units::memory,
    },
    Case {
        name: "units-devices",
        about: "a disk, a balloon, a network and another's back end in units: made from the machine file, killed, gone with the VM",
        kind: Kind::Systemd,
        run: unit_devices::run,
    },
    Case {
        name: "units-ceiling",
        about: "a guest that uses what it gave to the balloon hits its slice's limit, its neighbour runs on",
        kind: Kind::Systemd,
        run: ceiling::run,
    },
    Case {
        name: "units-host",
        about: "systemd 252 as PID 1, and bulkhead run as a transient service",
        kind: Kind::Systemd,
        run: units::host,
    },
    Case {
        name: "kills",
        about: "pci, balloon, console and broker die 10 times each under load: stalls below 1 s, no error, no state lost",
        kind: Kind::Busybox,
        run: kills::few,
    },
    Case {
        name: "disk",
        about: "boots from an ext4 disk behind the block daemon, which is killed under load",
        kind: Kind::Busybox,
        run: devices::disk,
    },
    Case {
        name: "disk-of-qemu",
        about: "boots from an ext4 disk behind qemu-storage-daemon",
        kind: Kind::Busybox,
        run: devices::disk_of_qemu,
    },
    Case {
        name: "hot-plug",
        about: "a disk comes to a root port and goes again",
        kind: Kind::Busybox,
        run: devices::hot_plug,
    },
    Case {
        name: "shared-directory",
        about: "a directory of virtiofsd, entropy and sockets of rust-vmm's daemons",
        kind: Kind::Busybox,
        run: devices::shared_directory,
    },
    Case {
        name: "network",
        about: "TCP over a TAP interface and the net daemon, which is killed meanwhile",
        kind: Kind::Busybox,
        run: devices::network,
    },
    Case {
        name: "reset",
        about: "system_reset and the guest's own reboot boot again",
        kind: Kind::Busybox,
        run: power::reset,
    },
    Case {
        name: "panic",
        about: "a guest panic: reset with panic=-1, hung and reset by QMP with panic=0",
        kind: Kind::Busybox,
        run: power::panic,
    },
    Case {
        name: "boot-4-cpus-4g",
        about: "4 vCPUs and 4 GiB: all come up, memory above 4 GiB",
        kind: Kind::Busybox,
        run: boot::four_cpus,
    },
    Case {
        name: "boot-1-cpu-256m",
        about: "1 vCPU and 256 MiB: command line, memory, clock, SMBIOS, an own ACPI table, full boot log",
        kind: Kind::Busybox,
        run: boot::one_cpu,
    },
    Case {
        name: "console-restarts",
        about: "a console that is killed while Debian boots, writes and is switched off",
        kind: Kind::Busybox,
        run: restarts::console,
    },
    Case {
        name: "console",
        about: "long input and output pass the console intact",
        kind: Kind::Busybox,
        run: boot::console,
    },
    Case {
        name: "ordinary-user",
        about: "a user in group kvm boots a guest",
        kind: Kind::Busybox,
        run: boot::ordinary_user,
    },
    Case {
        name: "stop-cont",
        about: "stop freezes the guest and its clock, cont resumes it",
        kind: Kind::Busybox,
        run: run_state::stop_cont,
    },
    Case {
        name: "start-paused",
        about: "-S waits for cont before the first instruction",
        kind: Kind::Busybox,
        run: run_state::start_paused,
    },
    Case {
        name: "power-button",
        about: "system_powerdown presses KEY_POWER, the guest powers off",
        kind: Kind::Busybox,
        run: power::button,
    },
    Case { name: "power-off", about: "the guest powers off by itself", kind: Kind::Busybox, run: power::off },
    Case {
        name: "no-reboot",
        about: "-no-reboot turns the guest's reboot into the end",
        kind: Kind::Busybox,
        run: power::no_reboot,
    },
    Case {
        name: "quit",
        about: "quit ends a running VM and leaves nothing behind",
        kind: Kind::Busybox,
        run: run_state::quit,
    },
];

/// Cases that take too long for every day; each runs only when it is named in full.
pub const LONG: &[Case] =
    &[Case { name: "kills-100", about: "as kills, 100 times each", kind: Kind::Busybox, run: kills::many }];

/// The case of this name.
pub fn find(name: &str) -> Option<&'static Case> {
    ALL.iter().chain(LONG).find(|case| case.name == name)
}

/// The cases whose name contains one of `words`; all for no words. A word that is the name of a case means that one only.
///
/// # Errors
/// A word selects nothing.
pub fn matching(words: &[String]) -> Result<Vec<&'static Case>> {
    let selects = |word: &str, case: &Case| match find(word) {
        Some(exact) => case.name == exact.name,
        None => case.name.contains(word),
    };
    let all = || ALL.iter().chain(LONG.iter().filter(|case| words.iter().any(|word| word == case.name)));
    if let Some(word) = words.iter().find(|word| !all().any(|case| selects(word, case))) {
        return Err(Failure::new(format!("no case has {word:?} in its name; see `bulkhead-lab list`")));
    }
    Ok(all().filter(|case| words.is_empty() || words.iter().any(|word| selects(word, case))).collect())
}
