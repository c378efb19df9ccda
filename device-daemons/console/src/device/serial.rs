//! 16550A UART (PC16550D data sheet), without baud rate: a byte takes no time on the line.
//!
//! Output goes to a bounded queue that the transport empties into a character device. While there
//! is no room for a whole transmit FIFO, THRE and TEMT stay clear: a driver that obeys them loses
//! nothing, however slow the other side is. A driver that ignores them loses bytes when the queue
//! is full, as it does on hardware.
//!
//! As the line is infinitely fast, the receive timeout (four character times without traffic) is
//! over as soon as the bytes that are there are in the FIFO: what does not reach the trigger level
//! raises the timeout interrupt at once.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use crate::queue::Queue;

/// Depth of either FIFO, in bytes.
pub const FIFO: usize = 16;
/// The most bytes of output that wait for the character device.
pub const OUTPUT_LIMIT: usize = 64 * 1024;

const IER_RECEIVE: u8 = 1;
const IER_TRANSMIT: u8 = 1 << 1;
const IER_LINE: u8 = 1 << 2;
const IER_MODEM: u8 = 1 << 3;

const IIR_MODEM: u8 = 0x00;
const IIR_NONE: u8 = 0x01;
const IIR_TRANSMIT: u8 = 0x02;
const IIR_RECEIVE: u8 = 0x04;
const IIR_LINE: u8 = 0x06;
const IIR_TIMEOUT: u8 = 0x0c;
const IIR_FIFOS: u8 = 0xc0;

const FCR_ENABLE: u8 = 1;
const FCR_CLEAR_RECEIVER: u8 = 1 << 1;

const LCR_DLAB: u8 = 1 << 7;

const MCR_DTR: u8 = 1;
const MCR_RTS: u8 = 1 << 1;
const MCR_OUT1: u8 = 1 << 2;
const MCR_OUT2: u8 = 1 << 3;
const MCR_LOOP: u8 = 1 << 4;
const MCR_MASK: u8 = 0x1f;

const LSR_DATA: u8 = 1;
const LSR_OVERRUN: u8 = 1 << 1;
const LSR_TRANSMITTER_EMPTY: u8 = 0x60;

const MSR_CTS: u8 = 1 << 4;
const MSR_DSR: u8 = 1 << 5;
const MSR_RI: u8 = 1 << 6;
const MSR_DCD: u8 = 1 << 7;
const MSR_DELTA_RI: u8 = 1 << 2;

/// Divisor after reset: 9600 baud of a 1.8432 MHz crystal, as PC firmware leaves it.
const DIVISOR: u16 = 12;

/// The registers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registers {
    ier: u8,
    lcr: u8,
    mcr: u8,
    scr: u8,
    divisor: u16,
    fifos: bool,
    /// Bytes in the FIFO from which on data is "available" (1 without FIFOs).
    trigger: usize,
    overrun: bool,
    modem_delta: u8,
    /// The transmitter has become empty and IIR has not said so yet.
    transmit_pending: bool,
    received: VecDeque<u8>,
    line: bool,
}

impl Default for Registers {
    fn default() -> Self {
        Self {
            ier: 0,
            lcr: 0,
            mcr: 0,
            scr: 0,
            divisor: DIVISOR,
            fifos: false,
            trigger: 1,
            overrun: false,
            modem_delta: 0,
            transmit_pending: false,
            received: VecDeque::with_capacity(FIFO),
            line: false,
        }
    }
}

impl Registers {
    /// Whether a guest can have brought them about.
    #[must_use]
    pub fn are_possible(&self) -> bool {
        let depth = if self.fifos { FIFO } else { 1 };
        self.received.len() <= depth && (1..=FIFO).contains(&self.trigger)
    }
}

/// The UART.
#[derive(Debug, Default)]
pub struct Serial {
    registers: Registers,
    output: Queue,
    edge: bool,
}

impl Serial {
    /// Puts every register into its reset state. Output that waits stays: it has left the UART.
    pub fn reset(&mut self) {
        self.registers = Registers::default();
        self.edge = false;
    }

    /// Reads register `offset` (0 to 7).
    pub fn read(&mut self, offset: u8) -> u8 {
        let dlab = self.registers.lcr & LCR_DLAB != 0;
        let [low, high] = self.registers.divisor.to_le_bytes();
        let value = match offset {
            0 if dlab => low,
            0 => self.registers.received.pop_front().unwrap_or(0),
            1 if dlab => high,
            1 => self.registers.ier,
            2 => self.identify(),
            3 => self.registers.lcr,
            4 => self.registers.mcr,
            5 => {
                let value = self.line_status();
                self.registers.overrun = false;
                value
            }
            6 => self.modem_lines() | std::mem::take(&mut self.registers.modem_delta),
            7 => self.registers.scr,
            _ => 0xff,
        };
        self.update_line();
        value
    }

