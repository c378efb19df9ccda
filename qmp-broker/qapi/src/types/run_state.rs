//! `qapi/run-state.json`.

use crate::schema::{Described, qapi_enum, qapi_struct};

qapi_enum! {
    /// What the machine is doing.
    RunState {
        /// Stopped by a debugger.
        "debug" Debug,
        /// Waiting for an incoming migration.
        "inmigrate" Inmigrate,
        /// An internal error; only a reset helps.
        "internal-error" InternalError,
        /// An I/O error paused it.
        "io-error" IoError,
        /// Stopped by `stop`.
        "paused" Paused,
        /// Migrated away.
        "postmigrate" Postmigrate,
        /// Not started since power-on or reset.
        "prelaunch" Prelaunch,
        /// Finishing a migration.
        "finish-migrate" FinishMigrate,
        /// Restoring a snapshot.
        "restore-vm" RestoreVm,
        /// The vCPUs run.
        "running" Running,
        /// Saving a snapshot.
        "save-vm" SaveVm,
        /// The guest is off.
        "shutdown" Shutdown,
        /// Suspended to RAM.
        "suspended" Suspended,
        /// Paused by a watchdog.
        "watchdog" Watchdog,
        /// The guest panicked.
        "guest-panicked" GuestPanicked,
        /// Saving or restoring for COLO.
        "colo" Colo,
        /// Before the machine is created (`--preconfig`).
        "preconfig" Preconfig,
    }
}

qapi_enum! {
    /// Why a machine was reset or shut down.
    ShutdownCause {
        /// No shutdown was asked for.
        "none" None,
        /// An error of the host.
        "host-error" HostError,
        /// QMP `quit`.
        "host-qmp-quit" HostQmpQuit,
        /// QMP `system_reset`.
        "host-qmp-system-reset" HostQmpSystemReset,
        /// A signal.
        "host-signal" HostSignal,
        /// The user interface.
        "host-ui" HostUi,
        /// The guest shut down.
        "guest-shutdown" GuestShutdown,
        /// The guest asked for a reset.
        "guest-reset" GuestReset,
        /// The guest panicked.
        "guest-panic" GuestPanic,
        /// A subsystem reset of a partial machine.
        "subsystem-reset" SubsystemReset,
    }
}

qapi_struct! {
    /// Run state of the machine.
    StatusInfo {
        /// Whether the vCPUs run.
        "running" running: bool,
        /// Whether TCG executes one instruction per block.
        "singlestep" singlestep: bool,
        /// The run state.
        "status" status: RunState,
    }
}

qapi_struct! {
    /// Data of `RESET`.
    ResetData {
        /// Whether the guest asked for it.
        "guest" guest: bool,
        /// Why.
        "reason" reason: ShutdownCause,
    }
}

qapi_struct! {
    /// Data of `SHUTDOWN`.
    ShutdownData {
        /// Whether the guest asked for it.
        "guest" guest: bool,
        /// Why.
        "reason" reason: ShutdownCause,
    }
}

qapi_enum! {
    /// What follows from a guest's panic.
    GuestPanicAction {
        /// The machine is paused.
        "pause" Pause,
        /// The machine is shut down.
        "poweroff" Poweroff,
        /// The machine runs on.
        "run" Run,
    }
}

qapi_enum! {
    /// Kind of details about a panic.
    GuestPanicInformationType {
        /// Hyper-V crash registers.
        "hyper-v" HyperV,
        /// s390.
        "s390" S390,
    }
}

qapi_struct! {
    /// Hyper-V crash registers.
    GuestPanicInformationHyperV {
        /// Register P0.
        "arg1" arg1: i64,
        /// Register P1.
        "arg2" arg2: i64,
        /// Register P2.
        "arg3" arg3: i64,
        /// Register P3.
        "arg4" arg4: i64,
        /// Register P4.
        "arg5" arg5: i64,
    }
}

qapi_enum! {
    /// Why an s390 guest crashed.
    S390CrashReason {
        /// Unknown.
        "unknown" Unknown,
        /// Disabled wait.
        "disabled-wait" DisabledWait,
        /// External interrupt loop.
        "extint-loop" ExtintLoop,
        /// Program interrupt loop.
        "pgmint-loop" PgmintLoop,
        /// Operation exception loop.
        "opint-loop" OpintLoop,
    }
}

qapi_struct! {
    /// Crash of an s390 vCPU.
    GuestPanicInformationS390 {
        /// vCPU that crashed.
        "core" core: i64,
        /// Its PSW mask.
        "psw-mask" psw_mask: i64,
        /// Its PSW address.
        "psw-addr" psw_addr: i64,
        /// Why.
        "reason" reason: S390CrashReason,
    }
}

qapi_struct! {
    /// Details about a panic.
    GuestPanicInformation {
        /// Their kind.
        "type" kind: GuestPanicInformationType,
    } by "type" { "hyper-v" => GuestPanicInformationHyperV, "s390" => GuestPanicInformationS390, }
}

qapi_struct! {
    /// Data of `GUEST_PANICKED`.
    GuestPanickedData {
        /// What follows.
        "action" action: GuestPanicAction,
        /// Details.
        "info" info: Option<GuestPanicInformation>,
    }
}
