//! Interrupts: COM1, the power button, NMI.

use core::sync::atomic::Ordering;

use crate::acpi::Tables;
use crate::port::{inb, inw, outb, outw};
use crate::pvh::StartInfo;
use crate::{apic, println, reset, serial, trap};

const IER_RX: u8 = 1;
const IER_THRE: u8 = 2;
const IIR_THRE: u8 = 2;
const IIR_MASK: u8 = 0xf;
const PM1_POWER_BUTTON: u16 = 1 << 8;

/// `test=irq`: a transmitter-empty interrupt, then one for each burst of input until a line ends.
pub fn serial(_: &StartInfo) {
    let counter = trap::gsi_counter(serial::GSI);
    apic::route(serial::GSI, false);
    trap::enable();
    outb(serial::IER, IER_THRE);
    trap::wait(counter, 0);
    let cause = inb(serial::IIR) & IIR_MASK;
    println!("transmitter interrupt: {} cause {cause:#x}", cause == IIR_THRE);
    outb(serial::IER, IER_RX);
    println!("send a line");
    let mut interrupts = 0;
    let mut bytes = 0;
    loop {
        let seen = counter.load(Ordering::SeqCst);
        let mut any = false;
        while let Some(byte) = serial::read() {
            (any, bytes) = (true, bytes + 1);
            if byte == b'\r' || byte == b'\n' {
                return println!("received {bytes} bytes, interrupted: {}", interrupts > 0);
            }
        }
        if !any {
            trap::wait(counter, seen);
            interrupts += 1;
        }
    }
}

/// `test=powerbutton`: waits for the event device's interrupt or a fixed power button, then powers off.
pub fn power_button(info: &StartInfo) {
    let Some(fixed) = Tables::find(info.rsdp).and_then(|tables| tables.fixed()) else {
        return println!("no ACPI");
    };
    outw(fixed.pm1_event + 2, PM1_POWER_BUTTON);
    trap::acknowledge_at(fixed.sci, fixed.pm1_event);
    apic::route(fixed.sci, false);
    let gsi = fixed.event_device().unwrap_or(fixed.sci);
    apic::route(gsi, false);
    trap::enable();
    println!("event device gsi={gsi}, sci={}, pm1 status={:#x}", fixed.sci, inw(fixed.pm1_event));
    println!("press the button");
    let counter = trap::gsi_counter(gsi);
    trap::wait(counter, 0);
    while counter.load(Ordering::SeqCst) == 0 {
        trap::wait(counter, 0);
    }
    println!("pressed, status={:#x}", trap::take_status(fixed.sci));
    apic::mask(gsi);
    reset::power_off(info);
}

/// `test=nmi`: waits for `n=` NMIs.
pub fn nmi(info: &StartInfo) {
    let counter = trap::nmi_counter();
    println!("waiting for an NMI");
    for seen in 0..info.number("n", 1) as u32 {
        while counter.load(Ordering::SeqCst) == seen {
            trap::wait(counter, seen);
        }
        println!("NMI {}", seen + 1);
    }
}
