//! Reset control register at port 0xcf9, as of PC chipsets.

use bulkhead_bus_api::Action;
use serde::{Deserialize, Serialize};

/// Hard instead of soft reset; kept, without effect.
const SYSTEM_RESET: u8 = 1 << 1;
/// A write of 1 resets.
const RESET_CPU: u8 = 1 << 2;

/// The register.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResetControl {
    value: u8,
}

impl ResetControl {
    /// Reads the register.
    #[must_use]
    pub const fn read(&self) -> u8 {
        self.value
    }

    /// Writes the register.
    pub const fn write(&mut self, value: u8) -> Action {
        self.value = value & SYSTEM_RESET;
        if value & RESET_CPU != 0 { Action::Reset } else { Action::None }
    }
}

#[cfg(test)]
mod tests {
    use bulkhead_bus_api::platform::RESET_VALUE;

    use super::*;

    #[test]
    fn only_the_reset_bit_resets() {
        let mut register = ResetControl::default();
        assert_eq!(register.write(0x02), Action::None);
        assert_eq!(register.read(), 0x02);
        assert_eq!(register.write(RESET_VALUE), Action::Reset);
        assert_eq!(register.read(), 0x02);
        assert_eq!(register.write(0x00), Action::None);
    }
}
