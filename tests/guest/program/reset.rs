//! Ways to end: reset, power-off, shutdown of the CPU, a KVM that gives up.

use crate::acpi::Tables;
use crate::port::{inb, outb, outw};
use crate::pvh::StartInfo;
use crate::{println, trap};

const SLEEP_ENABLE: u16 = 1 << 13;
/// Backed by nothing: just below the I/O APIC's page.
const NOWHERE: u64 = 0xfeb0_0000;

/// `test=reset by=cf9|i8042|acpi|triple` (acpi if not named).
pub fn reset(info: &StartInfo) {
    let by = info.option("by").unwrap_or("acpi");
    println!("resetting by {by}");
    match by {
        "cf9" => outb(0xcf9, 6),
        "i8042" => {
            while inb(0x64) & 2 != 0 {}
            outb(0x64, 0xfe);
        }
        "acpi" => match Tables::find(info.rsdp).and_then(|tables| tables.fixed()) {
            Some(fixed) if fixed.flags & 1 << 10 != 0 => outb(fixed.reset_port, fixed.reset_value),
            _ => println!("no ACPI reset register"),
        },
        "triple" => trap::triple_fault(),
        _ => println!("unknown way to reset"),
    }
}

/// `test=poweroff`: S5 by PM1 control, as FADT and DSDT say.
pub fn power_off(info: &StartInfo) {
    let fixed = Tables::find(info.rsdp).and_then(|tables| tables.fixed());
    match fixed.and_then(|fixed| Some((fixed.pm1_control, fixed.s5()?))) {
        Some((port, sleep_type)) => {
            println!("powering off");
            outw(port, SLEEP_ENABLE | u16::from(sleep_type) << 10);
        }
        None => println!("no ACPI power-off"),
    }
}

/// `test=internal-error`: what no KVM can run, see [`trap::derail`].
pub fn internal_error(_: &StartInfo) {
    println!("derailing");
    trap::derail(NOWHERE);
}
