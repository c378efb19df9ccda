//! The native guest: boots by PVH on any KVM, says hello on COM1 and does what `test=` on its command
//! line names. All of its work runs in 64-bit ring 3, see `boot.rs`.
#![no_std]
#![no_main]

mod acpi;
mod apic;
mod balloon;
mod bench;
mod blk;
mod boot;
mod chipset;
mod console;
mod dma;
mod hostile_pci;
mod hostile_virtio;
mod io;
mod irq;
mod memory;
mod pci;
mod port;
mod pvh;
mod reset;
mod rt;
mod serial;
mod smp;
mod trap;
mod virtio;

use pvh::StartInfo;

type Test = fn(&StartInfo);

/// Everything that `test=NAME` can name.
const TESTS: &[(&str, Test)] = &[
    ("hello", |_| {}),
    ("echo", console::echo),
    ("counter", console::counter),
    ("flood", console::flood),
    ("outs", console::string_output),
    ("panic", |_| panic!("asked for by test=panic")),
    ("halt", |_| println!("halting")),
    ("smp", smp::report),
    ("spin", smp::spin),
    ("mem", memory::report),
    ("keep", memory::keep),
    ("reset", reset::reset),
    ("poweroff", reset::power_off),
    ("powerbutton", irq::power_button),
    ("irq", irq::serial),
    ("nmi", irq::nmi),
    ("rtc", chipset::rtc),
    ("pmtimer", chipset::pm_timer),
    ("unclaimed", io::unclaimed),
    ("mmio", io::mmio),
    ("bench-pio", io::bench_ports),
    ("bench-mmio", io::bench_mmio),
    ("bench-link", io::bench_link),
    ("bench-blk", bench::disk),
    ("bench-pci", bench::bus),
    ("bench-balloon", bench::balloon),
    ("pci-list", pci::list),
    ("config-read", pci::config_read),
    ("blk-verify", blk::verify),
    ("blk-load", blk::load),
    ("balloon", balloon::give),
    ("balloon-hold", balloon::hold),
    ("balloon-cheat", balloon::cheat),
    ("rng", virtio::rng),
    ("hostile-pci", hostile_pci::run),
    ("hostile-virtio", hostile_virtio::run),
    ("internal-error", reset::internal_error),
    ("exception", io::exception),
];

/// First Rust code: ring 3 of the boot CPU, interrupts off.
extern "C" fn main(_cpu: u64, start_info: u64) -> ! {
    serial::first(b'B');
    serial::init();
    trap::init();
    apic::init();
    let info = StartInfo::read(start_info);
    match info.option("test") {
        None => {
            println!("ulkhead native guest: no -kernel was given, so this small program runs instead");
            console::interactive(&info);
        }
        Some(name) => {
            println!("ulkhead native guest: test={name}");
            match TESTS.iter().find(|(known, _)| *known == name) {
                Some((_, test)) => {
                    test(&info);
                    println!("done: {name}");
                }
                None => println!("unknown test: {name}"),
            }
        }
    }
    trap::halt()
}