    /// Writes register `offset` (0 to 7).
    pub fn write(&mut self, offset: u8, value: u8) {
        let dlab = self.registers.lcr & LCR_DLAB != 0;
        let [low, high] = self.registers.divisor.to_le_bytes();
        match offset {
            0 if dlab => self.registers.divisor = u16::from_le_bytes([value, high]),
            0 => self.transmit(value),
            1 if dlab => self.registers.divisor = u16::from_le_bytes([low, value]),
            1 => self.enable_interrupts(value),
            2 => self.control_fifos(value),
            3 => self.registers.lcr = value,
            4 => self.control_modem(value),
            7 => self.registers.scr = value,
            _ => {}
        }
        self.update_line();
    }

    /// Bytes that the receiver takes now. None in loopback: the line is cut.
    #[must_use]
    pub fn room(&self) -> usize {
        if self.registers.mcr & MCR_LOOP != 0 {
            0
        } else {
            self.depth().saturating_sub(self.registers.received.len())
        }
    }

    /// Bytes arrive on the line; what exceeds [`Self::room`] overruns.
    pub fn receive(&mut self, bytes: impl IntoIterator<Item = u8>) {
        for byte in bytes {
            self.push_received(byte);
        }
        self.update_line();
    }

    /// Output that waits, oldest first, in two pieces.
    #[must_use]
    pub fn output(&self) -> (&[u8], &[u8]) {
        self.output.as_slices()
    }

    /// The output that waits.
    #[must_use]
    pub const fn queue(&self) -> &Queue {
        &self.output
    }

    /// The registers.
    #[must_use]
    pub const fn registers(&self) -> &Registers {
        &self.registers
    }

    /// A UART that goes on from these registers, and from output of which `consumed` bytes have gone out
    /// since the registers were as they are.
    #[must_use]
    pub fn restored(registers: Registers, output: Queue, consumed: usize) -> Self {
        let mut serial = Self { registers, output, edge: false };
        serial.consume(consumed);
        serial
    }

    /// Number of bytes of output that wait.
    #[must_use]
    pub fn output_len(&self) -> usize {
        self.output.len()
    }

    /// The oldest `count` bytes of output have been delivered or dropped.
    pub fn consume(&mut self, count: usize) {
        let was_ready = self.transmitter_ready();
        drop(self.output.take(count));
        if !was_ready && self.transmitter_ready() {
            self.registers.transmit_pending = true;
        }
        self.update_line();
    }

    /// Whether the interrupt line has risen since the last call.
    pub fn take_edge(&mut self) -> bool {
        std::mem::take(&mut self.edge)
    }

    const fn depth(&self) -> usize {
        if self.registers.fifos { FIFO } else { 1 }
    }

    fn transmitter_ready(&self) -> bool {
        self.output.len() + FIFO <= OUTPUT_LIMIT
    }

    fn line_status(&self) -> u8 {
        let mut value = 0;
        if !self.registers.received.is_empty() {
            value |= LSR_DATA;
        }
        if self.registers.overrun {
            value |= LSR_OVERRUN;
        }
        if self.transmitter_ready() {
            value |= LSR_TRANSMITTER_EMPTY;
        }
        value
    }

    /// CTS, DSR, RI and DCD: of a modem that is there, or looped back from the outputs.
    const fn modem_lines(&self) -> u8 {
        if self.registers.mcr & MCR_LOOP == 0 {
            return MSR_CTS | MSR_DSR | MSR_DCD;
        }
        let mut lines = 0;
        if self.registers.mcr & MCR_RTS != 0 {
            lines |= MSR_CTS;
        }
        if self.registers.mcr & MCR_DTR != 0 {
            lines |= MSR_DSR;
        }
        if self.registers.mcr & MCR_OUT1 != 0 {
            lines |= MSR_RI;
        }
        if self.registers.mcr & MCR_OUT2 != 0 {
            lines |= MSR_DCD;
        }
        lines
    }

