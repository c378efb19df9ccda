//! What `test=NAME` can name.

use crate::pvh::StartInfo;
use crate::{
    balloon, bench, blk, chipset, console, hostile_pci, hostile_virtio, hotplug, io, irq, memory, pci, println,
    reset, shmem, smp, tables, virtio, vmem,
};

type Test = fn(&StartInfo);

/// All of them by name.
pub const ALL: &[(&str, Test)] = &[
    ("hello", |_| {}),
    ("echo", console::echo),
    ("counter", console::counter),
    ("flood", console::flood),
    ("outs", console::string_output),
    ("panic", |_| panic!("asked for by test=panic")),
    ("halt", |_| println!("halting")),
    ("smp", smp::report),
    ("tables", tables::list),
    ("spin", smp::spin),
    ("mem", memory::report),
    ("keep", memory::keep),
    ("fill", memory::fill),
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
    ("hotplug", hotplug::run),
    ("shmem", shmem::run),
    ("virtio-mem", vmem::follow),
    ("virtio-mem-hostile", vmem::hostile),
    ("hostile-pci", hostile_pci::run),
    ("hostile-virtio", hostile_virtio::run),
    ("internal-error", reset::internal_error),
    ("exception", io::exception),
];
