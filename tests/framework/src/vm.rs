//! One VM: `bulkhead run` in a directory of its own.

use std::ffi::{OsStr, OsString};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::time::Duration;

use nix::sys::signal::Signal;

use crate::{Child, Failure, Process, Qmp, Result, Scratch, Transcript, descendants};

/// How long a VM may take until its QMP socket listens.
const START: Duration = Duration::from_secs(30);

/// The build directory that holds `release` and `debug`: `CARGO_TARGET_DIR`, or the workspace's own.
pub fn target_dir() -> PathBuf {
    match std::env::var_os("CARGO_TARGET_DIR") {
        Some(dir) => dir.into(),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target"),
    }
}

/// The launcher under test: `BULKHEAD`, or the release build of this workspace.
pub fn launcher_path() -> PathBuf {
    std::env::var_os("BULKHEAD").map_or_else(|| target_dir().join("release/bulkhead"), PathBuf::from)
}

/// What to start. Standard output is the guest's console and `q.sock` the QMP socket, unless switched off.
pub struct VmBuilder {
    launcher: PathBuf,
    args: Vec<OsString>,
    serial: bool,
    qmp: bool,
    owner: Option<(u32, u32)>,
}

impl VmBuilder {
    /// Adds arguments of the launcher as they are.
    #[must_use]
    pub fn args(mut self, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Self {
        self.args.extend(args.into_iter().map(|arg| arg.as_ref().to_owned()));
        self
    }

    /// Boots `kernel` with `initrd` and the command line `append` instead of the embedded guest.
    #[must_use]
    pub fn kernel(self, kernel: &Path, initrd: &Path, append: &str) -> Self {
        self.args([OsStr::new("-kernel"), kernel.as_os_str(), OsStr::new("-initrd"), initrd.as_os_str()])
            .args(["-append", append])
    }

    /// Starts this launcher, or a program with its command line, instead of [`launcher_path`].
    #[must_use]
    pub fn launcher(mut self, path: impl Into<PathBuf>) -> Self {
        self.launcher = path.into();
        self
    }

    /// Adds no `-serial`: the test names its own, or wants the default.
    #[must_use]
    pub fn without_serial(mut self) -> Self {
        self.serial = false;
        self
    }

    /// Adds no `-qmp`.
    #[must_use]
    pub fn without_qmp(mut self) -> Self {
        self.qmp = false;
        self
    }

    /// Runs the VM as this user and group, without supplementary groups. Needs root.
    #[must_use]
    pub fn owner(mut self, uid: u32, gid: u32) -> Self {
        self.owner = Some((uid, gid));
        self
    }

    /// The command line, for people.
    pub fn command_line(&self) -> String {
        let quoted = |arg: OsString| {
            let arg = arg.to_string_lossy().into_owned();
            if arg.contains(' ') { format!("\"{arg}\"") } else { arg }
        };
        let args: Vec<String> = self.all_args().into_iter().map(quoted).collect();
        format!("bulkhead {}", args.join(" "))
    }

    fn all_args(&self) -> Vec<OsString> {
        let mut args = vec![OsString::from("run")];
        args.extend_from_slice(&self.args);
        if self.serial {
            args.extend(["-serial", "stdio"].map(OsString::from));
        }
        if self.qmp {
            args.extend(["-qmp", "unix:q.sock,server=on,wait=off"].map(OsString::from));
        }
        args
    }

    /// Starts the VM.
    ///
    /// # Errors
    /// The launcher cannot be started. That the VM runs shows on its console or by QMP.
    pub fn start(self) -> Result<Vm> {
        self.start_with(|_, _| Ok(()))
    }

    /// Starts the VM after `prepare` has seen its directory and changed its command as it likes.
    ///
    /// # Errors
    /// As [`VmBuilder::start`], or those of `prepare`.
    pub fn start_with(self, prepare: impl FnOnce(&mut Command, &Path) -> Result<()>) -> Result<Vm> {
        let dir = Scratch::new()?;
        let mut command = Command::new(&self.launcher);
        command.current_dir(dir.path()).args(self.all_args());
        if let Some((uid, gid)) = self.owner {
            std::os::unix::fs::chown(dir.path(), Some(uid), Some(gid))?;
            command.uid(uid).gid(gid);
        }
        prepare(&mut command, dir.path())?;
        let child = Child::start(&mut command, "console", "stderr")?;
        Ok(Vm { child, dir })
    }
}

/// A running VM. On drop its launcher is told to end, and killed if it does not.
pub struct Vm {
    // Dropped first: the directory goes when nobody uses it.
    child: Child,
    dir: Scratch,
}

impl Vm {
    /// A VM to be described.
    pub fn builder() -> VmBuilder {
        VmBuilder { launcher: launcher_path(), args: Vec::new(), serial: true, qmp: true, owner: None }
    }

    /// The guest's console, as standard output of the launcher.
    pub fn console(&self) -> &Transcript {
        self.child.stdout()
    }

    /// What the processes of the VM log.
    pub fn stderr(&self) -> &Transcript {
        self.child.stderr()
    }

    /// Writes to the guest's console.
    ///
    /// # Errors
    /// The VM closed its standard input.
    pub fn type_in(&mut self, text: &str) -> Result<()> {
        self.child.write(text.as_bytes())
    }

    /// The launcher.
    pub fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    /// The launcher's process id.
    pub fn pid(&self) -> i32 {
        self.child.pid()
    }

    /// The VM's working directory.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Opens another QMP session on the VM's own socket.
    ///
    /// # Errors
    /// The socket does not answer; the failure carries console and stderr.
    pub fn qmp(&self) -> Result<Qmp> {
        let logs = self.child.logs();
        match Qmp::connect(&self.dir.path().join("q.sock"), START) {
            Ok(qmp) => Ok(qmp.with_logs(&logs)),
            Err(failure) => Err(failure.with_logs(&logs)),
        }
    }

    /// All processes of the VM but the launcher.
    ///
    /// # Errors
    /// /proc is unreadable.
    pub fn processes(&self) -> Result<Vec<Process>> {
        descendants(self.child.pid())
    }

    /// Signals the launcher.
    ///
    /// # Errors
    /// As [`Child::signal`].
    pub fn signal(&self, signal: Signal) -> Result<()> {
        self.child.signal(signal)
    }

    /// Waits for the launcher's end.
    ///
    /// # Errors
    /// It runs on after `limit`.
    pub fn wait(&self, limit: Duration) -> Result<ExitStatus> {
        self.child.wait(limit)
    }

    /// Waits for the launcher's end, which must be exit status 0.
    ///
    /// # Errors
    /// Another status, or none within `limit`.
    pub fn wait_success(&self, limit: Duration) -> Result<()> {
        let status = self.wait(limit)?;
        if status.success() {
            Ok(())
        } else {
            Err(self.failure(&format!("the launcher ended with {status}")))
        }
    }

    /// A failure that carries console and stderr.
    pub fn failure(&self, message: &str) -> Failure {
        Failure::new(message).with_logs(&self.child.logs())
    }
}
