//! The balloon on its virtqueues: numbers in, holes in the files that back guest memory.

use std::fs::File;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use bulkhead_control_api::balloon::{Answer, FromBalloon, Op, Stats};
use bulkhead_control_api::config;
use bulkhead_jail::link::Link;
use bulkhead_jail::warn;
use bulkhead_kit::chain::Chain;
use bulkhead_kit::device::{Device, Notices, Progress};
use bulkhead_kit::memory::Memory;
use bulkhead_kit::ring::{Ring, RingError, Rings};
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::statfs::{HUGETLBFS_MAGIC, fstatfs};
use nix::sys::time::{TimeSpec, TimeValLike as _};
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use vm_memory::{GuestMemoryBackend as _, GuestMemoryRegion as _};

use crate::broker::{BROKER, Broker, OPENER};
use crate::device::{Balloon, CONFIG_LEN, QUEUES, Role, Written};
use crate::kept::State;
use crate::pages::{Held, PAGE, Piece, Region, Run, Waiting, cut};

/// The most bytes of a chain of page numbers: 262,144 of them, a GiB.
const MAX_CHAIN: u64 = 1 << 20;
/// The most chains that are held back until their pages are free: as many as a ring has.
const MAX_CHAINS: usize = 1024;
/// Page numbers are read in pieces of so many bytes.
const CHUNK: usize = 4096;
/// The longest buffer of statistics that is read, in bytes.
const MAX_STATS_LEN: usize = 256;
/// Messages and expirations in one turn.
const TURN: usize = 64;
const TIMER: u64 = 3;

/// A region of guest memory and its file.
#[derive(Debug)]
struct Backing {
    file: Arc<File>,
    /// Where the region starts in the file, in bytes.
    start: u64,
    held: Held,
}

/// The regions of the memory that was seen last.
#[derive(Debug, Default)]
struct Regions {
    of: Option<Arc<Memory>>,
    map: Vec<Region>,
    files: Vec<Backing>,
}

/// Pages that the file frees at once.
fn granule(file: &File) -> u64 {
    let size = fstatfs(file).ok().filter(|stat| stat.filesystem_type() == HUGETLBFS_MAGIC);
    let size = size.and_then(|stat| u64::try_from(stat.block_size()).ok()).unwrap_or(PAGE);
    if size.is_power_of_two() { (size / PAGE).max(1) } else { 1 }
}

impl Regions {
    /// Looks at guest memory, if it is not the one that was seen last.
    fn see(&mut self, memory: &Arc<Memory>) {
        if self.of.as_ref().is_some_and(|of| Arc::ptr_eq(of, memory)) {
            return;
        }
        *self = Self { of: Some(Arc::clone(memory)), ..Self::default() };
        for region in memory.iter() {
            let Some(place) = region.file_offset() else { continue };
            let count = region.len() / PAGE;
            let granule = granule(place.file());
            self.map.push(Region { first: region.start_addr().0 / PAGE, count, granule });
            let held = if granule > 1 { Held::new(count) } else { Held::default() };
            self.files.push(Backing { file: Arc::clone(place.arc()), start: place.start(), held });
        }
    }

    /// Frees pages that the guest has given.
    fn free(&mut self, run: Run) {
        let files = &mut self.files;
        let map = &self.map;
        cut(run, map, |Piece { region, offset, count }| {
            let (Some(backing), Some(region)) = (files.get_mut(region), map.get(region)) else { return };
            let Backing { file, start, held } = backing;
            if region.granule == 1 {
                punch(file, *start, offset, count);
            } else {
                held.hold(offset, count, region.granule, |offset, count| punch(file, *start, offset, count));
            }
        });
    }

    /// Frees what it can of pages that stay the guest's.
    fn free_reported(&self, run: Run) {
        cut(run, &self.map, |Piece { region, offset, count }| {
            let (Some(backing), Some(region)) = (self.files.get(region), self.map.get(region)) else {
                return;
            };
            let first = offset.next_multiple_of(region.granule);
            let end = (offset + count) / region.granule * region.granule;
            if first < end {
                punch(&backing.file, backing.start, first, end - first);
            }
        });
    }

    /// The guest takes pages back; only huge pages need to know.
    fn give_back(&mut self, run: Run) {
        let files = &mut self.files;
        cut(run, &self.map, |Piece { region, offset, count }| {
            if let Some(backing) = files.get_mut(region) {
                backing.held.give_back(offset, count);
            }
        });
    }

    fn has_huge(&self) -> bool {
        self.map.iter().any(|region| region.granule > 1)
    }
}

/// Frees `count` pages of a file, `offset` pages behind `start`.
fn punch(file: &File, start: u64, offset: u64, count: u64) {
    let at =
        offset.checked_mul(PAGE).and_then(|at| at.checked_add(start)).and_then(|at| i64::try_from(at).ok());
    let len = count.checked_mul(PAGE).and_then(|len| i64::try_from(len).ok());
    let (Some(at), Some(len)) = (at, len) else { return };
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    if let Err(errno) = fallocate(file, flags, at, len) {
        warn!("{count} pages are not freed: {errno}");
    }
}

