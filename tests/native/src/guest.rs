//! A VM with the native guest.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use bulkhead_framework::{Failure, Process, Qmp, Result, Transcript, Vm, VmBuilder, launcher_path};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::{CLEAN, Enter as _, SOON, Step, Trace, eventually};

/// What to start.
pub struct Setup {
    builder: VmBuilder,
    name: String,
    steps: Vec<Step>,
    owner: Option<u32>,
    expected: Vec<&'static str>,
    disk: Option<u64>,
    log: &'static str,
}

/// A running VM with the native guest.
pub struct Guest {
    vm: Vm,
    trace: Trace,
    expected: Vec<&'static str>,
}

impl Setup {
    /// The embedded guest with `append` as its command line, and further arguments of the launcher.
    pub fn new(append: &str, args: &[&str]) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("native-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let builder = Vm::builder().args(["-name", &name, "-append", append]).args(args);
        Self {
            builder,
            name,
            steps: Vec::new(),
            owner: None,
            expected: Vec::new(),
            disk: None,
            log: "notice",
        }
    }

    /// Changes what the framework builds.
    #[must_use]
    pub fn with(mut self, change: impl FnOnce(VmBuilder) -> VmBuilder) -> Self {
        self.builder = change(self.builder);
        self
    }

    /// Makes `steps` before the launcher's exec.
    #[must_use]
    pub fn steps(mut self, steps: &[Step]) -> Self {
        self.steps.extend_from_slice(steps);
        let mut owners =
            steps.iter().filter_map(|step| if let Step::User(uid, ..) = step { Some(*uid) } else { None });
        self.owner = owners.next_back().or(self.owner);
        self
    }

    /// A file that the VM makes and that is to stay.
    #[must_use]
    pub fn leaves(mut self, file: &'static str) -> Self {
        self.expected.push(file);
        self
    }

    /// Puts a file `disk.img` of so many bytes into its directory.
    #[must_use]
    pub fn disk(mut self, size: u64) -> Self {
        self.disk = Some(size);
        self.leaves("disk.img")
    }

    /// What is logged, as a level of `BULKHEAD_LOG`; without it notices and more serious things.
    #[must_use]
    pub fn log(mut self, level: &'static str) -> Self {
        self.log = level;
        self
    }

    /// Starts it.
    ///
    /// # Errors
    /// The launcher cannot be started.
    pub fn start(self) -> Result<Guest> {
        self.start_in(|_| Ok(()))
    }

    /// Starts it after `prepare` has put something into its directory.
    ///
    /// # Errors
    /// As [`Setup::start`], or those of `prepare`.
    pub fn start_in(self, prepare: impl FnOnce(&Path) -> Result<()>) -> Result<Guest> {
        let Self { builder, name, steps, owner, expected, disk, log } = self;
        let vm = builder.start_with(|command: &mut Command, dir: &Path| {
            std::os::unix::fs::chown(dir, owner, owner)?;
            if let Some(size) = disk {
                let path = dir.join("disk.img");
                fs::File::create(&path)?.set_len(size)?;
                std::os::unix::fs::chown(path, owner, owner)?;
            }
            prepare(dir)?;
            // What the launcher makes for a moment is to be seen if it stays.
            command.env("XDG_RUNTIME_DIR", dir).env("BULKHEAD_LOG", log).enter(&steps);
            Ok(())
        })?;
        let trace = Trace::new(name, vm.dir());
        Ok(Guest { vm, trace, expected })
    }
}

impl Guest {
    /// Boots `test=...` with further arguments of the launcher.
    ///
    /// # Errors
    /// As [`Setup::start`].
    pub fn boot(append: &str, args: &[&str]) -> Result<Self> {
        Setup::new(append, args).start()
    }

    /// The VM.
    pub fn vm(&mut self) -> &mut Vm {
        &mut self.vm
    }

    /// Its processes and files.
    pub fn trace(&self) -> &Trace {
        &self.trace
    }

    /// The guest's console.
    pub fn console(&self) -> &Transcript {
        self.vm.console()
    }

    /// What the launcher and the compartments have logged so far.
    pub fn stderr(&self) -> String {
        self.vm.stderr().text()
    }

    /// Waits for `text` on the console.
    ///
    /// # Errors
    /// It does not come; the failure carries console and stderr.
    pub fn expect(&self, text: &str) -> Result<()> {
        self.console().expect(text, SOON).map_err(|failure| self.explain(failure))
    }

    /// Waits for a line that begins with `prefix`, and returns its rest.
    ///
    /// # Errors
    /// As [`Guest::expect`].
    pub fn line(&self, prefix: &str) -> Result<String> {
        self.console().expect_line(prefix, SOON).map_err(|failure| self.explain(failure))
    }

    /// Adds the VM's logs to a failure.
    pub fn explain(&self, failure: Failure) -> Failure {
        failure.with_logs(&[self.console().clone(), self.vm.stderr().clone()])
    }

