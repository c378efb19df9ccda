//! The queue thread: it owns the device and its rings.
//!
//! ```text
//! commands -> rings with something in them -> busy polling -> rearm -> sleep (kicks, sources, commands)
//!     ^                                                                          |
//!     +--------------------------------------------------------------------------+
//! ```
//! Kicks are edge-triggered and their counters are left alone, as vhost in the kernel does it: no read for each
//! kick, and one that came while nobody was here is still seen when the descriptor is added.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::{Duration, Instant};

use bulkhead_control_api::config::IoThread;
use bulkhead_jail::owner::name_this_thread;
use bulkhead_jail::{error, warn};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::device::{Device, MAX_QUEUES, Notices, Progress, Told};
use crate::memory::Memory;
use crate::polling::Polling;
use crate::ring::{Ring, RingError, Rings, Setup};

/// Stack of the thread in bytes.
const STACK: usize = 256 * 1024;
/// Events taken in one round.
const EVENTS: usize = 64;
/// Name of the thread without an I/O thread's.
const NAME: &str = "queues";
/// The queue thread has so long for what the control thread wants of it: the requests that it is at are storage's, and may
/// never end. Pci waits a second longer.
const PATIENCE: Duration = Duration::from_secs(3);
/// At most one line on guests' mistakes in this time.
const QUIET: Duration = Duration::from_secs(1);

const COMMANDS: u64 = u64::MAX;
/// Sources have their index with this bit, kicks their queue's number.
const SOURCE: u64 = 1 << 32;

/// What the control thread wants.
#[derive(Debug)]
pub(crate) enum Command {
    /// Memory is this from now on.
    Memory(Arc<Memory>),
    /// Run a ring.
    Start {
        /// It.
        setup: Setup,
        /// The guest's doorbell.
        kick: OwnedFd,
    },
    /// Stop one: [`Answer::Base`].
    Stop(u16),
    /// Another interrupt.
    Call(u16, Option<OwnedFd>),
    /// The driver's features.
    Features(u64),
    /// Configuration space: [`Answer::Config`].
    ReadConfig,
    /// A write to it that is inside.
    WriteConfig(usize, Vec<u8>),
    /// Pci says so.
    Told(Told),
}

/// What it gets.
#[derive(Debug)]
pub(crate) enum Answer {
    /// Done.
    Done,
    /// Available index at which the ring stopped, if it ran.
    Base(Option<u16>),
    /// The configuration space.
    Config(Vec<u8>),
}

/// The control thread's end.
#[derive(Debug)]
pub(crate) struct Handle {
    commands: Sender<Command>,
    answers: Receiver<Answer>,
    wake: Arc<EventFd>,
    pending: Arc<AtomicBool>,
    /// Owned by the queue thread.
    pub(crate) named: Arc<EventFd>,
}

impl Handle {
    /// Has the queue thread do something, after the requests that it is at (it begins no others); waits for it. If it is
    /// held in one the process ends: what it has begun is given up, or finished, by the kernel before the front end sees the
    /// connection's end, so it is no danger to the memory of a guest after a reset; the next process does it again.
    pub(crate) fn ask(&self, command: Command) -> Answer {
        match self.answer(command, PATIENCE) {
            Ok(answer) => return answer,
            Err(RecvTimeoutError::Timeout) => {
                error!("a request takes longer than {} s: the host's storage hangs", PATIENCE.as_secs());
            }
            // It ends only when the host fails it, and has said why.
            Err(RecvTimeoutError::Disconnected) => error!("the queue thread is gone"),
        }
        std::process::exit(1);
    }

    fn answer(&self, command: Command, patience: Duration) -> Result<Answer, RecvTimeoutError> {
        self.commands.send(command).map_err(|_| RecvTimeoutError::Disconnected)?;
        self.pending.store(true, Ordering::Release);
        let _ = self.wake.write(1);
        self.answers.recv_timeout(patience)
    }
}

