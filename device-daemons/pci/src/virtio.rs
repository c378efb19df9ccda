//! The virtio-pci transport (virtio 1.2, 4.1) over a vhost-user front end.
//!
//! ```text
//!             DRIVER_OK, bus master, no pause, back end ready
//!   Stopped ------------------------------------------------> Running
//!     ^  ^                                                      |
//!     |  +-- lost, or it says so ------ Stopping <--------------+  anything of that is no more
//!     +-- back end ends its side, or answers anew --- Stale <---  a predecessor of this process had it running,
//!                                                                  or it was given up and may not know
//! ```
//! The guest's registers say what is to be, [`life`] makes it so. A reset by the guest is over when the back end has
//! stopped; until then the device status reads what it was.

mod common;
mod kind;
mod life;
mod saved;
mod share;
mod shmem;
mod side;
mod sync;
mod window;

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Instant;

use bulkhead_control_api::config::{PciDevice, PciKind, Virtio};
use bulkhead_control_api::side::{FromPci, MemorySizes};
use bulkhead_jail::pace::Pace;
use bulkhead_jail::warn;
use nix::sys::eventfd::{EfdFlags, EventFd};

use self::common::{Act, Common, NO_VECTOR, Offer, Shape, status};
use self::share::Share;
use self::shmem::{SHMEM_BAR, Shmem};
use self::side::Side;
use self::sync::Sync;
use self::window::{BAR, MSIX_BAR, PENDING, Place, Window, data_byte, place};
use crate::device::{Bar, Capability, Device, Identity, Msix, Shared, ToMemory, Wires};
use crate::event;
use crate::frontend::{Frontend, Spec};
use crate::memory::Memory;
use crate::pieces::{Ask, Reply};

/// Virtqueues of a device at most.
pub const MAX_QUEUES: u16 = 64;
/// Size of a virtqueue at most.
pub const MAX_QUEUE_SIZE: u16 = 1024;
/// Length of a configuration space at most, in bytes.
pub const MAX_CONFIG: usize = 256;
/// ISR status: the configuration has changed. Queues have no bit: there is no interrupt but by MSI-X.
const ISR_CONFIG: u8 = 2;
/// Lines on what guest and back end do wrong, in a second.
const LINES: usize = 4;

/// What runs at the back end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Nothing.
    Stopped,
    /// The queues that are enabled.
    Running,
    /// It is to stop.
    Stopping,
    /// What was started on a connection that this process or a predecessor of it has ended runs until the back end notices
    /// that: not beyond its end of that connection, nor its next answer. Since then; it may take for ever.
    Stale(Instant),
}

/// A virtio device.
pub struct VirtioPci {
    id: String,
    config: Virtio,
    shape: Shape,
    memory: Rc<Memory>,
    front: Frontend,
    side: Option<Side>,
    /// What the back end offers now, if it is there.
    offer: Option<Offer>,
    /// What the guest is offered, since a back end was there for the first time.
    shown: Option<Offer>,
    stage: Stage,
    common: Common,
    /// Configuration space as the guest reads it.
    space: Vec<u8>,
    sync: Sync,
    shmem: Shmem,
    isr: u8,
    /// The guest is to be interrupted for the configuration or the status.
    told: bool,
    /// Queues whose vectors the back end may not know.
    stale_calls: BTreeSet<u16>,
    wires: Wires,
    /// The interrupt of a queue without a vector.
    nobody: Rc<OwnedFd>,
    /// Offset of the window's capability.
    window: u8,
    master: bool,
    paused: bool,
    /// Queues have been started since the last reset.
    used: bool,
    /// The connection ended while they ran, and whether requests are lost is to be found out.
    orphaned: bool,
    /// What was under way when the last back end was lost is known only from the memory in which it noted that.
    noted: bool,
    /// They went on where another life of the back end had left them.
    resumed: bool,
    /// What a predecessor has kept.
    inherited: Option<OwnedFd>,
    pace: Pace,
    /// What concerns guest memory.
    share: Share,
}

