//! The cases: each boots its own Debian guest in L1.

mod boot;
mod power;
mod restarts;
mod run_state;

use bulkhead_framework::{Failure, Result};

use super::Journal;

/// One test case.
pub struct Case {
    /// Its name on the command line.
    pub name: &'static str,
    /// What it shows, in a line.
    pub about: &'static str,
    /// What it does. All its waits have limits.
    pub run: fn(&mut Journal) -> Result<()>,
}

/// All cases, the longest first: that keeps several L1s busy to the end.
pub const ALL: &[Case] = &[
    Case { name: "reset", about: "system_reset and the guest's own reboot boot again", run: power::reset },
    Case {
        name: "panic",
        about: "a guest panic: reset with panic=-1, hung and reset by QMP with panic=0",
        run: power::panic,
    },
    Case {
        name: "boot-4-cpus-4g",
        about: "4 vCPUs and 4 GiB: all come up, memory above 4 GiB",
        run: boot::four_cpus,
    },
    Case {
        name: "boot-1-cpu-256m",
        about: "1 vCPU and 256 MiB: command line, memory, clock, full boot log",
        run: boot::one_cpu,
    },
    Case {
        name: "console-restarts",
        about: "a console that is killed while Debian boots, writes and is switched off",
        run: restarts::console,
    },
    Case { name: "console", about: "long input and output pass the console intact", run: boot::console },
    Case { name: "ordinary-user", about: "a user in group kvm boots a guest", run: boot::ordinary_user },
    Case {
        name: "stop-cont",
        about: "stop freezes the guest and its clock, cont resumes it",
        run: run_state::stop_cont,
    },
    Case {
        name: "start-paused",
        about: "-S waits for cont before the first instruction",
        run: run_state::start_paused,
    },
    Case {
        name: "power-button",
        about: "system_powerdown presses KEY_POWER, the guest powers off",
        run: power::button,
    },
    Case { name: "power-off", about: "the guest powers off by itself", run: power::off },
    Case {
        name: "no-reboot",
        about: "-no-reboot turns the guest's reboot into the end",
        run: power::no_reboot,
    },
    Case { name: "quit", about: "quit ends a running VM and leaves nothing behind", run: run_state::quit },
];

/// The cases whose name contains one of `words`; all for no words.
///
/// # Errors
/// A word selects nothing.
pub fn matching(words: &[String]) -> Result<Vec<&'static Case>> {
    if let Some(word) = words.iter().find(|word| !ALL.iter().any(|case| case.name.contains(word.as_str()))) {
        return Err(Failure::new(format!("no case has {word:?} in its name; see `bulkhead-lab list`")));
    }
    let chosen =
        |case: &&Case| words.is_empty() || words.iter().any(|word| case.name.contains(word.as_str()));
    Ok(ALL.iter().filter(chosen).collect())
}
