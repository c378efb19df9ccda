//! Devices of our own daemons that come and go while the machine runs.

use std::fs;
use std::time::Duration;

use bulkhead_framework::{Failure, Qmp, Result};
use bulkhead_native_tests::{Guest, SOON, Setup, eventually};
use nix::unistd::geteuid;
use serde_json::{Value, json};

const PORT: [&str; 2] = ["-device", "pcie-root-port,id=rp0"];
const DRIVE: [&str; 2] = ["-drive", "if=none,id=d0,file=disk.img"];

fn setup(args: &[&str]) -> Setup {
    Setup::new("test=hotplug", &[&PORT[..], &DRIVE[..], args].concat()).disk(1 << 20)
}

fn disk(id: &str, bus: &str) -> Value {
    json!({ "driver": "virtio-blk-pci", "drive": "d0", "id": id, "bus": bus })
}

/// Adds a device, waits until the guest says that it works, and how.
fn add(guest: &Guest, qmp: &mut Qmp, device: Value, what: &str) -> Result<()> {
    guest.console().take_new();
    qmp.execute("device_add", device)?;
    guest.expect(&format!("{what}, works: true")).map_err(|failure| guest.explain(failure))
}

/// Has the guest give it up.
fn remove(guest: &Guest, qmp: &mut Qmp, id: &str) -> Result<()> {
    qmp.execute("device_del", json!({ "id": id }))?;
    let event = qmp.event("DEVICE_DELETED", SOON).map_err(|failure| guest.explain(failure))?;
    guest.check(event.pointer("/data/device") == Some(&json!(id)), &format!("{event}"))
}

fn none_runs(guest: &Guest, name: &str) -> Result<()> {
    let name = format!("bulkhead-{name}");
    eventually(&format!("no {name}"), SOON, || match guest.trace().find(&name) {
        None => Ok(()),
        Some(found) => Err(format!("{found:?}")),
    })
}

fn refusal(qmp: &mut Qmp, device: Value) -> Result<String> {
    match qmp.execute("device_add", device.clone()) {
        Ok(_) => Err(Failure::new(format!("{device} was added"))),
        Err(failure) => Ok(failure.message().to_owned()),
    }
}

/// Descriptors that a process has open.
fn descriptors(pid: i32) -> Result<usize> {
    Ok(fs::read_dir(format!("/proc/{pid}/fd"))?.count())
}

/// As many times as a tenant may want, and nothing is left of it.
#[test]
fn a_hundred_disks_leave_nothing() -> Result<()> {
    let mut guest = setup(&[]).start()?;
    let mut qmp = guest.running()?;
    guest.check(guest.trace().find("bulkhead-block").is_none(), "a daemon that no device has")?;
    let launcher = guest.vm().pid();
    let mut first = Vec::new();
    for round in 0..102 {
        add(&guest, &mut qmp, disk("x", "rp0"), "a disk of 256 blocks")?;
        remove(&guest, &mut qmp, "x")?;
        if round == 1 || round == 101 {
            none_runs(&guest, "block")?;
            let mut now = vec![guest.trace().processes().len(), descriptors(launcher)?];
            for name in ["pci", "broker", "core"] {
                now.push(descriptors(guest.process(name)?.pid)?);
            }
            if round == 1 {
                first = now;
            } else {
                guest.check(now == first, &format!("processes and descriptors: {first:?}, then {now:?}"))?;
            }
        }
    }
    guest.quit()
}

/// What is said of a device holds for its daemon; another one with the same disk says something else.
#[test]
fn a_disk_has_one_device_at_a_time() -> Result<()> {
    let guest = setup(&["-device", "pcie-root-port,id=rp1,slot=1"]).start()?;
    let mut qmp = guest.running()?;
    add(&guest, &mut qmp, disk("x", "rp0"), "a disk of 256 blocks")?;
    let said = refusal(&mut qmp, disk("y", "rp1"))?;
    guest.check(said.contains("Drive 'd0' is already in use by another device"), &said)?;
    let daemon = guest.process("block")?;
    guest.check(daemon.seccomp == 2, "the daemon has no filter")?;
    // It comes back as any other.
    guest.kill("block")?;
    eventually("another daemon", SOON, || match guest.trace().find("bulkhead-block") {
        Some(next) if next.pid != daemon.pid => Ok(()),
        found => Err(format!("{found:?}")),
    })?;
    remove(&guest, &mut qmp, "x")?;
    none_runs(&guest, "block")?;
    add(&guest, &mut qmp, disk("y", "rp0"), "a disk of 256 blocks")?;
    guest.quit()
}