impl VirtioPci {
    /// A device without a back end, as after power-on.
    ///
    /// # Errors
    /// A text for the user: the configuration is none of a virtio device, or the host is short of something.
    pub fn new(device: &PciDevice, memory: &Rc<Memory>) -> Result<Self, String> {
        let PciKind::Virtio(config) = &device.kind else {
            return Err(format!("{:?} is no virtio device", device.driver));
        };
        check(config)?;
        let nobody = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK);
        let nobody = nobody.map_err(|errno| format!("no eventfd: {errno}"))?;
        let shape = Shape {
            queues: config.queues,
            queue_size: config.queue_size,
            vectors: config.queues.saturating_add(1),
        };
        let remote = kind::is_config_remote(config.device_type);
        let config_len = if remote { u16::try_from(config.config.len()).unwrap_or(0) } else { 0 };
        let front = Frontend::new(Spec {
            id: device.id.clone(),
            queues: config.queues,
            queue_size: config.queue_size,
            config_len,
        });
        Ok(Self {
            id: device.id.clone(),
            shape,
            memory: Rc::clone(memory),
            front,
            side: None,
            offer: None,
            shown: None,
            stage: Stage::Stopped,
            common: Common::new(shape),
            space: config.config.clone(),
            sync: Sync::default(),
            shmem: Shmem::default(),
            isr: 0,
            told: false,
            stale_calls: BTreeSet::new(),
            wires: Wires::default(),
            nobody: Rc::new(nobody.into()),
            window: 0,
            master: false,
            paused: false,
            used: false,
            orphaned: false,
            noted: false,
            resumed: false,
            inherited: None,
            pace: Pace::new(LINES),
            share: Share::default(),
            config: config.clone(),
        })
    }

    fn offered(&self) -> Offer {
        self.shown.unwrap_or_default()
    }

    /// Logs what a guest or back end does wrong, at a pace.
    fn complain(&mut self, what: &str) {
        match self.pace.ask() {
            None => {}
            Some(0) => warn!("device {:?}: {what}", self.id),
            Some(left_out) => warn!("device {:?}: {what} ({left_out} lines left out)", self.id),
        }
    }

    /// The eventfd of a vector.
    fn call(&self, vector: u16) -> &Rc<OwnedFd> {
        self.wires.vectors.get(usize::from(vector)).unwrap_or(&self.nobody)
    }

    /// Tells the guest that the configuration or the status has changed.
    fn interrupt(&mut self) {
        if self.common.has(status::DRIVER_OK) {
            self.isr |= ISR_CONFIG;
            self.told = true;
        }
    }

    /// The device cannot go on until the guest resets it (2.1.2).
    fn needs_reset(&mut self, why: &str) {
        if !self.common.has(status::NEEDS_RESET) {
            self.complain(&format!("it needs a reset: {why}"));
            self.common.status |= status::NEEDS_RESET;
            self.interrupt();
        }
    }

    fn read_config_space(&self, at: u16, size: u8) -> u64 {
        let bytes = self.space.get(usize::from(at)..).unwrap_or_default();
        bytes.iter().take(size.into()).rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
    }

    fn write_config_space(&mut self, at: u16, size: u8, value: u64) {
        let from = usize::from(at);
        let range = from..from + usize::from(size);
        let field = kind::writable(self.config.device_type, self.common.driver, &range);
        let Some(field) = field.filter(|_| !self.common.resetting) else { return };
        let Some(bytes) = self.space.get_mut(range) else { return };
        bytes.iter_mut().zip(value.to_le_bytes()).for_each(|(to, from)| *to = from);
        self.sync.add(field);
        self.sync_config();
    }

    fn act(&mut self, act: Act) {
        match act {
            Act::Reset => self.begin_reset(),
            Act::Status => {}
            Act::ResetQueue(index) => self.stop_queue(index),
            Act::StartQueue(index) => self.start_queue(index),
            Act::Vector(index) => {
                self.stale_calls.insert(index);
                self.change_calls();
            }
        }
        self.settle();
    }
}

/// Signals an eventfd. Who shares it may spoil it: that is an interrupt or a kick of this device, and no other.
fn ring(fd: &OwnedFd) {
    let _spoilt = event::signal(fd);
}

/// Whether a device can be like this; the configuration comes from the starter or through the broker.
fn check(config: &Virtio) -> Result<(), String> {
    let size = config.queue_size;
    if !(1..=63).contains(&config.device_type) {
        return Err(format!("there is no virtio device type {}", config.device_type));
    }
    if !(1..=MAX_QUEUES).contains(&config.queues) {
        return Err(format!("a device cannot have {} queues", config.queues));
    }
    if !size.is_power_of_two() || size > MAX_QUEUE_SIZE {
        return Err(format!("a queue cannot have a size of {size}"));
    }
    if config.config.len() > MAX_CONFIG {
        return Err(format!("a configuration space cannot have {} bytes", config.config.len()));
    }
    Ok(())
}

impl Device for VirtioPci {
    fn thread(&self) -> Option<Rc<OwnedFd>> {
        self.side.as_ref().and_then(|side| side.thread.clone())
    }

    fn identity(&self) -> Identity {
        Identity {
            vendor: 0x1af4,
            device: 0x1040 + self.config.device_type,
            class: kind::class(self.config.device_type),
            revision: 1,
            subsystem: (0x1af4, 0x1100),
        }
    }

    fn bars(&self) -> Vec<Bar> {
        vec![MSIX_BAR, BAR]
    }

    fn msix(&self) -> Option<Msix> {
        Some(Msix { vectors: self.shape.vectors, bar: MSIX_BAR.index, table: 0, pba: PENDING })
    }

