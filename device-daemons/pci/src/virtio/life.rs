//! The device's life with its back end: start and stop, loss and return, changes of configuration.

use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::{Duration, Instant};

use bulkhead_control_api::side::ToPci;
use nix::poll::PollFd;

use super::common::{NO_VECTOR, Offer, status};
use super::side::Side;
use super::window::most_regions;
use super::{Stage, VirtioPci, kind, ring};
use crate::device::Backed;
use crate::frontend::{Event, Ring, StartError};
use crate::pieces::Ask;

/// A back end that nobody is connected to and that does not listen after this has stopped.
const STALE: Duration = Duration::from_secs(5);

impl VirtioPci {
    /// Whether queues are to run.
    fn wants(&self) -> bool {
        let bits = status::DRIVER_OK | status::NEEDS_RESET | status::FAILED;
        let driven = self.common.status & bits == status::DRIVER_OK;
        driven && !self.common.resetting && self.master && !self.paused && !self.share.held
    }

    /// Does what follows from what is and what is to be.
    pub(super) fn settle(&mut self) {
        match self.stage {
            Stage::Running if !self.wants() => {
                self.front.stop();
                self.stage = Stage::Stopping;
            }
            Stage::Stopped if self.common.resetting => self.end_reset(),
            Stage::Stopped if self.wants() => self.launch(),
            _ => {}
        }
    }

    /// The guest or the machine resets the device.
    pub(super) fn begin_reset(&mut self) {
        self.common.begin_reset();
        (self.isr, self.told) = (0, false);
    }

    /// The back end has stopped.
    fn end_reset(&mut self) {
        if std::mem::take(&mut self.used) {
            self.front.reset();
            // It knows from the reset, or from its queues' end, that nothing is mapped any more.
            self.shmem.clear();
        }
        (self.resumed, self.noted) = (false, false);
        self.common.end_reset();
        // What the guest wrote and the back end never heard of is no more.
        if self.sync.forget() && self.sync.ask() {
            self.front.read_config();
        }
        if let Some(offer) = self.offer {
            self.show(offer);
        }
    }

    /// What the guest is offered from now on.
    fn show(&mut self, offer: Offer) {
        self.shown = Some(offer);
        let mut space = std::mem::take(&mut self.space);
        kind::limit_queues(&self.config, offer.queues, &mut space);
        self.space = space;
    }

    /// An enabled queue as the front end needs it; `None` if it is not one that the back end may have.
    fn ring(&self, index: u16) -> Option<Ring> {
        let queue = self.common.queues.get(usize::from(index))?;
        let [desc, avail, used] = queue.areas;
        let mut ring = Ring {
            index,
            size: queue.size,
            desc,
            avail,
            used,
            base: 0,
            kick: Rc::clone(self.wires.bells.get(usize::from(index))?),
            call: Rc::clone(self.call(queue.vector)),
        };
        if !ring.is_in(&self.memory) {
            return None;
        }
        ring.base = match queue.base {
            Some(base) => base,
            // As another life of the back end has left it (vhost-user, "Inflight I/O tracking").
            None => self.memory.read_u16(used + 2)?,
        };
        Some(ring)
    }

    /// The queues that are to run, or the number of one that cannot.
    fn rings(&self) -> Result<Vec<Ring>, u16> {
        let live = (0..).zip(&self.common.queues).filter(|(_, queue)| queue.is_live());
        live.map(|(index, _)| self.ring(index).ok_or(index)).collect()
    }

    /// Why the back end that is there cannot go on with the device.
    fn misfit(&self, offer: &Offer) -> Option<String> {
        let missing = self.common.driver & !offer.features;
        if missing != 0 {
            return Some(format!("its back end has no longer the features {missing:#x}"));
        }
        let highest = (1..).zip(&self.common.queues).filter(|(_, queue)| queue.enabled).last();
        let needs = highest.map_or(0, |(count, _)| count);
        (needs > offer.queues).then(|| format!("its back end has {} of {needs} queues", offer.queues))
    }