/// One of the command line goes, and another one takes what it had.
#[test]
fn a_device_of_the_command_line_can_come_again() -> Result<()> {
    let args = ["-object", "iothread,id=t0", "-device", "virtio-blk-pci,drive=d0,id=d,bus=rp0,iothread=t0"];
    let guest = setup(&args).start()?;
    let mut qmp = guest.running()?;
    guest.expect("a disk of 256 blocks, works: true")?;
    remove(&guest, &mut qmp, "d")?;
    none_runs(&guest, "block")?;
    guest.check(
        qmp.execute("query-iothreads", json!({}))? == json!([]),
        "a thread of a daemon that is gone",
    )?;
    qmp.execute("object-add", json!({ "qom-type": "iothread", "id": "t1", "poll-max-ns": 7 }))?;
    let again = json!({
        "driver": "virtio-blk-pci", "drive": "d0", "id": "again", "bus": "rp0", "iothread": "t1",
    });
    add(&guest, &mut qmp, again, "a disk of 256 blocks")?;
    let threads = qmp.execute("query-iothreads", json!({}))?;
    let of = |property: &str| threads.pointer(&format!("/0/{property}")).cloned().unwrap_or_default();
    guest.check(of("id") == "t1" && of("poll-max-ns") == 7, &format!("{threads}"))?;
    let id = of("thread-id").as_i64().unwrap_or_default();
    guest.check(fs::read_to_string(format!("/proc/{id}/comm"))? == "t1\n", "another thread")?;
    guest.check(qmp.execute("object-del", json!({ "id": "t1" })).is_err(), "a thread in use was removed")?;
    qmp.execute("object-del", json!({ "id": "t0" }))?;
    guest.quit()
}

#[test]
fn a_balloon_comes_and_goes() -> Result<()> {
    let guest = setup(&["-device", "pcie-root-port,id=rp1,slot=1"]).start()?;
    let mut qmp = guest.running()?;
    let inactive = "No balloon device has been activated";
    let balloon = |bus: &str| json!({ "driver": "virtio-balloon-pci", "id": "b", "bus": bus });
    for _ in 0..3 {
        let failure = qmp.execute("query-balloon", json!({})).map(|_| ()).map_err(|f| f.message().to_owned());
        guest.check(failure.is_err_and(|text| text.contains(inactive)), "a balloon that is not there")?;
        add(&guest, &mut qmp, balloon("rp0"), "a balloon")?;
        let all = qmp.execute("query-balloon", json!({}))?;
        guest.check(all == json!({ "actual": 128 << 20 }), &format!("{all}"))?;
        qmp.execute("balloon", json!({ "value": 64 << 20 }))?;
        let second = json!({ "driver": "virtio-balloon-pci", "id": "c", "bus": "rp1" });
        let said = refusal(&mut qmp, second)?;
        guest.check(said.contains("Only one balloon device is supported"), &said)?;
        remove(&guest, &mut qmp, "b")?;
        none_runs(&guest, "balloon")?;
    }
    guest.quit()
}

/// The interface stays for the next device.
#[test]
fn a_network_comes_and_goes() -> Result<()> {
    if !geteuid().is_root() {
        println!("not root: no TAP interface can be made");
        return Ok(());
    }
    let guest = setup(&["-netdev", "tap,id=n0,queues=2"]).start()?;
    let mut qmp = guest.running()?;
    for mq in ["on", "off"] {
        let net = json!({
            "driver": "virtio-net-pci", "netdev": "n0", "id": "n", "bus": "rp0", "mq": mq,
        });
        add(&guest, &mut qmp, net, "a network")?;
        let said = refusal(&mut qmp, json!({ "driver": "virtio-net-pci", "netdev": "n0", "bus": "rp0" }))?;
        let taken = "Property 'virtio-net-device.netdev' can't take value 'n0', it's in use";
        guest.check(said.contains(taken), &said)?;
        remove(&guest, &mut qmp, "n")?;
        none_runs(&guest, "net")?;
    }
    guest.quit()
}

/// Whoever dies on the way, a device is there with its daemon, or neither is.
#[test]
fn deaths_while_a_disk_comes_leave_nothing() -> Result<()> {
    let guest = setup(&[]).start()?;
    guest.running()?;
    for (round, name) in (0..24).zip(["broker", "pci", "block"].into_iter().cycle()) {
        let mut qmp = guest.qmp()?;
        qmp.send(&json!({ "execute": "device_add", "arguments": disk("x", "rp0") }))?;
        std::thread::sleep(Duration::from_millis(round));
        // The daemon may not be there yet.
        if guest.trace().find(&format!("bulkhead-{name}")).is_some() {
            let _ = guest.kill(name);
        }
        drop(qmp);
        let mut qmp = guest.qmp()?;
        let mut present = || -> Result<bool> {
            let found = qmp.execute("qom-list", json!({ "path": "/machine/peripheral" }))?;
            Ok(found
                .as_array()
                .is_some_and(|all| all.iter().any(|child| child.get("name") == Some(&json!("x")))))
        };
        eventually("the device and its daemon, or neither", SOON, || {
            let there = present().map_err(|failure| failure.to_string())?;
            let runs = guest.trace().find("bulkhead-block").is_some();
            if there == runs { Ok(()) } else { Err(format!("device {there}, daemon {runs}")) }
        })
        .map_err(|failure| guest.explain(failure))?;
        if present()? {
            guest.expect("works: ")?;
            remove(&guest, &mut qmp, "x")?;
        }
        none_runs(&guest, "block")?;
    }
    let mut qmp = guest.qmp()?;
    add(&guest, &mut qmp, disk("last", "rp0"), "a disk of 256 blocks")?;
    guest.quit()
}