/// Starts the queue thread; what a thread does to begin is over when this returns: a filter may follow.
///
/// # Errors
/// The host's.
pub(crate) fn spawn(device: Box<dyn Device>, iothread: &IoThread, notices: Notices) -> io::Result<Handle> {
    let (commands, their_commands) = channel();
    let (their_answers, answers) = channel();
    let wake = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?);
    let pending = Arc::new(AtomicBool::new(false));
    let queues = device.queues().min(MAX_QUEUES);
    let mut worker = Worker {
        epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?,
        rings: Rings::new(queues),
        kicks: (0..queues).map(|_| None).collect(),
        memory: Arc::default(),
        device,
        polling: Polling::new(iothread),
        notices,
        commands: their_commands,
        answers: their_answers,
        wake: Arc::clone(&wake),
        pending: Arc::clone(&pending),
        ready: 0,
        idle: 0,
        spoken: None,
    };
    worker.watch()?;
    let begun = Arc::new(Barrier::new(2));
    let named = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC)?);
    let name_there = Arc::clone(&named);
    let here = Arc::clone(&begun);
    let name = if iothread.id.is_empty() { NAME } else { &iothread.id };
    thread::Builder::new().name(name.replace('\0', "?")).stack_size(STACK).spawn(move || {
        // Without it the thread has no id for others, and works all the same.
        if let Err(errno) = name_this_thread(name_there.as_fd()) {
            warn!("queue thread: {errno}");
        }
        here.wait();
        let Err(errno) = worker.run();
        error!("queue thread: {errno}");
        std::process::exit(1);
    })?;
    begun.wait();
    Ok(Handle { commands, answers, wake, pending, named })
}

struct Worker {
    epoll: Epoll,
    rings: Rings,
    kicks: Vec<Option<OwnedFd>>,
    memory: Arc<Memory>,
    device: Box<dyn Device>,
    polling: Polling,
    notices: Notices,
    commands: Receiver<Command>,
    answers: Sender<Answer>,
    wake: Arc<EventFd>,
    pending: Arc<AtomicBool>,
    /// Rings to process, a bit for each.
    ready: u64,
    /// Rings that nothing was left in: they are rearmed before the thread sleeps.
    idle: u64,
    /// When a guest's mistake was logged last.
    spoken: Option<Instant>,
}

const fn bit(queue: u16) -> u64 {
    if queue < MAX_QUEUES { 1 << queue } else { 0 }
}

fn edge(flags: EpollFlags, data: u64) -> EpollEvent {
    EpollEvent::new(flags | EpollFlags::EPOLLET, data)
}

impl Worker {
    fn watch(&self) -> Result<(), Errno> {
        self.epoll.add(&self.wake, EpollEvent::new(EpollFlags::EPOLLIN, COMMANDS))?;
        for (index, source) in (0..).zip(self.device.sources()) {
            self.epoll.add(source, edge(EpollFlags::EPOLLIN, SOURCE | index))?;
        }
        Ok(())
    }

    fn run(&mut self) -> Result<std::convert::Infallible, Errno> {
        loop {
            if self.pending.swap(false, Ordering::AcqRel) {
                self.obey()?;
            }
            self.process();
            if self.ready != 0 {
                // What else has come has its turn, too.
                self.wait(EpollTimeout::ZERO)?;
                continue;
            }
            let since = Instant::now();
            let caught = self.polling.length() > 0 && self.busy(since);
            if !caught && !self.rearm() {
                self.wait(EpollTimeout::NONE)?;
            }
            if self.polling.enabled() {
                let waited = u64::try_from(since.elapsed().as_nanos()).unwrap_or(u64::MAX);
                self.polling.waited(waited);
            }
        }
    }

    /// One turn for each ring that has something.
    fn process(&mut self) {
        let mut turn = std::mem::take(&mut self.ready);
        while turn != 0 {
            // Below 64.
            let queue = u16::try_from(turn.trailing_zeros()).unwrap_or_default();
            turn &= turn - 1;
            let Some(ring) = self.rings.get(queue) else { continue };
            ring.quiet();
            self.idle &= !bit(queue);
            match self.device.process(&mut self.rings, queue) {
                Progress::Idle => self.idle |= bit(queue),
                Progress::More => self.ready |= bit(queue),
                Progress::Blocked => {}
            }
        }
        self.settle();
    }

    /// Raises interrupts and speaks of rings that broke.
    fn settle(&mut self) {
        let mut broken = Vec::new();
        for (queue, ring) in self.rings.iter_mut() {
            ring.signal();
            if let Some(error) =
                ring.broken().filter(|_| self.kicks.get(usize::from(queue)).is_some_and(Option::is_some))
            {
                broken.push((queue, error));
            }
        }
        for (queue, error) in broken {
            self.unwatch(queue);
            self.complain(queue, error);
        }
    }

    fn complain(&mut self, queue: u16, error: RingError) {
        if self.spoken.is_none_or(|at| at.elapsed() >= QUIET) {
            warn!("queue {queue}: {error}; it stands still until the guest resets the device");
            self.spoken = Some(Instant::now());
        }
        self.notices.needs_reset();
    }

