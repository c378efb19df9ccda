//! What a function's device is to the bus.

use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Instant;

use bulkhead_control_api::config::PciDevice;
use bulkhead_control_api::side::MemorySizes;
use nix::poll::PollFd;

use crate::memory::Memory;
use crate::pieces::{Ask, Reply};

/// Identification of a function (PCI 3.0, 6.2.1 and 6.2.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Vendor id.
    pub vendor: u16,
    /// Device id.
    pub device: u16,
    /// Class code: base class, subclass, programming interface in 24 bits.
    pub class: u32,
    /// Revision id.
    pub revision: u8,
    /// Subsystem vendor id and subsystem id.
    pub subsystem: (u16, u16),
}

/// A memory BAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bar {
    /// Its number, 0 to 5; a wide one takes the next number, too.
    pub index: u8,
    /// Size in bytes, a power of two of at least 4,096.
    pub size: u64,
    /// 64 bits wide.
    pub wide: bool,
    /// Prefetchable.
    pub prefetch: bool,
}

/// Where the MSI-X structures are; the bus implements them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Msix {
    /// Number of vectors.
    pub vectors: u16,
    /// BAR of table and pending bits; accesses to both never reach the device.
    pub bar: u8,
    /// Offset of the table, 8-byte aligned.
    pub table: u32,
    /// Offset of the pending bits, 8-byte aligned.
    pub pba: u32,
}

/// A capability that the device adds to the bus's own (PCI Express, MSI-X).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capability {
    /// Capability id.
    pub id: u8,
    /// What follows id and next pointer.
    pub body: Vec<u8>,
    /// Bits of the body that the guest may write; shorter than the body: the rest is read-only.
    pub writable: Vec<u8>,
}

/// The eventfds of a device. They are the same as long as the device exists, whatever the guest does to masks and BARs.
#[derive(Clone, Debug, Default)]
pub struct Wires {
    /// By vector of the device's MSI-X table: a write raises the interrupt, or makes it pending while it is masked.
    pub vectors: Vec<Rc<OwnedFd>>,
    /// By entry of [`Device::bells`].
    pub bells: Vec<Rc<OwnedFd>>,
}

/// What a device's back end is to the event loop. Nothing here waits, and each call does a bounded piece of work.
pub trait Backed {
    /// Names of the connections that it lacks now, as the opener knows them (`vhost.ID`, `side.ID`). The loop asks for
    /// them at a pace of its own, without end; names that are no longer in here are not asked for any more.
    fn missing(&self) -> Vec<String>;
    /// A connection that it lacked; one that it does not lack is closed.
    fn connected(&mut self, name: &str, fd: OwnedFd);
    /// Nobody listens at a connection that it lacks.
    fn refused(&mut self, _name: &str) {}
    /// Adds the descriptors to watch and what for. Asked anew in every turn of the loop.
    fn watch<'a>(&'a self, list: &mut Vec<PollFd<'a>>);
    /// At least one of the descriptors that it watches is ready.
    fn advance(&mut self);
    /// When [`Backed::expire`] is due.
    fn deadline(&self) -> Option<Instant>;
    /// The deadline is over.
    fn expire(&mut self);
    /// Whether its back end, or one before that, has answered: features and configuration are known.
    fn is_known(&self) -> bool;
    /// Whether its back end is there and has answered.
    fn is_connected(&self) -> bool;
    /// Stop the back end; over when [`Backed::is_quiet`]. Accesses may come meanwhile.
    fn pause(&mut self);
    /// Undo [`Backed::pause`].
    fn resume(&mut self);
    /// Whether the back end touches no guest memory and raises no interrupt.
    fn is_quiet(&self) -> bool;
    /// It was not quiet in time: end the connection. It is quiet when the back end has noticed that.
    fn abandon(&mut self);
    /// What a successor of this process is to have of it ([`Backed::inherit`]): the memory in which its back end notes
    /// requests in flight. Asked after every call that may change it.
    fn kept(&self) -> Option<Rc<OwnedFd>> {
        None
    }
    /// What a predecessor has kept, before [`Device::restore`].
    fn inherit(&mut self, _kept: OwnedFd) {}
}

/// A piece of a file that the guest is to reach in a BAR without an exit. Its place holds whole pages.
#[derive(Clone, Debug)]
pub struct Shared {
    /// Number that the device gives to no other one.
    pub id: u64,
    /// The BAR.
    pub bar: u8,
    /// Offset there.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
    /// The file.
    pub file: Rc<OwnedFd>,
    /// Offset in it.
    pub file_offset: u64,
    /// The guest may write.
    pub writable: bool,
}

/// What pci tells the daemon of a memory device on its side link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToMemory {
    /// What it asked for is so, or not.
    Reply(Reply),
    /// The guest is to plug so many bytes.
    Request(u64),
}

