//! ACPI fixed hardware (ACPI 6.5, section 4.8.3): PM1 event and control, PM timer, power button.
//!
//! The machine is born in ACPI mode: SCI_EN always reads 1 and there is no SMI command port.

use bulkhead_bus_api::{Action, platform::SLP_TYP_S5};
use serde::{Deserialize, Serialize};

/// PM1 status: the most significant bit of the timer has changed.
pub const TIMER_STATUS: u16 = 1;
/// PM1 status: the power button was pressed.
pub const POWER_BUTTON_STATUS: u16 = 1 << 8;
/// Status bits that a write of 1 clears: timer, bus master, global lock, buttons, RTC, wake.
const STATUS_BITS: u16 = 0x8731;
/// Enable bits: timer, global lock, buttons, RTC.
const ENABLE_BITS: u16 = 0x0721;

/// PM1 control: interrupts are SCIs.
const SCI_EN: u16 = 1;
/// Control bits that keep what is written: bus master reload and the sleep type.
const CONTROL_BITS: u16 = 0x1c02;
const SLP_EN: u16 = 1 << 13;

/// Frequency of the PM timer in hertz.
const TIMER_HZ: u128 = 3_579_545;
const NANOS: u128 = 1_000_000_000;

/// The registers, from the PM1 status register on.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pm {
    status: u16,
    enable: u16,
    control: u16,
    /// Changes of the timer's most significant bit that the status register has seen.
    carries: u128,
    /// Status bits that drive the SCI.
    active: u16,
    #[serde(skip)]
    sci: bool,
    #[serde(skip)]
    button: bool,
}

fn ticks(run: u64) -> u128 {
    u128::from(run) * TIMER_HZ / NANOS
}

/// Low or high byte of a register.
const fn byte(register: u16, high: bool) -> u8 {
    let [first, second] = register.to_le_bytes();
    if high { second } else { first }
}

/// The register with one byte replaced.
const fn with_byte(register: u16, high: bool, value: u8) -> u16 {
    let [first, second] = register.to_le_bytes();
    u16::from_le_bytes(if high { [first, value] } else { [value, second] })
}

impl Pm {
    /// Whether a guest can have brought this about.
    #[must_use]
    pub fn is_possible(&self) -> bool {
        self.carries <= ticks(u64::MAX) >> 31
    }

    /// Reset state at run time `run` (nanoseconds); the timer goes on.
    pub fn reset(&mut self, run: u64) {
        *self = Self { carries: ticks(run) >> 31, ..Self::default() };
    }

    /// Reads the byte at `offset` from the PM1 status register.
    pub fn read(&mut self, offset: u64, run: u64) -> u8 {
        self.update(run);
        match offset {
            0 | 1 => byte(self.status, offset == 1),
            2 | 3 => byte(self.enable, offset == 3),
            4 | 5 => byte(self.control | SCI_EN, offset == 5),
            8..=11 => {
                let bytes = ticks(run).to_le_bytes();
                let index = usize::try_from(offset - 8).unwrap_or(0);
                bytes.get(index).copied().unwrap_or(0xff)
            }
            _ => 0xff,
        }
    }

    /// Writes the byte at `offset` from the PM1 status register.
    pub fn write(&mut self, offset: u64, value: u8, run: u64) -> Action {
        self.update(run);
        let mut action = Action::None;
        match offset {
            0 | 1 => self.status &= !(with_byte(0, offset == 1, value) & STATUS_BITS),
            2 | 3 => self.enable = with_byte(self.enable, offset == 3, value) & ENABLE_BITS,
            4 => self.control = with_byte(self.control, false, value) & CONTROL_BITS,
            5 => {
                let written = with_byte(self.control, true, value);
                self.control = written & CONTROL_BITS;
                if written & SLP_EN != 0 && written >> 10 & 7 == u16::from(SLP_TYP_S5) {
                    action = Action::PowerOff;
                }
            }
            _ => {}
        }
        self.update_sci();
        action
    }

    /// Presses the power button: the SCI if the guest enabled it there, and its own interrupt.
    pub fn press_power_button(&mut self) {
        self.status |= POWER_BUTTON_STATUS;
        self.button = true;
        self.update_sci();
    }

    /// Lets time pass.
    pub fn update(&mut self, run: u64) {
        let carries = ticks(run) >> 31;
        if carries > self.carries {
            self.carries = carries;
            self.status |= TIMER_STATUS;
            self.update_sci();
        }
    }

