//! Link `opener`: whoever opens what a machine names gives a process its descriptors.
//!
//! After the hello each way come any number of [`FromOpener::Given`], each with one descriptor, then
//! [`FromOpener::Done`]. Those that come later replace a connection whose other end was started anew
//! (`docs/decisions/0005-restarts-and-units.md`), or answer [`ToOpener::Connect`].

use serde::{Deserialize, Serialize};

use crate::plug::Settings;

/// The longest name in a request, in bytes.
pub const MAX_NAME: usize = 256;
/// The longest path in a request, in bytes: `PATH_MAX` of Linux less the NUL.
pub const MAX_PATH: usize = 4095;

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
    /// Open this file to write, empty, and made if it is not there: the broker's, for a memory dump. Answered by
    /// [`FromOpener::Given`] or [`FromOpener::NotGiven`] with the same name, at once: also a FIFO that nobody reads makes
    /// nobody wait (`ENXIO`). Under units a path is relative to the VM's directory and cannot leave it.
    Output {
        /// Any, to tell answers apart.
        name: String,
        /// As the client named it, at most [`MAX_PATH`] bytes.
        path: String,
    },
    /// The name stands for nothing any more, also one of the configuration: the broker's to say, for `chardev-remove`.
    /// Answered by [`FromOpener::Defined`]; `ENOENT` if it stands for no path.
    Forget {
        /// `chardev.ID`.
        name: String,
    },
    /// Start the daemon of something declared, for a device that is to be plugged in; one that runs is ended first. The
    /// broker's to say. Answered by [`FromOpener::Defined`] before the daemon is there, or by [`FromOpener::NotGiven`]:
    /// `EPERM` for a name that is not declared, `EINVAL` for settings that it cannot have, `EOPNOTSUPP` where daemons are
    /// started with the machine only and this one has other settings.
    Begin {
        /// [`crate::plug::Declared::key`].
        name: String,
        /// What the device says of it.
        settings: Settings,
    },
    /// No device uses the daemon any more: it is ended, and what was kept for it is forgotten. The broker's to say.
    /// Answered by [`FromOpener::Defined`], also if it does not run.
    End {
        /// [`crate::plug::Declared::key`].
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
    /// What the broker asked for this name is done.
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
