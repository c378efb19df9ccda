//! Native PCI Express hot-plug (PCI Express 3.0, 6.7) as a driver without interrupts sees it.

use crate::chipset::Clock;
use crate::pci::{Bus, Function};
use crate::pvh::StartInfo;
use crate::virtio::Device;
use crate::{balloon, blk, dma, println, trap};

/// Id of the PCI Express capability, and offsets in it.
const EXPRESS: u8 = 0x10;
const SLOT_CONTROL: u16 = 0x18;
const SLOT_STATUS: u16 = 0x1a;
/// Attention indicator off, power indicator on, power on; the same without power.
const ON: u16 = 0x01c0;
const OFF: u16 = 0x07c0;
const BUTTON: u16 = 1;
const PRESENT: u16 = 1 << 6;
/// Type of a network device.
const NET: u16 = 1;

/// A port's slot.
struct Slot {
    port: Function,
    capability: u16,
}

impl Slot {
    fn find(bus: &Bus) -> Option<Self> {
        let &port = bus.functions().iter().find(|function| function.is_bridge())?;
        Some(Self { port, capability: port.capability(EXPRESS)? })
    }

    /// Waits for one of these bits, and clears what it has seen.
    fn wait(&self, bits: u16) {
        let status = self.capability + SLOT_STATUS;
        while self.port.get::<u16>(status) & bits == 0 {
            core::hint::spin_loop();
        }
        self.port.set(status, self.port.get::<u16>(status));
    }

    fn control(&self, value: u16) {
        self.port.set(self.capability + SLOT_CONTROL, value);
    }
}

/// `test=hotplug`: gives power to what comes into the first port, says what it is and whether it works, and takes the power
/// when the button is pressed, for ever.
pub fn run(info: &StartInfo) {
    let clock = Clock::new(info);
    trap::enable();
    for round in 1u64.. {
        // What the last device had is not used any more.
        let mark = dma::mark();
        let Some(slot) = Bus::enumerate(info).as_ref().and_then(Slot::find) else { return println!("no port") };
        slot.wait(PRESENT);
        slot.control(ON);
        let Some(bus) = Bus::enumerate(info) else { return println!("no PCI bus") };
        if let Some(mut disk) = Device::find(&bus, blk::KIND, 0).and_then(blk::Disk::open) {
            let works = blk::works(&mut disk, &clock, round);
            println!("round {round}: a disk of {} blocks, works: {works}", disk.blocks);
        } else if let Some(device) = Device::find(&bus, balloon::KIND, 0) {
            println!("round {round}: a balloon, works: {}", device.begin(0).is_some());
        } else if let Some(device) = Device::find(&bus, NET, 0) {
            println!("round {round}: a network, works: {}", device.begin(0).is_some());
        } else {
            println!("round {round}: nothing that this program knows");
        }
        slot.wait(BUTTON);
        slot.control(OFF);
        println!("round {round}: gone");
        dma::release(mark);
    }
}