/// Makes a device of the configuration; the text says why not.
pub type Factory = Box<dyn Fn(&PciDevice, &Rc<Memory>) -> Result<Box<dyn Device>, String>>;

/// What a device does on the bus. Accesses come checked: inside the BAR, 1, 2, 4 or 8 bytes, naturally aligned.
pub trait Device: Backed {
    /// What it is.
    fn identity(&self) -> Identity;
    /// Its BARs in ascending order.
    fn bars(&self) -> Vec<Bar>;
    /// Its MSI-X structures.
    fn msix(&self) -> Option<Msix>;
    /// A descriptor that the queue thread of its daemon owns, if the daemon is one of ours and there.
    fn thread(&self) -> Option<Rc<OwnedFd>> {
        None
    }
    /// Its capabilities in order. Their offsets are told by [`Device::placed`].
    fn capabilities(&self) -> Vec<Capability>;
    /// BARs and capabilities that it has beside those, once it knows its back end or is restored; the same from then on.
    fn late(&self) -> (Vec<Bar>, Vec<Capability>) {
        (Vec::new(), Vec::new())
    }
    /// What it shares with the guest.
    fn shared(&self) -> &[Shared] {
        &[]
    }
    /// Whether [`Device::late`] or [`Device::shared`] has changed since the last call.
    fn take_changed(&mut self) -> bool {
        false
    }
    /// Guest memory is this now.
    fn set_memory(&mut self, _memory: &Rc<Memory>) {}
    /// Whether its back end, if it is there, has guest memory as it was last set.
    fn has_memory(&self) -> bool {
        true
    }
    /// Whether its back end, if it is there, takes so many regions of guest memory while it runs; the text says why not.
    ///
    /// # Errors
    /// The text.
    fn room(&self, _regions: usize) -> Result<(), String> {
        Ok(())
    }
    /// Its queues are not to run while this is set.
    fn hold(&mut self, _hold: bool) {}
    /// Says how often the machine was reset to the daemon, now and on each new side link.
    fn set_resets(&mut self, _resets: u64) {}
    /// What the daemon of a memory device asks.
    fn take_asks(&mut self) -> Vec<Ask> {
        Vec::new()
    }
    /// Tells the daemon of a memory device; false if it is away.
    fn tell_memory(&mut self, _what: ToMemory) -> bool {
        false
    }
    /// The sizes of a memory device, once its daemon has said them, and how often it has.
    fn sizes(&self) -> Option<(MemorySizes, u64)> {
        None
    }
    /// What has changed is carried out, except for what could not be: `refused` tells that by id.
    fn carried_out(&mut self, _refused: &dyn Fn(u64) -> bool) {}
    /// Where in configuration space its capabilities are, in the order of [`Device::capabilities`].
    fn placed(&mut self, offsets: &[u8]);
    /// BAR and offset of each doorbell.
    fn bells(&self) -> Vec<(u8, u64)>;
    /// Hands over the eventfds, once.
    fn wire(&mut self, wires: Wires);
    /// A read of BAR `bar`.
    fn read(&mut self, bar: u8, offset: u64, size: u8) -> u64;
    /// A write to BAR `bar`.
    fn write(&mut self, bar: u8, offset: u64, size: u8, value: u64);
    /// The guest has written its configuration space at `offset`; `space` is what it reads now: the first 256 bytes, the
    /// others are 0.
    /// Returns whether reads of this function's configuration space must exit from now on.
    fn config_written(&mut self, offset: u16, size: u8, space: &mut [u8]) -> bool;
    /// A read of configuration space that exits: the device may answer it instead of memory.
    fn config_read(&mut self, offset: u16, size: u8, space: &[u8]) -> Option<u64>;
    /// Whether the guest lets it master the bus (command register bit 2): without, it touches no guest memory.
    fn set_master(&mut self, enabled: bool);
    /// Power-on state. The back end's memory accesses are over when [`Backed::is_quiet`]; a pause stays one.
    fn reset(&mut self);
    /// Takes the interrupts that say what the state to be saved holds. They are raised once it is: what the guest has been told
    /// of must not be forgotten by a successor. Those that a predecessor may not have raised come again.
    fn take_interrupts(&mut self) -> Vec<Rc<OwnedFd>> {
        Vec::new()
    }
    /// Its state, for [`Device::restore`] in another process; at most [`MAX_SAVED`] bytes.
    fn save(&self) -> Vec<u8>;
    /// Takes over what a predecessor saved; false if it is no state of this device.
    fn restore(&mut self, saved: &[u8]) -> bool;
}

/// The most that a device saves, in bytes.
pub const MAX_SAVED: usize = 8192;
