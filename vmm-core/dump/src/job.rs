//! The one job of a dump process.

use std::os::fd::{AsFd as _, OwnedFd};
use std::process::exit;
use std::sync::{Arc, Barrier};
use std::thread::Builder;
use std::time::{Duration, Instant};

use bulkhead_control_api::VERSION;
use bulkhead_control_api::dump::{
    self, Failure, FromDump, Job, MAX_PAGES, PAGE, Space, Translate, Translated,
};
use bulkhead_jail::link::{Link, LinkError};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::MsgFlags;

use crate::memory::{Memory, Part};
use crate::output::{Output, Progress};

/// How often the broker hears of progress.
const PERIOD: Duration = Duration::from_secs(1);
/// Stack of the thread that waits for an end, in bytes.
const STACK: usize = 64 * 1024;

/// Where its work comes from.
#[derive(Debug)]
pub struct Links {
    core: Link,
    broker: Link,
}

/// A job that was cut short.
#[derive(Debug)]
enum Stopped {
    /// It has failed.
    Failed(Failure),
    /// Core does not answer.
    Link(LinkError),
}

impl From<Failure> for Stopped {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

impl From<LinkError> for Stopped {
    fn from(error: LinkError) -> Self {
        Self::Link(error)
    }
}

/// Ends this process with either link, whatever else waits: a pipe that nobody reads, a disk that does not answer. The
/// thread is ready for the jail when this returns.
///
/// # Errors
/// No thread can be made, or no copy of a descriptor.
pub fn end_with(core: &OwnedFd, broker: &OwnedFd) -> std::io::Result<()> {
    let links = [core.try_clone()?, broker.try_clone()?];
    let ready = Arc::new(Barrier::new(2));
    let there = Arc::clone(&ready);
    let wait = move || {
        there.wait();
        drop(there);
        while !has_end(&links) {}
        exit(0);
    };
    Builder::new().name("end".to_owned()).stack_size(STACK).spawn(wait)?;
    ready.wait();
    Ok(())
}

/// Waits; whether one of the links has ended.
fn has_end(links: &[OwnedFd; 2]) -> bool {
    // What is there to read is not for this thread; an end comes without being asked for.
    let mut fds = links.each_ref().map(|fd| PollFd::new(fd.as_fd(), PollFlags::empty()));
    matches!(poll(&mut fds, PollTimeout::NONE), Ok(1..)) && fds.iter().any(|fd| fd.any() == Some(true))
}

impl Links {
    /// Says hello to both.
    ///
    /// # Errors
    /// One of them is gone, or of another version.
    pub fn new(core: OwnedFd, broker: OwnedFd) -> Result<Self, LinkError> {
        Ok(Self { broker: Link::connect(broker, VERSION)?, core: Link::connect(core, VERSION)? })
    }

    /// Takes the job, does it, says how it went.
    ///
    /// # Errors
    /// A link's; a job that fails is answered, not returned.
    pub fn serve(mut self) -> Result<(), LinkError> {
        let (job, output): (Job, _) = self.broker.recv_with(MsgFlags::empty())?;
        let [output] = <[OwnedFd; 1]>::try_from(output).map_err(|_| LinkError::Malformed)?;
        let (memory, fds): (dump::Memory, _) = self.core.recv_with(MsgFlags::empty())?;
        let memory = Memory::new(memory, fds).ok_or(LinkError::Malformed)?;
        let Self { core, broker } = &mut self;
        let mut clock = Clock { broker, told: Instant::now() };
        let result = match run(job, output, &memory, core, &mut |done| clock.tell(done)) {
            Ok(()) => Ok(()),
            Err(Stopped::Failed(failure)) => Err(failure),
            Err(Stopped::Link(error)) => return Err(error),
        };
        broker.send(&FromDump::Ended(result))
    }
}

/// When the broker is told.
struct Clock<'a> {
    broker: &'a Link,
    told: Instant,
}

