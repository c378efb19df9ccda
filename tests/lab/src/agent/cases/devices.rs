//! Devices on the PCI bus under Debian's drivers, behind the product's daemons and those of others.

use std::fs;
use std::io::Read as _;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use bulkhead_framework::{Child, Process, Result, Scratch};
use serde_json::json;

use super::super::Journal;
use super::super::debian::{Debian, SOON};
use crate::paths;

/// The kernel's line for a guest on its disk.
const FROM_DISK: &str = "root=/dev/vda";

/// What a kernel says of a bus or a device that is not as it should be.
pub(super) const COMPLAINTS: &str = "dmesg | grep -E '(^|[^a-z])(BUG|WARNING)|Call Trace|[Ff]irmware [Bb]ug|FW_BUG|\
    ACPI (BIOS )?Error|can.t claim|no compatible bridge window|failed to assign|no space for|AER:|\
    pciehp.*([Ff]ail|[Ee]rror|[Tt]imeout)|I/O error|EXT4-fs error|virtio.*([Ff]ail|[Ee]rror)|blocked for more'";

fn complains_of_nothing(guest: &mut Debian) -> Result<()> {
    let complaints = guest.ask(COMPLAINTS)?;
    guest.check(complaints.is_empty(), &format!("the kernel complains: {complaints}"))
}

/// A copy of the guest's root file system, in a directory of its own.
pub(super) fn root(scratch: &Scratch) -> Result<String> {
    let path = scratch.path().join("root.img");
    fs::copy(paths::ROOT, &path)?;
    Ok(path.to_string_lossy().into_owned())
}

/// QEMU's storage daemon with this file; it listens on `blk.sock` beside it.
fn storage_daemon(journal: &mut Journal, dir: &Path, file: &str) -> Result<Child> {
    let mut command = Command::new("qemu-storage-daemon");
    command.current_dir(dir).args([
        "--blockdev",
        &format!("driver=file,node-name=disk,filename={file}"),
        "--export",
        "type=vhost-user-blk,id=e,node-name=disk,writable=on,addr.type=unix,addr.path=blk.sock",
    ]);
    let daemon = Child::start(&mut command, "storage daemon", "storage daemon's errors")?;
    journal.keep(&daemon.logs());
    wait_for(&dir.join("blk.sock"))?;
    Ok(daemon)
}