/// The balloon with all that is around it.
#[derive(Debug)]
pub struct Transport {
    balloon: Balloon,
    space: [u8; CONFIG_LEN],
    state: State,
    notices: Notices,
    /// Everything but kicks: it is the one source of the queue thread.
    epoll: Epoll,
    broker: Broker,
    timer: TimerFd,
    waiting: Waiting,
    chains: Vec<Chain>,
    regions: Regions,
    /// The buffer of statistics that waits until others are wanted, and its queue.
    stats: Option<(u16, Chain)>,
    last_update: u64,
}

/// What the daemon is made of.
#[derive(Debug)]
pub struct Parts {
    /// Connection to the broker.
    pub broker: OwnedFd,
    /// Link to the opener.
    pub opener: Option<Link>,
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
    pub fn new(config: &config::Balloon, parts: Parts) -> Result<Self, Errno> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let broker = Broker::new(&epoll, parts.broker, parts.opener)?;
        let flags = TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK;
        let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, flags)?;
        epoll.add(&timer, EpollEvent::new(EpollFlags::EPOLLIN, TIMER))?;
        let (state, kept) = State::open(parts.state, config.life);
        let balloon = Balloon::new(config, kept);
        let space = balloon.config();
        let mut this = Self {
            balloon,
            space,
            state,
            notices: parts.notices,
            epoll,
            broker,
            timer,
            waiting: Waiting::default(),
            chains: Vec::new(),
            regions: Regions::default(),
            stats: None,
            last_update: 0,
        };
        this.set_timer();
        Ok(this)
    }

    /// The device changed: what outlives the process, and what the guest reads.
    fn changed(&mut self) {
        self.space = self.balloon.config();
        self.state.commit(&self.balloon.kept);
    }

    fn set_timer(&mut self) {
        let interval = self.balloon.kept.interval;
        let set = if interval == 0 {
            self.timer.unset()
        } else {
            let every = Expiration::Interval(TimeSpec::seconds(interval.into()));
            self.timer.set(every, TimerSetTimeFlags::empty())
        };
        if let Err(errno) = set {
            warn!("timer of the statistics: {errno}");
        }
    }

    /// Takes page numbers of as many chains as there are, then frees all of their pages, then gives the chains back.
    fn inflate(&mut self, ring: &mut Ring) -> Progress {
        let memory = ring.memory();
        self.regions.see(&memory);
        let mut progress = Progress::Idle;
        while let Some(chain) = ring.pop() {
            let numbers = chain.readable();
            if numbers.len() > MAX_CHAIN {
                ring.fail(RingError::Request("more than 1 MiB of page numbers at once"));
                break;
            }
            let read = self.read_numbers(&memory, &chain, |this| this.carry_out());
            self.chains.push(chain);
            if let Err(error) = read {
                ring.fail(error);
                break;
            }
            if self.chains.len() >= MAX_CHAINS {
                progress = Progress::More;
                break;
            }
        }
        self.carry_out();
        self.chains.drain(..).for_each(|chain| ring.done(chain, 0));
        progress
    }

    fn carry_out(&mut self) {
        let Self { waiting, regions, .. } = self;
        waiting.take(|run| regions.free(run));
    }

    /// Adds the numbers in a chain to those that wait; `full` makes room.
    fn read_numbers(
        &mut self,
        memory: &Memory,
        chain: &Chain,
        full: impl Fn(&mut Self),
    ) -> Result<(), RingError> {
        let numbers = chain.readable();
        let mut chunk = [0; CHUNK];
        let mut at = 0;
        while at < numbers.len() {
            let len = (numbers.len() - at).min(CHUNK as u64);
            let Some(piece) = numbers.slice(at, len) else { break };
            let read = piece.read(memory, &mut chunk)?;
            let mut bytes = chunk.get(..read / 4 * 4).unwrap_or_default();
            while !bytes.is_empty() {
                let taken = self.waiting.add(bytes);
                if taken == 0 {
                    full(self);
                }
                bytes = bytes.get(taken..).unwrap_or_default();
            }
            at += len;
        }
        Ok(())
    }

    fn deflate(&mut self, ring: &mut Ring) -> Progress {
        let memory = ring.memory();
        self.regions.see(&memory);
        for _ in 0..MAX_CHAINS {
            let Some(chain) = ring.pop() else { return Progress::Idle };
            if self.regions.has_huge() && chain.readable().len() <= MAX_CHAIN {
                let give_back = |this: &mut Self| {
                    let Self { waiting, regions, .. } = this;
                    waiting.take(|run| regions.give_back(run));
                };
                let read = self.read_numbers(&memory, &chain, give_back);
                give_back(self);
                if let Err(error) = read {
                    ring.fail(error);
                }
            }
            ring.done(chain, 0);
        }
        Progress::More
    }

    fn report(&mut self, ring: &mut Ring) -> Progress {
        let memory = ring.memory();
        self.regions.see(&memory);
        let may = self.balloon.may_free_reported();
        for _ in 0..MAX_CHAINS {
            let Some(chain) = ring.pop() else { return Progress::Idle };
            for (addr, len) in chain.writable().pieces().filter(|_| may) {
                let first = addr.div_ceil(PAGE);
                let end = (addr + u64::from(len)) / PAGE;
                if first < end {
                    self.regions.free_reported(Run { first, count: end - first });
                }
            }
            ring.done(chain, 0);
        }
        Progress::More
    }

    /// Takes the newest statistics; their buffer waits until others are wanted.
    fn statistics(&mut self, ring: &mut Ring, queue: u16) -> Progress {
        let memory = ring.memory();
        for _ in 0..MAX_CHAINS {
            let Some(chain) = ring.pop() else { return Progress::Idle };
            let mut buffer = [0; MAX_STATS_LEN];
            match chain.readable().read(&memory, &mut buffer) {
                Ok(read) => {
                    self.balloon.take_stats(buffer.get(..read).unwrap_or_default());
                    let now = SystemTime::now().duration_since(UNIX_EPOCH);
                    self.last_update = now.map_or(0, |now| now.as_secs());
                }
                Err(error) => ring.fail(error.into()),
            }
            // A driver with two buffers gets the older one back.
            if let Some((_, older)) = self.stats.replace((queue, chain)) {
                ring.done(older, 0);
            }
        }
        Progress::More
    }

    /// Asks the guest for other statistics.
    fn want_stats(&mut self, rings: &mut Rings) {
        let Some((queue, chain)) = self.stats.take() else { return };
        if let Some(ring) = rings.get(queue) {
            ring.done(chain, 0);
            ring.signal();
        }
    }

    fn answer(&mut self, op: Op) -> Answer {
        match op {
            Op::Target { bytes } => {
                if self.balloon.set_target(bytes) {
                    self.changed();
                    self.notices.config_changed();
                }
                Answer::Done
            }
            Op::Query => Answer::Balloon { actual: self.balloon.actual() },
            Op::Stats => Answer::Stats(Stats {
                last_update: self.last_update,
                values: self.balloon.stats().to_vec(),
                polling_interval: self.balloon.kept.interval,
            }),
            Op::PollingInterval { seconds } => {
                self.balloon.kept.interval = seconds;
                self.changed();
                self.set_timer();
                Answer::Done
            }
        }
    }

    fn on_broker(&mut self) {
        if let Some(request) = self.broker.receive(&self.epoll) {
            let answer = self.answer(request.op);
            self.broker.tell(&self.epoll, FromBalloon::Reply { id: request.id, answer });
        }
    }
}

