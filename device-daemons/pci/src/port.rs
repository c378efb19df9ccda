//! A root port: bridge registers (PCI-to-PCI Bridge 1.2, chapter 3) and a hot-plug slot (PCI Express 3.0, 6.7 and
//! 7.8). There is no I/O window: its registers are constant 0.

use serde::{Deserialize, Serialize};

use crate::device::{Bar, Identity, Msix};
use crate::space::{Header, LEN, Space};

/// A memory window, base to limit, inclusive; empty if the limit is below the base.
pub type Window = (u64, u64);

/// What is behind BAR 0 of a port: the MSI-X structures.
pub const BAR: Bar = Bar { index: 0, size: 4096, wide: false, prefetch: false };
/// Its MSI-X structures.
pub const MSIX: Msix = Msix { vectors: 1, bar: 0, table: 0, pba: 0x800 };
/// Header type and class of a PCI-to-PCI bridge; the ids are QEMU's for its generic root port.
pub const IDENTITY: Identity =
    Identity { vendor: 0x1b36, device: 0x000c, class: 0x06_04_00, revision: 0, subsystem: (0, 0) };

const PRIMARY: u8 = 0x18;
const SECONDARY: u8 = 0x19;
const SUBORDINATE: u8 = 0x1a;
const SECONDARY_STATUS: u8 = 0x1e;
const MEMORY_BASE: u8 = 0x20;
const MEMORY_LIMIT: u8 = 0x22;
const PREFETCH_BASE: u8 = 0x24;
const PREFETCH_LIMIT: u8 = 0x26;
const PREFETCH_BASE_HIGH: u8 = 0x28;
const PREFETCH_LIMIT_HIGH: u8 = 0x2c;
const BRIDGE_CONTROL: u8 = 0x3e;
/// Bridge control: parity, SERR, secondary bus reset.
const BRIDGE_CONTROL_BITS: u16 = 0x0043;
const SECONDARY_RESET: u16 = 1 << 6;

/// Id of the PCI Express capability.
pub const EXPRESS: u8 = 0x10;
// Offsets from the capability.
const DEVICE_STATUS: u8 = 0x0a;
const LINK_CONTROL: u8 = 0x10;
const LINK_STATUS: u8 = 0x12;
const SLOT_CONTROL: u8 = 0x18;
const SLOT_STATUS: u8 = 0x1a;
const ROOT_STATUS_HIGH: u8 = 0x22;

/// Version 2 of the capability.
const VERSION: u16 = 2;
const ROOT_PORT: u16 = 4 << 4;
const INTEGRATED_ENDPOINT: u16 = 9 << 4;
const ENDPOINT: u16 = 0;
const SLOT_IMPLEMENTED: u16 = 1 << 8;
/// Device capabilities: role-based error reporting.
const ROLE_BASED: u32 = 1 << 15;
/// Device control: error reporting, relaxed ordering, payload, tags, no snoop, read request size.
const DEVICE_CONTROL_BITS: u16 = 0x79ff;
/// 8 GT/s, one lane.
const SPEED_AND_WIDTH: u16 = 3 | 1 << 4;
/// Speeds of the link capabilities 2 register: up to 8 GT/s.
const SPEEDS: u32 = 0b1110;
const LINK_ACTIVE_REPORTING: u32 = 1 << 20;
const LINK_CONTROL_BITS: u16 = 0x00db;
const LINK_DISABLE: u16 = 1 << 4;
const LINK_ACTIVE: u16 = 1 << 13;
/// Slot capabilities: attention button, power controller, attention and power indicators, hot-plug capable.
const SLOT: u32 = 1 | 1 << 1 | 1 << 3 | 1 << 4 | 1 << 6;
/// Slot control: enables, indicators, power controller, link state change enable.
const SLOT_CONTROL_BITS: u16 = 0x17fb;
const HOTPLUG_ENABLE: u16 = 1 << 5;
const LINK_ENABLE: u16 = 1 << 12;
const POWER_OFF: u16 = 1 << 10;
const POWER_INDICATOR: u16 = 3 << 8;
const POWER_INDICATOR_ON: u16 = 1 << 8;
const POWER_INDICATOR_BLINKS: u16 = 2 << 8;
const POWER_INDICATOR_OFF: u16 = 3 << 8;
const ATTENTION_INDICATOR_OFF: u16 = 3 << 6;
/// Slot status: what the guest clears.
const BUTTON_PRESSED: u16 = 1;
const PRESENCE_CHANGED: u16 = 1 << 3;
const COMMAND_DONE: u16 = 1 << 4;
const LINK_CHANGED: u16 = 1 << 8;
const SLOT_STATUS_CLEARS: u16 = 0x011f;
const PRESENT: u16 = 1 << 6;