    /// A failure with the VM's logs unless `condition` holds.
    ///
    /// # Errors
    /// It does not.
    pub fn check(&self, condition: bool, message: &str) -> Result<()> {
        if condition { Ok(()) } else { Err(self.vm.failure(message)) }
    }

    /// A negotiated session on `q.sock`.
    ///
    /// # Errors
    /// The socket does not answer.
    pub fn qmp(&self) -> Result<Qmp> {
        self.vm.qmp()
    }

    /// Waits until the guest runs; returns the session that says so.
    ///
    /// # Errors
    /// It does not.
    pub fn running(&self) -> Result<Qmp> {
        let mut qmp = self.qmp()?;
        eventually("run state running", SOON, || match qmp.status() {
            Ok(status) if status == "running" => Ok(()),
            Ok(status) => Err(status),
            Err(failure) => Err(failure.to_string()),
        })
        .map_err(|failure| self.explain(failure))?;
        Ok(qmp)
    }

    /// The process `bulkhead-NAME`.
    ///
    /// # Errors
    /// There is none.
    pub fn process(&self, name: &str) -> Result<Process> {
        let found = self.trace.wait_for(&format!("bulkhead-{name}"), SOON);
        found.map_err(|failure| self.explain(failure))
    }

    /// Kills the process `bulkhead-NAME` with SIGKILL.
    ///
    /// # Errors
    /// There is none.
    pub fn kill(&self, name: &str) -> Result<()> {
        kill_pid(self.process(name)?.pid)
    }

    /// Waits for the launcher's end with `status`; then nothing of the VM may be left.
    ///
    /// # Errors
    /// It ends otherwise, or not, or leaves something.
    pub fn ends(&self, status: i32) -> Result<()> {
        let end = self.vm.wait(SOON)?;
        self.check(end.code() == Some(status), &format!("the launcher ended with {end}, not {status}"))?;
        self.nothing_left()
    }

    /// Waits until nothing of the VM is left.
    ///
    /// # Errors
    /// Something is.
    pub fn nothing_left(&self) -> Result<()> {
        let left = self.trace.nothing_left(&self.expected, CLEAN);
        left.map_err(|failure| self.explain(failure))
    }

    /// Ends the VM by `quit`.
    ///
    /// # Errors
    /// As [`Guest::ends`].
    pub fn quit(&self) -> Result<()> {
        self.qmp()?.execute("quit", json!({}))?;
        self.ends(0)
    }

    /// What the VM said by itself: standard error but for the lines about clients' commands.
    fn own_lines(&self) -> usize {
        self.vm.stderr().text().lines().filter(|line| !line.starts_with("bulkhead-broker: qmp ")).count()
    }

    /// What was said: standard error, which must be one line that starts with `bulkhead` and has all of `words`,
    /// beside those about commands.
    ///
    /// # Errors
    /// It said something else.
    pub fn said(&self, words: &[&str]) -> Result<()> {
        let one = self.own_lines() == 1;
        self.check(one, &format!("standard error is not one line with {words:?}"))?;
        self.said_among(words)
    }

    /// As [`Guest::said`], where one more line may say what another process saw of the same event.
    ///
    /// # Errors
    /// As [`Guest::said`].
    pub fn said_among(&self, words: &[&str]) -> Result<()> {
        let text = self.vm.stderr().text();
        let has = |line: &str| line.starts_with("bulkhead") && words.iter().all(|word| line.contains(word));
        let good = text.ends_with('\n') && self.own_lines() <= 2 && text.lines().any(has);
        self.check(good, &format!("no line of standard error has {words:?}"))
    }

    /// Waits until the next event `name`, which must have this data.
    ///
    /// # Errors
    /// Other data, or no event.
    pub fn event(&self, qmp: &mut Qmp, name: &str, data: &Value) -> Result<()> {
        let event = qmp.event(name, SOON)?;
        let found = event.get("data").unwrap_or(&Value::Null);
        self.check(found == data, &format!("{name} with {found}, not {data}"))
    }
}

/// Sends SIGKILL.
///
/// # Errors
/// There is no such process.
pub fn kill_pid(pid: i32) -> Result<()> {
    Ok(kill(Pid::from_raw(pid), Signal::SIGKILL).map_err(|error| format!("kill {pid}: {error}"))?)
}

/// Copies the launcher and, of its compartments, `binaries` into `dir/bin`, where every user can run them; returns
/// the launcher's path.
///
/// # Errors
/// A binary is missing.
pub fn install(dir: &Path, binaries: &[&str]) -> Result<PathBuf> {
    let bin = dir.join("bin");
    fs::create_dir(&bin)?;
    let launcher = launcher_path();
    let beside = launcher.parent().unwrap_or(Path::new("."));
    for binary in [&["bulkhead"], binaries].concat() {
        let (from, to) = (beside.join(binary), bin.join(binary));
        fs::copy(&from, &to).map_err(|error| format!("{}: {error}", from.display()))?;
        fs::set_permissions(&to, fs::Permissions::from_mode(0o755))?;
    }
    Ok(bin.join("bulkhead"))
}