    /// Starts all queues, if a back end is there.
    fn launch(&mut self) {
        let rings = match self.rings() {
            Ok(rings) => rings,
            // Whether there is a back end or not.
            Err(index) => return self.needs_reset(&format!("queue {index} is not in its memory")),
        };
        let Some(offer) = self.offer else { return };
        if let Some(why) = self.misfit(&offer) {
            return self.needs_reset(&why);
        }
        if self.noted && !(self.front.tracks_inflight() && self.front.inflight().is_some()) {
            return self.needs_reset("its back end does not know what the one before had begun");
        }
        let resumed = self.common.queues.iter().any(|queue| queue.is_live() && queue.base.is_none());
        match self.front.start(self.common.driver, &self.memory, rings) {
            // It is lost, as the next event says.
            Err(StartError::NotReady) => {}
            Err(error @ StartError::Ring(_)) => self.needs_reset(&error.to_string()),
            Ok(()) => {
                self.stage = Stage::Running;
                self.used = true;
                self.noted = false;
                self.resumed |= resumed;
                for queue in self.common.queues.iter_mut().filter(|queue| queue.is_live()) {
                    queue.base = None;
                }
                self.sync_config();
            }
        }
    }

    /// A queue is to be reset by itself.
    pub(super) fn stop_queue(&mut self, index: u16) {
        match self.stage {
            Stage::Running => self.front.stop_ring(index),
            Stage::Stopped => self.common.end_queue_reset(index),
            Stage::Stopping | Stage::Stale(_) => {}
        }
    }

    /// A queue has been enabled anew.
    pub(super) fn start_queue(&mut self, index: u16) {
        let Some(ring) = self.ring(index) else {
            return self.needs_reset(&format!("queue {index} is not in its memory"));
        };
        if self.stage != Stage::Running || !self.wants() {
            return;
        }
        match self.front.start_ring(&self.memory, ring) {
            Err(StartError::NotReady) => {}
            Err(error @ StartError::Ring(_)) => self.needs_reset(&error.to_string()),
            Ok(()) => {
                if let Some(queue) = self.common.queues.get_mut(usize::from(index)) {
                    queue.base = None;
                }
            }
        }
    }

    /// Tells the back end of other vectors, when it has done what it was asked before: a guest changes them faster than a
    /// back end takes it.
    pub(super) fn change_calls(&mut self) {
        if !self.front.is_idle() {
            return;
        }
        for index in std::mem::take(&mut self.stale_calls) {
            let queue = self.common.queues.get(usize::from(index)).filter(|queue| queue.is_live());
            if let Some(queue) = queue.filter(|_| self.stage == Stage::Running) {
                let call = Rc::clone(self.call(queue.vector));
                self.front.set_call(index, &call);
            }
        }
    }

    /// Tells the back end what the guest has written, one change at a time.
    pub(super) fn sync_config(&mut self) {
        // Before, the back end does not know which features the guest has accepted, and fields depend on them.
        if self.stage != Stage::Running {
            return;
        }
        let told = self.sync.begin();
        for (from, to) in &told {
            if let (Some(bytes), Ok(offset)) = (self.space.get(*from..*to), u32::try_from(*from)) {
                self.front.write_config(offset, bytes);
            }
        }
        if !told.is_empty() {
            // The answer comes after the writes, and says what the back end has made of them.
            self.front.read_config();
        }
    }

    /// The back end's configuration space. What the guest has written meanwhile is newer.
    fn take_config(&mut self, config: &[u8]) {
        let mut space = self.space.clone();
        for (at, (to, from)) in space.iter_mut().zip(config).enumerate() {
            if !self.sync.is_newer(at) {
                *to = *from;
            }
        }
        kind::limit_queues(&self.config, self.offered().queues, &mut space);
        if space != self.space {
            let is_news = kind::is_news(self.config.device_type, &self.space, &space);
            self.space = space;
            self.common.generation = self.common.generation.wrapping_add(1);
            if is_news {
                self.interrupt();
            }
        }
    }

