//! Messages of a bus daemon's main link to core: set-up, device reset, pause and resume.
//!
//! The daemon connects; after the version exchange of the start contract core sends
//! [`FromCore::Welcome`] with the fds, then commands, each of which the daemon answers with
//! [`ToCore::Done`] before core goes on. To a daemon whose predecessor died core then says what that may have missed:
//! `Reset` if there was one, `Pause` or `Resume`; these may come while vCPUs run.

use serde::{Deserialize, Serialize};

/// Core to daemon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromCore {
    /// First message. Attached fds: `vcpus` access links, one access link of the drainer, then one
    /// eventfd per entry of `irqs`, in that order.
    Welcome {
        /// Number of vCPUs.
        vcpus: u16,
        /// Interrupts (GSI numbers) that the daemon may raise by writing to the eventfd.
        irqs: Vec<u32>,
    },
    /// Do this, then answer [`ToCore::Done`] with the same id.
    Command {
        /// Echoed in the answer.
        id: u32,
        /// What to do.
        what: Command,
    },
    /// The daemon broke the protocol: it is to end, so that another one can take its place.
    Leave,
}

/// What core asks of a bus daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Command {
    /// Put every device into its reset state; keep what a reset keeps (RTC time, connections).
    Reset,
    /// Stop the devices' virtual clock; raise no interrupt until `Resume`.
    Pause,
    /// Let the virtual clock go on from where it stopped.
    Resume,
    /// The host presses the power button. vCPUs may run meanwhile.
    PressPowerButton,
}

/// Daemon to core.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToCore {
    /// The command of this id is done.
    Done {
        /// The command's id.
        id: u32,
    },
}
