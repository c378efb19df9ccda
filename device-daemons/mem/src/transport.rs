//! The device on its virtqueue: requests in, pieces of guest memory that come and go, holes in the file behind them.
//!
//! A request that changes pieces is under way until pci has done its part; requests behind it wait. Plugging maps first and
//! counts then; unplugging counts first, has the chunk taken away, and frees last: whenever the process dies, no
//! memory is reachable that is not counted, once its successor has said its pieces.

use std::fs::File;
use std::ops::Range;
use std::os::fd::{BorrowedFd, OwnedFd};

use bulkhead_control_api::config;
use bulkhead_control_api::side::{MemorySizes, Piece};
use bulkhead_jail::pace::Pace;
use bulkhead_jail::warn;
use bulkhead_kit::chain::Chain;
use bulkhead_kit::device::{Device, Notices, Progress, Told};
use bulkhead_kit::pieces::{Outcome, Pieces};
use bulkhead_kit::ring::{Ring, RingError, Rings};
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};

use crate::device::{CONFIG_LEN, Mem, Plan, REQUEST_LEN, RESPONSE_LEN, Request, Response};
use crate::kept::{Kept, State};

/// The one virtqueue.
const QUEUE: u16 = 0;
/// Resets are not known yet.
const UNKNOWN: u64 = u64::MAX;
/// Lines a second on what is refused.
const LINES: usize = 1;

/// What is under way.
#[derive(Debug)]
enum Work {
    /// A predecessor's pieces are said again; then what it may have left is freed.
    Begin,
    /// These blocks are about to be plugged.
    Plug(Range<u64>),
    /// These are unplugged and about to be freed.
    Free(Range<u64>),
    /// What was wanted is wanted no more.
    Undo,
}

/// The device with all that is around it.
#[derive(Debug)]
pub struct Transport {
    mem: Mem,
    space: [u8; CONFIG_LEN],
    /// Guest physical address of the region.
    addr: u64,
    file: File,
    state: State,
    kept: Kept,
    /// The last change of a predecessor, which may not have answered it.
    inherited: Option<(Range<u64>, bool)>,
    pieces: Pieces,
    notices: Notices,
    work: Option<Work>,
    /// The request that is under way.
    chain: Option<Chain>,
    /// The machine was reset meanwhile.
    reset_due: bool,
    lines: Pace,
}

/// What the daemon is made of.
#[derive(Debug)]
pub struct Parts {
    /// The memory's file.
    pub memory: OwnedFd,
    /// The state's file.
    pub state: OwnedFd,
    /// What pci is told.
    pub notices: Notices,
}

impl Transport {
    /// The device at power-on, or as its predecessor left it.
    ///
    /// # Errors
    /// The host's.
    pub fn new(config: &config::Mem, parts: Parts) -> Result<Self, Errno> {
        let memory = parts.memory.try_clone().map_err(|_| Errno::EMFILE)?;
        let pieces = Pieces::new(memory, parts.notices.clone())?;
        let mut mem = Mem::new(config);
        let (state, left) = State::open(parts.state, config.life, mem.blocks());
        let inherited = left.as_ref().map(|(kept, _)| kept.change.clone());
        let fresh = left.is_none();
        let kept = match left {
            Some((kept, blocks)) => {
                mem.restore(blocks, kept.requested, kept.usable);
                kept
            }
            None => Kept { resets: UNKNOWN, ..Kept::default() },
        };
        let mut this = Self {
            space: mem.config(),
            mem,
            addr: config.addr,
            file: File::from(parts.memory),
            state,
            kept,
            inherited,
            pieces,
            notices: parts.notices,
            work: Some(Work::Begin),
            chain: None,
            reset_due: false,
            lines: Pace::new(LINES),
        };
        if fresh {
            this.note((0..0, false));
            this.state.begin(&this.kept, this.mem.blocks());
        }
        for chunk in (0..this.mem.blocks().chunks()).filter(|chunk| this.mem.blocks().is_used(*chunk)) {
            this.want(chunk, true);
        }
        this.say();
        Ok(this)
    }

    /// What the state is to hold.
    fn note(&mut self, change: (Range<u64>, bool)) {
        let (requested, usable) = (self.mem.requested(), self.mem.usable());
        self.kept = Kept { resets: self.kept.resets, requested, usable, change };
    }