    fn on_event(&mut self, event: Event) {
        match event {
            Event::Ready { features, queues, config } => self.on_ready(features, queues, &config),
            Event::Started { ring: None } if std::mem::take(&mut self.resumed) => {
                // An interrupt of the life before may not have come; one too many does no harm.
                let live = self.common.queues.iter().filter(|queue| queue.is_live());
                for queue in live.filter(|queue| queue.vector != NO_VECTOR) {
                    ring(self.call(queue.vector));
                }
            }
            Event::Started { .. } => {}
            Event::Memory => self.share.telling = false,
            Event::Asked => self.on_asked(),
            Event::Stopped { ring: Some(index), .. } => self.common.end_queue_reset(index),
            Event::Stopped { ring: None, bases } => self.on_stopped(&bases),
            Event::Config { config, changed } => {
                if !changed {
                    self.sync.answered();
                }
                self.take_config(&config);
                self.sync_config();
            }
            Event::Lost(why) => self.on_lost(&why),
            Event::Ended => self.end_stale(),
        }
        self.settle();
    }

    fn on_ready(&mut self, features: u64, queues: u16, config: &[u8]) {
        self.end_stale();
        if features & kind::VERSION_1 == 0 {
            self.front.disconnect();
            return self.on_lost("offers no virtio 1.0");
        }
        if !self.fit_regions() {
            return;
        }
        let queues = kind::queues(&self.config, queues);
        let offer = Offer { features: kind::features(&self.config, features, queues), queues };
        self.offer = Some(offer);
        if self.shown.is_none() || self.common.status == 0 {
            self.show(offer);
        }
        self.sync.connected(!config.is_empty());
        self.take_config(config);
    }

    /// Shows the guest the back end's shared memory regions; later ones must be the same. The connection is ended if they
    /// cannot be.
    fn fit_regions(&mut self) -> bool {
        let regions = self.front.shmem().to_vec();
        let why = if self.shown.is_some() {
            (regions != self.shmem.offered()).then_some("has other shared memory regions than before")
        } else {
            let fits = self.shmem.show(&regions, most_regions(self.space.len()));
            (!fits).then_some("has more shared memory regions, or larger ones, than a function has room for")
        };
        if let Some(why) = why {
            self.front.disconnect();
            self.on_lost(why);
        }
        why.is_none()
    }

    /// What the back end had mapped for the guest is no more, and the guest does not know.
    pub(super) fn lose_shared(&mut self) {
        if self.common.has(status::DRIVER_OK) && !self.common.resetting {
            self.needs_reset("what its back end had mapped into its shared memory is gone");
        }
    }

    fn on_stopped(&mut self, bases: &[(u16, u16)]) {
        if self.stage != Stage::Stopping {
            return;
        }
        for (index, base) in bases {
            if let Some(queue) = self.common.queues.get_mut(usize::from(*index))
                && queue.is_live()
            {
                queue.base = Some(*base);
            }
        }
        self.halted();
    }

    /// Nothing runs at the back end any more.
    fn halted(&mut self) {
        self.stage = Stage::Stopped;
        for index in 0..self.shape.queues {
            self.common.end_queue_reset(index);
        }
    }

    fn on_lost(&mut self, why: &str) {
        self.complain(&format!("its back end {why}"));
        self.offer = None;
        // The next one is told of all.
        self.share.telling = false;
        self.sync.lost();
        if self.shmem.clear() {
            self.lose_shared();
        }
        if !matches!(self.stage, Stage::Running | Stage::Stopping) {
            return;
        }
        if self.front.may_run() {
            // It was given up, but goes on until it notices: neither is a reset over, nor do its rings stand still.
            self.stage = Stage::Stale(Instant::now());
            self.orphaned = true;
            return;
        }
        self.halted();
        self.mourn();
    }

    /// What ran on a connection that is over has stopped.
    fn end_stale(&mut self) {
        if !matches!(self.stage, Stage::Stale(_)) {
            return;
        }
        self.halted();
        if std::mem::take(&mut self.orphaned) {
            self.mourn();
        }
    }

    /// Whether the device can go on after a back end that has stopped without saying where.
    fn mourn(&mut self) {
        let driven = self.common.has(status::DRIVER_OK) && !self.common.resetting;
        if !driven || self.config.resumes || self.is_idle() {
            return;
        }
        self.noted = self.front.inflight().is_some();
        if !self.noted {
            self.needs_reset("its back end may have lost requests");
        }
    }

