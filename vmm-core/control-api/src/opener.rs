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
    /// From now on pci may ask for a connection by this name, to the socket at this path: the broker's to say, for
    /// `chardev-add`. Answered by [`FromOpener::Defined`], also if it is so already, or by [`FromOpener::NotGiven`]:
    /// `EEXIST` for a name that stands for something else, `ENOENT` or another error of `lstat(2)` if `must_exist` and no
    /// socket is there. Nobody connects yet: a back end may take only one connection in its life.
    Define {
        /// `chardev.ID`.
        name: String,
        /// As the user named it.
        path: String,
        /// Something must be there.
        must_exist: bool,
    },
    /// The name stands for nothing any more, also one of the configuration: the broker's to say, for `chardev-remove`.
    /// Answered by [`FromOpener::Defined`]; `ENOENT` if it stands for no path.
    Forget {
        /// `chardev.ID`.
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
    /// A [`ToOpener::Define`] or [`ToOpener::Forget`] of this name is done.
    Defined {
        /// Its name.
        name: String,
    },
    /// What was asked for cannot be given now.
    NotGiven {
        /// Its name.
        name: String,
        /// The error number (`errno(3)`); `EPERM` for a name that is not the process's to ask for.
        errno: i32,
    },
}
