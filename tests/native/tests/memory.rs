//! Memory devices: what the guest plugs it has, what it unplugs is the host's again, over deaths of the processes on the way.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::time::Duration;

use bulkhead_framework::{Failure, Qmp, Result};
use bulkhead_native_tests::{Guest, SOON, eventually};
use serde_json::json;

const MIB: u64 = 1 << 20;
const PATH: &str = "/machine/peripheral/v";
const ARGS: [&str; 6] = [
    "-m",
    "256M,maxmem=2G",
    "-object",
    "memory-backend-memfd,id=m,size=1G",
    "-device",
    "virtio-mem-pci,id=v,memdev=m",
];

/// Bytes of the device's memory that take up room on the host.
fn held(guest: &Guest) -> Result<u64> {
    let mem = guest.process("mem")?.pid;
    for entry in fs::read_dir(format!("/proc/{mem}/fd"))? {
        let path = entry?.path();
        if fs::read_link(&path).is_ok_and(|to| to.to_string_lossy().starts_with("/memfd:bulkhead-memory")) {
            return Ok(fs::metadata(path)?.blocks() * 512);
        }
    }
    Err(Failure::new("the daemon has no memory"))
}

fn request(qmp: &mut Qmp, mib: u64) -> Result<()> {
    let arguments = json!({"path": PATH, "property": "requested-size", "value": mib * MIB});
    qmp.execute("qom-set", arguments).map(|_| ())
}

/// Waits until the guest has so many MiB, the host knows it, and they and no others take up room.
fn settled(guest: &Guest, qmp: &mut Qmp, mib: u64) -> Result<()> {
    let expected = json!([{"type": "virtio-mem", "data": {
        "id": "v", "memaddr": 36u64 << 30, "requested-size": mib * MIB, "size": mib * MIB,
        "max-size": 1u64 << 30, "block-size": 2 * MIB, "node": 0, "memdev": "/objects/m",
    }}]);
    eventually("the device", SOON, || {
        let now = qmp.execute("query-memory-devices", json!({})).map_err(|failure| failure.to_string())?;
        if now == expected { Ok(()) } else { Err(now.to_string()) }
    })?;
    eventually("memory on the host", SOON, || {
        let held = held(guest).map_err(|failure| failure.to_string())?;
        if held == mib * MIB { Ok(()) } else { Err(format!("{} of {mib} MiB", held / MIB)) }
    })
}

#[test]
fn plugged_memory_comes_and_unplugged_memory_is_the_hosts() -> Result<()> {
    let guest = Guest::boot("test=virtio-mem", &ARGS)?;
    let mut qmp = guest.running()?;
    guest.expect("region of 1024 MiB in blocks of 2048 KiB")?;
    for mib in [64, 640, 1024, 32, 0, 130] {
        request(&mut qmp, mib)?;
        guest.expect(&format!("plugged {mib} MiB, 0 pages lost"))?;
        settled(&guest, &mut qmp, mib)?;
        let summary = qmp.execute("query-memory-size-summary", json!({}))?;
        guest.check(summary["plugged-memory"] == json!(mib * MIB), &format!("{summary}"))?;
        loop {
            let event = qmp.event("MEMORY_DEVICE_SIZE_CHANGE", SOON)?;
            guest.check(event["data"]["id"] == "v", &format!("{event}"))?;
            if event["data"]["size"] == json!(mib * MIB) {
                break;
            }
        }
    }
    for (property, value) in [("size", json!(130 * MIB)), ("memdev", json!("/objects/m"))] {
        let now = qmp.execute("qom-get", json!({"path": PATH, "property": property}))?;
        guest.check(now == value, &format!("{property} is {now}"))?;
    }
    guest.quit()
}

