//! QEMU's storage daemon with a small disk.
#![allow(dead_code, reason = "each test binary uses a part of it")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::fs;
use std::os::fd::OwnedFd;
use std::process::Command;

use bulkhead_framework::{Child, Scratch};

use crate::common::connect;

pub const SECTORS: u8 = 8;
/// Length of `struct virtio_blk_config` in virtio 1.2, 5.2.4; the daemon's is shorter.
pub const CONFIG: u16 = 96;

pub struct Daemon {
    scratch: Scratch,
    child: Option<Child>,
}

impl Daemon {
    /// Each byte of a sector of its disk is the sector's number.
    pub fn new() -> Self {
        let scratch = Scratch::new().unwrap();
        let disk = scratch.path().join("disk");
        fs::write(&disk, (0..SECTORS).flat_map(|sector| [sector; 512]).collect::<Vec<u8>>()).unwrap();
        let mut daemon = Self { scratch, child: None };
        daemon.start();
        daemon
    }

    /// Starts it, again or for the first time.
    pub fn start(&mut self) {
        let mut command = Command::new("qemu-storage-daemon");
        let (disk, socket) = (self.scratch.path().join("disk"), self.scratch.path().join("vhost"));
        let _ = fs::remove_file(&socket);
        command.args(["--blockdev", &format!("file,node-name=d0,filename={}", disk.display())]);
        let export = "type=vhost-user-blk,id=e0,node-name=d0,writable=on,num-queues=2";
        command.args(["--export", &format!("{export},addr.type=unix,addr.path={}", socket.display())]);
        self.child = Some(Child::start(&mut command, "stdout", "stderr").unwrap());
    }

    /// Ends it.
    pub fn kill(&mut self) {
        self.child = None;
    }

    pub fn socket(&self) -> OwnedFd {
        connect(&self.scratch.path().join("vhost"))
    }
}