    fn capabilities(&self) -> Vec<Capability> {
        window::capabilities(self.shape.queues, self.config.config.len())
    }

    fn late(&self) -> (Vec<Bar>, Vec<Capability>) {
        self.shmem.shape()
    }

    fn shared(&self) -> &[Shared] {
        self.shmem.pieces()
    }

    fn take_changed(&mut self) -> bool {
        self.shmem.take_changed()
    }

    fn set_memory(&mut self, memory: &Rc<Memory>) {
        self.change_memory(memory);
    }

    fn has_memory(&self) -> bool {
        !self.share.telling
    }

    fn room(&self, regions: usize) -> Result<(), String> {
        self.front.room(regions).map_err(|why| format!("device {:?}: {why}", self.id))
    }

    fn hold(&mut self, hold: bool) {
        self.share.held = hold;
        self.settle();
    }

    fn set_resets(&mut self, resets: u64) {
        self.share.resets = resets;
        self.tell_side(&FromPci::Resets(resets));
    }

    fn take_asks(&mut self) -> Vec<Ask> {
        std::mem::take(&mut self.share.asks)
    }

    fn tell_memory(&mut self, what: ToMemory) -> bool {
        self.share.known |= what == ToMemory::Reply(Reply::All);
        self.tell_side(&match what {
            ToMemory::Request(bytes) => FromPci::Request { bytes },
            ToMemory::Reply(Reply::All) => FromPci::Pieces,
            ToMemory::Reply(Reply::Settled(number, result)) => FromPci::Settled { number, result },
        })
    }

    fn sizes(&self) -> Option<(MemorySizes, u64)> {
        self.share.sizes.map(|sizes| (sizes, self.share.said))
    }

    fn carried_out(&mut self, refused: &dyn Fn(u64) -> bool) {
        if let Some(done) = self.shmem.carried_out(refused) {
            self.front.answer(done);
        }
    }

    fn placed(&mut self, offsets: &[u8]) {
        self.window = offsets.last().copied().unwrap_or(0);
    }

    fn bells(&self) -> Vec<(u8, u64)> {
        (0..self.shape.queues).map(|queue| (BAR.index, window::bell(queue))).collect()
    }

    fn wire(&mut self, wires: Wires) {
        self.wires = wires;
    }

    fn read(&mut self, bar: u8, offset: u64, size: u8) -> u64 {
        if bar == SHMEM_BAR && !self.shmem.offered().is_empty() {
            // Where nothing of a shared memory region is mapped.
            return crate::space::all_ones(size);
        }
        if bar != BAR.index {
            return 0;
        }
        match place(offset) {
            Place::Common(at) => self.common.read(at, size, &self.offered()),
            Place::Isr if size == 1 => std::mem::take(&mut self.isr).into(),
            Place::Device(at) => self.read_config_space(at, size),
            Place::Isr | Place::Notify(_) | Place::Nowhere => 0,
        }
    }

    fn write(&mut self, bar: u8, offset: u64, size: u8, value: u64) {
        if bar != BAR.index {
            return;
        }
        match place(offset) {
            Place::Common(at) => {
                let offered = self.offered();
                if let Some(act) = self.common.write(at, size, value, &offered) {
                    self.act(act);
                }
            }
            Place::Device(at) => self.write_config_space(at, size, value),
            // One that did not go by way of core's doorbells.
            Place::Notify(queue) => {
                if let Some(bell) = self.wires.bells.get(usize::from(queue)) {
                    ring(bell);
                }
            }
            Place::Isr | Place::Nowhere => {}
        }
    }

    fn config_written(&mut self, offset: u16, _size: u8, space: &mut [u8]) -> bool {
        let Some(window) = Window::of(space, self.window) else { return false };
        if data_byte(self.window, offset).is_some() {
            self.write(BAR.index, window.offset, window.len, window.value());
        }
        true
    }

    fn config_read(&mut self, offset: u16, size: u8, space: &[u8]) -> Option<u64> {
        let window = Window::of(space, self.window)?;
        let first = data_byte(self.window, offset)?;
        let data = window.with(self.read(BAR.index, window.offset, window.len));
        let bytes = data.get(first..first + usize::from(size))?;
        Some(bytes.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte)))
    }

    fn set_master(&mut self, enabled: bool) {
        self.master = enabled;
        self.settle();
    }

    fn reset(&mut self) {
        self.master = false;
        self.begin_reset();
        self.settle();
    }

    fn take_interrupts(&mut self) -> Vec<Rc<OwnedFd>> {
        let vector = self.common.config_vector;
        let told = std::mem::take(&mut self.told) && vector != NO_VECTOR;
        told.then(|| Rc::clone(self.call(vector))).into_iter().collect()
    }

    fn save(&self) -> Vec<u8> {
        self.saved()
    }

    fn restore(&mut self, saved: &[u8]) -> bool {
        self.take_over(saved)
    }
}