/// The PCI Express capability's body of an endpoint on the root bus or behind a port, and what of it is writable.
#[must_use]
pub fn endpoint_capability(on_root_bus: bool) -> ([u8; 0x3a], [u8; 0x3a]) {
    let (mut body, mut writable) = ([0; 0x3a], [0; 0x3a]);
    set(&mut body, 2, &(VERSION | if on_root_bus { INTEGRATED_ENDPOINT } else { ENDPOINT }).to_le_bytes());
    set(&mut body, 4, &ROLE_BASED.to_le_bytes());
    set(&mut writable, 8, &DEVICE_CONTROL_BITS.to_le_bytes());
    if !on_root_bus {
        set(&mut body, 0x0c, &u32::from(SPEED_AND_WIDTH).to_le_bytes());
        set(&mut body, LINK_STATUS, &SPEED_AND_WIDTH.to_le_bytes());
        set(&mut body, 0x2c, &SPEEDS.to_le_bytes());
        set(&mut writable, LINK_CONTROL, &(LINK_CONTROL_BITS & !LINK_DISABLE).to_le_bytes());
    }
    (body, writable)
}

/// Sets a field of a capability's body by its offset from the capability.
fn set(body: &mut [u8], offset: u8, value: &[u8]) {
    let at = usize::from(offset).saturating_sub(2);
    if let Some(slot) = body.get_mut(at..).and_then(|rest| rest.get_mut(..value.len())) {
        slot.copy_from_slice(value);
    }
}

/// What a write to a port's configuration space brings about beyond its own registers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Effects {
    /// The slot has lost its power.
    pub power_off: bool,
    /// What is behind is to be reset.
    pub reset: bool,
}

/// What is not in configuration space.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Saved {
    /// The guest has been asked to give up what is in the slot.
    pub leaving: bool,
    /// An enabled event is in the slot status: the interrupt has been raised for it.
    pub asserted: bool,
}

/// A root port's slot.
#[derive(Clone, Debug)]
pub struct Port {
    /// Offset of the PCI Express capability.
    cap: u8,
    /// The rest of its state.
    pub saved: Saved,
}

