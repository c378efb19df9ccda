//! COM1: polled output in bursts of one FIFO, polled or interrupt-driven input.

use crate::port::{inb, outb};

/// I/O port of COM1.
pub const BASE: u16 = 0x3f8;
/// GSI of COM1.
pub const GSI: u8 = 4;
/// Interrupt enable register.
pub const IER: u16 = BASE + 1;
/// Interrupt identification register (read).
pub const IIR: u16 = BASE + 2;
const FCR: u16 = BASE + 2;
const LCR: u16 = BASE + 3;
const MCR: u16 = BASE + 4;
const LSR: u16 = BASE + 5;
const LSR_DATA: u8 = 1;
const LSR_THRE: u8 = 0x20;
const FIFO: usize = 16;

/// Sends the very first byte, before anything is set up.
pub fn first(byte: u8) {
    outb(BASE, byte);
}

/// 8n1, FIFOs on, OUT2 on so that interrupts reach the interrupt controller.
pub fn init() {
    outb(LCR, 3);
    outb(FCR, 1);
    outb(MCR, 0x0b);
}

/// Writes all of `bytes`, one look at the line status per FIFO.
pub fn write(bytes: &[u8]) {
    for burst in bytes.chunks(FIFO) {
        while inb(LSR) & LSR_THRE == 0 {}
        for &byte in burst {
            outb(BASE, byte);
        }
    }
}

/// The next received byte, if there is one. A port that is not there reads all ones.
pub fn read() -> Option<u8> {
    let status = inb(LSR);
    (status & LSR_DATA != 0 && status != 0xff).then(|| inb(BASE))
}

/// `core::fmt` onto COM1, collected into FIFO-sized bursts.
pub struct Writer {
    buffer: [u8; FIFO],
    used: usize,
}

impl Writer {
    /// An empty burst.
    pub fn new() -> Self {
        Self { buffer: [0; FIFO], used: 0 }
    }

    fn flush(&mut self) {
        write(&self.buffer[..self.used]);
        self.used = 0;
    }
}

impl core::fmt::Write for Writer {
    fn write_str(&mut self, text: &str) -> core::fmt::Result {
        for &byte in text.as_bytes() {
            self.buffer[self.used] = byte;
            self.used += 1;
            if self.used == FIFO {
                self.flush();
            }
        }
        Ok(())
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.flush();
    }
}

/// Prints without an end of line.
#[macro_export]
macro_rules! print {
    ($($arg:tt)*) => {{
        let _ = core::fmt::Write::write_fmt(&mut $crate::serial::Writer::new(), format_args!($($arg)*));
    }};
}

/// Prints one line.
#[macro_export]
macro_rules! println {
    ($($arg:tt)*) => { $crate::print!("{}\r\n", format_args!($($arg)*)) };
}
