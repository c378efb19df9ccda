//! Local APIC, I/O APIC and the legacy PIC (masked).

use crate::port::{outb, read32, write32};
use crate::trap::GSI_BASE;

const LOCAL: u64 = 0xfee0_0000;
const IO: u64 = 0xfec0_0000;
const ID: u64 = LOCAL + 0x20;
const TASK_PRIORITY: u64 = LOCAL + 0x80;
const SPURIOUS: u64 = LOCAL + 0xf0;
const COMMAND: u64 = LOCAL + 0x300;
const COMMAND_HIGH: u64 = LOCAL + 0x310;
const PENDING: u32 = 1 << 12;
const LINT1: u64 = LOCAL + 0x360;
const DELIVER_NMI: u32 = 4 << 8;
const INIT: u32 = 0x4500;
const STARTUP: u32 = 0x4600;
const LEVEL: u32 = 1 << 15;
const MASKED: u32 = 1 << 16;

/// Enables this CPU's local APIC; the PIC stays masked.
pub fn init() {
    outb(0x21, 0xff);
    outb(0xa1, 0xff);
    init_local();
}

/// Enables the local APIC of the CPU that runs this. LINT1 delivers NMIs, as firmware sets it up.
pub fn init_local() {
    write32(TASK_PRIORITY, 0);
    write32(SPURIOUS, 0x13f);
    write32(LINT1, DELIVER_NMI);
}

/// Local APIC id of the CPU that runs this.
pub fn id() -> u32 {
    read32(ID) >> 24
}

/// Routes a GSI to the boot CPU: active high, edge, or level on request.
pub fn route(gsi: u8, level: bool) {
    let register = 0x10 + 2 * u32::from(gsi);
    io_write(register + 1, id() << 24);
    io_write(register, u32::from(GSI_BASE + gsi) | if level { LEVEL } else { 0 });
}

/// Masks a GSI.
pub fn mask(gsi: u8) {
    io_write(0x10 + 2 * u32::from(gsi), MASKED);
}

fn io_write(register: u32, value: u32) {
    write32(IO, register);
    write32(IO + 0x10, value);
}

/// Sends INIT to the CPU with this local APIC id.
pub fn send_init(apic_id: u32) {
    send(apic_id, INIT);
}

/// Makes it start in real mode at page `page` (below 1 MiB).
pub fn send_startup(apic_id: u32, page: u32) {
    send(apic_id, STARTUP | page);
}

fn send(apic_id: u32, command: u32) {
    write32(COMMAND_HIGH, apic_id << 24);
    write32(COMMAND, command);
    while read32(COMMAND) & PENDING != 0 {}
}