    /// Whether every request that the guest has made so far is answered.
    fn is_idle(&self) -> bool {
        let ran = self.common.queues.iter().filter(|queue| queue.is_live() && queue.base.is_none());
        let mut indices = ran.map(|queue| {
            let [_, avail, used] = queue.areas;
            // First the back end's, which does not move any more.
            let used = self.memory.read_u16(used.checked_add(2)?)?;
            Some((used, self.memory.read_u16(avail.checked_add(2)?)?))
        });
        indices.all(|pair| pair.is_some_and(|(used, avail)| used == avail))
    }

    pub(super) fn on_events(&mut self, events: Vec<Event>) {
        events.into_iter().for_each(|event| self.on_event(event));
        self.change_calls();
    }

    fn hear(&mut self) {
        let Some(side) = &mut self.side else { return };
        match side.advance() {
            Ok(said) => {
                for message in said {
                    let Some((message, fd)) = message else {
                        self.greeted();
                        continue;
                    };
                    match message {
                        ToPci::ConfigChanged if self.offer.is_some() && self.sync.ask() => {
                            self.front.read_config();
                        }
                        // It is read when there is a back end, or a second time already.
                        ToPci::ConfigChanged | ToPci::Thread => {}
                        ToPci::NeedsReset if self.stage == Stage::Running => {
                            self.needs_reset("its back end says so");
                        }
                        // Of queues that the guest has stopped since: a device that has been reset stays so.
                        ToPci::NeedsReset => {}
                        ToPci::Memory(sizes) => self.on_sizes(sizes),
                        ToPci::Piece { number, piece } => self.on_piece(number, piece, fd),
                        ToPci::NoPiece { number } => self.share.asks.push(Ask::NoPiece(number)),
                        ToPci::Pieces => self.on_all_said(),
                    }
                }
                self.settle();
            }
            Err(error) => {
                self.complain(&format!("side link: {error}"));
                self.side = None;
            }
        }
    }
}

impl Backed for VirtioPci {
    fn missing(&self) -> Vec<String> {
        let socket = (!self.front.is_connected()).then(|| self.config.socket.clone());
        let side = self.config.side.clone().filter(|_| self.side.is_none());
        socket.into_iter().chain(side).collect()
    }

    fn connected(&mut self, name: &str, fd: OwnedFd) {
        if name == self.config.socket && !self.front.is_connected() {
            self.front.connect(fd);
            // The first request of the handshake: until then there is nothing to wait for.
            let events = self.front.advance();
            self.on_events(events);
        } else if self.config.side.as_deref() == Some(name) && self.side.is_none() {
            match Side::new(fd) {
                Ok(side) => self.side = Some(side),
                Err(error) => self.complain(&format!("side link: {error}")),
            }
        }
    }

    fn refused(&mut self, name: &str) {
        let stale = matches!(self.stage, Stage::Stale(since) if since.elapsed() >= STALE);
        if stale && name == self.config.socket && !self.front.lingers() {
            self.end_stale();
            self.settle();
        }
    }

    fn watch<'a>(&'a self, list: &mut Vec<PollFd<'a>>) {
        self.front.watch(list);
        list.extend(self.side.as_ref().map(Side::watch));
    }

    fn advance(&mut self) {
        let events = self.front.advance();
        self.on_events(events);
        self.hear();
    }

    fn deadline(&self) -> Option<Instant> {
        self.front.deadline()
    }

    fn expire(&mut self) {
        let events = self.front.expire();
        self.on_events(events);
    }

    fn is_known(&self) -> bool {
        self.shown.is_some() && (self.config.memory.is_none() || self.share.known)
    }

    fn is_connected(&self) -> bool {
        self.offer.is_some()
    }

    fn pause(&mut self) {
        self.paused = true;
        self.settle();
    }

    fn resume(&mut self) {
        self.paused = false;
        self.settle();
    }

    fn is_quiet(&self) -> bool {
        self.stage == Stage::Stopped
    }

    fn abandon(&mut self) {
        self.front.disconnect();
        self.on_lost("does not stop");
        self.settle();
    }

    fn kept(&self) -> Option<Rc<OwnedFd>> {
        self.front.inflight().map(|inflight| Rc::clone(&inflight.fd))
    }

    fn inherit(&mut self, kept: OwnedFd) {
        self.inherited = Some(kept);
    }
}
