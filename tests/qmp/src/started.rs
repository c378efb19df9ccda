//! Servers that a test starts by their command line: a VM and QEMU, with descriptors that they inherit.

use std::path::Path;
use std::process::{Command, Stdio};

use bulkhead_framework::launcher_path;

/// Whose command line it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Server {
    /// The launcher of the release build.
    Bulkhead,
    /// Debian's QEMU with a machine that does nothing.
    Qemu,
}

impl Server {
    /// The server in `dir`, stopped at its start, with further arguments. A shell executes `before` and becomes
    /// it; what the server says goes to the file `errors`.
    #[must_use]
    pub fn command(self, dir: &Path, before: &str, args: &str) -> Command {
        let mut command = Command::new("/bin/sh");
        let script = format!("exec 2>errors; {before}; exec \"$@\"");
        command.args(["-c", &script, "sh"]).current_dir(dir).stdin(Stdio::null()).stdout(Stdio::null());
        match self {
            Self::Bulkhead => command.arg(launcher_path()).args(["run", "-nodefaults", "-S"]),
            Self::Qemu => command.args([
                "qemu-system-x86_64",
                "-machine",
                "none",
                "-nodefaults",
                "-display",
                "none",
                "-S",
            ]),
        };
        command.args(args.split(' '));
        command
    }
}