    /// The enabled interrupt of the highest priority, as IIR names it.
    fn interrupt(&self) -> u8 {
        if self.registers.ier & IER_LINE != 0 && self.registers.overrun {
            IIR_LINE
        } else if self.registers.ier & IER_RECEIVE != 0
            && self.registers.received.len() >= self.registers.trigger
        {
            IIR_RECEIVE
        } else if self.registers.ier & IER_RECEIVE != 0 && !self.registers.received.is_empty() {
            IIR_TIMEOUT
        } else if self.registers.ier & IER_TRANSMIT != 0 && self.registers.transmit_pending {
            IIR_TRANSMIT
        } else if self.registers.ier & IER_MODEM != 0 && self.registers.modem_delta != 0 {
            IIR_MODEM
        } else {
            IIR_NONE
        }
    }

    fn identify(&mut self) -> u8 {
        let id = self.interrupt();
        if id == IIR_TRANSMIT {
            self.registers.transmit_pending = false;
        }
        if self.registers.fifos { id | IIR_FIFOS } else { id }
    }

    fn update_line(&mut self) {
        let line = self.interrupt() != IIR_NONE;
        self.edge |= line && !self.registers.line;
        self.registers.line = line;
    }

    fn push_received(&mut self, byte: u8) {
        if self.registers.received.len() < self.depth() {
            self.registers.received.push_back(byte);
            return;
        }
        self.registers.overrun = true;
        // Without FIFOs the new byte takes the place of the old one; a full FIFO keeps what it has.
        if !self.registers.fifos {
            self.registers.received.clear();
            self.registers.received.push_back(byte);
        }
    }

    fn transmit(&mut self, byte: u8) {
        if self.registers.mcr & MCR_LOOP != 0 {
            self.push_received(byte);
        } else if self.output.len() < OUTPUT_LIMIT {
            self.output.push(byte);
        }
        self.registers.transmit_pending = self.transmitter_ready();
    }

    fn enable_interrupts(&mut self, value: u8) {
        let value = value & (IER_RECEIVE | IER_TRANSMIT | IER_LINE | IER_MODEM);
        // Enabling the transmit interrupt while the transmitter is empty raises it, each time anew.
        if (self.registers.ier ^ value) & IER_TRANSMIT != 0 {
            self.registers.transmit_pending = value & IER_TRANSMIT != 0 && self.transmitter_ready();
        }
        self.registers.ier = value;
    }

    fn control_fifos(&mut self, value: u8) {
        let enable = value & FCR_ENABLE != 0;
        if enable != self.registers.fifos || value & FCR_CLEAR_RECEIVER != 0 {
            self.registers.received.clear();
        }
        // The transmit FIFO is always empty: its bytes have left for the output queue.
        self.registers.fifos = enable;
        self.registers.trigger = match value >> 6 {
            _ if !enable => 1,
            0 => 1,
            1 => 4,
            2 => 8,
            _ => 14,
        };
    }

    fn control_modem(&mut self, value: u8) {
        let before = self.modem_lines();
        self.registers.mcr = value & MCR_MASK;
        let after = self.modem_lines();
        let changed = before ^ after;
        self.registers.modem_delta |= (changed & (MSR_CTS | MSR_DSR | MSR_DCD)) >> 4;
        // The ring indicator counts when the ringing ends.
        if changed & before & MSR_RI != 0 {
            self.registers.modem_delta |= MSR_DELTA_RI;
        }
    }
}

#[cfg(test)]
#[expect(clippy::cast_possible_truncation, reason = "patterns and small random numbers")]
mod tests {
    use super::*;

    const RBR: u8 = 0;
    const IER: u8 = 1;
    const IIR: u8 = 2;
    const LCR: u8 = 3;
    const MCR: u8 = 4;
    const LSR: u8 = 5;
    const MSR: u8 = 6;

    fn sent(serial: &Serial) -> Vec<u8> {
        let (first, second) = serial.output();
        [first, second].concat()
    }

    fn with_fifos(trigger: u8) -> Serial {
        let mut serial = Serial::default();
        serial.write(IIR, FCR_ENABLE | trigger << 6);
        serial
    }

    /// The register accesses with which Linux's 8250 driver tells a 16550A from its relatives.
    #[test]
    fn a_driver_sees_a_16550a() {
        let mut serial = Serial::default();
        serial.write(IER, 0);
        assert_eq!(serial.read(IER), 0);
        serial.write(IER, 0x0f);
        assert_eq!(serial.read(IER), 0x0f);
        serial.write(IER, 0xff);
        assert_eq!(serial.read(IER), 0x0f, "no sleep mode, no other enable bits");
        serial.write(IER, 0);

        serial.write(MCR, MCR_LOOP | MCR_OUT2 | MCR_RTS);
        assert_eq!(serial.read(MSR) & 0xf0, MSR_DCD | MSR_CTS);
        serial.write(MCR, 0);

        for (fcr, id) in [(0, 0), (FCR_ENABLE, 3)] {
            serial.write(IIR, fcr);
            assert_eq!(serial.read(IIR) >> 6, id);
        }
        for lcr in [0x80, 0xbf, 0xe0] {
            serial.write(LCR, lcr);
            assert_ne!(serial.read(IIR), 0, "no extended feature register");
        }
        serial.write(LCR, 0);
        let plain = serial.read(IIR);
        serial.write(IIR, FCR_ENABLE | 1 << 5);
        assert_eq!(serial.read(IIR), plain, "no 64-byte FIFO");
        serial.write(7, 0xa5);
        assert_eq!(serial.read(7), 0xa5);
    }

