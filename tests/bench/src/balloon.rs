//! What the balloon gives back to the host, and how fast, beside QEMU's balloon over the same kind of memory.

use std::fs;
use std::time::Instant;

use bulkhead_framework::Result;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::uio::pwrite;

use crate::host::Host;
use crate::machine::{Machine, Side};
use crate::report::{self, Samples};

const ROUNDS: usize = 3;
/// MiB that are given and taken back.
const GIVEN: u32 = 256;
/// MiB that the guest has: enough for every other page.
const MEMORY: u32 = 640;
/// Buffers of 256 numbers, each a MiB, that are under way: what Linux does, and what fills half of the ring.
const AHEAD: [u32; 2] = [1, 32];
/// Times QEMU's rate.
const GOAL: f64 = 10.0;
const GIB: f64 = 1024.0;

/// Measures and prints.
///
/// # Errors
/// A guest did not start.
pub fn run(host: &Host) -> Result<()> {
    host.needs_kvm()?;
    let granted = fs::read_to_string("/sys/kernel/mm/transparent_hugepage/shmem_enabled").unwrap_or_default();
    let granted = granted.split(['[', ']']).nth(1).unwrap_or("none").to_owned();
    println!("  huge pages of memory files (shmem_enabled): {granted}; the goals need `advise`");
    let sides = [(Side::Ours, "ours"), (Side::Qemu, "QEMU's")].map(|(side, name)| {
        let modern = if side == Side::Qemu { ",disable-legacy=on" } else { "" };
        (Machine::new(host, side, MEMORY, &format!("-device virtio-balloon-pci,id=b0{modern}")), name)
    });
    for ahead in AHEAD {
        for (step, place) in [(1, "contiguous"), (2, "every other page")] {
            for (touch, state) in [(1, "touched"), (0, "untouched")] {
                println!("  {place}, {state}, {ahead} x 256 pages at once:");
                let pages = GIVEN * 256;
                let test = format!("bench-balloon pages={pages} step={step} touch={touch} ahead={ahead}");
                compare(&sides, &test, if step == 1 { GOAL } else { 1.0 })?;
                if (step, touch) == (1, 1) {
                    bare(ahead).map_err(|errno| format!("a memory file: {errno}"))?;
                }
            }
        }
    }
    Ok(())
}

/// What the kernel can do: a file of touched memory that is freed in pieces as large, without any guest.
fn bare(ahead: u32) -> nix::Result<()> {
    const MIB: i64 = 1 << 20;
    let mut rate = Samples::default();
    for _ in 0..ROUNDS {
        let file = memfd_create("bench", MFdFlags::MFD_CLOEXEC)?;
        let content = vec![1; 1 << 20];
        (0..GIVEN).try_for_each(|part| pwrite(&file, &content, i64::from(part) * MIB).map(drop))?;
        let piece = i64::from(ahead) * MIB;
        let begin = Instant::now();
        for part in 0..GIVEN / ahead {
            let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            fallocate(&file, flags, i64::from(part) * piece, piece)?;
        }
        rate.value(f64::from(GIVEN) / GIB / begin.elapsed().as_secs_f64());
    }
    rate.print("the kernel's own fallocate, no guest", "GiB/s", 1.0);
    Ok(())
}

/// Runs the program on both sides in turns.
fn compare(sides: &[(Machine<'_>, &str); 2], test: &str, least: f64) -> Result<()> {
    let mut rates: [[Samples; 2]; 2] = Default::default();
    for _ in 0..ROUNDS {
        for ((machine, _), [given, taken]) in sides.iter().zip(&mut rates) {
            let outcome = machine.run(test)?;
            let [inflate, deflate, touch] = ["inflate", "deflate", "touch"].map(|name| outcome.time(name));
            given.value(f64::from(GIVEN) / GIB / inflate?);
            taken.value(f64::from(GIVEN) / GIB / (deflate? + touch?));
        }
    }
    for ((_, name), [given, taken]) in sides.iter().zip(&rates) {
        given.print(&format!("given, {name}"), "GiB/s", 1.0);
        taken.print(&format!("taken back and touched, {name}"), "GiB/s", 1.0);
    }
    let [ours, qemu] = &rates;
    report::at_least("given, ours / QEMU's", ours[0].median(), qemu[0].median(), least);
    report::at_least("taken back and touched, ours / QEMU's", ours[1].median(), qemu[1].median(), 1.0);
    Ok(())
}
