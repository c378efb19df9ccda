//! What the figures are measured with: our launcher, Debian's QEMU, the native guest.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use bulkhead_framework::{Child, Failure, Result, Scratch, launcher_path};

const QEMU: &str = "qemu-system-x86_64";
/// Guest RAM on both sides, in MiB.
const RAM: &str = "256";

/// The two sides.
pub struct Host {
    scratch: Scratch,
    launcher: PathBuf,
    qemu: String,
}

impl Host {
    /// Looks for both.
    ///
    /// # Errors
    /// One of them is missing.
    pub fn look() -> Result<Self> {
        let launcher = launcher_path();
        if !launcher.exists() {
            return Err(format!("{} is missing: use `make bench`", launcher.display()).into());
        }
        let output = Command::new(QEMU).arg("--version").output();
        let output = output.map_err(|error| Failure::new(format!("{QEMU}: {error}: use `make setup`")))?;
        let version = String::from_utf8_lossy(&output.stdout);
        let qemu = version.lines().next().unwrap_or_default().replace(" emulator version", "");
        let scratch = Scratch::new()?;
        fs::write(scratch.path().join("guest.elf"), bulkhead_guest::ELF)?;
        Ok(Self { scratch, launcher, qemu })
    }

    /// The host and the reference in one line.
    pub fn describe(&self) -> String {
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
        let load = load.split_whitespace().next().unwrap_or("?");
        format!("{cpus} processors, load {load}; reference: {}, -M microvm on the same KVM", self.qemu)
    }

    /// Says why there can be no guests here.
    ///
    /// # Errors
    /// This user has no KVM.
    pub fn needs_kvm(&self) -> Result<()> {
        let opened = fs::File::options().read(true).write(true).open("/dev/kvm");
        opened.map(drop).map_err(|error| Failure::new(format!("/dev/kvm: {error}: see `bulkhead doctor`")))
    }

    /// A directory for sockets.
    pub fn dir(&self) -> &Path {
        self.scratch.path()
    }

    /// `bulkhead run` with the native guest on stdio.
    pub fn ours(&self, test: &str) -> Command {
        self.ours_on("stdio", test)
    }

    /// `bulkhead run` with the native guest on that serial device.
    pub fn ours_on(&self, serial: &str, test: &str) -> Command {
        let mut command = Command::new(&self.launcher);
        command.args(["run", "-m", RAM, "-serial", serial, "-kernel"]).arg(self.dir().join("guest.elf"));
        command.arg("-append").arg(format!("test={test}"));
        command
    }

    /// QEMU with the same guest on stdio. Its RAM is a memfd, so that /proc tells it from the rest.
    pub fn qemu(&self, test: &str) -> Command {
        self.qemu_as("microvm,isa-serial=on,memory-backend=ram", test, RAM)
    }

    /// The same with a PCIe bus and so many MiB.
    pub fn qemu_with_pci(&self, test: &str, memory: u32) -> Command {
        self.qemu_as("microvm,pcie=on,acpi=on,isa-serial=on,memory-backend=ram", test, &memory.to_string())
    }

    fn qemu_as(&self, machine: &str, test: &str, memory: &str) -> Command {
        let mut command = Command::new(QEMU);
        command
            // A KVM inside of another one may list bits of ARCH_CAPABILITIES that it refuses to set.
            .args(["-accel", "kvm", "-cpu", "host,arch-capabilities=off"])
            .args(["-nodefaults", "-no-user-config", "-display", "none"])
            .args(["-M", machine, "-m", memory])
            .args(["-object", &format!("memory-backend-memfd,id=ram,size={memory}M,share=on")])
            .args([OsStr::new("-kernel"), self.dir().join("guest.elf").as_os_str()])
            .args(["-serial", "stdio", "-append"])
            .arg(format!("test={test}"));
        command
    }

    /// Adds a QMP socket of that name to a command and starts it.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn with_qmp(&self, mut command: Command, socket: &str) -> Result<(Child, PathBuf)> {
        let path = self.dir().join(socket);
        command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", path.display()));
        Ok((Child::start(&mut command, "console", "stderr")?, path))
    }
}