    #[test]
    fn the_fifo_is_sixteen_deep_in_loopback() {
        let mut serial = with_fifos(0);
        serial.write(MCR, MCR_LOOP);
        for byte in 0..=255 {
            serial.write(RBR, byte);
        }
        assert_eq!(serial.read(LSR) & (LSR_DATA | LSR_OVERRUN), LSR_DATA | LSR_OVERRUN);
        assert_eq!(serial.read(LSR) & LSR_OVERRUN, 0, "reading clears it");
        let mut count = 0;
        while serial.read(LSR) & LSR_DATA != 0 {
            assert_eq!(serial.read(RBR), count, "a full FIFO keeps what it has");
            count += 1;
        }
        assert_eq!(count, 16);
        assert!(sent(&serial).is_empty(), "nothing leaves the chip");
    }

    #[test]
    fn without_fifos_the_last_byte_wins() {
        let mut serial = Serial::default();
        serial.write(MCR, MCR_LOOP);
        serial.write(RBR, 1);
        serial.write(RBR, 2);
        assert_eq!(serial.read(LSR) & LSR_OVERRUN, LSR_OVERRUN);
        assert_eq!(serial.read(RBR), 2);
        assert_eq!(serial.read(LSR) & LSR_DATA, 0);
    }

    #[test]
    fn interrupts_come_in_their_order() {
        let mut serial = with_fifos(1);
        serial.write(MCR, MCR_LOOP);
        serial.write(IER, 0x0f);
        assert!(serial.take_edge());
        for _ in 0..17 {
            serial.write(RBR, b'x');
        }
        serial.write(MCR, MCR_LOOP | MCR_DTR);
        assert_eq!(serial.read(IIR), 0xc0 | IIR_LINE);
        serial.read(LSR);
        for _ in 0..13 {
            assert_eq!(serial.read(IIR), 0xc0 | IIR_RECEIVE);
            serial.read(RBR);
        }
        for _ in 0..3 {
            assert_eq!(serial.read(IIR), 0xc0 | IIR_TIMEOUT, "below the trigger level of 4");
            serial.read(RBR);
        }
        assert_eq!(serial.read(IIR), 0xc0 | IIR_TRANSMIT);
        assert_eq!(serial.read(IIR), 0xc0 | IIR_MODEM, "reading IIR acknowledged the transmitter");
        assert_eq!(serial.read(MSR) & 0x0f, 0x02 | 0x08 | 0x01, "DSR rose since; CTS and DCD fell before");
        assert_eq!(serial.read(IIR), 0xc0 | IIR_NONE);
    }

    #[test]
    fn modem_changes_are_latched_until_read() {
        let mut serial = Serial::default();
        assert_eq!(serial.read(MSR), MSR_CTS | MSR_DSR | MSR_DCD, "a modem that is ready");
        serial.write(IER, IER_MODEM);
        serial.write(MCR, MCR_LOOP | MCR_RTS | MCR_DTR | MCR_OUT2);
        assert!(!serial.take_edge(), "the same lines as before");
        serial.write(MCR, MCR_LOOP | MCR_RTS | MCR_DTR | MCR_OUT2 | MCR_OUT1);
        assert!(!serial.take_edge(), "ringing begins");
        serial.write(MCR, MCR_LOOP | MCR_RTS | MCR_DTR | MCR_OUT2);
        assert!(serial.take_edge(), "ringing ends");
        assert_eq!(serial.read(IIR), IIR_MODEM);
        assert_eq!(serial.read(MSR) & 0x0f, MSR_DELTA_RI);
        assert_eq!(serial.read(IIR), IIR_NONE);
    }

