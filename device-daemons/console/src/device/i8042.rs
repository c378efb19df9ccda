//! i8042 keyboard controller with nothing attached: self-test, configuration byte and reset.
//!
//! Enough for a guest to find that there is no keyboard and no mouse, and to reset the machine by
//! command 0xfe ("pulse output line 0") or by the output port.

use bulkhead_bus_api::Action;
use serde::{Deserialize, Serialize};

const STATUS_OUTPUT_FULL: u8 = 1;
const STATUS_SYSTEM: u8 = 1 << 2;
const STATUS_COMMAND: u8 = 1 << 3;
/// The keyboard is not locked.
const STATUS_UNLOCKED: u8 = 1 << 4;

/// Both ports disabled, no interrupt.
const CONFIG: u8 = 0x30;
/// Output port: gate A20 open, reset line idle.
const OUTPUT_PORT: u8 = 0x03;
const SELF_TEST_PASSED: u8 = 0x55;
/// Result of a port test: the clock line is stuck low, as nothing drives it.
const CLOCK_STUCK: u8 = 0x01;

/// What the next byte written to the data port is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Parameter {
    None,
    Config,
    OutputPort,
    /// Comes back from the output buffer.
    Echo,
}

/// The controller.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct I8042 {
    status: u8,
    config: u8,
    output: Option<u8>,
    parameter: Parameter,
}

impl Default for I8042 {
    fn default() -> Self {
        Self { status: STATUS_UNLOCKED, config: CONFIG, output: None, parameter: Parameter::None }
    }
}

impl I8042 {
    /// Reads port 0x64.
    #[must_use]
    pub fn read_status(&self) -> u8 {
        if self.output.is_some() { self.status | STATUS_OUTPUT_FULL } else { self.status }
    }

    /// Reads port 0x60.
    pub fn read_data(&mut self) -> u8 {
        self.output.take().unwrap_or(0)
    }

    /// Writes port 0x60.
    pub fn write_data(&mut self, value: u8) -> Action {
        self.status &= !STATUS_COMMAND;
        match std::mem::replace(&mut self.parameter, Parameter::None) {
            // To a keyboard that is not there.
            Parameter::None => {}
            Parameter::Config => self.config = value,
            Parameter::Echo => self.output = Some(value),
            Parameter::OutputPort if value & 1 == 0 => return Action::Reset,
            Parameter::OutputPort => {}
        }
        Action::None
    }

    /// Writes port 0x64.
    pub fn write_command(&mut self, command: u8) -> Action {
        self.status |= STATUS_COMMAND;
        self.parameter = Parameter::None;
        match command {
            0x20 => self.output = Some(self.config),
            0x60 => self.parameter = Parameter::Config,
            0xa9 | 0xab => self.output = Some(CLOCK_STUCK),
            0xaa => {
                self.status |= STATUS_SYSTEM;
                self.config = CONFIG;
                self.output = Some(SELF_TEST_PASSED);
            }
            0xd0 => self.output = Some(OUTPUT_PORT),
            0xd1 => self.parameter = Parameter::OutputPort,
            // Without the status bit that says "from the mouse": a driver sees that there is none.
            0xd2 | 0xd3 => self.parameter = Parameter::Echo,
            // 0xf0 to 0xff pulse the output lines whose bit is 0; line 0 is the CPU's reset.
            0xf0..=0xff if command & 1 == 0 => return Action::Reset,
            _ => {}
        }
        Action::None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(controller: &mut I8042, command: u8) -> u8 {
        assert_eq!(controller.write_command(command), Action::None);
        assert_eq!(controller.read_status() & STATUS_OUTPUT_FULL, STATUS_OUTPUT_FULL);
        let value = controller.read_data();
        assert_eq!(controller.read_status() & STATUS_OUTPUT_FULL, 0);
        value
    }

    #[test]
    fn the_self_test_passes_and_no_port_works() {
        let mut controller = I8042::default();
        assert_eq!(controller.read_status() & (STATUS_OUTPUT_FULL | 2 | STATUS_SYSTEM), 0);
        assert_eq!(answer(&mut controller, 0xaa), 0x55);
        assert_eq!(controller.read_status() & STATUS_SYSTEM, STATUS_SYSTEM);
        assert_eq!(answer(&mut controller, 0xab), CLOCK_STUCK);
        assert_eq!(answer(&mut controller, 0xa9), CLOCK_STUCK);
    }

    #[test]
    fn the_configuration_byte_is_kept() {
        let mut controller = I8042::default();
        assert_eq!(answer(&mut controller, 0x20), CONFIG);
        controller.write_command(0x60);
        controller.write_data(0x74);
        assert_eq!(answer(&mut controller, 0x20), 0x74);
    }

    #[test]
    fn the_mouse_loop_comes_back_without_the_mouse_bit() {
        let mut controller = I8042::default();
        controller.write_command(0xd3);
        controller.write_data(0x5a);
        assert_eq!(controller.read_status() & 0x21, STATUS_OUTPUT_FULL);
        assert_eq!(controller.read_data(), 0x5a);
    }

    #[test]
    fn both_reset_lines_reset() {
        let mut controller = I8042::default();
        assert_eq!(controller.write_command(0xfe), Action::Reset);
        assert_eq!(controller.write_command(0xff), Action::None);
        controller.write_command(0xd1);
        assert_eq!(controller.write_data(0x03), Action::None);
        controller.write_command(0xd1);
        assert_eq!(controller.write_data(0x02), Action::Reset);
        // A parameter is wanted by the command just before it only.
        controller.write_command(0xd1);
        controller.write_command(0xae);
        assert_eq!(controller.write_data(0x02), Action::None);
    }
}
