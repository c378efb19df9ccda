//! The devices of this process behind their ports, without descriptors or clocks of their own.

pub mod calendar;
pub mod i8042;
pub mod pm;
pub mod reset;
pub mod rtc;
pub mod serial;

use bulkhead_bus_api::{Access, Action, CollectedWrite, Op, Space, platform as map};

use serde::{Deserialize, Serialize};

use crate::clock::Now;
use crate::queue::Queue;
use i8042::I8042;
use pm::Pm;
use reset::ResetControl;
use rtc::Rtc;
use serial::Serial;

/// Interrupts that have risen, in the order of [`map::CONSOLE_GSIS`].
pub type Edges = [bool; map::CONSOLE_GSIS.len()];

/// All devices.
#[derive(Debug)]
pub struct Platform {
    /// COM1, if the machine has one.
    pub serial: Option<Serial>,
    rtc: Rtc,
    i8042: I8042,
    reset_control: ResetControl,
    pm: Pm,
    /// A device with a timer was touched.
    timers_changed: bool,
}

/// What of the devices outlives the process, beside the serial port's output.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Saved {
    serial: Option<serial::Registers>,
    rtc: Rtc,
    i8042: I8042,
    reset_control: ResetControl,
    pm: Pm,
}

impl Saved {
    /// Whether a guest can have brought this about on a machine with or without a serial port.
    #[must_use]
    pub fn is_possible(&self, serial: bool) -> bool {
        self.serial.is_some() == serial
            && self.serial.as_ref().is_none_or(serial::Registers::are_possible)
            && self.rtc.is_possible()
            && self.pm.is_possible()
    }
}

/// Offset of a port in a range that has it.
fn offset(range: map::Range, port: u64) -> Option<u64> {
    range.contains(port, 1).then(|| port - range.base)
}

/// The first that is to be done: what follows a reset or power-off belongs to a machine that is gone.
pub(crate) fn first(earlier: Action, later: Action) -> Action {
    if earlier == Action::None { later } else { earlier }
}

impl Platform {
    /// Devices in their power-on state.
    #[must_use]
    pub fn new(serial: bool, now: Now) -> Self {
        Self {
            serial: serial.then(Serial::default),
            rtc: Rtc::new(now.wall),
            i8042: I8042::default(),
            reset_control: ResetControl::default(),
            pm: Pm::default(),
            timers_changed: true,
        }
    }

    /// Devices that go on from what was saved, and from output of which `consumed` bytes have gone out since.
    #[must_use]
    pub fn restored(saved: Saved, output: Queue, consumed: usize) -> Self {
        Self {
            serial: saved.serial.map(|registers| Serial::restored(registers, output, consumed)),
            rtc: saved.rtc,
            i8042: saved.i8042,
            reset_control: saved.reset_control,
            pm: saved.pm,
            timers_changed: true,
        }
    }

    /// What is to outlive the process.
    #[must_use]
    pub fn save(&self) -> Saved {
        Saved {
            serial: self.serial.as_ref().map(|serial| serial.registers().clone()),
            rtc: self.rtc.clone(),
            i8042: self.i8042.clone(),
            reset_control: self.reset_control.clone(),
            pm: self.pm.clone(),
        }
    }

    /// Whether that is what was saved.
    #[must_use]
    pub fn is_as(&self, saved: &Saved) -> bool {
        self.serial.as_ref().map(Serial::registers) == saved.serial.as_ref()
            && self.rtc == saved.rtc
            && self.pm == saved.pm
            && self.i8042 == saved.i8042
            && self.reset_control == saved.reset_control
    }

    /// Puts every device into its reset state.
    pub fn reset(&mut self, now: Now) {
        if let Some(serial) = &mut self.serial {
            serial.reset();
        }
        self.rtc.reset(now.wall);
        self.i8042 = I8042::default();
        self.reset_control = ResetControl::default();
        self.pm.reset(now.run);
        self.timers_changed = true;
    }