    fn commit(&mut self, change: (Range<u64>, bool)) {
        self.note(change);
        self.state.commit(&self.kept, self.mem.blocks());
        self.space = self.mem.config();
    }

    /// Tells pci the sizes.
    fn say(&self) {
        let sizes = MemorySizes { plugged: self.mem.plugged(), requested: self.mem.requested() };
        self.pieces.say_sizes(sizes);
    }

    fn want(&self, chunk: u64, there: bool) {
        let (blocks, block) = (self.mem.blocks().blocks_of(chunk), self.mem.block());
        let offset = blocks.start.saturating_mul(block);
        let len = (blocks.end - blocks.start).saturating_mul(block);
        let piece = Piece { addr: self.addr.saturating_add(offset), len, offset };
        if let Ok(number) = u16::try_from(chunk) {
            self.pieces.want(number, there.then_some(piece));
        }
    }

    /// Has the chunks that the range touches come or go as their blocks say.
    fn settle_chunks(&self, range: &Range<u64>) {
        for chunk in self.mem.blocks().chunks_of(range) {
            if !self.mem.blocks().is_used(chunk) {
                self.want(chunk, false);
            }
        }
    }

    fn begin(&mut self, plan: &Plan) {
        self.work = Some(match plan {
            Plan::Plug(range) => {
                self.mem.blocks().chunks_of(range).for_each(|chunk| self.want(chunk, true));
                Work::Plug(range.clone())
            }
            Plan::Unplug(_) | Plan::UnplugAll => {
                self.mem.commit(plan);
                let range = match plan {
                    Plan::Unplug(range) => range.clone(),
                    _ => 0..self.mem.blocks().count(),
                };
                self.commit((range.clone(), false));
                self.settle_chunks(&range);
                Work::Free(range)
            }
        });
    }

    /// Goes on with what is under way as far as that goes; the answer to the request, if there is one now.
    fn go_on(&mut self) -> Option<Response> {
        let mut answer = None;
        while self.work.is_some() {
            let outcome = self.pieces.outcome();
            if outcome == Outcome::Waiting {
                break;
            }
            let Some(work) = self.work.take() else { break };
            answer = match outcome {
                Outcome::Refused(text) => self.refused(&text, work),
                _ => self.finish(work),
            };
            if self.work.is_none() && std::mem::take(&mut self.reset_due) {
                self.begin(&Plan::UnplugAll);
                self.notices.config_changed();
                // Nobody waits for its answer.
                let _ = self.go_on();
            }
            if answer.is_some() {
                break;
            }
        }
        answer
    }

    fn refused(&mut self, text: &str, work: Work) -> Option<Response> {
        if self.lines.ask().is_some() {
            warn!("memory does not come or go: {text}");
        }
        if let Work::Plug(range) = work {
            self.settle_chunks(&range);
            self.work = Some(Work::Undo);
            return Some(Response::Busy);
        }
        // What is left to do stays so.
        self.work = Some(work);
        None
    }

    fn finish(&mut self, work: Work) -> Option<Response> {
        match work {
            Work::Begin => {
                self.free_unplugged();
                return None;
            }
            Work::Undo => return None,
            Work::Plug(range) => {
                self.mem.commit(&Plan::Plug(range.clone()));
                self.commit((range, true));
            }
            Work::Free(range) => self.punch(&range),
        }
        self.say();
        Some(Response::Ack(0))
    }

    /// What a predecessor has unplugged and not freed.
    fn free_unplugged(&self) {
        let mut next = 0;
        let end = self.mem.blocks().count();
        for run in self.mem.blocks().runs().chain(std::iter::once(end..end)) {
            self.punch(&(next..run.start));
            next = run.end;
        }
    }

    fn punch(&self, range: &Range<u64>) {
        let block = self.mem.block();
        let bytes = |blocks: u64| i64::try_from(blocks.saturating_mul(block)).unwrap_or(i64::MAX);
        let len = bytes(range.end.saturating_sub(range.start));
        if len == 0 {
            return;
        }
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        if let Err(errno) = fallocate(&self.file, flags, bytes(range.start), len) {
            warn!("{len} bytes are not freed: {errno}");
        }
    }

