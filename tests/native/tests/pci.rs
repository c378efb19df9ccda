//! The PCI bus and what is on it, as the guest's own drivers see them.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::process::{Command, Stdio};
use std::time::Duration;

use bulkhead_framework::{Child, Result};
use bulkhead_native_tests::{Guest, SOON, Setup, eventually, kill_pid, slowness};
use serde_json::{Value, json};

/// Bytes of a test's disk.
const DISK: u64 = 32 << 20;
/// How often a process dies in a test.
const DEATHS: u32 = 100;
/// The longest that 99 of 100 stalls may take.
const STALL: Duration = Duration::from_secs(1);

const DRIVE: [&str; 2] = ["-drive", "file=disk.img,if=none,id=d0,format=raw"];
const BLOCK: [&str; 2] = ["-device", "virtio-blk-pci,drive=d0,id=v0"];

/// A guest with `args` and a disk of zeros in its directory.
fn boot(append: &str, args: &[&[&str]]) -> Result<Guest> {
    let args = [&["-m", "64M"], &DRIVE[..], &args.concat()].concat();
    Setup::new(append, &args).disk(DISK).start()
}

/// Waits for the program's last line, which takes longer than a start.
fn done(guest: &Guest, name: &str, limit: Duration) -> Result<()> {
    let found = guest.console().expect(&format!("done: {name}"), limit * slowness());
    found.map_err(|failure| guest.explain(failure))?;
    let text = guest.console().text();
    let wrong = text.lines().find(|line| line.starts_with("wrong:") || line.starts_with("error:"));
    guest.check(wrong.is_none(), &format!("the guest says {wrong:?}"))
}

/// Process ids by name of all but the launcher and the guard.
fn pids(guest: &Guest) -> BTreeMap<String, i32> {
    guest.trace().processes().into_iter().map(|process| (process.name, process.pid)).collect()
}

/// Device number to the addresses of its BARs, as the guest set and printed them.
fn seen(text: &str) -> BTreeMap<(u64, u64), Vec<u64>> {
    let mut found: BTreeMap<_, Vec<u64>> = BTreeMap::new();
    let mut place = (0, 0);
    for line in text.lines() {
        let hex = |text: &str| u64::from_str_radix(text, 16).unwrap_or(u64::MAX);
        if let Some(rest) = line.strip_prefix("pci ") {
            place = (hex(rest.get(..2).unwrap_or("")), hex(rest.get(3..5).unwrap_or("")));
            found.entry(place).or_default();
        } else if let Some((_, rest)) = line.split_once(": 0x").filter(|_| line.starts_with("  bar ")) {
            found.entry(place).or_default().push(hex(rest.split(' ').next().unwrap_or("")));
        }
    }
    found
}

/// The same from `query-pci`.
fn reported(buses: &Value, found: &mut BTreeMap<(u64, u64), Vec<u64>>) {
    for device in buses.as_array().into_iter().flatten().flat_map(|bus| bus["devices"].as_array()).flatten() {
        let place = (device["bus"].as_u64().unwrap_or(99), device["slot"].as_u64().unwrap_or(99));
        let regions = device["regions"].as_array().into_iter().flatten();
        found.insert(place, regions.filter_map(|region| region["address"].as_u64()).collect());
        if let Some(bridge) = device.get("pci_bridge") {
            reported(&json!([{"devices": bridge["devices"]}]), found);
        }
    }
}

#[test]
fn a_bus_with_ports_is_enumerated_and_reported_as_the_guest_set_it_up() -> Result<()> {
    let ports = ["-device", "pcie-root-port,id=rp0,slot=1", "-device", "pcie-root-port,id=rp1,slot=2"];
    let disk = ["-device", "virtio-blk-pci,drive=d0,id=v0,bus=rp1"];
    let guest = boot("test=pci-list", &[&ports, &disk])?;
    done(&guest, "pci-list", SOON)?;
    let text = guest.console().text();
    // The host bridge, two ports, the disk.
    guest.check(
        text.contains("functions: 4\r\n") && text.contains("1af4:1042 class 0100"),
        "not all is there",
    )?;
    let mut told = BTreeMap::new();
    reported(&guest.qmp()?.execute("query-pci", json!({}))?, &mut told);
    let seen = seen(&text);
    guest.check(told == seen, &format!("query-pci has {told:x?}, the guest {seen:x?}"))?;
    guest.quit()
}

