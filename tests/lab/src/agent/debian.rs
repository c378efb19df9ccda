//! A VM that runs Debian's unmodified kernel, whose init executes what is typed on the console.

use std::path::Path;
use std::time::Duration;

use bulkhead_framework::{Failure, Qmp, Result, Vm, VmBuilder};
use serde_json::Value;

use super::Journal;
use crate::paths;

/// How long the guest may take to user space; it is 4 to 6 s on a free machine.
pub const BOOT: Duration = Duration::from_secs(60);

/// How long anything else may take.
pub const SOON: Duration = Duration::from_secs(30);

/// What init prints when user space is there.
pub const UP: &str = "guest is up";

/// The kernel's command line, but for what a case adds.
pub const APPEND: &str = "console=ttyS0 quiet";

/// Reads the next event of every input device and powers off when it is KEY_POWER pressed: 24 bytes, at the end
/// type 1, code 116 (hexadecimal 74), value 1.
pub const WATCH_BUTTON: &str = "for e in /dev/input/event*; do \
    (dd if=$e bs=24 count=1 2>/dev/null | hexdump -v -e '12/2 \"%04x \"' | grep -q '0001 0074 0001 0000' && \
    echo KEY_POWER pressed && poweroff -f) & done";

/// Says so when all input devices are being read.
pub const SAY_WATCHED: &str = "until [ $(ls -l /proc/[0-9]*/fd 2>/dev/null | grep -c /dev/input/event) = \
    $(ls /dev/input/event* | wc -l) ]; do usleep 10000; done; echo waiting for the button";

/// A Debian guest and a QMP session to it.
pub struct Debian {
    /// The VM.
    pub vm: Vm,
    /// The session.
    pub qmp: Qmp,
    asked: u32,
}

impl Debian {
    /// Starts a guest, with `args` for the launcher and `append` for the kernel.
    ///
    /// # Errors
    /// The VM does not start.
    pub fn start(journal: &mut Journal, args: &[&str], append: &str) -> Result<Self> {
        Self::start_from(Vm::builder(), journal, args, append)
    }

    /// Starts a guest from a prepared builder.
    ///
    /// # Errors
    /// As [`Debian::start`].
    pub fn start_from(
        builder: VmBuilder,
        journal: &mut Journal,
        args: &[&str],
        append: &str,
    ) -> Result<Self> {
        let append = format!("{APPEND} {append}");
        let vm = builder
            .args(args)
            .kernel(Path::new(paths::KERNEL), Path::new(paths::INITRD), append.trim())
            .start()?;
        journal.keep(&[vm.console().clone(), vm.stderr().clone()]);
        let qmp = vm.qmp()?;
        journal.keep(&[qmp.wire().clone()]);
        Ok(Self { vm, qmp, asked: 0 })
    }

    /// Starts a guest and waits for its user space.
    ///
    /// # Errors
    /// It does not get there.
    pub fn boot(journal: &mut Journal, args: &[&str], append: &str) -> Result<Self> {
        let debian = Self::start(journal, args, append)?;
        debian.wait_for_user_space()?;
        Ok(debian)
    }

    /// Waits until init says that it is up, once more.
    ///
    /// # Errors
    /// It does not; the failure carries console and stderr.
    pub fn wait_for_user_space(&self) -> Result<()> {
        self.expect_within(UP, BOOT)
    }

    /// Waits for `pattern` on the console.
    ///
    /// # Errors
    /// It does not come.
    pub fn expect(&self, pattern: &str) -> Result<()> {
        self.expect_within(pattern, SOON)
    }

    fn expect_within(&self, pattern: &str, limit: Duration) -> Result<()> {
        let logs = [self.vm.stderr().clone(), self.qmp.wire().clone()];
        self.vm.console().expect(pattern, limit).map_err(|failure| failure.with_logs(&logs))
    }

    /// Runs shell code in the guest.
    ///
    /// # Errors
    /// The console takes no input.
    pub fn shell(&mut self, code: &str) -> Result<()> {
        self.vm.type_in(&format!("{code}\n"))
    }

    /// Runs shell code in the guest and returns its output with every white space made one blank.
    ///
    /// # Errors
    /// The guest does not answer.
    pub fn ask(&mut self, code: &str) -> Result<String> {
        self.asked += 1;
        let mark = format!("answer {}: ", self.asked);
        self.shell(&format!("echo \"{mark}\"$({code})"))?;
        let logs = [self.vm.stderr().clone(), self.qmp.wire().clone()];
        self.vm.console().expect_line(&mark, SOON).map_err(|failure| failure.with_logs(&logs))
    }

    /// Runs shell code in the guest whose output is a number.
    ///
    /// # Errors
    /// It is none.
    pub fn ask_number(&mut self, code: &str) -> Result<u64> {
        let answer = self.ask(code)?;
        answer.parse().map_err(|_| self.failure(&format!("{code}: {answer:?} is not a number")))
    }

    /// Fails with `message` and all logs unless `holds`.
    ///
    /// # Errors
    /// The condition does not hold.
    pub fn check(&self, holds: bool, message: &str) -> Result<()> {
        if holds { Ok(()) } else { Err(self.failure(message)) }
    }

    /// Waits for an event `name` with exactly this data; others of that name may come first.
    ///
    /// # Errors
    /// No such event.
    pub fn event(&mut self, name: &str, data: &Value) -> Result<()> {
        loop {
            let event =
                self.qmp.event(name, SOON).map_err(|failure| failure.context(format!("data {data}")))?;
            if event.get("data") == Some(data) {
                return Ok(());
            }
        }
    }

    /// Runs a QMP command without arguments that must succeed. Events from before it are forgotten.
    ///
    /// # Errors
    /// It fails.
    pub fn command(&mut self, name: &str) -> Result<()> {
        self.qmp.pending_events();
        self.qmp.execute(name, serde_json::json!({})).map(drop)
    }

    /// Fails unless `query-status` says `status`.
    ///
    /// # Errors
    /// It says another.
    pub fn check_status(&mut self, status: &str) -> Result<()> {
        let found = self.qmp.status()?;
        self.check(found == status, &format!("the run state is {found:?} instead of {status:?}"))
    }

    /// Waits for the launcher's end with status 0.
    ///
    /// # Errors
    /// It runs on or fails.
    pub fn ends(&self) -> Result<()> {
        self.vm.wait_success(SOON)
    }

    /// A failure with all logs.
    pub fn failure(&self, message: &str) -> Failure {
        self.vm.failure(message).with_logs(std::slice::from_ref(self.qmp.wire()))
    }
}

/// Makes the guest power off when its power button is pressed, after saying `KEY_POWER pressed`.
///
/// # Errors
/// The guest does not answer.
pub fn watch_button(vm: &mut Vm) -> Result<()> {
    vm.type_in(&format!("{WATCH_BUTTON}\n{SAY_WATCHED}\n"))?;
    vm.console().expect("waiting for the button", SOON)
}