    /// A queue's kicks concern nobody any more.
    fn unwatch(&mut self, queue: u16) {
        if let Some(kick) = self.kicks.get_mut(usize::from(queue)).and_then(Option::take) {
            // By hand: others have the description, too, and closing removes nothing then.
            let _ = self.epoll.delete(&kick);
        }
        self.ready &= !bit(queue);
        self.idle &= !bit(queue);
    }

    /// Polls what needs no system call; true if something came before the time was over.
    fn busy(&mut self, since: Instant) -> bool {
        let length = Duration::from_nanos(self.polling.length());
        loop {
            if self.pending.load(Ordering::Relaxed) {
                return true;
            }
            for (queue, ring) in self.rings.iter_mut() {
                if self.idle & bit(queue) != 0 && ring.pending() {
                    self.ready |= bit(queue);
                }
            }
            self.ready |= self.device.poll(&mut self.rings);
            if self.ready != 0 {
                return true;
            }
            if since.elapsed() >= length {
                return false;
            }
            std::hint::spin_loop();
        }
    }

    /// Asks for kicks of the rings in which nothing was left; true if something came meanwhile.
    fn rearm(&mut self) -> bool {
        for (queue, ring) in self.rings.iter_mut() {
            if self.idle & bit(queue) != 0 && ring.rearm() {
                self.ready |= bit(queue);
            }
        }
        self.ready != 0
    }

    fn wait(&mut self, timeout: EpollTimeout) -> Result<(), Errno> {
        let mut events = [EpollEvent::empty(); EVENTS];
        let count = match self.epoll.wait(&mut events, timeout) {
            Err(Errno::EINTR) => 0,
            result => result?,
        };
        for event in events.iter().take(count) {
            match event.data() {
                COMMANDS => {
                    let _ = self.wake.read();
                }
                data if data & SOURCE != 0 => {
                    let index = usize::try_from(data & !SOURCE).unwrap_or(usize::MAX);
                    self.ready |= self.device.ready(&mut self.rings, index);
                }
                data => self.ready |= u16::try_from(data).map_or(0, bit),
            }
        }
        Ok(())
    }

    fn obey(&mut self) -> Result<(), Errno> {
        while let Ok(command) = self.commands.try_recv() {
            let answer = match command {
                Command::Memory(memory) => self.set_memory(memory),
                Command::Start { setup, kick } => self.start(setup, kick)?,
                Command::Stop(queue) => self.stop(queue),
                Command::Call(queue, call) => {
                    if let Some(ring) = self.rings.get(queue) {
                        ring.set_call(call);
                    }
                    Answer::Done
                }
                Command::Features(features) => {
                    self.device.acknowledge(features);
                    Answer::Done
                }
                Command::Told(what) => {
                    self.device.told(what);
                    Answer::Done
                }
                Command::ReadConfig => Answer::Config(self.device.config().to_vec()),
                Command::WriteConfig(offset, data) => {
                    self.device.write_config(offset, &data);
                    Answer::Done
                }
            };
            let _ = self.answers.send(answer);
        }
        Ok(())
    }

    fn set_memory(&mut self, memory: Arc<Memory>) -> Answer {
        let running: Vec<u16> = self.rings.iter_mut().map(|(queue, _)| queue).collect();
        for queue in running {
            self.device.memory_changed(&mut self.rings, queue);
            if let Some(ring) = self.rings.get(queue) {
                ring.signal();
                ring.set_memory(Arc::clone(&memory));
                self.ready |= bit(queue);
            }
        }
        self.memory = memory;
        Answer::Done
    }

    fn start(&mut self, setup: Setup, kick: OwnedFd) -> Result<Answer, Errno> {
        let queue = setup.index;
        self.unwatch(queue);
        match Ring::new(setup, Arc::clone(&self.memory)) {
            Ok(mut ring) => {
                ring.set_hurry(Arc::clone(&self.pending));
                self.rings.insert(queue, ring);
                self.epoll.add(&kick, edge(EpollFlags::EPOLLIN, queue.into()))?;
                if let Some(slot) = self.kicks.get_mut(usize::from(queue)) {
                    *slot = Some(kick);
                }
                self.ready |= bit(queue);
            }
            Err(error) => self.complain(queue, error),
        }
        Ok(Answer::Done)
    }

    fn stop(&mut self, queue: u16) -> Answer {
        self.device.stop(&mut self.rings, queue);
        self.unwatch(queue);
        let ring = self.rings.remove(queue);
        Answer::Base(ring.map(|mut ring| {
            ring.signal();
            ring.stop()
        }))
    }
}
