//! Debian's QEMU, the oracle.

use std::path::PathBuf;
use std::process::Command;

use bulkhead_framework::{Child, Result, Scratch};

/// A running QEMU whose guest does nothing, stopped at its start.
pub struct Qemu {
    scratch: Scratch,
    _child: Child,
}

impl Qemu {
    /// Starts it with one QMP socket.
    ///
    /// # Errors
    /// It is not installed.
    pub fn start() -> Result<Self> {
        let scratch = Scratch::new()?;
        // The reset vector holds a jump to itself: a guest that runs causes no event of its own.
        let mut firmware = vec![0; 64 << 10];
        if let Some(vector) = firmware.get_mut(0xFFF0..0xFFF2) {
            vector.copy_from_slice(&[0xEB, 0xFE]);
        }
        let bios = scratch.path().join("bios");
        std::fs::write(&bios, firmware)?;
        let mut command = Command::new("qemu-system-x86_64");
        command.args(["-M", "pc", "-accel", "tcg", "-S", "-nodefaults", "-display", "none", "-m", "16"]);
        command.args(["-smp", "2", "-serial", "null", "-bios"]).arg(&bios);
        let free = scratch.path().join("free");
        command.arg("-chardev").arg(format!("socket,id=free,path={},server=on,wait=off", free.display()));
        command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", scratch.path().join("qmp0").display()));
        let child = Child::start(&mut command, "QEMU output", "QEMU errors")?;
        Ok(Self { scratch, _child: child })
    }

    /// Path of the socket.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        self.scratch.path().join("qmp0")
    }
}