impl Port {
    /// Adds bridge registers and capability; none if there is no room.
    pub fn new(space: &mut Space, devfn: u8, slot: u16) -> Option<Self> {
        space.define(PRIMARY, &[0; 3], &[0xff; 3]);
        space.define(MEMORY_BASE, &[0; 4], &0xfff0_fff0_u32.to_le_bytes());
        // The prefetchable window is 64 bits wide.
        space.define(PREFETCH_BASE, &[1, 0, 1, 0], &0xfff0_fff0_u32.to_le_bytes());
        space.define(PREFETCH_BASE_HIGH, &[0; 8], &[0xff; 8]);
        space.define(BRIDGE_CONTROL, &[0; 2], &BRIDGE_CONTROL_BITS.to_le_bytes());
        space.define_clears(SECONDARY_STATUS, 0);
        let (mut body, mut writable) = ([0; 0x3a], [0; 0x3a]);
        set(&mut body, 2, &(VERSION | ROOT_PORT | SLOT_IMPLEMENTED).to_le_bytes());
        set(&mut body, 4, &ROLE_BASED.to_le_bytes());
        let link = u32::from(SPEED_AND_WIDTH) | LINK_ACTIVE_REPORTING | u32::from(devfn) << 24;
        set(&mut body, 0x0c, &link.to_le_bytes());
        set(&mut body, LINK_STATUS, &SPEED_AND_WIDTH.to_le_bytes());
        set(&mut body, 0x14, &(SLOT | u32::from(slot & 0x1fff) << 19).to_le_bytes());
        set(&mut body, 0x2c, &SPEEDS.to_le_bytes());
        set(&mut writable, 8, &DEVICE_CONTROL_BITS.to_le_bytes());
        set(&mut writable, LINK_CONTROL, &LINK_CONTROL_BITS.to_le_bytes());
        set(&mut writable, SLOT_CONTROL, &SLOT_CONTROL_BITS.to_le_bytes());
        // Root control: system errors and PME interrupts.
        set(&mut writable, 0x1c, &0x000f_u16.to_le_bytes());
        let cap = space.add_capability(EXPRESS, &body, &writable)?;
        space.define_clears(cap + DEVICE_STATUS, 0x000f);
        space.define_clears(cap + SLOT_STATUS, SLOT_STATUS_CLEARS);
        space.define_clears(cap + ROOT_STATUS_HIGH, 1);
        let port = Self { cap, saved: Saved::default() };
        Some(port)
    }

    /// The slot after power-on, when configuration space has been reset.
    pub fn power_on(&mut self, space: &mut Space, present: bool) {
        self.saved = Saved::default();
        let control = if present { POWER_INDICATOR_ON } else { POWER_INDICATOR_OFF | POWER_OFF };
        space.set_u16(self.cap + SLOT_CONTROL, ATTENTION_INDICATOR_OFF | control);
        space.set_u16(self.cap + SLOT_STATUS, if present { PRESENT } else { 0 });
        self.settle_link(space);
        let status = space.u16(self.cap + SLOT_STATUS) & !LINK_CHANGED;
        space.set_u16(self.cap + SLOT_STATUS, status);
    }

    /// Whether what is behind can be reached.
    #[must_use]
    pub fn is_link_up(&self, space: &Space) -> bool {
        space.u16(self.cap + LINK_STATUS) & LINK_ACTIVE != 0
    }

    /// Whether the slot has power.
    #[must_use]
    pub fn is_powered(&self, space: &Space) -> bool {
        space.u16(self.cap + SLOT_CONTROL) & POWER_OFF == 0
    }

    /// Whether the guest is at work on a press of the button: its power indicator blinks.
    #[must_use]
    pub fn is_busy(&self, space: &Space) -> bool {
        space.u16(self.cap + SLOT_CONTROL) & POWER_INDICATOR == POWER_INDICATOR_BLINKS
    }

    /// Something is in the slot, or not any more.
    pub fn set_present(&mut self, space: &mut Space, present: bool) {
        let status = space.u16(self.cap + SLOT_STATUS);
        if (status & PRESENT != 0) != present {
            let status = status ^ PRESENT;
            space.set_u16(self.cap + SLOT_STATUS, status | PRESENCE_CHANGED);
        }
        self.settle_link(space);
    }

    /// Presses the attention button.
    pub fn press_button(&mut self, space: &mut Space) {
        let status = space.u16(self.cap + SLOT_STATUS);
        space.set_u16(self.cap + SLOT_STATUS, status | BUTTON_PRESSED);
    }

    /// Brings the link's state up to date with power and presence.
    fn settle_link(&self, space: &mut Space) {
        let status = space.u16(self.cap + SLOT_STATUS);
        let disabled = space.u16(self.cap + LINK_CONTROL) & LINK_DISABLE != 0;
        let up = status & PRESENT != 0 && self.is_powered(space) && !disabled;
        if up != self.is_link_up(space) {
            let link = space.u16(self.cap + LINK_STATUS) ^ LINK_ACTIVE;
            space.set_u16(self.cap + LINK_STATUS, link);
            space.set_u16(self.cap + SLOT_STATUS, status | LINK_CHANGED);
        }
    }

