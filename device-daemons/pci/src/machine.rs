//! The bus with its surroundings: core, the memfd of the configuration window and the state.
//!
//! Whatever has changed on the bus is committed first; then the window's memfd, core's slots, routes and doorbells
//! follow, then interrupts. Only after that an access is answered. A successor begins with the commit and does all the
//! rest again.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::rc::Rc;
use std::time::Instant;

use bulkhead_bus_api::{Access, Action};
use bulkhead_bus_api::{CollectedWrite, REPLY_LEN, Reply};
use bulkhead_control_api::config::{DeviceMemory, PciDevice, PciKind};
use bulkhead_control_api::encode;
use bulkhead_control_api::pci::Refusal;
use bulkhead_jail::{error, warn};
use nix::errno::Errno;

use crate::bus::Bus;
use crate::core_link::{CoreError, CoreLink};
use crate::device::{Device, Factory, MAX_SAVED, ToMemory};
use crate::event;
use crate::function::{Function, Saved};
use crate::memory::Memory;
use crate::msix::MAX_VECTORS;
use crate::pieces::Pieces;
use crate::place::{self, Place, PlaceError};
use crate::state::{Left, MAX_RECORD, State};

/// A piece of memory that waits for nobody outside has come or gone after so many turns.
const SETTLE_TURNS: usize = 8;
/// What of a record is neither the device's state nor its configuration, at most: configuration space, MSI-X table,
/// numbers of vectors and doorbells.
const REST_OF_RECORD: usize = 256 + 16 * MAX_VECTORS as usize + 3 * MAX_VECTORS as usize + 3 * 256 + 64;

/// The memory of a memory device.
fn memory_of(function: &Function) -> Option<DeviceMemory> {
    if let PciKind::Virtio(virtio) = &function.config.kind { virtio.memory } else { None }
}

