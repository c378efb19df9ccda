//! The launcher and the daemons of devices: they come back, they go with the VM, a disk has one writer.

use std::fs;
use std::os::unix::net::UnixListener;
use std::time::Duration;

use bulkhead_framework::Result;
use bulkhead_native_tests::{SOON, Setup, eventually};

const DISK: [&str; 4] = ["-drive", "if=none,id=d,file=disk.img", "-device", "virtio-blk-pci,drive=d,id=d0"];

fn setup(args: &[&str]) -> Setup {
    Setup::new("test=counter ms=1", &[&DISK[..], args].concat()).disk(1 << 20)
}

/// Pci, a disk's daemon and the balloon's are killed while the guest counts; each is named with its device.
#[test]
fn device_daemons_are_started_again() -> Result<()> {
    let guest = setup(&["-device", "virtio-balloon-pci,id=b0"]).start()?;
    guest.running()?;
    let mut kills = 0;
    for round in 0..3 {
        for name in ["block", "pci", "balloon"] {
            let former = guest.process(name)?.pid;
            guest.kill(name)?;
            kills += 1;
            eventually(&format!("round {round}: another {name}"), SOON, || {
                match guest.trace().find(&format!("bulkhead-{name}")) {
                    Some(next) if next.pid != former && next.seccomp == 2 => Ok(()),
                    found => Err(format!("{found:?}")),
                }
            })?;
            guest.console().take_new();
            guest.expect("count ")?;
        }
    }
    let said = guest.stderr();
    let again =
        |who: &str| said.matches(&format!("{who} was killed by SIGKILL: it is started again")).count();
    let counts = (again("bulkhead-block d0"), again("bulkhead-pci"), again("bulkhead-balloon b0"));
    guest.check(counts == (3, 3, 3) && kills == 9, &format!("{counts:?}"))?;
    guest.check(guest.qmp()?.status()? == "running", "not running any more")?;
    guest.quit()
}

#[test]
fn a_daemon_says_in_ps_whose_it_is() -> Result<()> {
    let guest = setup(&[]).start()?;
    guest.running()?;
    let block = guest.process("block")?;
    let line = fs::read(format!("/proc/{}/cmdline", block.pid))?;
    let words: Vec<&[u8]> = line.split(|byte| *byte == 0).collect();
    guest.check(words.first() == Some(&&b"bulkhead-block"[..]), "another name")?;
    guest.check(words.get(2) == Some(&&b"d0"[..]), &format!("{:?}", String::from_utf8_lossy(&line)))?;
    guest.quit()
}

/// The lock lasts as long as the VM, not as long as one daemon.
#[test]
fn two_machines_do_not_write_one_disk() -> Result<()> {
    let first = setup(&[]).start()?;
    first.running()?;
    let former = first.process("block")?.pid;
    first.kill("block")?;
    let disk = first.trace().dir().join("disk.img").display().to_string();
    let taken = format!("Failed to get \"write\" lock: is another process using the image [{disk}]?");
    let drive = format!("file={disk}");
    let second = Setup::new("test=hello", &["-drive", &drive]).start()?;
    second.ends(1)?;
    second.said(&[&taken])?;
    eventually("another block daemon", SOON, || match first.trace().find("bulkhead-block") {
        Some(next) if next.pid != former => Ok(()),
        found => Err(format!("{found:?}")),
    })?;
    first.quit()?;
    Ok(())
}

/// A back end that listens nowhere, or does not accept, holds the machine up, not the launcher.
#[test]
fn a_back_end_that_is_not_there_is_waited_for() -> Result<()> {
    let args =
        ["-chardev", "socket,id=c,path=rng.sock,reconnect=1", "-device", "vhost-user-rng-pci,chardev=c,id=r"];
    let guest = Setup::new("test=hello", &args).leaves("rng.sock").start()?;
    let qmp = guest.qmp()?;
    eventually("the log names it", SOON, || {
        let said = guest.stderr();
        if said.contains("bulkhead-pci: waiting for the back ends of: r") { Ok(()) } else { Err(said) }
    })?;
    let listener = UnixListener::bind(guest.trace().dir().join("rng.sock"))?;
    listener.set_nonblocking(true)?;
    // Asked for again and again: a connection that ends is made anew.
    for _ in 0..2 {
        let connection =
            eventually("a connection", SOON, || listener.accept().map_err(|error| error.to_string()))?;
        drop(connection);
    }
    std::thread::sleep(Duration::from_millis(100));
    drop(qmp);
    guest.check(guest.qmp()?.status()? == "prelaunch", "it runs without its back end")?;
    guest.quit()
}
