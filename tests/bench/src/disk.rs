//! Random reads of 4 KiB from virtio-blk, the host's cache warm: our block daemon and QEMU's storage daemon behind our
//! machine, the same storage daemon and its own device behind QEMU.

use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use bulkhead_framework::{Child, Result};

use crate::host::Host;
use crate::machine::{Machine, Side};
use crate::report::{self, Samples};

const ROUNDS: usize = 9;
/// Cycles of the guest's TSC that a round takes, a second or less. The threads of QEMU's storage daemon and the scheduler
/// make rounds differ by a factor of two, so there are many short ones.
const CYCLES: u64 = 2_000_000_000;
/// Reads of a run whose exits are counted.
const COUNTED: u32 = 20_000;
/// Exits for a thousand reads: how often the driver looks before the device is out of its reset differs by a few.
const NO_EXIT: f64 = 1.0;
const DEPTHS: [u32; 2] = [1, 32];
/// MiB.
const MEMORY: u32 = 256;
const DISK: usize = 256;
const SOON: Duration = Duration::from_secs(10);

/// Whose machine, what it is, and whether the disk is the storage daemon's.
const SIDES: [(Side, &str, bool); 4] = [
    (Side::Ours, "ours, our block daemon", false),
    (Side::Ours, "ours, qemu-storage-daemon", true),
    (Side::Qemu, "QEMU, qemu-storage-daemon", true),
    (Side::Qemu, "QEMU, its own virtio-blk", false),
];

/// Measures and prints.
///
/// # Errors
/// A guest or QEMU's storage daemon did not start.
pub fn run(host: &Host) -> Result<()> {
    host.needs_kvm()?;
    let disk = host.dir().join("disk");
    let mut file = File::create(&disk)?;
    (0..DISK).try_for_each(|_| file.write_all(&vec![0x5a; 1 << 20]))?;
    file.sync_all()?;
    for depth in DEPTHS {
        let mut rates: [[Samples; 3]; SIDES.len()] = Default::default();
        for _ in 0..ROUNDS {
            for (&side, samples) in SIDES.iter().zip(&mut rates) {
                let test = format!("bench-blk depth={depth} cycles={CYCLES}");
                let outcome = with(host, &disk, side, |machine| machine.run(&test))?;
                let count = outcome.number("n")?;
                if outcome.number("errors")? != 0.0 {
                    return Err(format!("{}: reads fail", side.1).into());
                }
                let [rate, processor, first] = samples;
                rate.value(count / outcome.time("all")?);
                processor.value(outcome.processor * 1e6 / count);
                first.value(outcome.time("first")? * 1e6);
            }
        }
        println!("  {depth} under way:");
        for ((_, name, _), [rate, processor, first]) in SIDES.iter().zip(&rates) {
            rate.print(name, "/s", 1.0);
            processor.print("    processor time of all processes for each", "us", 1.0);
            first.print("    from DRIVER_OK to the end of the first", "ms", 1e-3);
        }
        let [block, storage, reference, own] = &rates;
        compare("ours / QEMU, same storage daemon", storage, reference);
        compare("our block daemon / QEMU's own", block, own);
    }
    exits(host, &disk)
}

fn compare(what: &str, [rate, processor, _]: &[Samples; 3], reference: &[Samples; 3]) {
    report::at_least(&format!("{what}, rate"), rate.median(), reference[0].median(), 1.0);
    report::ratio(&format!("{what}, processor"), processor.median(), reference[1].median(), 1.0);
}

/// Exits to user space for a thousand reads: those of a run with reads less those of a run without.
fn exits(host: &Host, disk: &Path) -> Result<()> {
    println!("  exits to user space for 1000 reads, 32 under way:");
    for side in SIDES {
        let count =
            |n: u32| with(host, disk, side, |machine| machine.exits(&format!("bench-blk depth=32 n={n}")));
        let exits = (count(COUNTED)? - count(0)?).abs() * 1000.0 / f64::from(COUNTED);
        if side.0 == Side::Ours {
            report::limit(side.1, exits, NO_EXIT, "");
        } else {
            println!("  {:<46} {exits:13.2}", side.1);
        }
    }
    Ok(())
}

/// A machine with that disk.
fn with<T>(
    host: &Host,
    disk: &Path,
    (side, _, storage): (Side, &str, bool),
    work: impl FnOnce(Machine<'_>) -> Result<T>,
) -> Result<T> {
    let modern = if side == Side::Qemu { ",disable-legacy=on" } else { "" };
    if !storage {
        let drive = format!("-drive if=none,id=d0,format=raw,file={}", disk.display());
        let args = format!("{drive} -device virtio-blk-pci,drive=d0{modern}");
        return work(Machine::new(host, side, MEMORY, &args));
    }
    let (daemon, socket) = storage_daemon(host, disk)?;
    let chardev = format!("-chardev socket,id=c0,path={}", socket.display());
    let args = format!("{chardev} -device vhost-user-blk-pci,chardev=c0{modern}");
    work(Machine::new(host, side, MEMORY, &args).and(daemon.pid()))
}

/// Starts one that serves the disk, and waits until it listens.
fn storage_daemon(host: &Host, disk: &Path) -> Result<(Child, PathBuf)> {
    let socket = host.dir().join("qsd");
    // Of the one before.
    let _ = std::fs::remove_file(&socket);
    let mut command = Command::new("qemu-storage-daemon");
    command.arg("--blockdev").arg(format!("driver=file,node-name=d0,filename={}", disk.display()));
    let export = format!("addr.type=unix,addr.path={}", socket.display());
    command.arg("--export").arg(format!("type=vhost-user-blk,id=e0,node-name=d0,writable=on,{export}"));
    let daemon = Child::start(&mut command, "storage daemon", "its stderr")?;
    let begin = Instant::now();
    while !socket.exists() {
        if !daemon.is_running() || begin.elapsed() > SOON {
            return Err(format!("qemu-storage-daemon: {}", daemon.stderr().text()).into());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok((daemon, socket))
}
