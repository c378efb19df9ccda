//! Link `opener`: whoever opens what a machine names gives a process its descriptors.
//!
//! After the hello each way come any number of [`FromOpener::Given`], each with one descriptor, then
//! [`FromOpener::Done`]. Those that come later replace a connection whose other end was started anew
//! (`docs/decisions/0005-restarts-and-units.md`), or answer [`ToOpener::Connect`].

use serde::{Deserialize, Serialize};

/// The longest name in a request, in bytes.
pub const MAX_NAME: usize = 256;

/// Process to opener.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToOpener {
    /// Connect to the back end of this name, which the configuration of the machine says where to find. Answered by
    /// [`FromOpener::Given`] or [`FromOpener::NotGiven`] with the same name, at once: a listener that does not accept
    /// makes nobody wait.
    Connect {
        /// Its name: `vhost.ID` or `side.ID` of a device, see [`crate::config::PciDevice`].
        name: String,
    },
}

/// Opener to process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromOpener {
    /// The attached descriptor has this name in the topology.
    Given {
        /// Its name.
        name: String,
    },
    /// All that the process is started with has been given.
    Done,
    /// What was asked for cannot be given now.
    NotGiven {
        /// Its name.
        name: String,
        /// The error number (`errno(3)`); `EPERM` for a name that is not the process's to ask for.
        errno: i32,
    },
}