fn wait_for(path: &Path) -> Result<()> {
    let end = std::time::Instant::now() + SOON;
    while !path.exists() {
        if std::time::Instant::now() > end {
            return Err(format!("{} does not come", path.display()).into());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// The process `bulkhead-NAME` of the guest, if there is one at the moment.
pub(super) fn process_of(guest: &Debian, name: &str) -> Result<Option<Process>> {
    let name: String = format!("bulkhead-{name}").chars().take(15).collect();
    Ok(guest.vm.processes()?.into_iter().find(|process| process.name == name))
}

/// Kills the process `bulkhead-NAME` of the guest, if there is one at the moment.
fn kill(guest: &Debian, name: &str) -> Result<()> {
    if let Some(process) = process_of(guest, name)? {
        Command::new("kill").args(["-9", &process.pid.to_string()]).status()?;
    }
    Ok(())
}

/// Writes, reads back after the cache is dropped, and looks where the root file system is.
fn uses_its_disk(guest: &mut Debian) -> Result<()> {
    let root = guest.ask("grep ' / ext4' /proc/mounts | cut -d' ' -f4 | cut -d, -f1")?;
    guest.check(root == "rw", &format!("the root file system is {root:?}"))?;
    let code = "dd if=/dev/urandom of=/data bs=64k count=32 2>/dev/null; sync; a=$(md5sum < /data); \
        echo 3 > /proc/sys/vm/drop_caches; b=$(md5sum < /data); [ \"$a\" = \"$b\" ] && echo the same";
    let answer = guest.ask(code)?;
    guest.check(answer == "the same", &format!("what was written and is read back is {answer:?}"))
}

pub fn disk(journal: &mut Journal) -> Result<()> {
    let scratch = Scratch::new()?;
    let drive = format!("file={},if=none,id=d0,format=raw", root(&scratch)?);
    let args = ["-m", "256M", "-drive", &drive, "-device", "virtio-blk-pci,drive=d0,id=v0,serial=lab"];
    let mut guest = Debian::boot(journal, &args, FROM_DISK)?;
    let serial = guest.ask("cat /sys/block/vda/serial")?;
    guest.check(serial == "lab", &format!("the serial number is {serial:?}"))?;
    uses_its_disk(&mut guest)?;
    // The daemon and the bus die while the guest writes.
    guest.shell(
        "for i in 1 2 3 4 5; do dd if=/data of=/copy$i bs=64k conv=fsync 2>/dev/null || echo cannot copy; done; echo copied",
    )?;
    for name in ["block", "pci", "block", "pci", "block"] {
        std::thread::sleep(Duration::from_millis(400));
        kill(&guest, name)?;
    }
    guest.expect("copied\r\n")?;
    let sums = guest.ask_number(
        "echo 3 > /proc/sys/vm/drop_caches; md5sum /data /copy? | cut -d' ' -f1 | sort -u | wc -l",
    )?;
    guest.check(sums == 1, &format!("{sums} different contents of one file"))?;
    complains_of_nothing(&mut guest)?;
    guest.shell("sync; mount -o remount,ro /; poweroff -f")?;
    guest.ends()
}

pub fn disk_of_qemu(journal: &mut Journal) -> Result<()> {
    let scratch = Scratch::new()?;
    let file = root(&scratch)?;
    let _daemon = storage_daemon(journal, scratch.path(), &file)?;
    let chardev = format!("socket,id=c0,path={}/blk.sock", scratch.path().display());
    let args = ["-m", "256M", "-chardev", &chardev, "-device", "vhost-user-blk-pci,chardev=c0,id=v0"];
    let mut guest = Debian::boot(journal, &args, FROM_DISK)?;
    uses_its_disk(&mut guest)?;
    complains_of_nothing(&mut guest)?;
    guest.shell("sync; mount -o remount,ro /; poweroff -f")?;
    guest.ends()
}

/// Has the guest give a device up.
fn unplug(guest: &mut Debian, id: &str) -> Result<()> {
    guest.qmp.pending_events();
    guest.qmp.execute("device_del", json!({ "id": id }))?;
    loop {
        let event = guest.qmp.event("DEVICE_DELETED", SOON)?;
        if event.pointer("/data/device") == Some(&json!(id)) {
            return Ok(());
        }
    }
}

/// A disk of our own daemon comes, is written, goes, and comes again with what was written.
fn own_disk_comes_twice(guest: &mut Debian) -> Result<()> {
    let wait = "for i in $(seq 200); do [ -e /sys/block/vda ] && break; usleep 100000; done";
    let mut sums = Vec::new();
    for (id, then) in
        [("one", "dd if=/dev/urandom of=/dev/vda bs=64k count=64 2>/dev/null; sync;"), ("two", "")]
    {
        let device =
            json!({"driver": "virtio-blk-pci", "id": id, "drive": "own", "bus": "rp0", "serial": id});
        guest.qmp.execute("device_add", device)?;
        let serial = guest.ask(&format!("{wait}; cat /sys/block/vda/serial"))?;
        guest.check(serial == id, &format!("the disk's serial number is {serial:?}"))?;
        sums.push(guest.ask(&format!("{then} dd if=/dev/vda bs=64k count=64 2>/dev/null | md5sum"))?);
        unplug(guest, id)?;
        let gone = guest.ask("[ -e /sys/block/vda ] && echo there || echo gone")?;
        guest.check(gone == "gone", "the disk is there")?;
    }
    let same = matches!(sums.as_slice(), [one, two] if one == two);
    guest.check(same, &format!("written and read: {sums:?}"))
}

pub fn hot_plug(journal: &mut Journal) -> Result<()> {
    let scratch = Scratch::new()?;
    let file = root(&scratch)?;
    let _daemon = storage_daemon(journal, scratch.path(), &file)?;
    let image = scratch.path().join("own.img");
    fs::File::create(&image)?.set_len(16 << 20)?;
    let drive = format!("if=none,id=own,format=raw,file={}", image.display());
    let ports = ["pcie-root-port,id=rp0,slot=1", "pcie-root-port,id=rp1,slot=2"];
    let [first, second] = ports;
    let args = ["-m", "256M", "-drive", &drive, "-device", first, "-device", second];
    let mut guest = Debian::boot(journal, &args, "")?;
    own_disk_comes_twice(&mut guest)?;
    let path = scratch.path().join("blk.sock");
    let backend = json!({"type": "socket", "data": {"addr": {"type": "unix", "data": {"path": path}}, "server": false}});
    guest.qmp.execute("chardev-add", json!({"id": "c0", "backend": backend}))?;
    let device = json!({"driver": "vhost-user-blk-pci", "id": "hot", "chardev": "c0", "bus": "rp1"});
    guest.qmp.execute("device_add", device)?;
    let appears = "for i in $(seq 200); do [ -e /sys/block/vda ] && break; usleep 100000; done; cat /sys/block/vda/size";
    let found = guest.ask(appears)?;
    if found.is_empty() {
        guest.shell("dmesg | grep -iE 'hp|pcie|vda|virtio'; ls -l /sys/bus/pci/devices; ls /sys/bus/pci/slots; echo told")?;
        guest.expect("told\r\n")?;
    }
    let sectors: u64 = found.parse().map_err(|_| guest.failure("no disk"))?;
    guest.check(sectors == 24 << 11, &format!("the disk has {sectors} sectors"))?;
    let read =
        guest.ask("dd if=/dev/vda bs=2 skip=540 count=1 2>/dev/null | hexdump -v -e '1/2 \"%04x\"'")?;
    guest.check(read == "ef53", &format!("there is {read:?} instead of ext4's magic number"))?;
    unplug(&mut guest, "hot")?;
    let gone =
        guest.ask("[ -e /sys/block/vda ] && echo there || echo gone; ls /sys/bus/pci/devices | wc -l")?;
    guest.check(gone == "gone 3", &format!("the disk is {gone}"))?;
    complains_of_nothing(&mut guest)?;
    guest.command("quit")?;
    guest.ends()
}

/// vhost-device-rng, which makes `rng.sock0` in this directory.
fn entropy(journal: &mut Journal, dir: &Path) -> Result<Child> {
    let mut command = Command::new("vhost-device-rng");
    command.current_dir(dir).args(["--socket-path", "rng.sock"]);
    let daemon = Child::start(&mut command, "entropy daemon", "entropy daemon's errors")?;
    journal.keep(&daemon.logs());
    wait_for(&dir.join("rng.sock0"))?;
    Ok(daemon)
}

/// The guest's kernel has chosen the device, and what it gives is not twice the same.
fn gives_entropy(guest: &mut Debian) -> Result<()> {
    let source = guest.ask("cat /sys/class/misc/hw_random/rng_current")?;
    guest.check(source.starts_with("virtio_rng"), &format!("the source of entropy is {source:?}"))?;
    let read = "dd if=/dev/hwrng bs=512 count=8 iflag=fullblock 2>/dev/null";
    let answer = guest.ask(&format!("{read} > /a; {read} > /b; wc -c < /a; cmp -s /a /b || echo differ"))?;
    guest.check(answer == "4096 differ", &format!("two times 4096 bytes of entropy: {answer:?}"))
}

/// vhost-device-vsock, which makes `vsock.sock` in this directory and passes what guests send to port N to `vm.vsock_N`.
fn sockets(journal: &mut Journal, dir: &Path) -> Result<Child> {
    let mut command = Command::new("vhost-device-vsock");
    command.current_dir(dir).args(["--guest-cid", "3", "--socket", "vsock.sock", "--uds-path", "vm.vsock"]);
    let daemon = Child::start(&mut command, "vsock daemon", "vsock daemon's errors")?;
    journal.keep(&daemon.logs());
    wait_for(&dir.join("vsock.sock"))?;
    Ok(daemon)
}

/// Bytes that a guest sends through a socket: four times what the back end buffers.
const SENT: u64 = 64 << 12;

/// What the guest sends to the host comes back from there.
fn passes_sockets(guest: &mut Debian, dir: &Path) -> Result<()> {
    // The shared directory takes a client to the guest.
    fs::copy(std::env::current_exe()?, dir.join("share/client"))?;
    let listener = UnixListener::bind(dir.join("vm.vsock_1234"))?;
    let echo = std::thread::spawn(move || -> std::io::Result<u64> {
        let (mut stream, _) = listener.accept()?;
        std::io::copy(&mut stream.try_clone()?.take(SENT), &mut stream)
    });
    let answer = guest.ask(
        "sum() { md5sum | cut -c1-32; }; dd if=/dev/urandom of=/sent bs=4k count=64 2>/dev/null; \
            sum < /sent; /share/client vsock 2 1234 < /sent | sum",
    )?;
    let same = answer.split_once(' ').is_some_and(|(sent, back)| sent == back);
    guest.check(same, &format!("sent and received: {answer:?}"))?;
    let passed = echo.join().map_err(|_| "the server is gone")??;
    guest.check(passed == SENT, &format!("{passed} bytes have come"))
}

pub fn shared_directory(journal: &mut Journal) -> Result<()> {
    let scratch = Scratch::new()?;
    let (socket, share) = (scratch.path().join("fs.sock"), scratch.path().join("share"));
    fs::create_dir(&share)?;
    fs::write(share.join("from-l1"), "written outside\n")?;
    // Where Debian's virtiofsd keeps its lock.
    fs::create_dir_all("/var/run/virtiofsd")?;
    let mut command = Command::new("virtiofsd");
    command.arg(format!("--socket-path={}", socket.display()));
    command.args(["-o", &format!("source={},sandbox=chroot", share.display())]);
    let daemon = Child::start(&mut command, "virtiofsd", "virtiofsd's errors")?;
    journal.keep(&daemon.logs());
    wait_for(&socket)?;
    let _others = [entropy(journal, scratch.path())?, sockets(journal, scratch.path())?];
    let path = scratch.path().display();
    let chardevs = ["fs0,path=PATH/fs.sock", "r0,path=PATH/rng.sock0", "v0,path=PATH/vsock.sock"]
        .map(|chardev| format!("socket,id={}", chardev.replace("PATH", &path.to_string())));
    let devices = ["fs-pci,chardev=fs0,tag=share", "rng-pci,chardev=r0", "vsock-pci,chardev=v0"]
        .map(|device| format!("vhost-user-{device}"));
    let mut args = vec!["-m", "256M"];
    for (chardev, device) in chardevs.iter().zip(&devices) {
        args.extend(["-chardev", chardev, "-device", device]);
    }
    let mut guest = Debian::boot(journal, &args, "")?;
    let text = guest.ask("mkdir /share; mount -t virtiofs share /share && cat /share/from-l1")?;
    guest.check(text == "written outside", &format!("the guest reads {text:?}"))?;
    let sum = guest.ask(
        "dd if=/dev/urandom of=/share/from-l2 bs=64k count=32 2>/dev/null; sync; md5sum < /share/from-l2",
    )?;
    let output = Command::new("md5sum").arg(share.join("from-l2")).output()?;
    let ours = String::from_utf8_lossy(&output.stdout).split(' ').next().unwrap_or_default().to_owned();
    guest.check(sum.starts_with(&ours) && !ours.is_empty(), &format!("{sum} inside, {ours} outside"))?;
    gives_entropy(&mut guest)?;
    passes_sockets(&mut guest, scratch.path())?;
    let done = guest.ask("umount /share && echo done")?;
    guest.check(done == "done", "it cannot be unmounted")?;
    complains_of_nothing(&mut guest)?;
    guest.command("quit")?;
    guest.ends()
}

pub fn network(journal: &mut Journal) -> Result<()> {
    let scratch = Scratch::new()?;
    let run = |code: &str| Command::new("sh").args(["-c", code]).current_dir(scratch.path()).output();
    let netdev = "tap,id=n0,ifname=lab0,script=no,downscript=no";
    let args = [
        "-m",
        "256M",
        "-netdev",
        netdev,
        "-device",
        "virtio-net-pci,netdev=n0,id=net0,mac=52:54:00:00:00:07",
    ];
    let mut guest = Debian::boot(journal, &args, "")?;
    run("ip addr add 10.9.0.1/24 dev lab0; ip link set lab0 up")?;
    let mac = guest.ask("cat /sys/class/net/eth0/address")?;
    guest.check(mac == "52:54:00:00:00:07", &format!("the address is {mac:?}"))?;
    let answers = guest.ask_number(
        "ip addr add 10.9.0.2/24 dev eth0; ip link set eth0 up; ping -c 3 -W 5 10.9.0.1 | grep -c 'bytes from'",
    )?;
    guest.check(answers >= 2, &format!("{answers} answers to 3 pings"))?;
    // Both ways over TCP, the second time while the daemon is killed.
    run("dd if=/dev/urandom of=file bs=64k count=64 2>/dev/null; md5sum < file > sum")?;
    let mut server = Child::start(
        Command::new("httpd").args(["-f", "-p", "10.9.0.1:8080"]).current_dir(scratch.path()),
        "httpd",
        "httpd's errors",
    )?;
    server.close_stdin();
    let sum = fs::read_to_string(scratch.path().join("sum"))?;
    let sum = sum.split(' ').next().unwrap_or_default().to_owned();
    let fetch = "wget -q -O - http://10.9.0.1:8080/file | md5sum";
    let received = guest.ask(fetch)?;
    guest.check(received.starts_with(&sum), &format!("{received} instead of {sum}"))?;
    guest.shell(&format!("for i in 1 2 3 4; do {fetch}; done; echo fetched"))?;
    for _ in 0..3 {
        std::thread::sleep(Duration::from_millis(300));
        kill(&guest, "net")?;
    }
    guest.expect("fetched\r\n")?;
    let same = guest.vm.console().text().matches(sum.as_str()).count();
    guest.check(same == 5, &format!("{same} of 5 transfers are right"))?;
    complains_of_nothing(&mut guest)?;
    guest.command("quit")?;
    guest.ends()
}
