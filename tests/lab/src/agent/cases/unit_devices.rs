//! Devices of VMs as systemd runs them.

use std::collections::BTreeSet;
use std::fs;

use bulkhead_framework::{Process, Result, process};
use serde_json::json;

use super::super::Journal;
use super::super::debian::SOON;
use super::super::units::{UnitVm, check, output, tool, wait_for};

/// A disk, a balloon, a network on a TAP interface, another's back end, a bus between them and the guest, and a disk that
/// may come to a port.
const DEVICES: &str = "drive = [{ if = \"none\", id = \"d\", file = \"disk.img\" }, \
        { if = \"none\", id = \"e\", file = \"e.img\" }]\n\
    netdev = { type = \"tap\", id = \"tap\", ifname = \"lab0\" }\n\
    chardev = [{ backend = \"socket\", id = \"r0\", path = \"r0\" }]\n\
    device = [{ driver = \"virtio-blk-pci\", id = \"d0\", drive = \"d\" }, { driver = \"virtio-balloon-pci\", id = \"b0\" }, \
        { driver = \"virtio-net-pci\", id = \"n0\", netdev = \"tap\" }, { driver = \"vhost-user-rng-pci\", chardev = \"r0\" }, \
        { driver = \"pcie-root-port\", id = \"rp0\" }]\n";
/// The units that this makes.
const UNITS: [&str; 6] = [
    "bulkhead-pci@vm1.service",
    "bulkhead-block@vm1-d0.service",
    "bulkhead-balloon@vm1-b0.service",
    "bulkhead-net@vm1-n0.service",
    FOREIGN,
    "bulkhead-block@vm1-e.service",
];
/// The one of them that runs another's back end.
const FOREIGN: &str = "bulkhead-vhost@vm1-r0.service";
/// What is run as a back end, in the terms of its unit: it makes a socket of this name with a number behind it.
const BACK_END: &str = "COMMAND=/usr/bin/vhost-device-rng --socket-path=r\n";
/// An interface as an administrator makes it, with the host's address.
const TAP: [&str; 3] =
    ["busybox tunctl -t lab0", "busybox ip addr add 10.9.0.1/24 dev lab0", "busybox ip link set lab0 up"];

fn main_process(unit: &str) -> Option<Process> {
    let pid = tool(&["systemctl", "show", "--value", "--property=MainPID", unit]).ok()?;
    process(pid.parse().ok().filter(|pid| *pid != 0)?).ok()
}

/// The guest reaches the host.
fn reaches_host(vm: &mut UnitVm) -> Result<()> {
    let code = "ip addr add 10.9.0.2/24 dev eth0 2>/dev/null; ip link set eth0 up; \
        ping -c 5 -W 5 10.9.0.1 | grep -c 'bytes from'";
    let answers = vm.ask(code, SOON)?;
    check(answers.parse().is_ok_and(|count: u32| count >= 2), || format!("{answers} answers to 5 pings"))
}

/// The guest reads entropy.
fn gets_entropy(vm: &mut UnitVm) -> Result<()> {
    let read = vm.ask("dd if=/dev/hwrng bs=512 count=8 iflag=fullblock 2>/dev/null | wc -c", SOON)?;
    check(read == "4096", || format!("{read:?} bytes of 4096 are read"))
}

/// A disk whose daemon waits for it comes, goes and comes again; with other properties it does not.
fn plug(vm: &mut UnitVm, journal: &mut Journal) -> Result<()> {
    let mut qmp = vm.qmp("operator", journal)?;
    let disk = json!({ "driver": "virtio-blk-pci", "id": "hot", "drive": "e", "bus": "rp0" });
    let mut other = disk.clone();
    if let Some(properties) = other.as_object_mut() {
        properties.insert("num-queues".to_owned(), 2.into());
    }
    let refused = qmp.try_execute("device_add", other)?;
    let said = refused.as_ref().err().map(|error| error.desc.as_str()).unwrap_or_default();
    check(said.contains("the machine file gives it"), || format!("with two queues: {refused:?}"))?;
    for round in 0..2 {
        qmp.execute("device_add", disk.clone())?;
        let wait = "for i in $(seq 200); do [ -e /sys/block/vdb ] && break; usleep 100000; done";
        let size = vm.ask(&format!("{wait}; cat /sys/block/vdb/size"), SOON)?;
        check(size == "16384", || format!("round {round}: the disk has {size:?} sectors"))?;
        qmp.execute("device_del", json!({ "id": "hot" }))?;
        qmp.event("DEVICE_DELETED", SOON)?;
        let gone = vm.ask("[ -e /sys/block/vdb ] && echo there || echo gone", SOON)?;
        check(gone == "gone", || format!("round {round}: the disk is there"))?;
    }
    Ok(())
}

