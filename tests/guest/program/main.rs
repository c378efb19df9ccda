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
mod hotplug;
mod io;
mod irq;
mod memory;
mod pci;
mod port;
mod pvh;
mod reset;
mod rt;
mod serial;
mod shmem;
mod smp;
mod tables;
mod tests;
mod trap;
mod virtio;
mod vmem;

use pvh::StartInfo;

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
            match tests::ALL.iter().find(|(known, _)| *known == name) {
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
