//! Link `control-broker`: the broker asks core for run-state changes and live state.
//!
//! Core sends events and replies on this one ordered link: the event of a change comes before the
//! reply to the request that caused it.

use serde::{Deserialize, Serialize};

/// Run state of the machine, by QEMU's names (QAPI `RunState`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum RunState {
    /// Not started since power-on or since a reset while stopped.
    Prelaunch,
    /// The vCPUs run.
    Running,
    /// Stopped by `stop`.
    Paused,
    /// The guest is off and the VM is kept (`-no-shutdown`).
    Shutdown,
    /// KVM or a compartment could not go on; only a reset helps.
    InternalError,
    /// The guest panicked.
    GuestPanicked,
}

impl RunState {
    /// Its name in QAPI and in the topology.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Prelaunch => "prelaunch",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Shutdown => "shutdown",
            Self::InternalError => "internal-error",
            Self::GuestPanicked => "guest-panicked",
        }
    }
}

/// Why the machine was reset or shut down (QAPI `ShutdownCause`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Cause {
    /// An error of the host (QAPI's; core does not send it: it says why and exits).
    HostError,
    /// QMP `quit`.
    HostQmpQuit,
    /// QMP `system_reset`.
    HostQmpSystemReset,
    /// SIGTERM, SIGINT or SIGHUP.
    HostSignal,
    /// The user interface, of which Bulkhead has none.
    HostUi,
    /// ACPI S5.
    GuestShutdown,
    /// A reset register, i8042 or a triple fault.
    GuestReset,
    /// The guest panicked.
    GuestPanic,
}

/// What the broker asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Op {
    /// The run state: [`Answer::Status`].
    Status,
    /// First start of a machine that is to start by itself; does nothing once it has been started
    /// or stopped, so a restarted broker may ask again. Held until every bus daemon is there.
    Start,
    /// Stop all vCPUs; answered when none executes and no access is half done.
    Stop,
    /// Let the vCPUs run on.
    Cont,
    /// Reset the machine (cause `host-qmp-system-reset`).
    Reset,
    /// Shut down (cause `host-qmp-quit`).
    Quit,
    /// Inject an NMI into every vCPU.
    InjectNmi,
    /// The vCPUs: [`Answer::Cpus`].
    Cpus,
    /// Counters of the bus: [`Answer::Counters`].
    Counters,
    /// Note which pages of RAM the guest writes (KVM's dirty log), or stop that.
    LogDirty(bool),
}

impl Op {
    /// The request's name in the topology.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Status => "status",
            Self::Start => "start",
            Self::Stop => "stop",
            Self::Cont => "cont",
            Self::Reset => "reset",
            Self::Quit => "quit",
            Self::InjectNmi => "inject-nmi",
            Self::Cpus => "cpus",
            Self::Counters => "counters",
            Self::LogDirty(_) => "log-dirty",
        }
    }
}

/// Broker to core.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// Echoed in the reply.
    pub id: u32,
    /// What to do.
    pub op: Op,
}

/// One vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cpu {
    /// Thread id in the host's pid namespace.
    pub thread_id: u32,
    /// Socket number.
    pub socket: u32,
    /// Core number within the socket.
    pub core: u32,
    /// Thread number within the core.
    pub thread: u32,
}

/// Counters since the start of core.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// Accesses that no daemon claims.
    pub unclaimed: u64,
    /// Accesses that went over a bus link.
    pub forwarded: u64,
    /// Writes that were collected.
    pub collected: u64,
    /// Resets since power-on.
    pub resets: u64,
}

/// A successful answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// Done, nothing to say.
    Done,
    /// The run state.
    Status(RunState),
    /// All vCPUs by index.
    Cpus(Vec<Cpu>),
    /// Counters.
    Counters(Counters),
}

/// Why core refuses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum Refusal {
    /// Only a reset leads out of this run state.
    #[error("Resetting the Virtual Machine is required")]
    ResetRequired,
    /// The topology does not let this peer ask that in this state.
    #[error("request not permitted")]
    NotPermitted,
    /// KVM refused.
    #[error("KVM error {0}")]
    Kvm(i32),
}

/// Something that happened to the machine, in the order in which it happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Event {
    /// The vCPUs stopped.
    Stop,
    /// The vCPUs run.
    Resume,
    /// The machine was reset.
    Reset(Cause),
    /// The machine shuts down.
    Shutdown(Cause),
    /// The guest panicked.
    GuestPanicked,
    /// Core is about to exit: tell the clients what is still queued, then close the link.
    Exiting,
    /// The host pressed the power button (SIGPWR).
    PowerButton,
}

/// Core to broker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromCore {
    /// Answer to the request of this id.
    Reply {
        /// The request's id.
        id: u32,
        /// The answer.
        result: Result<Answer, Refusal>,
    },
    /// An event, with the run state after it.
    Event {
        /// What happened.
        event: Event,
        /// The run state from now on.
        state: RunState,
    },
}