    /// Linux's start-up test: toggling the enable bit raises the transmit interrupt each time.
    #[test]
    fn enabling_the_transmit_interrupt_raises_it_anew() {
        let mut serial = with_fifos(0);
        for _ in 0..2 {
            serial.write(IER, IER_TRANSMIT);
            assert!(serial.take_edge());
            assert_eq!(serial.read(IIR), 0xc0 | IIR_TRANSMIT);
            assert_eq!(serial.read(IIR), 0xc0 | IIR_NONE);
            serial.write(IER, IER_TRANSMIT);
            assert!(!serial.take_edge(), "enabled already");
            serial.write(IER, 0);
        }
    }

    /// A driver that sends a buffer from its interrupt handler: one edge per FIFO load.
    #[test]
    fn output_flows_interrupt_driven() {
        let mut serial = with_fifos(0);
        let text: Vec<u8> = (0..100).collect();
        let mut left = text.chunks(FIFO);
        serial.write(IER, IER_TRANSMIT);
        let mut interrupts = 0;
        while serial.take_edge() {
            interrupts += 1;
            assert_eq!(serial.read(IIR), 0xc0 | IIR_TRANSMIT);
            assert_eq!(serial.read(LSR) & LSR_TRANSMITTER_EMPTY, LSR_TRANSMITTER_EMPTY);
            match left.next() {
                Some(chunk) => chunk.iter().for_each(|byte| serial.write(RBR, *byte)),
                None => serial.write(IER, 0),
            }
        }
        assert_eq!((interrupts, sent(&serial)), (8, text));
    }

    #[test]
    fn a_full_queue_holds_the_driver_and_loses_nothing() {
        let mut serial = with_fifos(0);
        let mut written = Vec::new();
        while serial.read(LSR) & LSR_TRANSMITTER_EMPTY != 0 {
            for _ in 0..FIFO {
                written.push(written.len() as u8);
                serial.write(RBR, *written.last().unwrap());
            }
        }
        assert_eq!(written.len(), OUTPUT_LIMIT);
        serial.write(IER, IER_TRANSMIT);
        assert!(!serial.take_edge());
        serial.consume(FIFO - 1);
        assert!(!serial.take_edge());
        serial.consume(1);
        assert!(serial.take_edge(), "room for a FIFO again");
        assert_eq!(serial.read(IIR), 0xc0 | IIR_TRANSMIT);
        assert_eq!(sent(&serial), written[FIFO..]);
        for _ in 0..2 * OUTPUT_LIMIT {
            serial.write(RBR, 0);
        }
        assert_eq!(serial.output_len(), OUTPUT_LIMIT, "a driver that does not look loses bytes");
    }

    #[test]
    fn the_receiver_takes_what_fits_and_signals_the_rest_when_read() {
        let mut serial = with_fifos(3);
        serial.write(IER, IER_RECEIVE);
        assert_eq!(serial.room(), 16);
        serial.receive(*b"hello");
        assert!(serial.take_edge());
        assert_eq!((serial.read(IIR), serial.room()), (0xc0 | IIR_TIMEOUT, 11));
        serial.receive(*b" world 1234");
        assert!(!serial.take_edge(), "the line is up already");
        assert_eq!((serial.read(IIR), serial.room()), (0xc0 | IIR_RECEIVE, 0));
        let text: Vec<u8> = (0..16).map(|_| serial.read(RBR)).collect();
        assert_eq!(text, b"hello world 1234");
        assert_eq!(serial.read(IIR), 0xc0 | IIR_NONE);
        serial.receive(*b"!");
        assert!(serial.take_edge());
        serial.write(IIR, FCR_ENABLE | FCR_CLEAR_RECEIVER);
        assert_eq!(serial.read(LSR) & LSR_DATA, 0);
    }

    #[test]
    fn the_divisor_hides_behind_dlab() {
        let mut serial = Serial::default();
        serial.write(LCR, LCR_DLAB | 3);
        assert_eq!((serial.read(0), serial.read(1)), (12, 0));
        serial.write(0, 1);
        serial.write(1, 2);
        assert_eq!((serial.read(0), serial.read(1)), (1, 2));
        serial.write(LCR, 3);
        assert_eq!((serial.read(1), serial.output_len()), (0, 0));
    }

    #[test]
    fn a_reset_keeps_the_output_that_has_left() {
        let mut serial = with_fifos(0);
        serial.write(RBR, b'z');
        serial.write(IER, 0x0f);
        serial.receive(*b"in");
        serial.reset();
        assert_eq!(sent(&serial), b"z");
        assert_eq!((serial.read(IER), serial.read(IIR), serial.read(LSR)), (0, 1, LSR_TRANSMITTER_EMPTY));
        assert!(!serial.take_edge());
    }
}