impl Device for Transport {
    fn features(&self) -> u64 {
        self.balloon.offered()
    }

    fn queues(&self) -> u16 {
        u16::try_from(QUEUES).unwrap_or(u16::MAX)
    }

    fn config(&self) -> &[u8] {
        &self.space
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        let written = self.balloon.write_config(offset, data);
        self.changed();
        if written == Written::Actual {
            self.broker.tell(&self.epoll, FromBalloon::Changed { actual: self.balloon.actual() });
        }
    }

    fn acknowledge(&mut self, features: u64) {
        self.balloon.acknowledge(features);
    }

    fn process(&mut self, rings: &mut Rings, queue: u16) -> Progress {
        let role = self.balloon.role(queue.into());
        let Some((ring, role)) = rings.get(queue).zip(role) else { return Progress::Idle };
        match role {
            Role::Inflate => self.inflate(ring),
            Role::Deflate => self.deflate(ring),
            Role::Stats => self.statistics(ring, queue),
            Role::Reporting => self.report(ring),
        }
    }

    fn stop(&mut self, rings: &mut Rings, queue: u16) {
        if let Some((_, chain)) = self.stats.take_if(|(of, _)| *of == queue) {
            if let Some(ring) = rings.get(queue) {
                ring.put_back(chain);
            }
        }
        // Mappings that are no more must not be kept alive.
        self.regions = Regions::default();
    }

    fn sources(&self) -> Vec<BorrowedFd<'_>> {
        vec![self.epoll.0.as_fd()]
    }

    fn ready(&mut self, rings: &mut Rings, _source: usize) -> u64 {
        let mut events = [EpollEvent::empty(); 4];
        for _ in 0..TURN {
            let count = self.epoll.wait(&mut events, EpollTimeout::ZERO).unwrap_or(0);
            if count == 0 {
                break;
            }
            for event in events.iter().take(count) {
                match event.data() {
                    BROKER => self.on_broker(),
                    OPENER => self.broker.on_opener(&self.epoll),
                    _ => {
                        // Of a timer that has expired this never waits.
                        let _ = self.timer.wait();
                        self.want_stats(rings);
                    }
                }
            }
        }
        0
    }
}