/// Accesses that core forwarded over the life of a guest which read configuration space so often.
fn forwarded(reads: u32) -> Result<(u64, String)> {
    let append = format!("test=config-read n={reads}");
    let args = [&["-m", "64M", "-nodefaults"], &DRIVE[..], &BLOCK].concat();
    let guest = Setup::new(&append, &args).disk(DISK).log("info").start()?;
    done(&guest, "config-read", SOON)?;
    let took =
        guest.console().text().lines().find(|line| line.starts_with("config reads")).map(str::to_owned);
    guest.quit()?;
    let log = guest.stderr();
    let line = log.lines().find_map(|line| line.split_once("accesses: ")?.1.split_once(" forwarded"));
    let count = line.and_then(|(count, _)| count.parse().ok()).ok_or("core logs no counters")?;
    Ok((count, took.unwrap_or_default()))
}

#[test]
fn configuration_space_is_read_without_exits() -> Result<()> {
    let ((few, _), (many, took)) = (forwarded(1)?, forwarded(100_000)?);
    println!("{took}: {few} accesses forwarded with 1 read, {many} with 100,000");
    // What varies is how often the guest looks at its serial port and its clock.
    if many.abs_diff(few) > 2000 {
        Err(format!("{many} accesses, and {few} without reads").into())
    } else {
        Ok(())
    }
}

#[test]
fn a_disk_holds_what_is_written() -> Result<()> {
    let guest = boot("test=blk-verify rounds=3 blocks=1024", &[&BLOCK])?;
    done(&guest, "blk-verify", SOON)?;
    guest.check(guest.console().text().contains("round 3: 0 errors\r\n"), "errors")?;
    let mut block = [0; 4096];
    File::open(guest.trace().dir().join("disk.img"))?.read_exact_at(&mut block, 8 * 4096)?;
    guest.check(block.iter().filter(|byte| **byte == 0).count() < 100, "the file has nothing of it")?;
    guest.quit()
}

/// How often a back end has come back.
fn back_ends_back(guest: &Guest) -> usize {
    guest.stderr().matches("its back end is there again").count()
}

/// Kills `name` so many times, `pause` apart, under verified load; prints how long the guest waited.
fn killed_under_load(name: &str, deaths: u32, pause: Duration) -> Result<()> {
    let guest = boot("test=blk-load", &[&BLOCK])?;
    guest.expect("load reads=")?;
    let deaths = deaths / slowness();
    let mut former = 0;
    for _ in 0..deaths {
        let pid =
            eventually("the next one", SOON, || match guest.trace().find(&format!("bulkhead-{name}")) {
                Some(process) if process.pid != former => Ok(process.pid),
                _ => Err(format!("no {name}")),
            })?;
        std::thread::sleep(pause * slowness());
        let returns = back_ends_back(&guest);
        kill_pid(pid)?;
        former = pid;
        if name == "block" {
            // One that dies before it has served is asked for at a slower pace; how fast it starts is the host's.
            eventually("its return", SOON, || {
                (back_ends_back(&guest) > returns).then_some(()).ok_or("it is away".to_owned())
            })?;
        }
    }
    guest.console().take_new();
    for _ in 0..3 {
        guest.expect("load reads=")?;
    }
    let text = guest.console().text();
    let mut stalls: Vec<u64> = text
        .lines()
        .filter_map(|line| line.strip_prefix("stall ")?.strip_suffix(" us")?.parse().ok())
        .collect();
    stalls.sort_unstable();
    let worst = stalls.last().copied().unwrap_or(0);
    // A hundred deaths are a hundred stalls at most; those below 20 ms are not printed.
    let p99 = stalls.iter().rev().nth(deaths as usize / 100).copied().unwrap_or(0);
    println!(
        "{name}: {deaths} deaths, {} stalls of 20 ms and more, p99 {} ms, longest {} ms",
        stalls.len(),
        p99 / 1000,
        worst / 1000
    );
    guest.check(!text.contains("error:"), "the guest saw an error")?;
    let bound = (STALL * slowness()).as_micros();
    guest.check(u128::from(p99) < bound, &format!("stalls of {p99} us"))?;
    // Whole lines: the last one may be under way.
    let whole = text.rsplit_once("\r\n").map_or("", |(whole, _)| whole);
    let last = whole.lines().rev().find(|line| line.starts_with("load ")).unwrap_or_default();
    guest.check(last.ends_with("errors=0"), &format!("the guest counts {last:?}"))?;
    guest.quit()
}

