//! Loader runs: a word asks the starter for a loader, the loader connects, gets the RAM and
//! answers where to start.

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use bulkhead_control_api::loader::{Job, MAX_FAILURE, Mode, Outcome, Start};
use bulkhead_jail::door::{Arrival, Door};
use bulkhead_jail::link::LinkError;
use bulkhead_jail::pace::Pace;
use nix::sys::socket::MsgFlags;

use crate::memory::Ram;

/// A loader run takes no longer; then the boot has failed.
const PATIENCE: Duration = Duration::from_secs(60);

/// How far the boot is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// A loader was asked for and has not answered.
    Loading(Instant),
    /// The guest is in memory, the first vCPU not yet at its start.
    Ready(Start),
    /// The guest runs, or ran.
    Started,
    /// The loader failed; only a reset tries again.
    Failed,
}

/// The loader's door and the way to ask for a loader.
#[derive(Debug)]
pub struct Boot {
    /// Where loaders connect.
    pub door: Door,
    /// How far the boot is.
    pub phase: Phase,
    trigger: OwnedFd,
    /// How often loaders are asked for: a guest may reset itself in a loop.
    pace: Pace,
    /// A loader is to be asked for as soon as the pace allows.
    due: bool,
}

impl Boot {
    /// Asks for the first loader run.
    pub fn new(door: Door, trigger: OwnedFd) -> Result<Self, String> {
        let mut boot = Self { door, phase: Phase::Started, trigger, pace: Pace::default(), due: false };
        boot.begin(true)?;
        Ok(boot)
    }

    /// Asks for a loader run, unless one is under way or its result was never used; once memory is `free`.
    pub fn begin(&mut self, free: bool) -> Result<(), String> {
        if matches!(self.phase, Phase::Loading(_) | Phase::Ready(_)) {
            return Ok(());
        }
        self.phase = Phase::Loading(Instant::now());
        self.due = true;
        self.ask(free)
    }

    /// Asks for the loader that is due, if the pace allows it.
    fn ask(&mut self, free: bool) -> Result<(), String> {
        if !self.due || !free || !self.pace.allows() {
            return Ok(());
        }
        self.due = false;
        self.phase = Phase::Loading(Instant::now());
        self.pace.take();
        // A socket under the launcher, a FIFO under systemd.
        nix::unistd::write(&self.trigger, b"boot")
            .map(drop)
            .map_err(|errno| self.failed(format!("the starter cannot be asked for a loader: {errno}")))
    }

    fn failed(&mut self, why: String) -> String {
        self.phase = Phase::Failed;
        self.door.close();
        why
    }

    /// Goes on when the door is readable.
    pub fn advance(&mut self, ram: &[Ram]) -> Result<(), String> {
        let greeted = self.door.is_greeting();
        let arrival = self.door.advance();
        if arrival == Arrival::Nothing {
            return self.greeted(greeted);
        }
        if !matches!(self.phase, Phase::Loading(_)) {
            // Nobody asked for this one.
            self.door.close();
            return Ok(());
        }
        let Some(link) = self.door.link() else { return Ok(()) };
        if arrival == Arrival::Connected {
            let job = Job { mode: Mode::Boot, regions: ram.iter().map(|r| r.region).collect() };
            let fds: Vec<_> = ram.iter().map(|r| r.fd.as_fd()).collect();
            let sent = link.send_with(&job, &fds, MsgFlags::MSG_DONTWAIT);
            return sent.map_err(|error| self.failed(error.to_string()));
        }
        match link.recv::<Outcome>() {
            Err(LinkError::WouldBlock) => Ok(()),
            Ok(Ok(start)) => {
                self.phase = Phase::Ready(start);
                self.door.close();
                Ok(())
            }
            Ok(Err(text)) => Err(self.failed(text.chars().take(MAX_FAILURE).collect())),
            Err(LinkError::Closed) => Err(self.failed("it ended without an answer".into())),
            Err(error) => Err(self.failed(error.to_string())),
        }
    }

    /// A loader that was at the door and is gone without a hello has failed.
    fn greeted(&mut self, before: bool) -> Result<(), String> {
        let gone = before && !self.door.is_greeting();
        if gone && matches!(self.phase, Phase::Loading(_)) {
            return Err(self.failed("it ended before it said hello".into()));
        }
        Ok(())
    }

    /// Ends a run that takes too long; asks for one that is due if memory is `free`.
    pub fn expire(&mut self, free: bool) -> Result<(), String> {
        self.ask(free)?;
        let greeted = self.door.is_greeting();
        self.door.expire();
        self.greeted(greeted)?;
        match self.phase {
            Phase::Loading(since) if !self.due && since.elapsed() > PATIENCE => {
                Err(self.failed(format!("no answer in {} seconds", PATIENCE.as_secs())))
            }
            _ => Ok(()),
        }
    }
}
