//! VMs under systemd: machine files, units, their processes and sockets, as an administrator would use them.

use std::fs;
use std::io::Write as _;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use bulkhead_framework::{Failure, Process, Qmp, Result, Transcript, process};

use super::Journal;
use super::debian::{APPEND, BOOT, SAY_WATCHED, SOON, UP, WATCH_BUTTON};
use crate::paths;

/// Units of a VM that run a process as long as it lives.
pub const PARTS: [&str; 4] = ["opener", "core", "console", "broker"];

/// Every socket and pipe of a VM, below /run.
pub const SOCKETS: [&str; 12] = [
    "bulkhead/NAME/operator",
    "bulkhead/NAME/monitor",
    "bulkhead/NAME/console",
    "bulkhead/NAME/serial",
    "bulkhead-inner/NAME/boot",
    "bulkhead-inner/NAME/job",
    "bulkhead-inner/NAME/core",
    "bulkhead-inner/NAME/console",
    "bulkhead-inner/NAME/broker",
    "bulkhead-inner/NAME/loader",
    "bulkhead-inner/NAME/dump",
    "bulkhead-inner/NAME/pci",
];

/// Seconds after which a tool is killed; a VM that is switched off may take 75.
const TOOL: &str = "100";

/// Runs a tool to its end.
///
/// # Errors
/// It cannot be started.
pub fn output(words: &[&str]) -> Result<Output> {
    Command::new("timeout")
        .arg(TOOL)
        .args(words)
        .output()
        .map_err(|error| Failure::new(format!("{}: {error}", words.join(" "))))
}

/// Runs a tool that must succeed and returns what it prints.
///
/// # Errors
/// It fails.
pub fn tool(words: &[&str]) -> Result<String> {
    let output = output(words)?;
    let said = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    if output.status.success() {
        return Ok(said);
    }
    let error = String::from_utf8_lossy(&output.stderr);
    Err(Failure::new(format!("{}: {}: {said}{error}", words.join(" "), output.status)))
}

/// Fails with `message` unless `holds`.
///
/// # Errors
/// It does not hold.
pub fn check(holds: bool, message: impl FnOnce() -> String) -> Result<()> {
    if holds { Ok(()) } else { Err(Failure::new(message())) }
}