/// Why the machine cannot go on without this process.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// The main link.
    #[error("{0}")]
    Core(#[from] CoreError),
    /// The host has no page left for the state or the configuration window.
    #[error("state: {0}")]
    State(#[from] Errno),
    /// A device of the command line cannot be.
    #[error("device {0:?}: {1}")]
    Device(String, String),
}

/// Why a device is not added.
#[derive(Debug)]
pub enum AddError {
    /// For who asked.
    Refused(Refusal),
    /// For the machine.
    Machine(MachineError),
}

impl<T: Into<MachineError>> From<T> for AddError {
    fn from(error: T) -> Self {
        Self::Machine(error.into())
    }
}

/// The machine.
pub struct Machine {
    /// The bus.
    pub bus: Bus,
    /// The main link.
    pub core: CoreLink,
    /// Devices are to be at rest.
    pub paused: bool,
    /// Devices whose connections may have changed.
    pub changed: BTreeSet<u16>,
    state: State,
    ecam: File,
    /// Guest memory as devices have it.
    memory: Rc<Memory>,
    pieces: Pieces,
    /// Devices' queues are not to run: where guest memory is is not known.
    held: bool,
    factory: Factory,
}

impl Machine {
    /// An empty bus.
    #[must_use]
    pub fn new(core: CoreLink, ecam: OwnedFd, memory: Memory, state: State, factory: Factory) -> Self {
        let ram_end = memory.regions.iter().map(|r| r.place.base.saturating_add(r.place.len)).max();
        let bus = Bus::new(ram_end.unwrap_or(0));
        let (paused, changed) = (false, BTreeSet::new());
        let (ecam, pieces) = (File::from(ecam), Pieces::new(memory.regions.clone()));
        Self {
            bus,
            core,
            paused,
            changed,
            state,
            ecam,
            memory: Rc::new(memory),
            pieces,
            held: false,
            factory,
        }
    }

    /// Puts everything on the bus: what a predecessor has left, or else what the configuration says.
    ///
    /// # Errors
    /// [`MachineError`].
    pub fn assemble(
        &mut self,
        devices: &[PciDevice],
        left: Option<Left>,
        links: usize,
        kept: &mut dyn FnMut(u32) -> Option<OwnedFd>,
    ) -> Result<(), MachineError> {
        self.state.begin(links);
        let mut id = [0; 4];
        // The host bridge's page, which whoever has asked core for anything had written before.
        self.bus.unknown = self.ecam.read_exact_at(&mut id, 0).is_err() || id != [0; 4];
        if let Some(left) = left.filter(|left| !left.is_empty()) {
            for (index, saved) in &left {
                self.take_over(*index, saved, kept)?;
            }
            self.bus.raise_again();
        } else {
            self.bus.insert(0, Function::host());
            for device in devices {
                let failed = |text: String| MachineError::Device(device.id.clone(), text);
                let place = place::find(&self.bus.taken(), device, false);
                let place = place.map_err(|error| failed(error.to_string()))?;
                match self.add(device, place, true) {
                    Ok(_) => {}
                    Err(AddError::Machine(error)) => return Err(error),
                    Err(AddError::Refused(Refusal::BackEnd(text) | Refusal::NoRoom(text))) => {
                        return Err(failed(text));
                    }
                    Err(AddError::Refused(refusal)) => return Err(failed(format!("{refusal:?}"))),
                }
            }
            self.bus.power_on();
        }
        self.settle()
    }

    fn build(&self, config: &PciDevice, place: Place) -> Result<Function, String> {
        let built = match &config.kind {
            PciKind::RootPort { slot, .. } => Function::port(config.clone(), place.devfn, *slot),
            PciKind::Virtio(_) => {
                let device = (self.factory)(config, &self.memory)?;
                Function::device(config.clone(), place.parent, place.devfn, device)
            }
        };
        built.map_err(|error| error.to_string())
    }

    /// Gives a function its wires and puts it on the bus.
    fn connect(
        &mut self,
        index: u16,
        mut function: Function,
        vectors: &[u16],
        bells: &[u16],
    ) -> Result<Result<Function, Refusal>, MachineError> {
        let (vector_fds, bell_fds) = match self.core.eventfds(vectors, bells)? {
            Ok(fds) => fds,
            Err(refusal) => {
                error!("function {index}: core gives no eventfds: {refusal}");
                return Ok(Err(Refusal::NoRoom(format!("core: {refusal}"))));
            }
        };
        let wires = |numbers: &[u16], fds: Vec<OwnedFd>| {
            numbers.iter().copied().zip(fds.into_iter().map(Rc::new)).collect()
        };
        function.wire(wires(vectors, vector_fds), wires(bells, bell_fds));
        if memory_of(&function).is_some() {
            self.pieces.expect(index);
            self.hold();
        }
        let (hold, resets) = (!self.pieces.are_known(), self.state.resets());
        if let Some(device) = function.as_device() {
            if self.paused {
                device.pause();
            }
            device.hold(hold);
            device.set_resets(resets);
        }
        Ok(Ok(function))
    }

    /// Makes a device and puts it on the bus; unless it is `plugged` the guest does not see it yet.
    ///
    /// # Errors
    /// [`AddError`].
    pub fn add(&mut self, config: &PciDevice, place: Place, plugged: bool) -> Result<u16, AddError> {
        let refused = |refusal| Err(AddError::Refused(refusal));
        let room = MAX_RECORD - MAX_SAVED - REST_OF_RECORD;
        if encode(config).map_or(usize::MAX, |bytes| bytes.len()) > room {
            return refused(Refusal::NoRoom("its configuration is too long".to_owned()));
        }
        let mut function = match self.build(config, place) {
            Ok(function) => function,
            Err(text) => return refused(Refusal::BackEnd(text)),
        };
        let (vectors, bells) = function.needs();
        let (Some(index), Some((vectors, bells))) =
            (self.bus.free_index(), self.bus.free_wires(vectors, bells))
        else {
            let text = format!("no interrupts or doorbells are left for its {vectors} and {bells}");
            return refused(Refusal::NoRoom(text));
        };
        function.plugged = plugged;
        match self.connect(index, function, &vectors, &bells)? {
            Err(refusal) => return refused(refusal),
            Ok(function) => {
                // What a former owner has left in them is nobody's.
                function.drain_vectors();
                function.bells.iter().for_each(|bell| event::drain(&bell.fd));
                self.bus.insert(index, function);
            }
        }
        Ok(index)
    }

    /// Where a device goes while the machine runs.
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn find_place(&self, config: &PciDevice) -> Result<Place, Refusal> {
        place::find(&self.bus.taken(), config, true).map_err(|error| match error {
            PlaceError::NoBus(_) => Refusal::NoBus,
            PlaceError::NoHotplug(_) => Refusal::NoHotplug,
            PlaceError::IdTaken(_) => Refusal::IdTaken,
            PlaceError::InUse { id, .. } => Refusal::SlotTaken(id),
            other => Refusal::NoRoom(other.to_string()),
        })
    }

    /// Goes on with a function of a predecessor.
    fn take_over(
        &mut self,
        index: u16,
        saved: &Saved,
        kept: &mut dyn FnMut(u32) -> Option<OwnedFd>,
    ) -> Result<(), MachineError> {
        let id = saved.config.as_ref().map_or("", |config| &config.id);
        let failed = |text: String| MachineError::Device(id.to_owned(), text);
        let place = Place { parent: saved.parent, devfn: saved.devfn };
        let mut function = match &saved.config {
            None => Function::host(),
            Some(config) => self.build(config, place).map_err(failed)?,
        };
        if function.needs() != (saved.vectors.len(), saved.bells.len()) {
            return Err(failed("it is not what it was before this process was started anew".to_owned()));
        }
        if let (Some(number), Some(device)) = (saved.kept, function.as_device()) {
            match kept(number) {
                Some(fd) => device.inherit(fd),
                None => warn!("device {id:?}: what was kept of its back end has not come back"),
            }
        }
        let connected = self.connect(index, function, &saved.vectors, &saved.bells)?;
        let mut function = connected.map_err(|refusal| failed(format!("{refusal:?}")))?;
        if !function.restore(saved) {
            error!("device {id:?}: its saved state cannot be used; the guest finds it as after power-on");
        }
        // It is kept already, if it has come back: a starter may not keep it twice.
        function.kept_fd = function.device_ref().filter(|_| saved.kept.is_some()).and_then(|d| d.kept());
        self.bus.insert(index, function);
        Ok(())
    }

    /// Takes what the daemon of a memory device asks.
    fn hear_memory(&mut self, index: u16) {
        let Some(function) = self.bus.get_mut(index) else { return };
        let Some(memory) = memory_of(function) else { return };
        let asks = function.as_device().map(Device::take_asks).unwrap_or_default();
        let (bus, pieces) = (&self.bus, &mut self.pieces);
        let room = |regions| {
            let mut all = bus.functions().filter_map(|(_, function)| function.device_ref());
            all.try_for_each(|device| device.room(regions))
        };
        for ask in asks {
            pieces.ask(index, &memory, ask, &room);
        }
    }

    /// Queues stand still while a memory device's pieces are not known.
    fn hold(&mut self) {
        self.held = !self.pieces.are_known();
        let devices: Vec<u16> = self.devices().map(|(index, _)| index).collect();
        for index in devices {
            if let Some(device) = self.bus.get_mut(index).and_then(Function::as_device) {
                device.hold(self.held);
            }
            self.bus.touch(index);
        }
    }

    /// The index of the memory device of this id.
    #[must_use]
    pub fn memory_device(&self, id: &str) -> Option<u16> {
        let is_it = |function: &&Function| function.config.id == id && memory_of(function).is_some();
        self.bus.functions().find(|(_, function)| is_it(function)).map(|(index, _)| index)
    }

    /// Devices are gone from the bus.
    pub fn forget(&mut self, index: u16) {
        self.pieces.remove(index);
        self.hold();
    }

    /// The machine has been reset.
    pub fn count_reset(&mut self) {
        self.state.count_reset();
        let resets = self.state.resets();
        let devices: Vec<u16> = self.devices().map(|(index, _)| index).collect();
        for index in devices {
            if let Some(device) = self.bus.get_mut(index).and_then(Function::as_device) {
                device.set_resets(resets);
            }
        }
    }

    /// Does what one request of a vCPU says, or answers it as it was answered before.
    ///
    /// # Errors
    /// [`MachineError`].
    pub fn access(
        &mut self,
        link: usize,
        seq: u32,
        writes: &[CollectedWrite],
        access: &Access,
    ) -> Result<[u8; REPLY_LEN], MachineError> {
        if let Some(reply) = self.state.reply_to(link, seq) {
            return Ok(reply);
        }
        for write in writes {
            self.bus.write(write.space, write.addr, write.size, write.data);
        }
        let data = self.bus.access(access);
        let reply = Reply { seq, action: Action::None, data }.encode();
        self.state.set_reply(link, (seq, reply));
        self.settle()?;
        Ok(reply)
    }

    /// Commits what has changed on the bus and does what follows from it.
    ///
    /// # Errors
    /// [`MachineError`].
    pub fn settle(&mut self) -> Result<(), MachineError> {
        for _ in 0..SETTLE_TURNS {
            self.settle_once()?;
            self.answer_memory();
            if !self.pieces.is_pending() {
                break;
            }
        }
        Ok(())
    }

    /// Tells memory devices what has become of what they asked.
    fn answer_memory(&mut self) {
        for (index, reply) in self.pieces.take_replies() {
            if let Some(device) = self.bus.get_mut(index).and_then(Function::as_device) {
                // One that is away asks again.
                let _ = device.tell_memory(ToMemory::Reply(reply));
            }
        }
        if self.held && self.pieces.are_known() {
            self.hold();
        }
    }

    fn settle_once(&mut self) -> Result<(), MachineError> {
        self.settle_memory();
        let touched = self.bus.take_touched();
        let indices: Vec<u16> = touched.iter().map(|(index, _)| *index).collect();
        self.changed.extend(&indices);
        self.state.commit(touched)?;
        let effects = self.bus.effects();
        for (offset, bytes) in effects.writes {
            let written = self.ecam.write_all_at(&bytes, offset);
            written.map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(0)))?;
        }
        let (ecam, files) = (self.ecam.as_fd(), &effects.files);
        let file = |window: u16| files.get(&window).map_or(ecam, |file| file.as_fd());
        let refused = self.core.apply(&effects.changes, &file)?;
        self.bus.carried_out(&refused);
        self.pieces.placed(&refused);
        for fd in effects.raise {
            if let Err(error) = event::signal(&fd) {
                error!("an interrupt of a port is lost: {error}");
            }
        }
        for index in indices {
            let device = self.bus.get_mut(index).and_then(Function::as_device);
            for fd in device.map_or(Vec::new(), |device| device.take_interrupts()) {
                // Who shares it may spoil it: that is an interrupt of this device, and no other.
                let _spoilt = event::signal(&fd);
            }
        }
        Ok(())
    }

    /// Has memory devices' pieces come and go as far as that is possible now.
    fn settle_memory(&mut self) {
        let devices: Vec<u16> = self.devices().map(|(index, _)| index).collect();
        for index in &devices {
            self.hear_memory(*index);
        }
        if let Some(memory) = self.pieces.take_changed() {
            self.memory = Rc::new(memory);
            for index in &devices {
                if let Some(device) = self.bus.get_mut(*index).and_then(Function::as_device) {
                    device.set_memory(&self.memory);
                }
                self.bus.touch(*index);
            }
        }
        if self.devices().all(|(_, device)| device.has_memory()) {
            self.pieces.told();
        }
        let absent = self.pieces.take_absent();
        self.bus.set_memory(self.pieces.windows(), absent);
    }

    /// The number for the next descriptor that is to be kept.
    pub const fn next_name(&mut self) -> u32 {
        self.state.next_name()
    }

    /// Devices with their indices.
    pub fn devices(&self) -> impl Iterator<Item = (u16, &dyn Device)> {
        self.bus.functions().filter_map(|(index, function)| Some((index, function.device_ref()?)))
    }

    /// When devices want to be called.
    pub fn deadlines(&self) -> impl Iterator<Item = (u16, Instant)> {
        self.devices().filter_map(|(index, device)| Some((index, device.deadline()?)))
    }
}