impl Clock<'_> {
    fn tell(&mut self, done: u64) {
        if self.told.elapsed() >= PERIOD {
            self.told = Instant::now();
            // A broker that does not read misses it.
            let _ = self.broker.send_with(&FromDump::Progress { done }, &[], MsgFlags::MSG_DONTWAIT);
        }
    }
}

fn run(
    job: Job,
    output: OwnedFd,
    memory: &Memory,
    core: &mut Link,
    progress: Progress<'_>,
) -> Result<(), Stopped> {
    let mut output = Output::new(output)?;
    let written = match job.space {
        Space::Physical => physical(memory, job.addr, job.size, &mut output, progress).map_err(Stopped::from),
        Space::Virtual(cpu) => virtually(memory, core, (cpu, job), &mut output, progress),
    };
    // What comes before a failure is there, as with QEMU.
    let finished = output.finish();
    written?;
    Ok(finished?)
}

/// Appends a stretch of guest physical addresses. Those beyond the end go on at 0.
fn physical(
    memory: &Memory,
    addr: u64,
    size: u64,
    output: &mut Output,
    progress: Progress<'_>,
) -> Result<(), Failure> {
    let (mut addr, mut left) = (addr, size);
    while left > 0 {
        let len = match memory.at(addr, left) {
            Part::Ram { fd, offset, len } => {
                output.copy(fd, offset, len, progress)?;
                len
            }
            Part::Nothing(len) => {
                output.skip(len, progress)?;
                len
            }
        };
        addr = addr.wrapping_add(len);
        left -= len.min(left);
    }
    Ok(())
}

/// Appends a stretch of a vCPU's addresses, as far as they are mapped.
fn virtually(
    memory: &Memory,
    core: &mut Link,
    (cpu, job): (u32, Job),
    output: &mut Output,
    progress: Progress<'_>,
) -> Result<(), Stopped> {
    let (mut addr, mut left) = (job.addr, job.size);
    while left > 0 {
        let into = addr % PAGE;
        let pages = into.saturating_add(left).div_ceil(PAGE).min(u64::from(MAX_PAGES));
        let pages = u32::try_from(pages).unwrap_or(MAX_PAGES);
        let found = translate(core, Translate { cpu, addr: addr - into, pages })?;
        if found.len() > pages as usize {
            return Err(LinkError::Malformed.into());
        }
        let mapped = (found.len() as u64 * PAGE).saturating_sub(into).min(left);
        for (start, len) in runs(&found, into, mapped) {
            physical(memory, start, len, output, progress)?;
        }
        if found.len() < pages as usize {
            return Err(Failure::Unmapped.into());
        }
        addr = addr.wrapping_add(mapped);
        left -= mapped;
    }
    Ok(())
}

/// Asks core.
fn translate(core: &mut Link, asked: Translate) -> Result<Vec<u64>, LinkError> {
    core.send(&asked)?;
    loop {
        let Translated { what, pages } = core.recv()?;
        if what == asked {
            return Ok(pages);
        }
    }
}

/// Pages that follow each other, from `into` bytes into the first one, `len` bytes in all.
fn runs(pages: &[u64], into: u64, len: u64) -> Vec<(u64, u64)> {
    let mut runs: Vec<(u64, u64)> = Vec::new();
    let (mut into, mut left) = (into, len);
    for page in pages {
        let (start, len) = (page.wrapping_add(into), (PAGE - into).min(left));
        match runs.last_mut() {
            Some((first, so_far)) if first.wrapping_add(*so_far) == start => *so_far += len,
            _ => runs.push((start, len)),
        }
        left -= len;
        into = 0;
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_that_follow_each_other_are_one_run() {
        assert_eq!(runs(&[0x1000, 0x2000, 0x5000], 0x10, 0x2100), [(0x1010, 0x1ff0), (0x5000, 0x110)]);
        assert_eq!(runs(&[0x3000], 0xfff, 1), [(0x3fff, 1)]);
        assert_eq!(runs(&[0x3000, 0x2000], 0, 0x2000), [(0x3000, 0x1000), (0x2000, 0x1000)]);
        assert_eq!(runs(&[], 0, 0), []);
    }
}