/// A reset takes all plugged memory away; what was requested is requested still.
#[test]
fn a_reset_unplugs_all() -> Result<()> {
    let guest = Guest::boot("test=virtio-mem", &ARGS)?;
    let mut qmp = guest.running()?;
    request(&mut qmp, 512)?;
    guest.expect("plugged 512 MiB, 0 pages lost")?;
    guest.console().take_new();
    qmp.execute("system_reset", json!({}))?;
    guest.expect("plugged 512 MiB, 0 pages lost")?;
    let text = guest.console().text();
    guest.check(!text.contains("are plugged already"), "the device came out of the reset with memory")?;
    settled(&guest, &mut qmp, 512)?;
    guest.quit()
}

/// The daemon, pci and the broker are killed in turn while memory comes and goes.
#[test]
fn deaths_on_the_way_lose_no_plugged_memory() -> Result<()> {
    let guest = Guest::boot("test=virtio-mem", &ARGS)?;
    let mut qmp = guest.running()?;
    guest.expect("plugged 0 MiB, 0 pages lost")?;
    for (round, part) in (0..18).zip(["mem", "pci", "broker"].into_iter().cycle()) {
        let mib = if round % 2 == 0 { 768 + round } else { 64 + 2 * round };
        request(&mut qmp, mib)?;
        guest.kill(part)?;
        guest.expect(&format!("plugged {mib} MiB, 0 pages lost"))?;
        if part == "broker" {
            drop(qmp);
            qmp = guest.qmp()?;
        }
        settled(&guest, &mut qmp, mib)?;
        // No faster than processes are started again.
        std::thread::sleep(Duration::from_millis(200));
    }
    let status = qmp.status()?;
    guest.check(status == "running", &status)?;
    guest.quit()
}

/// What no driver asks for, and touches of what is not plugged, harm nobody and cost nothing.
#[test]
fn a_hostile_driver_gets_no_memory() -> Result<()> {
    let args = [&ARGS[..5], &["virtio-mem-pci,id=v,memdev=m,requested-size=64M"]].concat();
    let guest = Guest::boot("test=virtio-mem-hostile", &args)?;
    let mut qmp = guest.running()?;
    guest.expect("plugged 0 MiB at the end")?;
    let text = guest.console().text();
    let reads: Vec<&str> = text.lines().filter(|line| line.starts_with("offset ")).collect();
    guest.check(reads.len() == 4 && !text.contains("5a5a5a5a"), &format!("{reads:?}"))?;
    let devices = qmp.execute("query-memory-devices", json!({}))?;
    guest.check(devices[0]["data"]["size"] == json!(0), &format!("{devices}"))?;
    let held = held(&guest)?;
    guest.check(held == 0, &format!("{held} bytes are held"))?;
    guest.quit()
}

/// An empty or missing file gets the device's length, and the device is there.
#[test]
fn a_file_is_persistent_memory() -> Result<()> {
    let path = std::env::temp_dir().join(format!("bulkhead-pmem-{}", std::process::id()));
    let object = format!("memory-backend-file,id=f,size=64M,share=on,mem-path={}", path.display());
    let args = ["-m", "256M,maxmem=1G", "-object", &object, "-device", "virtio-pmem-pci,id=p,memdev=f"];
    let guest = Guest::boot("test=pci-list", &args)?;
    let mut qmp = guest.running()?;
    let devices = qmp.execute("query-memory-devices", json!({}))?;
    let data = json!({"id": "p", "memaddr": 36u64 << 30, "size": 64 * MIB, "memdev": "/objects/f"});
    guest.check(devices == json!([{"type": "virtio-pmem", "data": data}]), &format!("{devices}"))?;
    guest.check(fs::metadata(&path)?.len() == 64 * MIB, "the file is as long as the device")?;
    guest.kill("pmem")?;
    eventually("the daemon", SOON, || {
        let functions =
            qmp.execute("query-memory-devices", json!({})).map_err(|failure| failure.to_string())?;
        if functions.as_array().map(Vec::len) == Some(1) { Ok(()) } else { Err(functions.to_string()) }
    })?;
    let summary = qmp.execute("query-memory-size-summary", json!({}))?;
    guest.check(summary["plugged-memory"] == json!(64 * MIB), &format!("{summary}"))?;
    guest.quit()?;
    fs::remove_file(path)?;
    Ok(())
}
