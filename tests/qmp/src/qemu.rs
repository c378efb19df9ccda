//! Debian's QEMU, the oracle.

use std::path::PathBuf;
use std::process::Command;

use bulkhead_framework::{Child, Result, Scratch};

use crate::memory;

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
        Self::with(&["-M", "pc", "-m", "16"])
    }

    /// Starts it with ports and devices, which no guest has set up.
    ///
    /// # Errors
    /// It is not installed.
    pub fn with_devices() -> Result<Self> {
        let devices = [
            "pcie-root-port,id=rp0,chassis=1,addr=1",
            "pcie-root-port,id=rp1,chassis=2,addr=2",
            "virtio-balloon-pci,id=b0,addr=3,disable-legacy=on",
            "virtio-blk-pci,drive=d0,addr=4,disable-legacy=on",
        ];
        let mut args = vec!["-M", "q35", "-m", "64", "-drive", "if=none,id=d0,driver=null-co"];
        args.extend(["-object", "iothread,id=io0"]);
        // What no device uses yet.
        args.extend(["-drive", "if=none,id=hd,driver=null-co"]);
        args.extend(devices.iter().flat_map(|device| ["-device", device]));
        Self::with(&args)
    }

    /// Starts it with memory devices.
    ///
    /// # Errors
    /// It is not installed.
    pub fn with_memory() -> Result<Self> {
        let devices = memory::DEVICES.iter().flat_map(|device| ["-device", device]);
        Self::with(
            &[&["-M", "q35"], &memory::ARGS[..]].concat().into_iter().chain(devices).collect::<Vec<_>>(),
        )
    }

    fn with(machine: &[&str]) -> Result<Self> {
        let scratch = Scratch::new()?;
        // The reset vector holds a jump to itself: a guest that runs causes no event of its own.
        let mut firmware = vec![0; 64 << 10];
        if let Some(vector) = firmware.get_mut(0xFFF0..0xFFF2) {
            vector.copy_from_slice(&[0xEB, 0xFE]);
        }
        let bios = scratch.path().join("bios");
        std::fs::write(&bios, firmware)?;
        let mut command = Command::new("qemu-system-x86_64");
        command.args(machine).args(["-accel", "tcg", "-S", "-nodefaults", "-display", "none"]);
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
