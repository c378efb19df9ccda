//! The state machine: packets and messages in and out, no system call but writes to doorbells.
//!
//! It works through a script. One request is under way at a time; a step is over when it is sent and, where an answer
//! follows, that has come and been checked. What a back end may do wrong ends in [`Machine::lose`].

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::{Duration, Instant};

use nix::sys::stat::{SFlag, fstat};

use super::script::{self, Expect, Step, Why};
use super::wire::{self, Message, Packet, Piece, Request, protocol};
use super::{Event, Inflight, Ring, Spec, StartError};
use crate::event;
use crate::memory::{Memory, Region};

/// A back end has this long for each step.
pub const PATIENCE: Duration = Duration::from_secs(5);
/// The most steps in a script: a guest that writes configuration space faster than the back end takes it fills it.
pub const MAX_STEPS: usize = 4096;
/// Pieces of memory that every back end takes in one message.
const MAX_TABLE: usize = 8;
/// Steps that need no answer in one call.
const STEPS_AT_ONCE: usize = 256;

/// How far the connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Away,
    Handshake,
    Ready,
}

/// What a back end has said of itself.
#[derive(Debug, Default)]
struct Offer {
    features: u64,
    protocol: u64,
    queues: u16,
    slots: usize,
    config: Vec<u8>,
    shmem: Vec<(u8, u64)>,
}

/// A request of the back end on its shared memory regions.
#[derive(Debug)]
pub struct Asked {
    /// SHMEM_MAP or SHMEM_UNMAP.
    request: u32,
    need_reply: bool,
    /// What it is about.
    pub piece: Piece,
    /// The file to map; none: the piece is to go.
    pub file: Option<Rc<OwnedFd>>,
}

/// State of one front end.
#[derive(Debug)]
pub struct Machine {
    spec: Spec,
    phase: Phase,
    offer: Offer,
    /// What the back end has been, or will have been by the script, told of memory.
    told: Vec<Region>,
    /// Rings that run once the script is done.
    running: Vec<u16>,
    /// Rings have been started, and the back end has not said that all have stopped.
    live: bool,
    /// That was so at the end of the last connection, and the back end did not end it.
    stray: bool,
    /// Where rings have stopped, of the stop that is under way.
    bases: Vec<(u16, u16)>,
    /// A change of configuration space is yet to be read.
    changed: bool,
    inflight: Option<Inflight>,
    script: VecDeque<Step>,
    /// What is being sent.
    out: Option<Packet>,
    /// What the back end is to answer.
    waiting: Option<(Request, Expect)>,
    deadline: Option<Instant>,
    events: Vec<Event>,
    /// The back end's side of the channel for its requests: to be made.
    channel: Option<Rc<OwnedFd>>,
    /// No back end of this device is asked for memory any more.
    distrusted: bool,
    /// What it has asked and is not answered.
    asked: Option<Asked>,
}

impl Machine {
    /// Without a back end.
    pub fn new(spec: Spec) -> Self {
        Self {
            spec,
            phase: Phase::Away,
            offer: Offer::default(),
            told: Vec::new(),
            running: Vec::new(),
            live: false,
            stray: false,
            bases: Vec::new(),
            changed: false,
            inflight: None,
            script: VecDeque::new(),
            out: None,
            waiting: None,
            deadline: None,
            events: Vec::new(),
            channel: None,
            distrusted: false,
            asked: None,
        }
    }

    /// A back end is there. `channel` is its side of the channel for its requests.
    pub fn begin(&mut self, channel: Option<Rc<OwnedFd>>) {
        self.end();
        self.events.clear();
        self.stray = false;
        self.phase = Phase::Handshake;
        self.channel = channel;
        self.push(Step::ask(Request::GET_FEATURES, Vec::new(), Expect::Features));
    }

    /// The back end is no longer of interest.
    pub fn end(&mut self) {
        self.stray |= std::mem::take(&mut self.live);
        self.phase = Phase::Away;
        self.offer = Offer::default();
        self.script.clear();
        self.told.clear();
        self.running.clear();
        self.bases.clear();
        self.changed = false;
        (self.out, self.waiting, self.deadline, self.channel) = (None, None, None, None);
        self.asked = None;
    }