    /// The guest has written `size` bytes at `offset`; `before` is what was there.
    pub fn written(&mut self, space: &mut Space, before: &[u8; LEN], offset: u16, size: u8) -> Effects {
        let was = |at: u8| {
            let bytes = before.get(usize::from(at)..).and_then(|rest| rest.first_chunk::<2>());
            bytes.map_or(0, |bytes| u16::from_le_bytes(*bytes))
        };
        let control = self.cap + SLOT_CONTROL;
        let slot = u16::from(control);
        if offset < slot + 2 && slot < offset + u16::from(size) {
            // Every command is done at once.
            let status = space.u16(self.cap + SLOT_STATUS);
            space.set_u16(self.cap + SLOT_STATUS, status | COMMAND_DONE);
        }
        self.settle_link(space);
        Effects {
            power_off: was(control) & POWER_OFF == 0 && !self.is_powered(space),
            reset: was(BRIDGE_CONTROL) & SECONDARY_RESET == 0
                && space.u16(BRIDGE_CONTROL) & SECONDARY_RESET != 0,
        }
    }

    /// Whether the interrupt is to be raised: an enabled event has come while there was none (6.7.3.4).
    pub fn take_edge(&mut self, space: &Space) -> bool {
        let (control, status) = (space.u16(self.cap + SLOT_CONTROL), space.u16(self.cap + SLOT_STATUS));
        // These enables are at the places of their events, the link's is not.
        let mut events = control & status & (BUTTON_PRESSED | PRESENCE_CHANGED | COMMAND_DONE);
        if control & LINK_ENABLE != 0 {
            events |= status & LINK_CHANGED;
        }
        let asserted = control & HOTPLUG_ENABLE != 0 && events != 0;
        let edge = asserted && !self.saved.asserted;
        self.saved.asserted = asserted;
        edge
    }
}

/// Bus numbers: primary, secondary, subordinate.
#[must_use]
pub fn buses(space: &Space) -> (u8, u8, u8) {
    (space.u8(PRIMARY), space.u8(SECONDARY), space.u8(SUBORDINATE))
}

/// The bus behind, if its number can be one.
#[must_use]
pub fn secondary(space: &Space) -> Option<u8> {
    let (_, secondary, subordinate) = buses(space);
    (secondary != 0 && secondary <= subordinate).then_some(secondary)
}

/// The memory window and the prefetchable one.
#[must_use]
pub fn windows(space: &Space) -> [Window; 2] {
    let low = |at| u64::from(space.u16(at) & 0xfff0) << 16;
    let high = |at| u64::from(space.u32(at)) << 32;
    [
        (low(MEMORY_BASE), low(MEMORY_LIMIT) | 0xf_ffff),
        (
            high(PREFETCH_BASE_HIGH) | low(PREFETCH_BASE),
            high(PREFETCH_LIMIT_HIGH) | low(PREFETCH_LIMIT) | 0xf_ffff,
        ),
    ]
}

/// Header of a port.
#[must_use]
pub fn space(multifunction: bool) -> Space {
    Space::new(&IDENTITY, Header::Bridge, multifunction)
}

#[cfg(test)]
mod tests {
    use super::*;

    const CAP: u16 = 0x40;

    fn port(present: bool) -> (Space, Port) {
        let mut space = space(false);
        let mut port = Port::new(&mut space, 0x08, 5).unwrap();
        port.power_on(&mut space, present);
        (space, port)
    }

    fn write(space: &mut Space, port: &mut Port, offset: u16, size: u8, value: u64) -> Effects {
        let before = *space.bytes();
        space.write(offset, size, value);
        port.written(space, &before, offset, size)
    }