    /// The answer to a request, or none while it is under way.
    fn carry_out(&mut self, request: Option<Request>) -> Option<Response> {
        let inherited = self.inherited.take();
        match request.map_or(Err(Response::Error), |request| self.mem.check(request)) {
            Ok(plan) => {
                self.begin(&plan);
                self.go_on()
            }
            // A predecessor has done it and died before it said so.
            Err(Response::Error)
                if inherited.is_some() && request.and_then(|r| self.mem.change(r)) == inherited =>
            {
                Some(Response::Ack(0))
            }
            Err(response) => Some(response),
        }
    }

    fn answer(ring: &mut Ring, chain: Chain, response: Response) {
        let written = chain.writable().write(&ring.memory(), &response.encode());
        match written {
            Ok(_) => ring.done(chain, u32::try_from(RESPONSE_LEN).unwrap_or(0)),
            Err(error) => {
                ring.done(chain, 0);
                ring.fail(error.into());
            }
        }
    }
}

impl Device for Transport {
    fn features(&self) -> u64 {
        self.mem.offered()
    }

    fn queues(&self) -> u16 {
        QUEUE + 1
    }

    fn config(&self) -> &[u8] {
        &self.space
    }

    fn process(&mut self, rings: &mut Rings, queue: u16) -> Progress {
        let Some(ring) = rings.get(queue) else { return Progress::Idle };
        while self.work.is_none() {
            let Some(chain) = ring.pop() else { return Progress::Idle };
            let (readable, writable) = (chain.readable(), chain.writable());
            if readable.len() < REQUEST_LEN as u64 || writable.len() < RESPONSE_LEN as u64 {
                ring.fail(RingError::Request("a request or its answer is too short"));
                return Progress::Idle;
            }
            let mut bytes = [0; REQUEST_LEN];
            if let Err(error) = readable.read(&ring.memory(), &mut bytes) {
                ring.fail(error.into());
                return Progress::Idle;
            }
            match self.carry_out(Request::decode(&bytes)) {
                Some(response) => Self::answer(ring, chain, response),
                None => self.chain = Some(chain),
            }
        }
        Progress::Blocked
    }

    fn stop(&mut self, rings: &mut Rings, queue: u16) {
        let (Some(chain), Some(ring)) = (self.chain.take(), rings.get(queue)) else { return };
        match self.work.take() {
            // Whoever goes on with the ring begins it anew.
            Some(Work::Plug(range)) => {
                ring.put_back(chain);
                self.settle_chunks(&range);
                self.work = Some(Work::Undo);
            }
            // It is counted already; the rest needs no driver.
            work => {
                self.work = work;
                Self::answer(ring, chain, Response::Ack(0));
            }
        }
    }

    /// The request that is under way has caused it, perhaps, and goes on.
    fn memory_changed(&mut self, _rings: &mut Rings, _queue: u16) {}

    fn sources(&self) -> Vec<BorrowedFd<'_>> {
        vec![self.pieces.source()]
    }

    fn ready(&mut self, rings: &mut Rings, _source: usize) -> u64 {
        self.pieces.seen();
        if let Some(response) = self.go_on() {
            // Without a chain it is nobody's.
            if let (Some(chain), Some(ring)) = (self.chain.take(), rings.get(QUEUE)) {
                Self::answer(ring, chain, response);
                ring.signal();
            }
        }
        if self.work.is_none() { 1 << QUEUE } else { 0 }
    }

    fn pieces(&self) -> Option<Pieces> {
        Some(self.pieces.clone())
    }

    fn told(&mut self, what: Told) {
        match what {
            Told::Request(bytes) => {
                let changed = self.mem.request(bytes);
                self.commit(self.kept.change.clone());
                if changed {
                    self.notices.config_changed();
                }
                self.say();
            }
            Told::Resets(count) => {
                let before = std::mem::replace(&mut self.kept.resets, count);
                self.commit(self.kept.change.clone());
                if before != count && before != UNKNOWN {
                    self.reset_due = true;
                    self.work.get_or_insert(Work::Undo);
                    self.pieces.poke();
                }
            }
        }
    }
}
