//! The table of cases against our broker and against Debian's QEMU.

use std::path::Path;

use bulkhead_framework::{Failure, Result, Scratch, Vm};
use bulkhead_qmp_tests::broker::{Broker, Kind};
use bulkhead_qmp_tests::qemu::Qemu;
use bulkhead_qmp_tests::{Case, cases, devices, memory, runner, vms_run_here};

fn run_all(path: &Path, is_qemu72: bool) -> Result<()> {
    run_these(&cases::all(), path, is_qemu72)
}

fn run_these(cases: &[Case], path: &Path, is_qemu72: bool) -> Result<()> {
    let failed: Vec<String> = cases
        .iter()
        .filter_map(|case| runner::run(path, case, is_qemu72).err())
        .map(|failure| failure.to_string())
        .collect();
    if failed.is_empty() {
        println!("{} cases", cases.len());
        return Ok(());
    }
    Err(Failure::new(format!("{} of {} cases:\n{}", failed.len(), cases.len(), failed.join("\n"))))
}

#[test]
fn our_broker_answers_as_the_table_says() -> Result<()> {
    let broker = Broker::start(&[Kind::Server], false)?;
    run_all(&broker.path(0), false)
}

/// The same on the whole product. It needs the release build and a host that runs VMs; the other tests do not.
#[test]
fn a_vm_answers_as_the_table_says() -> Result<()> {
    if !vms_run_here() {
        return Ok(());
    }
    let vm =
        Vm::builder().args(["-S", "-smp", "2", "-m", "16M", "-device", "pcie-root-port,id=port"]).start()?;
    let path = vm.dir().join("q.sock");
    run_all(&path, false).map_err(|failure| failure.with_logs(&[vm.console().clone(), vm.stderr().clone()]))
}

#[test]
fn qemu_answers_as_the_table_says() -> Result<()> {
    let qemu = Qemu::start()?;
    run_all(&qemu.path(), true)
}

/// A machine with the devices that the fake bus has.
#[test]
fn a_vm_answers_as_the_table_says_of_devices() -> Result<()> {
    if !vms_run_here() {
        return Ok(());
    }
    let disk = Scratch::new()?;
    let image = disk.path().join("disk");
    std::fs::File::create(&image)?.set_len(1 << 20)?;
    let drive = format!("if=none,id=d0,format=raw,file={}", image.display());
    let unused = disk.path().join("unused");
    std::fs::File::create(&unused)?.set_len(1 << 20)?;
    let unused = format!("if=none,id=hd,format=raw,file={}", unused.display());
    let devices = [
        "pcie-root-port,id=rp0,chassis=1,addr=1",
        "pcie-root-port,id=rp1,chassis=2,addr=2",
        "virtio-balloon-pci,id=b0,addr=3",
        "virtio-blk-pci,drive=d0,addr=4,iothread=io0",
    ];
    let vm = Vm::builder().args([
        "-S",
        "-m",
        "64M",
        "-object",
        "iothread,id=io0",
        "-drive",
        &drive,
        "-drive",
        &unused,
    ]);
    let vm = devices.iter().fold(vm, |vm, device| vm.args(["-device", device])).start()?;
    let path = vm.dir().join("q.sock");
    run_these(&devices::some(), &path, false)
        .map_err(|failure| failure.with_logs(&[vm.console().clone(), vm.stderr().clone()]))
}

#[test]
fn our_broker_answers_as_the_table_says_of_devices() -> Result<()> {
    let broker = Broker::with_devices()?;
    run_these(&devices::some(), &broker.path(0), false)
}

#[test]
fn qemu_answers_as_the_table_says_of_devices() -> Result<()> {
    let qemu = Qemu::with_devices()?;
    run_these(&devices::some(), &qemu.path(), true)
}

/// A machine with memory devices.
#[test]
fn a_vm_answers_as_the_table_says_of_memory_devices() -> Result<()> {
    if !vms_run_here() {
        return Ok(());
    }
    let vm = Vm::builder().args(["-S"]).args(memory::ARGS);
    let vm = memory::DEVICES.iter().fold(vm, |vm, device| vm.args(["-device", device])).start()?;
    let path = vm.dir().join("q.sock");
    run_these(&memory::some(), &path, false)
        .map_err(|failure| failure.with_logs(&[vm.console().clone(), vm.stderr().clone()]))
}

#[test]
fn qemu_answers_as_the_table_says_of_memory_devices() -> Result<()> {
    let qemu = Qemu::with_memory()?;
    run_these(&memory::some(), &qemu.path(), true)
}