/// Tries until `found` has something; looks every 20 ms.
///
/// # Errors
/// It has not within `limit`.
pub fn wait_for<T>(what: &str, limit: Duration, mut found: impl FnMut() -> Option<T>) -> Result<T> {
    let end = Instant::now() + limit;
    loop {
        if let Some(found) = found() {
            return Ok(found);
        }
        check(Instant::now() < end, || format!("{what}: not within {limit:?}"))?;
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A VM with a machine file that boots Debian's kernel.
pub struct UnitVm {
    /// Its name.
    pub name: &'static str,
    /// The guest's serial port, once [`UnitVm::attach`] has connected to it.
    pub serial: Transcript,
    port: Option<UnixStream>,
    asked: u32,
}

impl UnitVm {
    /// Writes machine file and directory. `more` is added to the file.
    ///
    /// # Errors
    /// They cannot be written.
    pub fn install(name: &'static str, more: &str) -> Result<Self> {
        let dir = format!("/var/lib/bulkhead/{name}");
        fs::create_dir_all(&dir)?;
        fs::create_dir_all("/etc/bulkhead")?;
        for (file, from) in [("vmlinuz", paths::KERNEL), ("initrd", paths::INITRD)] {
            fs::copy(from, format!("{dir}/{file}"))?;
        }
        let text =
            format!("m = \"192M\"\nkernel = \"vmlinuz\"\ninitrd = \"initrd\"\nappend = \"{APPEND}\"\n{more}");
        fs::write(format!("/etc/bulkhead/{name}.toml"), text)?;
        Ok(Self { name, serial: Transcript::new(format!("serial {name}")), port: None, asked: 0 })
    }

    /// Name of its target.
    pub fn target(&self) -> String {
        format!("bulkhead@{}.target", self.name)
    }

    /// Name of the service of a part.
    pub fn service(&self, part: &str) -> String {
        format!("bulkhead-{part}@{}.service", self.name)
    }

    /// Connects to the serial port.
    ///
    /// # Errors
    /// Nobody listens.
    pub fn attach(&mut self, journal: &mut Journal) -> Result<()> {
        let path = format!("/run/bulkhead/{}/serial", self.name);
        let stream = UnixStream::connect(&path).map_err(|error| Failure::new(format!("{path}: {error}")))?;
        self.serial = Transcript::of(format!("serial {}", self.name), stream.try_clone()?);
        journal.keep(std::slice::from_ref(&self.serial));
        self.port = Some(stream);
        Ok(())
    }

    /// Has the guest power off when its button is pressed, which a stop of the VM waits for.
    ///
    /// # Errors
    /// The guest does not say that it will.
    pub fn watch_button(&mut self) -> Result<()> {
        self.shell(&format!("{WATCH_BUTTON}\n{SAY_WATCHED}"))?;
        self.serial.expect("waiting for the button", SOON)
    }

    /// Runs shell code in the guest.
    ///
    /// # Errors
    /// The serial port takes nothing.
    pub fn shell(&mut self, code: &str) -> Result<()> {
        let port = self.port.as_mut().ok_or("the serial port is not attached")?;
        Ok(port.write_all(format!("{code}\n").as_bytes())?)
    }

    /// Runs shell code in the guest and returns its output, with white space made one blank.
    ///
    /// # Errors
    /// The guest does not answer within `limit`.
    pub fn ask(&mut self, code: &str, limit: Duration) -> Result<String> {
        self.asked += 1;
        let mark = format!("answer {}: ", self.asked);
        self.shell(&format!("echo \"{mark}\"$({code})"))?;
        self.serial.expect_line(&mark, limit)
    }

    /// Waits until init says that it is up, once more. What is typed before is lost.
    ///
    /// # Errors
    /// It does not.
    pub fn wait_for_user_space(&mut self) -> Result<()> {
        self.serial.expect(UP, 2 * BOOT)
    }

    /// A QMP session on the socket of a role.
    ///
    /// # Errors
    /// The broker does not serve.
    pub fn qmp(&self, role: &str, journal: &mut Journal) -> Result<Qmp> {
        let qmp = Qmp::connect(Path::new(&format!("/run/bulkhead/{}/{role}", self.name)), SOON)?;
        journal.keep(std::slice::from_ref(qmp.wire()));
        Ok(qmp)
    }

    /// The main process of a part.
    ///
    /// # Errors
    /// It does not run.
    pub fn process(&self, part: &str) -> Result<Process> {
        let unit = self.service(part);
        let pid = tool(&["systemctl", "show", "--value", "--property=MainPID", &unit])?;
        let pid = pid.parse().ok().filter(|pid| *pid != 0);
        process(pid.ok_or_else(|| Failure::new(format!("{unit} has no process")))?)
    }

    /// What is left of the VM: processes of its slice, sockets, and users that systemd made.
    ///
    /// # Errors
    /// /proc is unreadable.
    pub fn left(&self) -> Result<Vec<String>> {
        let mut left = Vec::new();
        let name = self.name;
        let slice = format!("bulkhead-{name}.slice");
        for entry in fs::read_dir("/proc")? {
            let path = entry?.path();
            // A process may end meanwhile, and most entries are none.
            let cgroup = fs::read_to_string(path.join("cgroup")).unwrap_or_default();
            if cgroup.contains(&slice) {
                let comm = fs::read_to_string(path.join("comm")).unwrap_or_default();
                left.push(format!("process {} {}", path.display(), comm.trim()));
            }
        }
        for path in SOCKETS.map(|path| format!("/run/{}", path.replace("NAME", name))) {
            if fs::symlink_metadata(&path).is_ok() {
                left.push(path);
            }
        }
        for part in PARTS {
            let group = format!("/sys/fs/cgroup/bulkhead.slice/{slice}/{}", self.service(part));
            if Path::new(&group).exists() {
                left.push(group);
            }
            let user = format!("bh-{part}-{name}");
            if output(&["getent", "passwd", &user])?.status.success() {
                left.push(format!("user {user}"));
            }
        }
        Ok(left)
    }
}

/// Ends every VM and removes every machine file, whatever a case has left.
///
/// # Errors
/// systemd does not answer.
pub fn clean() -> Result<()> {
    // There may be nothing to kill.
    output(&["systemctl", "kill", "--signal=KILL", "bulkhead-*@*.service"])?;
    output(&["systemctl", "stop", "bulkhead*"])?;
    output(&["systemctl", "reset-failed"])?;
    for dir in ["/etc/bulkhead", "/var/lib/private/bulkhead"] {
        // It may not be there.
        let _ = fs::remove_dir_all(dir);
    }
    let _ = fs::remove_dir_all("/var/lib/bulkhead");
    Ok(())
}

/// The system's log since the case began.
///
/// # Errors
/// It cannot be read.
pub fn log_since(seconds: u64) -> Result<Transcript> {
    let log = Transcript::new("journal of L1");
    let since = format!("--since=@{seconds}");
    log.push(&output(&["journalctl", "--no-pager", "--output=short-monotonic", &since])?.stdout);
    Ok(log)
}
