//! Commands about what this machine does not have, answered as QEMU answers them without it.

use bulkhead_control_api::core;
use bulkhead_qapi::Error;
use bulkhead_qapi::types::misc::{ChangeArg, XenLoadDevicesStateArg};

/// Why nothing can be changed: there is no removable medium, and no VNC server.
#[must_use]
pub fn change(args: &ChangeArg) -> Error {
    match (args.device.as_str(), args.target.as_str(), &args.arg) {
        ("vnc", "passwd" | "password", None) => Error::generic("Parameter 'password' is missing"),
        ("vnc", "passwd" | "password", Some(_)) => Error::generic("Could not set password"),
        // Where QEMU would begin to listen: the answer of one that was built without it.
        ("vnc", _, _) => Error::generic("The feature 'vnc' is not enabled"),
        (device, _, _) => Error::device_not_found(format!("Device '{device}' not found")),
    }
}

/// Why there is nothing to wake up.
#[must_use]
pub fn wakeup() -> Error {
    Error::generic("wake-up from suspend is not supported by this guest")
}

/// Why no state is loaded. The broker's file system is empty, so there is no such file.
#[must_use]
pub fn load_devices(args: &XenLoadDevicesStateArg, state: core::RunState) -> Error {
    if state == core::RunState::Running {
        return Error::generic("Cannot update device state while vm is running");
    }
    Error::generic(format!("Unable to open {}: No such file or directory", args.filename))
}