    /// Run time in nanoseconds until the timer raises an interrupt, if it will.
    #[must_use]
    pub fn next_event(&self, run: u64) -> Option<u64> {
        if self.enable & TIMER_STATUS == 0 || self.status & TIMER_STATUS != 0 {
            return None;
        }
        let at = (((self.carries + 1) << 31) * NANOS).div_ceil(TIMER_HZ);
        Some(u64::try_from(at).unwrap_or(u64::MAX).saturating_sub(run))
    }

    /// Whether the SCI has been raised since the last call.
    pub fn take_sci(&mut self) -> bool {
        std::mem::take(&mut self.sci)
    }

    /// Whether the button's interrupt has been raised since the last call.
    pub fn take_button(&mut self) -> bool {
        std::mem::take(&mut self.button)
    }

    /// The SCI is an edge here, so each further cause raises it anew.
    fn update_sci(&mut self) {
        let active = self.status & self.enable;
        self.sci |= active & !self.active != 0;
        self.active = active;
    }
}

#[cfg(test)]
#[expect(clippy::cast_possible_truncation, reason = "the low part is what is compared")]
mod tests {
    use super::*;

    fn read16(pm: &mut Pm, offset: u64) -> u16 {
        u16::from_le_bytes([pm.read(offset, 0), pm.read(offset + 1, 0)])
    }

    fn write16(pm: &mut Pm, offset: u64, value: u16) -> Action {
        let [low, high] = value.to_le_bytes();
        assert_eq!(pm.write(offset, low, 0), Action::None);
        pm.write(offset + 1, high, 0)
    }

    #[test]
    fn only_sleep_type_five_with_sleep_enable_switches_off() {
        let mut pm = Pm::default();
        for kind in 0..8u16 {
            assert_eq!(write16(&mut pm, 4, kind << 10), Action::None);
            let expected = if kind == 5 { Action::PowerOff } else { Action::None };
            assert_eq!(write16(&mut pm, 4, kind << 10 | SLP_EN), expected);
            assert_eq!(read16(&mut pm, 4), kind << 10 | SCI_EN, "SLP_EN is write-only");
        }
        assert_eq!(write16(&mut pm, 4, 0), Action::None);
        assert_eq!(read16(&mut pm, 4), SCI_EN, "SCI_EN cannot be cleared");
    }

    #[test]
    fn the_power_button_interrupts_and_its_status_is_cleared_by_a_one() {
        let mut pm = Pm::default();
        pm.press_power_button();
        assert_eq!((pm.take_sci(), pm.take_button(), pm.take_button()), (false, true, false));
        assert_eq!(read16(&mut pm, 0), POWER_BUTTON_STATUS);
        write16(&mut pm, 2, 0xffff);
        assert_eq!(read16(&mut pm, 2), ENABLE_BITS);
        assert!(pm.take_sci(), "enabling what is pending interrupts");
        pm.press_power_button();
        assert!(!pm.take_sci(), "still the same press");
        write16(&mut pm, 0, !POWER_BUTTON_STATUS);
        assert_eq!(read16(&mut pm, 0), POWER_BUTTON_STATUS);
        write16(&mut pm, 0, POWER_BUTTON_STATUS);
        assert_eq!(read16(&mut pm, 0), 0);
        pm.press_power_button();
        assert!(pm.take_sci());
    }

    #[test]
    fn the_timer_counts_at_its_rate_and_wraps_at_32_bits() {
        let mut pm = Pm::default();
        let mut timer = |run| u32::from_le_bytes([8, 9, 10, 11].map(|offset| pm.read(offset, run)));
        assert_eq!(timer(0), 0);
        assert_eq!(timer(1_000_000_000), 3_579_545);
        assert_eq!(timer(1200 * 1_000_000_000), (1200u64 * 3_579_545 % (1 << 32)) as u32);
        assert_eq!(timer(u64::MAX), (ticks(u64::MAX) % (1 << 32)) as u32);
    }

    #[test]
    fn the_timer_interrupts_when_its_top_bit_changes() {
        let mut pm = Pm::default();
        assert_eq!(pm.next_event(0), None);
        pm.write(2, 1, 0);
        let first = pm.next_event(0).unwrap();
        assert_eq!(ticks(first), 1 << 31);
        pm.update(first - 1);
        assert!(!pm.take_sci());
        pm.update(first);
        assert!(pm.take_sci());
        assert_eq!(pm.next_event(first), None, "not before it is acknowledged");
        pm.write(0, 1, first);
        assert_eq!(pm.read(0, first), 0);
        assert_eq!(ticks(first + pm.next_event(first).unwrap()), 1 << 32);
    }
}