    /// The connection is over.
    pub fn lose(&mut self, why: impl Into<String>) {
        if self.phase != Phase::Away {
            self.end();
            self.events.push(Event::Lost(why.into()));
        }
    }

    /// The back end has closed the connection.
    pub fn closed(&mut self) {
        self.live = false;
        self.lose("has closed the connection");
    }

    /// Whether the answer that is awaited brings memory along.
    pub fn awaits_memory(&self) -> bool {
        self.out.is_none() && matches!(self.waiting, Some((_, Expect::Inflight(..))))
    }

    /// Whether the back end may have memory of its own mapped for the guest.
    pub fn shares(&self) -> bool {
        self.has(protocol::SHMEM)
    }

    /// The back end has sent something else in place of memory.
    pub fn distrust(&mut self) {
        self.distrusted = true;
        self.lose("sent a descriptor that is no memory; it is not asked for any again");
    }

    /// See [`super::Frontend::may_run`].
    pub fn may_run(&self) -> bool {
        self.live || self.stray
    }

    /// Whether there is a connection.
    pub fn is_connected(&self) -> bool {
        self.phase != Phase::Away
    }

    /// What has happened since the last call.
    pub fn events(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.events)
    }

    /// Whether anything is to be done without the back end doing something first.
    pub fn is_busy(&self) -> bool {
        !self.events.is_empty() || (self.waiting.is_none() && self.out.is_none() && !self.script.is_empty())
    }

    /// See [`super::Frontend::is_idle`].
    pub fn is_idle(&self) -> bool {
        self.waiting.is_none() && self.out.is_none() && self.script.is_empty()
    }

    /// When the step under way must be over.
    pub fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// Ends the connection if the back end has let the deadline pass.
    pub fn expire(&mut self, now: Instant) {
        if self.deadline.is_some_and(|deadline| deadline <= now) {
            let what = match self.waiting {
                Some((request, _)) if self.out.is_none() => format!("does not answer {request:?}"),
                _ => "does not read its requests".to_owned(),
            };
            self.lose(format!("{what} within {} seconds", PATIENCE.as_secs()));
        }
    }

    /// What is being sent.
    pub fn outgoing(&self) -> Option<&Packet> {
        self.out.as_ref()
    }

    /// So many bytes of it, and its descriptors with the first, have gone.
    pub fn sent(&mut self, len: usize) {
        let Some(packet) = &mut self.out else { return };
        packet.fds.clear();
        packet.bytes.drain(..len.min(packet.bytes.len()));
        if packet.bytes.is_empty() {
            self.out = None;
            if self.waiting.is_none() {
                self.deadline = None;
            }
        }
    }

    fn has(&self, feature: u64) -> bool {
        self.offer.protocol & feature == feature
    }

    /// Whether rings are enabled by messages (the specification, "Ring states").
    fn enables(&self) -> bool {
        self.offer.features & wire::PROTOCOL_FEATURES != 0
    }

    fn push(&mut self, step: Step) {
        // Its last step may have ended the connection.
        if self.phase == Phase::Away {
            return;
        }
        if self.script.len() < MAX_STEPS {
            self.script.push_back(step);
        } else {
            self.lose("does not keep up with what the guest wants");
        }
    }

    fn push_all(&mut self, steps: impl IntoIterator<Item = Step>) {
        steps.into_iter().for_each(|step| self.push(step));
    }

    /// Goes on with the script as far as it goes without the back end.
    pub fn run(&mut self, now: Instant) {
        for _ in 0..STEPS_AT_ONCE {
            if self.waiting.is_some() || self.out.is_some() {
                return;
            }
            let Some(step) = self.script.pop_front() else { return };
            self.step(step, now);
        }
    }

    fn step(&mut self, step: Step, now: Instant) {
        match step {
            Step::Ask { request, payload, fds, expect } => {
                let acks = self.has(protocol::REPLY_ACK);
                let (packet, answer) = script::message((request, &payload, fds), expect, acks);
                self.out = Some(packet);
                self.waiting = answer.then_some((request, expect));
                self.deadline = Some(now + PATIENCE);
            }
            Step::Ready => {
                self.phase = Phase::Ready;
                self.events.push(Event::Ready {
                    features: self.offer.features & !(wire::LOG_ALL | wire::PROTOCOL_FEATURES),
                    queues: self.offer.queues,
                    config: self.config(),
                });
            }
            Step::Started(kicks, ring) => {
                for kick in kicks {
                    // A back end that plays with its doorbell gets no kick.
                    let _rung = event::signal(&kick);
                }
                self.events.push(Event::Started { ring });
            }
            Step::Stopped(ring) => {
                self.live &= ring.is_some() || !self.running.is_empty();
                let bases = std::mem::take(&mut self.bases);
                self.events.push(Event::Stopped { ring, bases });
            }
            Step::Memory => self.events.push(Event::Memory),
            Step::Reread(why) => {
                self.changed &= why != Why::Changed;
                let len = self.offer.config.len();
                if len > 0 {
                    self.script.push_front(Step::config(len, why));
                }
            }
            Step::Forget => self.inflight = None,
            Step::Unusable(why) => self.lose(why),
        }
    }

    /// Configuration space in the length that the device has. A back end's may be shorter: what it does not know is 0.
    fn config(&self) -> Vec<u8> {
        let mut config = self.offer.config.clone();
        if !config.is_empty() {
            config.resize(self.spec.config_len.into(), 0);
        }
        config
    }

    /// A message of the back end on its main connection.
    pub fn take(&mut self, mut message: Message) {
        let Some((request, expect)) = self.waiting.filter(|_| self.out.is_none()) else {
            return self.lose("sent a message that nobody asked for");
        };
        if !message.reply || message.request != request as u32 {
            return self.lose(format!("sent message {} in answer to {request:?}", message.request));
        }
        let fd = message.fds.pop();
        if fd.is_some() != matches!(expect, Expect::Inflight(..)) {
            return self.lose(format!("sent the wrong number of descriptors in answer to {request:?}"));
        }
        (self.waiting, self.deadline) = (None, None);
        let done = match (expect, fd) {
            (Expect::Config { len, why }, _) => self.take_config(&message.payload, len, why),
            (Expect::Shmem, _) => {
                wire::as_shmem_config(&message.payload).map(|regions| self.offer.shmem = regions)
            }
            (Expect::Base(index), _) => self.take_base(&message.payload, index),
            (Expect::Inflight(queues, size), Some(fd)) => {
                self.take_inflight(&message.payload, fd, (queues, size))
            }
            _ => wire::as_u64(&message.payload).map(|value| self.take_u64(request, expect, value)),
        };
        if done.is_none() {
            self.lose(format!("sent a wrong answer to {request:?}"));
        }
    }

    fn take_u64(&mut self, request: Request, expect: Expect, value: u64) {
        match expect {
            Expect::Done if value != 0 => self.lose(format!("refused {request:?} ({value})")),
            Expect::Features => self.take_features(value),
            Expect::ProtocolFeatures => self.take_protocol(value),
            Expect::Queues if value == 0 => self.lose("has no queues"),
            Expect::Queues => self.offer.queues = u16::try_from(value).unwrap_or(u16::MAX),
            Expect::Slots => self.offer.slots = usize::try_from(value).unwrap_or(usize::MAX),
            _ => {}
        }
    }

    fn take_features(&mut self, features: u64) {
        self.offer.features = features;
        self.offer.queues = self.spec.queues;
        if self.enables() {
            let expect = Expect::ProtocolFeatures;
            self.push(Step::ask(Request::GET_PROTOCOL_FEATURES, Vec::new(), expect));
        } else {
            self.introduce();
        }
    }

    fn take_protocol(&mut self, mut offered: u64) {
        let mut wanted = offered & protocol::WANTED;
        if self.distrusted {
            wanted &= !protocol::INFLIGHT_SHMFD;
            offered &= !protocol::SHMEM;
        }
        if self.channel.is_none() {
            wanted &= !protocol::BACKEND_REQ;
        }
        if wanted & protocol::BACKEND_REQ != 0 && offered & protocol::SHMEM != 0 {
            wanted |= offered & (protocol::SHMEM | protocol::BACKEND_SEND_FD);
        }
        self.offer.protocol = wanted;
        let payload = wanted.to_ne_bytes().to_vec();
        self.push(Step::ask(Request::SET_PROTOCOL_FEATURES, payload, Expect::Silence));
        if self.has(protocol::MQ) {
            self.push(Step::ask(Request::GET_QUEUE_NUM, Vec::new(), Expect::Queues));
        }
        if self.has(protocol::CONFIGURE_MEM_SLOTS) {
            self.push(Step::ask(Request::GET_MAX_MEM_SLOTS, Vec::new(), Expect::Slots));
        }
        if let Some(channel) = self.channel.take().filter(|_| self.has(protocol::BACKEND_REQ)) {
            self.push(Step::hand(Request::SET_BACKEND_REQ_FD, Vec::new(), vec![channel]));
        }
        self.introduce();
    }

    /// The end of the handshake.
    fn introduce(&mut self) {
        self.channel = None;
        self.push(Step::ask(Request::SET_OWNER, Vec::new(), Expect::Done));
        let len = usize::from(self.spec.config_len).min(wire::MAX_CONFIG);
        if len > 0 && self.has(protocol::CONFIG) {
            self.push(Step::config(len, Why::Handshake));
        }
        if self.has(protocol::SHMEM) {
            self.push(Step::ask(Request::GET_SHMEM_CONFIG, Vec::new(), Expect::Shmem));
        }
        self.push(Step::Ready);
    }

    fn take_config(&mut self, payload: &[u8], len: usize, why: Why) -> Option<()> {
        let config = wire::as_config(payload, len)?;
        if config.is_empty() {
            // Back ends that are older than a field refuse to read it, and the whole with it.
            let shorter = len.saturating_sub(1) & !3;
            if shorter == 0 || why != Why::Handshake {
                return None;
            }
            self.script.push_front(Step::config(shorter, why));
            return Some(());
        }
        self.offer.config = config;
        if why != Why::Handshake {
            let changed = why == Why::Changed;
            self.events.push(Event::Config { config: self.config(), changed });
        }
        Some(())
    }

    fn take_base(&mut self, payload: &[u8], index: u16) -> Option<()> {
        let (ring, base) = wire::as_ring_state(payload)?;
        let base = u16::try_from(base).ok().filter(|_| ring == u32::from(index))?;
        self.bases.push((index, base));
        Some(())
    }

    fn take_inflight(&mut self, payload: &[u8], fd: OwnedFd, room: (u16, u16)) -> Option<()> {
        let (size, offset) = wire::as_inflight(payload)?;
        let end = i64::try_from(size.checked_add(offset)?).ok()?;
        let stat = fstat(&fd).ok()?;
        let file = SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT == SFlag::S_IFREG;
        if !file || size == 0 || stat.st_size < end {
            return None;
        }
        let inflight = Inflight { fd: Rc::new(fd), size, offset, queues: room.0, queue_size: room.1 };
        self.script.push_front(Step::inflight(&inflight));
        self.inflight = Some(inflight);
        Some(())
    }

    /// A request of the back end on its channel; returns what to answer, if it wants an answer.
    /// One on shared memory regions waits for [`Self::answer`] with what it is answered; nothing else is read meanwhile.
    pub fn request(&mut self, mut message: Message) -> Option<Packet> {
        let maps = message.request == wire::SHMEM_MAP;
        let (shmem, fd) = (self.has(protocol::SHMEM), message.fds.pop());
        if fd.is_some() && !(shmem && maps) {
            self.lose(wire::Malformed::Descriptors.to_string());
            return None;
        }
        if shmem && (maps || message.request == wire::SHMEM_UNMAP) && self.phase == Phase::Ready {
            if let Some(piece) = wire::as_piece(&message.payload).filter(|_| fd.is_some() == maps) {
                let Message { request, need_reply, .. } = message;
                self.asked = Some(Asked { request, need_reply, piece, file: fd.map(Rc::new) });
                self.events.push(Event::Asked);
                return None;
            }
        }
        let known = message.request == wire::CONFIG_CHANGE && message.payload.is_empty();
        if known && !self.changed {
            self.changed = true;
            self.push(Step::Reread(Why::Changed));
        }
        message.need_reply.then(|| Packet::answer(message.request, u64::from(!known)))
    }

    /// See [`super::Frontend::asked`].
    pub fn asked(&self) -> Option<&Asked> {
        self.asked.as_ref()
    }

    /// Ends what is asked; returns what to answer, if the back end wants an answer.
    pub fn answer(&mut self, done: bool) -> Option<Packet> {
        let asked = self.asked.take()?;
        asked.need_reply.then(|| Packet::answer(asked.request, u64::from(!done)))
    }

    /// See [`super::Frontend::shmem`].
    pub fn shmem(&self) -> &[(u8, u64)] {
        &self.offer.shmem
    }

    /// See [`super::Frontend::start`].
    pub fn start(&mut self, features: u64, memory: &Memory, rings: &[Ring]) -> Result<(), StartError> {
        if self.phase != Phase::Ready || !self.running.is_empty() {
            return Err(StartError::NotReady);
        }
        self.check(rings, memory)?;
        let own = self.offer.features & wire::PROTOCOL_FEATURES;
        let features = (features & self.offer.features & !wire::LOG_ALL) | own;
        self.push(Step::ask(Request::SET_FEATURES, features.to_ne_bytes().to_vec(), Expect::Done));
        self.tell(memory);
        self.track(rings);
        self.go(rings, None);
        Ok(())
    }

    /// See [`super::Frontend::start_ring`].
    pub fn start_ring(&mut self, ring: Ring, memory: &Memory) -> Result<(), StartError> {
        if self.phase != Phase::Ready {
            return Err(StartError::NotReady);
        }
        let index = ring.index;
        let rings = [ring];
        self.check(&rings, memory)?;
        self.tell(memory);
        self.go(&rings, Some(index));
        Ok(())
    }

    fn check(&self, rings: &[Ring], memory: &Memory) -> Result<(), StartError> {
        let mut taken = self.running.clone();
        for ring in rings {
            let index = ring.index;
            if index >= self.spec.queues || taken.contains(&index) || !ring.is_in(memory) {
                return Err(StartError::Ring(index));
            }
            taken.push(index);
        }
        Ok(())
    }

    fn go(&mut self, rings: &[Ring], one: Option<u16>) {
        self.running.extend(rings.iter().map(|ring| ring.index));
        self.live = true;
        self.push_all(rings.iter().flat_map(script::set_up));
        if self.enables() {
            self.push_all(rings.iter().map(|ring| Step::enable(ring.index, true)));
        }
        // Older back ends lose a kick that comes before they have seen the last message.
        self.push(Step::barrier());
        self.push(Step::Started(rings.iter().map(|ring| Rc::clone(&ring.kick)).collect(), one));
    }

    /// Memory for what is in flight: what a former life of the back end left, or new one.
    fn track(&mut self, rings: &[Ring]) {
        if !self.has(protocol::INFLIGHT_SHMFD) {
            return;
        }
        let highest = rings.iter().map(|ring| ring.index + 1).max().unwrap_or(1);
        let queues = self.spec.queues.min(self.offer.queues).max(highest);
        // A ring that is reset by itself may come back larger than it is now.
        let size = self.spec.queue_size;
        let kept = self.inflight.as_ref().filter(|kept| kept.queues >= queues && kept.queue_size >= size);
        let step = if let Some(kept) = kept {
            Step::inflight(kept)
        } else {
            let expect = Expect::Inflight(queues, size);
            Step::ask(Request::GET_INFLIGHT_FD, wire::inflight(0, 0, queues, size), expect)
        };
        self.push(step);
    }

    /// Makes the back end's memory this one.
    fn tell(&mut self, memory: &Memory) {
        let (new, old) = (memory.regions.clone(), std::mem::take(&mut self.told));
        let lacks = |list: &[Region], one: &Region| !list.iter().any(|other| other.is(one));
        if self.has(protocol::CONFIGURE_MEM_SLOTS) {
            if new.len() > self.offer.slots {
                let slots = self.offer.slots;
                self.push(Step::Unusable(format!("has room for {slots} pieces of memory only")));
            }
            let gone = old.iter().filter(|region| lacks(&new, region));
            let come = new.iter().filter(|region| lacks(&old, region));
            let steps = gone.map(|region| script::change(region, false));
            let steps: Vec<Step> = steps.chain(come.map(|region| script::change(region, true))).collect();
            self.push_all(steps);
        } else if new.len() > MAX_TABLE {
            self.push(Step::Unusable(format!("has room for {MAX_TABLE} pieces of memory only")));
        } else if new.len() != old.len() || new.iter().any(|region| lacks(&old, region)) {
            self.push(script::replace(&new));
        }
        if !self.has(protocol::REPLY_ACK) {
            self.push(Step::barrier());
        }
        self.told = new;
    }

    /// See [`super::Frontend::set_memory`].
    pub fn set_memory(&mut self, memory: &Memory) {
        if self.phase == Phase::Ready {
            self.tell(memory);
            self.push(Step::Memory);
        } else {
            self.events.push(Event::Memory);
        }
    }

    /// See [`super::Frontend::room`].
    pub fn room(&self, regions: usize) -> Result<(), String> {
        let slots = self.offer.slots;
        if self.phase != Phase::Ready {
            Ok(())
        } else if !self.has(protocol::CONFIGURE_MEM_SLOTS) {
            Err("its back end takes no memory while it runs (VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS)"
                .to_owned())
        } else if regions > slots {
            Err(format!("its back end has room for {slots} pieces of memory only"))
        } else {
            Ok(())
        }
    }

    /// See [`super::Frontend::stop`].
    pub fn stop(&mut self) {
        let rings = std::mem::take(&mut self.running);
        self.halt(&rings, None);
    }

    /// See [`super::Frontend::stop_ring`].
    pub fn stop_ring(&mut self, index: u16) {
        let known = self.running.iter().position(|ring| *ring == index);
        let ring = known.map(|at| self.running.swap_remove(at));
        self.halt(ring.as_slice(), Some(index));
    }

    /// A disabled ring may lose what is in it (a network device drops it), so it is disabled once it has stopped.
    fn halt(&mut self, rings: &[u16], one: Option<u16>) {
        if self.phase != Phase::Ready {
            self.events.push(Event::Stopped { ring: one, bases: Vec::new() });
            return;
        }
        for ring in rings {
            self.push(script::stop(*ring));
            if self.enables() {
                self.push(Step::enable(*ring, false));
            }
        }
        self.push(Step::Stopped(one));
    }

    /// See [`super::Frontend::reset`].
    pub fn reset(&mut self) {
        self.inflight = None;
        if self.phase != Phase::Ready {
            return;
        }
        // Once more after the start that may be under way.
        self.push(Step::Forget);
        if self.has(protocol::RESET_DEVICE) {
            self.push(Step::ask(Request::RESET_DEVICE, Vec::new(), Expect::Done));
        }
    }

    /// See [`super::Frontend::set_call`].
    pub fn set_call(&mut self, index: u16, call: &Rc<OwnedFd>) {
        if self.running.contains(&index) {
            self.push(Step::ring_fd(Request::SET_VRING_CALL, index, call));
        }
    }

    /// See [`super::Frontend::write_config`].
    pub fn write_config(&mut self, offset: u32, bytes: &[u8]) {
        let end = (offset as usize).checked_add(bytes.len());
        let ready = self.phase == Phase::Ready && !bytes.is_empty();
        if ready && end.is_some_and(|end| end <= self.offer.config.len()) {
            self.push(Step::ask(Request::SET_CONFIG, wire::config(offset, bytes), Expect::Tried));
        }
    }

    /// See [`super::Frontend::read_config`].
    pub fn read_config(&mut self) {
        if self.phase == Phase::Ready {
            self.push(Step::Reread(Why::Asked));
        }
    }

    /// See [`super::Frontend::inflight`].
    pub fn inflight(&self) -> Option<&Inflight> {
        self.inflight.as_ref()
    }

    /// See [`super::Frontend::set_inflight`].
    pub fn set_inflight(&mut self, inflight: Option<Inflight>) {
        self.inflight = inflight;
    }

    /// See [`super::Frontend::tracks_inflight`].
    pub fn tracks_inflight(&self) -> bool {
        self.has(protocol::INFLIGHT_SHMFD)
    }
}