    /// Does one access: all its bytes see the same moment. What no device claims reads all ones.
    pub fn access(&mut self, access: &Access, now: Now) -> (u64, Action) {
        let size = u64::from(access.size.min(8));
        match access.op {
            Op::Flush => (0, Action::None),
            Op::Write(data) => {
                let write =
                    CollectedWrite { space: access.space, addr: access.addr, size: access.size, data };
                (0, self.write(&write, now))
            }
            Op::Read => {
                let mut data = [0; 8];
                for (byte, i) in data.iter_mut().zip(0..size) {
                    *byte = match access.space {
                        Space::Pio => self.read_port(access.addr.wrapping_add(i), now),
                        Space::Mmio => 0xff,
                    };
                }
                (u64::from_le_bytes(data), Action::None)
            }
        }
    }

    /// Does one write.
    pub fn write(&mut self, write: &CollectedWrite, now: Now) -> Action {
        let mut action = Action::None;
        if write.space == Space::Pio {
            for (byte, i) in write.data.to_le_bytes().into_iter().zip(0..u64::from(write.size)) {
                action = first(action, self.write_port(write.addr.wrapping_add(i), byte, now));
            }
        }
        action
    }

    /// Presses the power button.
    pub fn press_power_button(&mut self) {
        self.pm.press_power_button();
    }

    /// Lets time pass.
    pub fn update(&mut self, now: Now) {
        self.rtc.update(now.wall);
        self.pm.update(now.run);
        self.timers_changed = true;
    }

    /// Whether [`Self::next_event`] may have changed since the last call.
    pub fn take_timers_changed(&mut self) -> bool {
        std::mem::take(&mut self.timers_changed)
    }

    /// Nanoseconds until [`Self::update`] is due; `runs` tells whether run time passes.
    #[must_use]
    pub fn next_event(&self, now: Now, runs: bool) -> Option<u64> {
        let pm = if runs { self.pm.next_event(now.run) } else { None };
        [self.rtc.next_event(now.wall), pm].into_iter().flatten().min()
    }

    /// The interrupts that have risen since the last call.
    pub fn take_edges(&mut self) -> Edges {
        let serial = self.serial.as_mut().is_some_and(Serial::take_edge);
        [serial, self.rtc.take_edge(), self.pm.take_sci(), self.pm.take_button()]
    }

    fn read_port(&mut self, port: u64, now: Now) -> u8 {
        if let Some(at) = offset(map::COM1, port) {
            let at = u8::try_from(at).unwrap_or(u8::MAX);
            return self.serial.as_mut().map_or(0xff, |serial| serial.read(at));
        }
        if let Some(at) = offset(map::RTC, port) {
            self.timers_changed = true;
            return self.rtc.read(at, now.wall);
        }
        if let Some(at) = pm_offset(port) {
            return self.pm.read(at, now.run);
        }
        if map::I8042_DATA.contains(port, 1) {
            self.i8042.read_data()
        } else if map::I8042_COMMAND.contains(port, 1) {
            self.i8042.read_status()
        } else if map::RESET_CONTROL.contains(port, 1) {
            self.reset_control.read()
        } else {
            0xff
        }
    }

    fn write_port(&mut self, port: u64, value: u8, now: Now) -> Action {
        if let Some(at) = offset(map::COM1, port) {
            if let Some(serial) = &mut self.serial {
                serial.write(u8::try_from(at).unwrap_or(u8::MAX), value);
            }
            return Action::None;
        }
        if let Some(at) = offset(map::RTC, port) {
            self.timers_changed = true;
            self.rtc.write(at, value, now.wall);
            return Action::None;
        }
        if let Some(at) = pm_offset(port) {
            self.timers_changed = true;
            return self.pm.write(at, value, now.run);
        }
        if map::I8042_DATA.contains(port, 1) {
            self.i8042.write_data(value)
        } else if map::I8042_COMMAND.contains(port, 1) {
            self.i8042.write_command(value)
        } else if map::RESET_CONTROL.contains(port, 1) {
            self.reset_control.write(value)
        } else {
            Action::None
        }
    }
}

/// Offset of a port from the PM1 status register, if it belongs to the ACPI fixed hardware.
fn pm_offset(port: u64) -> Option<u64> {
    let ranges = [map::PM1_EVENT, map::PM1_CONTROL, map::PM_TIMER];
    ranges.iter().any(|range| range.contains(port, 1)).then(|| port - map::PM1_EVENT.base)
}

#[cfg(test)]
#[expect(clippy::cast_possible_truncation, reason = "patterns and small random numbers")]
mod tests {
    use super::*;

    const START: Now = Now { wall: 1_763_865_682_000_000_000, run: 0 };

