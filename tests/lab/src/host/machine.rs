//! L1: a Debian kernel with nested KVM under QEMU's software emulation.
//!
//! Its first serial port is the console, which goes to a log file. The second carries the protocol with the
//! agent, as lines: requests down, and up what [`Line`] lists.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use bulkhead_framework::{Child, Failure, Result};

use super::image::{Image, Kind};

/// How long L1 may take from start to its agent. It is 4 s on a free machine, 7 s with systemd.
const BOOT: Duration = Duration::from_secs(120);

/// No L1 outlives this, whatever happens to its owner.
const LIFETIME: &str = "1800";

/// Guest memory that is never touched costs nothing, here as in L2.
const MEMORY: &str = "3072";

/// What every L1's kernel is told. Without no_timer_check it panics now and then on a loaded host: its timer seems not
/// to tick.
const KERNEL_LINE: &str = "console=ttyS0 quiet no_timer_check panic=-1 mitigations=off init_on_alloc=0 audit=0 rcupdate.rcu_expedited=1";

/// What systemd's L1 adds. The kernel has NVMe and ext4 built in, so there is no initramfs.
const SYSTEMD_LINE: &str = "root=/dev/nvme0n1 rootfstype=ext4 rw systemd.show_status=0";

/// A running L1 whose agent waits for a request.
pub struct Machine {
    qemu: Child,
    console: PathBuf,
    /// Time from the start of QEMU to the agent.
    pub boot: Duration,
}

/// What the agent says: a keyword, a space, and text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Line {
    /// Part of a log: its name and a line.
    Log(String, String),
    /// A line of a program's output.
    Out(String),
}

impl Machine {
    /// Boots L1. Its console goes to `console`.
    ///
    /// # Errors
    /// QEMU cannot be started or the agent does not answer.
    pub fn boot(image: &Image, console: &Path) -> Result<Self> {
        // QEMU 7.2 hangs now and then with thread=multi and more than one CPU: a kernel text patch.
        let mut command = Command::new("setpriv");
        // However this thread ends, QEMU does not stay behind.
        command.args(["--pdeathsig", "TERM", "timeout", "--kill-after=5", LIFETIME, "qemu-system-x86_64"]);
        command.args(["-machine", "pc", "-accel", "tcg,thread=multi,tb-size=512"]);
        // With XSAVE, L2's XSETBV does not reach KVM under QEMU 7.2: CPUID 0xd keeps its reset size and Linux warns.
        command.args(["-cpu", "max,+svm,-la57,-xsave"]);
        command.args([
            "-smp",
            "1",
            "-m",
            MEMORY,
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
        ]);
        command.arg("-serial").arg(format!("file:{}", console.display()));
        command.args(["-chardev", "stdio,id=agent,signal=off", "-serial", "chardev:agent"]);
        command.arg("-kernel").arg(&image.kernel);
        match image.kind {
            Kind::Busybox => command.arg("-initrd").arg(&image.file).args(["-append", KERNEL_LINE]),
            Kind::Systemd => {
                let file = format!(
                    "if=none,id=root,file={},format=raw,snapshot=on,cache=unsafe",
                    image.file.display()
                );
                command.args(["-drive", &file, "-device", "nvme,drive=root,serial=lab"]);
                command.args(["-append", &format!("{KERNEL_LINE} {SYSTEMD_LINE}")])
            }
        };
        let start = Instant::now();
        let qemu = Child::start(&mut command, "L1 agent", "QEMU")?;
        let mut machine = Self { qemu, console: console.to_owned(), boot: Duration::ZERO };
        let ready = machine.qemu.stdout().expect("agent ready\n", BOOT);
        ready.map_err(|failure| machine.explain(failure.context("L1 does not start")))?;
        machine.boot = start.elapsed();
        Ok(machine)
    }

    /// Sends one request and hands each line that comes back to `seen`, up to the last.
    ///
    /// # Errors
    /// L1 ended, or the request took longer than `limit`. L1 is of no further use then.
    pub fn request(
        &mut self,
        request: &str,
        limit: Duration,
        mut seen: impl FnMut(Line),
    ) -> Result<std::result::Result<(), String>> {
        let end = Instant::now() + limit;
        self.qemu.write(format!("{request}\n").as_bytes())?;
        let mut reason: Vec<String> = Vec::new();
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let line = self.qemu.stdout().expect_line("", left);
            let line = line.map_err(|failure| self.explain(failure.context(format!("L1 at {request:?}"))))?;
            match line.split_once(' ').unwrap_or((&line, "")) {
                ("passed", _) => return Ok(Ok(())),
                ("failed", _) => return Ok(Err(reason.join("\n"))),
                ("why", text) => reason.push(text.to_owned()),
                ("out", text) => seen(Line::Out(text.to_owned())),
                ("log", text) => {
                    let (name, text) = text.split_once('\t').unwrap_or(("L1", text));
                    seen(Line::Log(name.to_owned(), text.to_owned()));
                }
                _ => return Err(self.explain(Failure::new(format!("L1 says {line:?} to {request:?}")))),
            }
        }
    }

    /// Adds the end of L1's console to a failure.
    fn explain(&self, failure: Failure) -> Failure {
        let console = bulkhead_framework::Transcript::new("console of L1");
        console.push(&std::fs::read(&self.console).unwrap_or_default());
        failure.with_logs(&[console, self.qemu.stderr().clone()])
    }
}
