//! The other CPUs: started by INIT and SIPI, each reports what it is.

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::acpi::Tables;
use crate::boot::{self, MAX_CPUS};
use crate::pvh::StartInfo;
use crate::{apic, chipset, println, trap};

/// How long all CPUs together have to come up, in microseconds.
const PATIENCE: u64 = 20_000_000;

struct Cpu {
    apic_id: AtomicU32,
    /// CPUID 1 (ebx), 0xb/0 (eax, ebx, edx) and 0xb/1 (eax, ebx).
    topology: [AtomicU32; 6],
    /// Rounds of the spin loop.
    rounds: AtomicU64,
}

static CPUS: [Cpu; MAX_CPUS] = [const {
    Cpu { apic_id: AtomicU32::new(0), topology: [const { AtomicU32::new(0) }; 6], rounds: AtomicU64::new(0) }
}; MAX_CPUS];
static READY: AtomicU32 = AtomicU32::new(0);
static SPIN: AtomicU32 = AtomicU32::new(0);

fn describe(cpu: &Cpu) {
    cpu.apic_id.store(apic::id(), Ordering::SeqCst);
    let [_, features, ..] = trap::cpuid(1, 0);
    let [shift, count, _, id] = trap::cpuid(0xb, 0);
    let [package_shift, package_count, ..] = trap::cpuid(0xb, 1);
    let values = [features, shift, count, id, package_shift, package_count];
    for (field, value) in cpu.topology.iter().zip(values) {
        field.store(value, Ordering::SeqCst);
    }
    READY.fetch_add(1, Ordering::SeqCst);
}

/// First Rust code of CPU `index`: ring 3, interrupts off.
pub extern "C" fn ap_main(index: u64) -> ! {
    apic::init_local();
    let cpu = &CPUS[index as usize % MAX_CPUS];
    describe(cpu);
    if SPIN.load(Ordering::SeqCst) == 0 {
        trap::halt();
    }
    loop {
        cpu.rounds.fetch_add(1, Ordering::SeqCst);
    }
}

/// Number of CPUs in the MADT (1 if there is none).
pub fn count(info: &StartInfo) -> usize {
    Tables::find(info.rsdp).map_or(1, |tables| tables.apic_ids().count()).clamp(1, MAX_CPUS)
}

/// Starts all CPUs; returns how many there should be and how many came.
fn start(info: &StartInfo) -> (usize, usize) {
    let expected = count(info);
    describe(&CPUS[0]);
    if let Some(tables) = Tables::find(info.rsdp) {
        boot::prepare_aps(expected);
        let own = apic::id();
        for id in tables.apic_ids().filter(|&id| id != own) {
            apic::send_init(id);
        }
        for id in tables.apic_ids().filter(|&id| id != own) {
            apic::send_startup(id, boot::TRAMPOLINE as u32 >> 12);
        }
    }
    let clock = chipset::Clock::new(info);
    let begin = clock.now();
    while (READY.load(Ordering::SeqCst) as usize) < expected && clock.microseconds_since(begin) < PATIENCE {
        core::hint::spin_loop();
    }
    (expected, READY.load(Ordering::SeqCst) as usize)
}

/// `test=smp`: one line per CPU, in the order in which they came up.
pub fn report(info: &StartInfo) {
    let (expected, ready) = start(info);
    for cpu in &CPUS[..ready] {
        let [features, shift, threads, id, package_shift, package] =
            [0, 1, 2, 3, 4, 5].map(|field: usize| cpu.topology[field].load(Ordering::SeqCst));
        println!(
            "cpu apic={} initial={} x2apic={id} logical={} thread-shift={shift} threads={threads} \
             package-shift={package_shift} package={package}",
            cpu.apic_id.load(Ordering::SeqCst),
            features >> 24,
            features >> 16 & 0xff,
            threads = threads & 0xffff,
            package = package & 0xffff,
        );
    }
    println!("cpus: {ready} of {expected}");
}

/// `test=spin`: all other CPUs count in memory; the boot CPU prints the sum as `rounds N`, `ms=` apart.
pub fn spin(info: &StartInfo) {
    SPIN.store(1, Ordering::SeqCst);
    let (expected, ready) = start(info);
    println!("cpus: {ready} of {expected}");
    let clock = chipset::Clock::new(info);
    loop {
        clock.sleep(info.number("ms", 20) * 1000);
        println!("rounds {}", CPUS.iter().map(|cpu| cpu.rounds.load(Ordering::SeqCst)).sum::<u64>());
    }
}