    #[test]
    fn the_slot_says_what_it_has() {
        let (space, port) = port(false);
        assert_eq!(space.read(CAP, 4), 0x0142_0010);
        assert_eq!(space.read(CAP + 0x14, 4), 0x5b | 5 << 19);
        assert_eq!(space.read(CAP + 0x0c, 4), 0x0810_0013);
        assert_eq!(space.read(CAP + 0x18, 4), 0x07c0, "no power, indicators off, empty");
        assert!(!port.is_link_up(&space));
    }

    #[test]
    fn a_card_that_comes_is_powered_by_the_guest_and_leaves_when_it_takes_the_power() {
        let (mut space, mut port) = port(false);
        // Presence, command and link state interrupts.
        write(&mut space, &mut port, CAP + 0x18, 2, 0x17f8);
        assert_eq!(space.read(CAP + 0x1a, 2), 0x10);
        assert!(port.take_edge(&space) && !port.take_edge(&space));
        write(&mut space, &mut port, CAP + 0x1a, 2, 0x10);
        assert!(!port.take_edge(&space));
        port.set_present(&mut space, true);
        assert_eq!(space.read(CAP + 0x1a, 2), 0x48);
        assert!(port.take_edge(&space) && !port.is_link_up(&space));
        let effects = write(&mut space, &mut port, CAP + 0x18, 2, 0x13f8 & !0x200);
        assert_eq!(effects, Effects::default());
        assert!(port.is_link_up(&space));
        assert_eq!(space.read(CAP + 0x1a, 2), 0x158);
        assert!(!port.take_edge(&space), "the other events are not yet cleared");
        write(&mut space, &mut port, CAP + 0x1a, 2, 0x1ff);
        assert_eq!(space.read(CAP + 0x1a, 2), 0x40);
        port.press_button(&mut space);
        assert!(!port.take_edge(&space), "the button's interrupt is not enabled");
        write(&mut space, &mut port, CAP + 0x1a, 2, 0x1ff);
        let effects = write(&mut space, &mut port, CAP + 0x18, 2, 0x17f8);
        assert_eq!(effects, Effects { power_off: true, reset: false });
        assert!(!port.is_link_up(&space) && port.take_edge(&space));
    }

    #[test]
    fn a_card_that_was_there_is_on() {
        let (mut space, mut port) = port(true);
        assert_eq!(space.read(CAP + 0x18, 4), 0x0040_01c0);
        assert!(port.is_link_up(&space) && !port.take_edge(&space));
        write(&mut space, &mut port, CAP + 0x10, 2, 0x10);
        assert!(!port.is_link_up(&space), "the link is disabled");
        assert_eq!(space.read(CAP + 0x1a, 2), 0x140);
        assert!(write(&mut space, &mut port, 0x3e, 2, 0x40).reset);
        assert!(!write(&mut space, &mut port, 0x3e, 2, 0x40).reset);
    }

    #[test]
    fn windows_and_buses_are_what_the_guest_writes() {
        let (mut space, _) = port(false);
        assert_eq!(secondary(&space), None);
        space.write(0x18, 4, 0xff05_0300);
        assert_eq!((buses(&space), secondary(&space)), ((0, 3, 5), Some(3)));
        space.write(0x18, 4, 0x0002_0300);
        assert_eq!(secondary(&space), None, "the subordinate bus is below");
        assert_eq!(windows(&space), [(0, 0xf_ffff), (0, 0xf_ffff)]);
        space.write(0x20, 4, 0xc1ff_c00f);
        space.write(0x24, 4, 0x001f_0010);
        space.write(0x28, 4, 2);
        space.write(0x2c, 4, 3);
        assert_eq!(windows(&space), [(0xc000_0000, 0xc1ff_ffff), (0x2_0010_0000, 0x3_001f_ffff)]);
        assert_eq!(space.read(0x24, 4), 0x0011_0011);
        space.write(0x1c, 2, 0xffff);
        assert_eq!(space.read(0x1c, 2), 0, "no I/O window");
    }
}
