//! Devices of VMs as systemd runs them.

use std::collections::BTreeSet;
use std::fs;

use bulkhead_framework::{Process, Result, process};

use super::super::Journal;
use super::super::debian::SOON;
use super::super::units::{UnitVm, check, output, tool, wait_for};

/// A disk, a balloon, and a bus between them and the guest.
const DEVICES: &str = "drive = { if = \"none\", id = \"d\", file = \"disk.img\" }\n\
    device = [{ driver = \"virtio-blk-pci\", id = \"d0\", drive = \"d\" }, { driver = \"virtio-balloon-pci\", id = \"b0\" }]\n";
/// The units that this makes.
const UNITS: [&str; 3] =
    ["bulkhead-pci@vm1.service", "bulkhead-block@vm1-d0.service", "bulkhead-balloon@vm1-b0.service"];

fn main_process(unit: &str) -> Option<Process> {
    let pid = tool(&["systemctl", "show", "--value", "--property=MainPID", unit]).ok()?;
    process(pid.parse().ok().filter(|pid| *pid != 0)?).ok()
}

/// The units come with the machine file, are confined, in the VM's slice, come back when they are killed, and go with it.
pub fn run(journal: &mut Journal) -> Result<()> {
    let mut vm = UnitVm::install("vm1", DEVICES)?;
    fs::File::create("/var/lib/bulkhead/vm1/disk.img")?.set_len(8 << 20)?;
    // What has not been generated does not start half.
    let early = output(&["systemctl", "start", &vm.target()])?;
    check(!early.status.success(), || "it starts without its devices".to_owned())?;
    let why = tool(&["journalctl", "--no-pager", "--output=cat", "--unit=bulkhead-limits@vm1"])?;
    check(why.contains("its devices have changed: run systemctl daemon-reload"), || why.clone())?;
    tool(&["systemctl", "daemon-reload"])?;
    tool(&["systemctl", "start", &vm.target()])?;
    vm.attach(journal)?;
    vm.wait_for_user_space()?;
    let mut uids = BTreeSet::new();
    for unit in UNITS {
        let found = main_process(unit).ok_or_else(|| format!("{unit} has no process"))?;
        let confined = found.seccomp == 2 && found.no_new_privs && found.capabilities == [0; 3];
        check(confined, || format!("{unit} is not confined: {found:?}"))?;
        check(found.uid != 0 && uids.insert(found.uid), || {
            format!("{unit} has no uid of its own: {found:?}")
        })?;
        let cgroup = fs::read_to_string(format!("/proc/{}/cgroup", found.pid))?;
        check(cgroup.contains("/bulkhead.slice/bulkhead-vm1.slice/"), || format!("{unit} is in {cgroup}"))?;
        tool(&["systemctl", "kill", "--signal=KILL", unit])?;
        let next = || main_process(unit).filter(|next| next.pid != found.pid && next.seccomp == 2);
        wait_for(&format!("another process of {unit}"), SOON, next)?;
    }
    check(vm.qmp("operator", journal)?.status()? == "running", || "not running".to_owned())?;
    check(vm.ask("echo still here", SOON)? == "still here", || "the guest is gone".to_owned())?;
    // The descriptor store outlives this, and with it the disk's lock for a moment.
    tool(&["systemctl", "restart", &vm.target()])?;
    vm.attach(journal)?;
    vm.wait_for_user_space()?;
    tool(&["systemctl", "kill", "--signal=KILL", "bulkhead-core@vm1.service"])?;
    let gone = || vm.left().ok().filter(Vec::is_empty);
    wait_for("the end of the VM", 2 * SOON, gone)?;
    for unit in UNITS {
        check(main_process(unit).is_none(), || format!("{unit} still runs"))?;
    }
    for user in ["bh-pci-vm1", "bh-vm1-d0", "bh-vm1-b0"] {
        let known = output(&["getent", "passwd", user])?.status.success();
        check(!known, || format!("user {user} is left"))?;
    }
    Ok(())
}