#[test]
fn a_block_daemon_that_is_killed_every_second_loses_nothing() -> Result<()> {
    killed_under_load("block", 10, Duration::from_secs(1))
}

#[test]
fn a_block_daemon_that_is_killed_often_loses_nothing() -> Result<()> {
    killed_under_load("block", DEATHS, Duration::from_millis(150))
}

#[test]
fn a_bus_that_is_killed_often_is_not_noticed() -> Result<()> {
    killed_under_load("pci", DEATHS, Duration::from_millis(150))
}

#[test]
fn a_console_that_is_killed_often_is_no_disks_concern() -> Result<()> {
    killed_under_load("console", DEATHS, Duration::from_millis(150))
}

#[test]
fn a_broker_that_is_killed_often_is_no_disks_concern() -> Result<()> {
    killed_under_load("broker", DEATHS, Duration::from_millis(150))
}

/// Runs a hostile program: at its end the disk works, and no process has died meanwhile.
fn survives(name: &str) -> Result<()> {
    let ports = ["-device", "pcie-root-port,id=rp0,slot=1", "-device", "pcie-root-port,id=rp1,slot=2"];
    let guest = boot(&format!("test={name}"), &[&ports, &BLOCK])?;
    guest.expect("Bulkhead native guest")?;
    guest.running()?;
    let before = pids(&guest);
    // Some hundred thousand exits.
    done(&guest, name, Duration::from_secs(240))?;
    let text = guest.console().text();
    guest.check(text.contains("machine is well\r\n"), "the machine is not well")?;
    let after = pids(&guest);
    guest.check(before == after, &format!("processes were {before:?}, are {after:?}"))?;
    guest.quit()
}

#[test]
fn hostile_configuration_writes_bars_and_messages_hurt_nobody_else() -> Result<()> {
    survives("hostile-pci")
}

#[test]
fn hostile_rings_and_registers_hurt_nobody_else() -> Result<()> {
    survives("hostile-virtio")
}

/// QEMU's storage daemon with the file `disk.img` of this directory, listening on `blk.sock`.
fn storage_daemon(dir: &std::path::Path) -> Result<Child> {
    let mut command = Command::new("qemu-storage-daemon");
    command.current_dir(dir).stdin(Stdio::null()).args([
        "--blockdev",
        "driver=file,node-name=disk,filename=disk.img",
        "--export",
        "type=vhost-user-blk,id=e,node-name=disk,writable=on,addr.type=unix,addr.path=blk.sock",
    ]);
    Child::start(&mut command, "storage daemon", "storage daemon's errors")
}

#[test]
fn a_disk_of_qemus_storage_daemon_holds_what_is_written() -> Result<()> {
    let args = ["-m", "64M", "-chardev", "socket,id=c0,path=blk.sock"];
    let device = ["-device", "vhost-user-blk-pci,chardev=c0,id=v0"];
    let mut daemon = None;
    let setup = Setup::new("test=blk-verify rounds=3 blocks=1024", &[&args[..], &device].concat());
    let guest = setup.disk(DISK).leaves("blk.sock").start_in(|dir| {
        daemon = Some(storage_daemon(dir)?);
        Ok(())
    })?;
    done(&guest, "blk-verify", SOON)?;
    guest.check(guest.console().text().contains("round 3: 0 errors\r\n"), "errors")?;
    guest.quit()
}