/// A unit's process is confined, has a uid that no other has, is in the VM's slice, and another takes its place when it is
/// killed.
fn comes_again(unit: &str, uids: &mut BTreeSet<u32>) -> Result<()> {
    let found = main_process(unit).ok_or_else(|| format!("{unit} has no process"))?;
    let confined = found.seccomp == 2 && found.no_new_privs && found.capabilities == [0; 3];
    check(confined, || format!("{unit} is not confined: {found:?}"))?;
    check(found.uid != 0 && uids.insert(found.uid), || format!("{unit} has no uid of its own: {found:?}"))?;
    let cgroup = fs::read_to_string(format!("/proc/{}/cgroup", found.pid))?;
    check(cgroup.contains("/bulkhead.slice/bulkhead-vm1.slice/"), || format!("{unit} is in {cgroup}"))?;
    tool(&["systemctl", "kill", "--signal=KILL", unit])?;
    let next = || main_process(unit).filter(|next| next.pid != found.pid && next.seccomp == 2);
    wait_for(&format!("another process of {unit}"), SOON, next).map(|_| ())
}

/// The units come with the machine file, are confined, in the VM's slice, come back when they are killed, and go with it.
pub fn run(journal: &mut Journal) -> Result<()> {
    let mut vm = UnitVm::install("vm1", DEVICES)?;
    for disk in ["disk.img", "e.img"] {
        fs::File::create(format!("/var/lib/bulkhead/vm1/{disk}"))?.set_len(8 << 20)?;
    }
    fs::write("/etc/bulkhead/vm1-r0.env", BACK_END)?;
    for line in TAP {
        tool(&line.split(' ').collect::<Vec<_>>())?;
    }
    // What has not been generated does not start half.
    let early = output(&["systemctl", "start", &vm.target()])?;
    check(!early.status.success(), || "it starts without its devices".to_owned())?;
    let why = tool(&["journalctl", "--no-pager", "--output=cat", "--unit=bulkhead-limits@vm1"])?;
    check(why.contains("its devices have changed: run systemctl daemon-reload"), || why.clone())?;
    tool(&["systemctl", "daemon-reload"])?;
    tool(&["systemctl", "start", &vm.target()])?;
    vm.attach(journal)?;
    vm.wait_for_user_space()?;
    reaches_host(&mut vm)?;
    gets_entropy(&mut vm)?;
    let mut uids = BTreeSet::new();
    for unit in UNITS.into_iter().filter(|unit| *unit != FOREIGN) {
        comes_again(unit, &mut uids)?;
    }
    check(vm.qmp("operator", journal)?.status()? == "running", || "not running".to_owned())?;
    reaches_host(&mut vm)?;
    plug(&mut vm, journal)?;
    // The descriptor store outlives this, and with it the disk's lock for a moment. Core does not come back without the
    // daemons that had the disks of its last life.
    for unit in [vm.target(), vm.service("core")] {
        let before = main_process("bulkhead-block@vm1-d0.service").ok_or("no block daemon")?;
        vm.watch_button()?;
        tool(&["systemctl", "restart", &unit])?;
        vm.attach(journal)?;
        vm.wait_for_user_space()?;
        gets_entropy(&mut vm)?;
        let next = main_process("bulkhead-block@vm1-d0.service").ok_or("no block daemon")?;
        check(next.pid != before.pid, || format!("{unit} left the block daemon"))?;
        check(vm.qmp("operator", journal)?.status()? == "running", || format!("{unit}: not running"))?;
    }
    // Last, as it costs this guest its entropy: vhost-device-rng 0.1.0, on vhost-user-backend 0.10, counts the used ring of
    // a guest that goes on from nought.
    comes_again(FOREIGN, &mut uids)?;
    check(vm.qmp("operator", journal)?.status()? == "running", || "not running".to_owned())?;
    check(vm.ask("echo still here", SOON)? == "still here", || "the guest is gone".to_owned())?;
    tool(&["systemctl", "kill", "--signal=KILL", "bulkhead-core@vm1.service"])?;
    let gone = || vm.left().ok().filter(Vec::is_empty);
    wait_for("the end of the VM", 2 * SOON, gone)?;
    for unit in UNITS {
        check(main_process(unit).is_none(), || format!("{unit} still runs"))?;
    }
    for user in ["bh-pci-vm1", "bh-vm1-d0", "bh-vm1-b0", "bh-vm1-n0", "bh-vm1-r0", "bh-vm1-e"] {
        let known = output(&["getent", "passwd", user])?.status.success();
        check(!known, || format!("user {user} is left"))?;
    }
    Ok(())
}