    fn read(platform: &mut Platform, port: u64, size: u8, now: Now) -> u64 {
        platform.access(&Access { space: Space::Pio, addr: port, size, op: Op::Read }, now).0
    }

    fn write(platform: &mut Platform, port: u64, size: u8, data: u64) -> Action {
        platform.access(&Access { space: Space::Pio, addr: port, size, op: Op::Write(data) }, START).1
    }

    /// xorshift64*: enough to reach every register in every state, the same in every run.
    struct Random(u64);

    impl Random {
        fn next(&mut self) -> u64 {
            self.0 ^= self.0 >> 12;
            self.0 ^= self.0 << 25;
            self.0 ^= self.0 >> 27;
            self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
        }

        fn below(&mut self, end: u64) -> u64 {
            (self.next() >> 33) % end
        }
    }

    #[test]
    fn wide_accesses_see_one_moment() {
        let mut platform = Platform::new(true, START);
        let now = Now { run: 0x0100_0000_0000, ..START };
        let ticks = u128::from(now.run) * 3_579_545 / 1_000_000_000;
        assert_eq!(u128::from(read(&mut platform, 0x608, 4, now)), ticks);
        assert_eq!(u128::from(read(&mut platform, 0x60a, 2, now)), ticks >> 16);
        assert_eq!(read(&mut platform, 0x604, 2, now), 1);
    }

    #[test]
    fn what_nobody_claims_reads_all_ones() {
        let mut platform = Platform::new(false, START);
        assert_eq!(read(&mut platform, 0x3f8, 4, START), 0xffff_ffff, "no COM1");
        assert_eq!(read(&mut platform, 0x606, 2, START), 0xffff);
        assert_eq!(read(&mut platform, u64::MAX, 8, START), u64::MAX);
        let access = Access { space: Space::Mmio, addr: 0x604, size: 2, op: Op::Read };
        assert_eq!(platform.access(&access, START), (0xffff, Action::None));
        let access = Access { space: Space::Mmio, addr: 0x604, size: 2, op: Op::Write(0xffff) };
        assert_eq!(platform.access(&access, START), (0, Action::None));
    }

    #[test]
    fn the_first_action_of_a_wide_write_counts() {
        let mut platform = Platform::new(true, START);
        assert_eq!(write(&mut platform, 0xcf9, 1, 6), Action::Reset);
        assert_eq!(write(&mut platform, 0x604, 2, 0x3400), Action::PowerOff);
        assert_eq!(write(&mut platform, 0x604, 4, 0x3400), Action::PowerOff);
        assert_eq!(write(&mut platform, 0x64, 1, 0xfe), Action::Reset);
    }

    #[test]
    fn a_million_random_accesses_break_nothing() {
        let mut random = Random(0x9e37_79b9_7f4a_7c15);
        let mut platform = Platform::new(true, START);
        let mut now = START;
        for _ in 0..1_000_000 {
            let range = map::CONSOLE_PORTS[random.below(8) as usize];
            let addr = (range.base + random.below(range.len + 2)).wrapping_sub(1);
            let size = 1 << random.below(4);
            let data = random.next();
            let op = if random.below(3) == 0 { Op::Read } else { Op::Write(data) };
            platform.access(&Access { space: Space::Pio, addr, size, op }, now);
            match random.below(64) {
                0 => platform.reset(now),
                1 => platform.press_power_button(),
                2 => platform.update(now),
                3 => now.wall = START.wall + i128::from(random.next() as i64),
                4 => now.run = now.run.saturating_add(random.next() >> 16),
                5..16 => now.run += random.below(100_000),
                _ => {}
            }
            let room = platform.serial.as_ref().unwrap().room();
            assert!(room <= serial::FIFO);
            let serial = platform.serial.as_mut().unwrap();
            if random.below(4) == 0 {
                serial.receive((0..room).map(|i| i as u8));
            }
            if random.below(5000) == 0 {
                serial.consume(random.below(100_000) as usize);
            }
            assert!(serial.output_len() <= serial::OUTPUT_LIMIT);
            platform.take_edges();
            platform.update(now);
            if let Some(wait) = platform.next_event(now, true) {
                assert!(wait < 86_400 * 2_000_000_000, "{wait}");
            }
        }
    }
}
