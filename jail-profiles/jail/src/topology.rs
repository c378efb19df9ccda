//! The processes and links of a VM: `topology.toml` and the seccomp profiles as constants.

use seccompiler::sock_filter;

/// Digits of the number in `kept.N`: those of a `u64`.
const MAX_DIGITS: usize = 20;

/// A kind of Linux namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Namespace {
    /// User ids and capabilities.
    User,
    /// Mounts: an empty root.
    Mount,
    /// Process ids.
    Pid,
    /// Network.
    Net,
    /// System V IPC and POSIX message queues.
    Ipc,
    /// Host name.
    Uts,
}

/// Namespaces that some starter cannot make for a process.
#[derive(Clone, Copy, Debug)]
pub struct Gap {
    /// `user`: the launcher run by an ordinary user.
    pub starter: &'static str,
    /// What is missing there.
    pub namespaces: &'static [Namespace],
    /// Why.
    pub why: &'static str,
    /// What stands in for it.
    pub substitute: &'static str,
}

/// When a process is started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Boots {
    /// Once, with the VM.
    Vm,
    /// Anew for each boot and reset.
    Boot,
    /// Anew for each job.
    Job,
}

impl Boots {
    /// What asks for a process that is started anew: the name of the asker's descriptor, and under systemd of the
    /// process's own.
    #[must_use]
    pub const fn trigger(self) -> Option<&'static str> {
        match self {
            Self::Vm => None,
            Self::Boot => Some("boot"),
            Self::Job => Some("job"),
        }
    }
}

/// What happens when a process dies after its first READY=1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Restart {
    /// Its end is the VM's (of a loader: the boot's).
    Never,
    /// It is started again, for ever.
    Always,
}

/// RLIMIT_FSIZE of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileSize {
    /// So many bytes.
    Bytes(u64),
    /// The size of guest RAM, at least of the configuration window: a memfd counts.
    Ram,
    /// No limit.
    Unlimited,
}

/// Resource limits of a process.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// RLIMIT_NOFILE.
    pub nofile: u64,
    /// RLIMIT_DATA in bytes: private memory, thread stacks included.
    pub data: u64,
    /// RLIMIT_FSIZE.
    pub fsize: FileSize,
}

/// One process of the topology.
#[derive(Clone, Copy, Debug)]
pub struct Process {
    /// Its name in the topology.
    pub name: &'static str,
    /// Its executable, as `ps` shows it.
    pub binary: &'static str,
    /// What it is for.
    pub about: &'static str,
    /// When it is started.
    pub boots: Boots,
    /// There is one for each device that needs one, none or several in a VM.
    pub per_device: bool,
    /// What its death means.
    pub restart: Restart,
    /// Namespaces of its own.
    pub namespaces: &'static [Namespace],
    /// Starters that cannot make them all.
    pub gaps: &'static [Gap],
    /// Names of its descriptors: `name`, `name?` (optional) or `name.*` (any number).
    pub fds: &'static [&'static str],
    /// Descriptors that its starter keeps for it at most: `state` and `kept.*`.
    pub store: usize,
    /// Resource limits.
    pub limits: Limits,
    /// System calls that its filter allows, at least with some arguments.
    pub syscalls: &'static [&'static str],
    /// Its seccomp filter.
    pub filter: &'static [sock_filter],
}

impl Process {
    /// Whether the topology lets this process have a descriptor of that name.
    #[must_use]
    pub fn may_have(&self, fd: &str) -> bool {
        self.fds.iter().any(|rule| match rule.strip_suffix('*') {
            Some(prefix) => fd.starts_with(prefix) && fd.len() > prefix.len(),
            None => rule.trim_end_matches('?') == fd,
        })
    }

    /// Whether its starter keeps a descriptor of that name beyond its death: `state`, or `kept.` and a number. A name
    /// of any other form could split the list of names in which it comes back.
    #[must_use]
    pub fn may_keep(&self, fd: &str) -> bool {
        let is_number = |text: &str| {
            (1..=MAX_DIGITS).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_digit())
        };
        self.may_have(fd) && (fd == "state" || fd.strip_prefix("kept.").is_some_and(is_number))
    }

    /// The namespaces that `starter` gives this process.
    pub fn namespaces_under<'a>(&'a self, starter: &'a str) -> impl Iterator<Item = Namespace> + 'a {
        let missing =
            move |n: &Namespace| self.gaps.iter().any(|g| g.starter == starter && g.namespaces.contains(n));
        self.namespaces.iter().copied().filter(move |n| !missing(n))
    }
}

/// A request that a peer may send, and the run states in which it may.
#[derive(Clone, Copy, Debug)]
pub struct Permit {
    /// The request's name.
    pub request: &'static str,
    /// Run states by QEMU's names.
    pub states: &'static [&'static str],
}

/// One link of the topology.
#[derive(Clone, Copy, Debug)]
pub struct Link {
    /// Its name: also the listener's descriptor.
    pub name: &'static str,
    /// The process that listens.
    pub listener: &'static str,
    /// The process that connects.
    pub connector: &'static str,
    /// The connector's name for its descriptor.
    pub as_name: &'static str,
    /// The listener asks and the connector answers; else the other way round.
    pub listener_asks: bool,
    /// What may be asked; empty for links whose messages are not requests.
    pub requests: &'static [Permit],
}

impl Link {
    /// Whether `request` may be sent while the machine is in `state`.
    #[must_use]
    pub fn permits(&self, request: &str, state: &str) -> bool {
        self.requests.iter().any(|p| p.request == request && p.states.contains(&state))
    }
}

include!(concat!(env!("OUT_DIR"), "/topology.rs"));

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fd_rules_are_exact() {
        assert!(CORE.may_have("kvm") && CORE.may_have("proc") && !CORE.may_have("kvm2"));
        assert!(
            CONSOLE.may_have("chardev.serial0") && !CONSOLE.may_have("chardev.") && !CONSOLE.may_have("kvm")
        );
    }

    #[test]
    fn only_core_holds_kvm() {
        for process in PROCESSES {
            assert_eq!(process.may_have("kvm"), process.name == "core", "{}", process.name);
        }
    }

    #[test]
    fn every_link_end_has_its_descriptor() {
        for link in LINKS {
            let find = |name| PROCESSES.iter().find(|p| p.name == name).unwrap();
            assert!(find(link.listener).may_have(link.name), "{}", link.name);
            assert!(find(link.connector).may_have(link.as_name), "{}", link.name);
        }
    }

    #[test]
    fn permits_follow_the_run_state() {
        assert!(LINK_CONTROL_BROKER.permits("stop", "running"));
        assert!(!LINK_CONTROL_BROKER.permits("format-disk", "running"));
        assert!(!LINK_CONTROL_CONSOLE.permits("power-button", "shutdown"));
    }
}
