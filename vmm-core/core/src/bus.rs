//! The bus: accesses of vCPUs to the daemon that claims the address.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bulkhead_bus_api::platform::{COALESCED_PORT, CONSOLE_PORTS, Range, pci_ranges};
use bulkhead_bus_api::{
    Access, Action, MAX_REQUEST_LEN, Op, REPLY_LEN, REQUEST_LEN, Reply, Request, Space, WRITE_LEN,
};
use bulkhead_control_api::core::Counters;
use bulkhead_jail::link::receive;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::sockopt::ReceiveTimeout;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, send, setsockopt, socketpair};
use nix::sys::time::{TimeVal, TimeValLike};

use crate::coalesce::Coalescer;
use crate::error::{Result, system};
use crate::notice::{Notice, Notices};
use crate::presence::{Daemon, Seat, Wait};

/// A wait for a reply looks up this often, in milliseconds.
const WAIT_STEP_MS: i64 = 100;
/// A reply that has not come after so many looks is late: the daemon is given up. Looks rather than
/// time, so that a VM whose processes were all stopped for a while goes on.
pub const MAX_WAIT_STEPS: u32 = 50;

/// Replies that are not to the present request: a daemon answers once more what it was asked again
/// after its predecessor's death. No more than this are dropped, in a row.
const MAX_STALE: u32 = 8;
/// What a daemon has left in a link: as much as a queue holds, and more than an honest one leaves.
const MAX_LEFT: u32 = 1024;

/// Core's end of one access link, with room for one request.
#[derive(Debug)]
pub struct AccessLink {
    fd: OwnedFd,
    seq: u32,
    packet: [u8; MAX_REQUEST_LEN],
    /// Number of the daemon that it was last used with.
    daemon: u32,
    /// Length of a request that waits for the next daemon.
    pending: Option<usize>,
}

/// Why an exchange gave no reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trouble {
    /// The daemon is gone; the next one is asked again.
    Gone,
    /// It broke the protocol; the next one is asked again.
    Broke(&'static str),
    /// There is no use in another one.
    Failed(&'static str),
}

/// Drops what waits in a queue, within the bound; false if there is more. Never waits.
pub fn empty(fd: BorrowedFd<'_>) -> bool {
    let mut buffer = [0; REPLY_LEN];
    (0..MAX_LEFT).any(|_| match receive(fd, &mut buffer, MsgFlags::MSG_DONTWAIT) {
        Ok(received) => received.len == 0,
        Err(_) => true,
    })
}

impl AccessLink {
    /// A link; the second descriptor is for the daemon.
    pub fn pair() -> Result<(Self, OwnedFd)> {
        let pair = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC);
        let (ours, theirs) = pair.map_err(system("socketpair"))?;
        // The wait for a reply must end even if no reply ever comes, see `exchange`.
        setsockopt(&ours, ReceiveTimeout, &TimeVal::milliseconds(WAIT_STEP_MS))
            .map_err(system("SO_RCVTIMEO"))?;
        Ok((Self { fd: ours, seq: 0, packet: [0; MAX_REQUEST_LEN], daemon: 0, pending: None }, theirs))
    }

    /// Whether a request waits for the next daemon.
    pub fn is_pending(&self) -> bool {
        self.pending.is_some()
    }

    /// Builds the request in the packet; `writes` fills in what was collected and says how much.
    fn build(&mut self, access: &Access, writes: impl FnOnce(&mut [u8]) -> usize) -> usize {
        self.seq = self.seq.wrapping_add(1);
        let head = Request::encode_head(self.seq, access);
        let (start, rest) = self.packet.split_at_mut(head.len());
        start.copy_from_slice(&head);
        head.len() + writes(rest) * WRITE_LEN
    }

    /// Sends the built request to daemon `number` and waits for its reply, or until `watch` is readable.
    fn exchange(
        &mut self,
        len: usize,
        number: u32,
        seat: &Seat,
        watch: Option<BorrowedFd<'_>>,
    ) -> std::result::Result<Reply, Trouble> {
        if std::mem::replace(&mut self.daemon, number) != number && !empty(self.fd.as_fd()) {
            return Err(Trouble::Broke("it sends without being asked"));
        }
        let packet = self.packet.get(..len).unwrap_or(&self.packet);
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        match send(self.fd.as_raw_fd(), packet, flags) {
            Ok(_) => {}
            // There is one request at a time, and with a new daemon none.
            Err(Errno::EAGAIN) => return Err(Trouble::Broke("its access link is full")),
            Err(_) => return Err(Trouble::Failed("its access link is closed")),
        }
        let (mut steps, mut stale) = (0, 0);
        // One byte more than a reply, so that a longer packet shows.
        let mut buffer = [0; REPLY_LEN + 1];
        loop {
            if watch.is_some_and(|watch| !self.wait(watch)) {
                return Err(Trouble::Gone);
            }
            match nix::unistd::read(&self.fd, &mut buffer) {
                Ok(0) => return Err(Trouble::Failed("its access link is closed")),
                Ok(n) => {
                    let reply = Reply::decode(buffer.get(..n).unwrap_or_default())
                        .map_err(|_| Trouble::Broke("it sent a malformed reply"))?;
                    if reply.seq == self.seq {
                        return Ok(reply);
                    }
                    stale += 1;
                    let is_older = self.seq.wrapping_sub(reply.seq) <= MAX_STALE;
                    if !is_older || stale > MAX_STALE {
                        return Err(Trouble::Broke("it replied out of order"));
                    }
                }
                Err(Errno::EAGAIN) => steps += 1,
                Err(Errno::EINTR) => {}
                Err(_) => return Err(Trouble::Failed("its access link failed")),
            }
            if seat.is_over(number) {
                return Err(Trouble::Gone);
            }
            if steps >= MAX_WAIT_STEPS {
                return Err(Trouble::Failed("it did not reply in time"));
            }
        }
    }

    /// Asks one daemon after the other until one answers.
    fn ask(&mut self, len: usize, seat: &Seat) -> Outcome {
        let mut last = 0;
        loop {
            last = match seat.wait(last) {
                Wait::There(number) => number,
                Wait::Discarded => return UNCLAIMED,
                Wait::GivenUp => return FAILED,
            };
            match self.exchange(len, last, seat, None) {
                Ok(reply) => return Outcome { data: reply.data, action: Some(reply.action) },
                Err(Trouble::Gone) => {}
                Err(Trouble::Broke(why)) => seat.note_breach(last, why),
                Err(Trouble::Failed(why)) => {
                    seat.fail(why);
                    return FAILED;
                }
            }
        }
    }

    /// Waits for a reply, for one step; false if `watch` is readable and nothing came.
    fn wait(&self, watch: BorrowedFd<'_>) -> bool {
        let mut fds = [self.fd.as_fd(), watch].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
        let step = u16::try_from(WAIT_STEP_MS).unwrap_or(u16::MAX);
        let _ = poll(&mut fds, PollTimeout::from(step));
        let [replied, watched] = fds.map(|fd| fd.revents().is_some_and(|events| !events.is_empty()));
        replied || !watched
    }
}

/// A vCPU's links.
#[derive(Debug)]
pub struct Links {
    /// To the console.
    pub console: AccessLink,
    /// To pci, in a machine that has one.
    pub pci: Option<AccessLink>,
}

/// What the vCPU does after an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// Data of a read.
    pub data: u64,
    /// What the guest asked for by it; `None` if the daemon is given up.
    pub action: Option<Action>,
}

/// No access, for collected writes to go along with.
const NOTHING: Access = Access { space: Space::Pio, addr: COALESCED_PORT as u64, size: 1, op: Op::Flush };
/// The answer of an address that nobody claims.
const UNCLAIMED: Outcome = Outcome { data: u64::MAX, action: Some(Action::None) };
/// The answer of a daemon that is given up.
const FAILED: Outcome = Outcome { data: u64::MAX, action: None };

/// What became of collected writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flushed {
    /// There were none.
    Nothing,
    /// They are delivered.
    Delivered,
    /// They wait for the console, or somebody else is about to deliver them.
    Waiting,
}

/// What all vCPUs share of the bus.
#[derive(Debug)]
pub struct Bus {
    notices: Arc<Notices>,
    /// Collected writes to the console.
    pub coalescer: Coalescer,
    /// The console.
    pub console: Arc<Seat>,
    /// The pci daemon, which does not come in a machine that has none.
    pub pci: Arc<Seat>,
    /// Where pci decodes memory.
    windows: [Range; 3],
    unclaimed: AtomicU64,
    forwarded: AtomicU64,
    collected: AtomicU64,
}

fn is_within(ranges: &[Range], access: &Access) -> bool {
    ranges.iter().any(|range| range.contains(access.addr, u64::from(access.size)))
}

impl Bus {
    /// The bus with the console's drainer, of a machine whose RAM ends at `ram_end`.
    pub fn new(notices: Arc<Notices>, coalescer: Coalescer, ram_end: u64) -> Self {
        let seat = |daemon| Arc::new(Seat::new(daemon, Arc::clone(&notices)));
        Self {
            console: seat(Daemon::Console),
            pci: seat(Daemon::Pci),
            notices,
            coalescer,
            windows: pci_ranges(ram_end),
            unclaimed: AtomicU64::new(0),
            forwarded: AtomicU64::new(0),
            collected: AtomicU64::new(0),
        }
    }

    /// From now on, or no longer, accesses that wait for an absent daemon are let go: a reset or the end
    /// makes them meaningless.
    pub fn discard_waiting(&self, discard: bool) {
        self.console.set_discard(discard);
        self.pci.set_discard(discard);
        self.coalescer.wake();
    }

    /// Carries out one access over the vCPU's link to who claims the address.
    pub fn access(&self, links: &mut Links, access: &Access) -> Outcome {
        match (access.space, &mut links.pci) {
            (Space::Pio, _) if is_within(&CONSOLE_PORTS, access) => {
                self.access_console(&mut links.console, access)
            }
            (Space::Mmio, Some(link)) if is_within(&self.windows, access) => {
                self.forwarded.fetch_add(1, Ordering::Relaxed);
                // Collected writes wait on: they are for another device, which shares no state with any
                // behind pci, so no order between the two can be seen. A stop delivers them in any case.
                let len = link.build(access, |_| 0);
                link.ask(len, &self.pci)
            }
            _ => {
                self.unclaimed.fetch_add(1, Ordering::Relaxed);
                UNCLAIMED
            }
        }
    }

    fn access_console(&self, link: &mut AccessLink, access: &Access) -> Outcome {
        if self.console.is_given_up() {
            return FAILED;
        }
        self.forwarded.fetch_add(1, Ordering::Relaxed);
        // Held until the reply, so that nobody overtakes the writes that go along.
        let Ok(drain) = self.coalescer.drain(|| self.console.lets_go()) else { return UNCLAIMED };
        let len = link.build(access, |room| self.fill(drain.as_ref(), room));
        let outcome = link.ask(len, &self.console);
        drop(drain);
        let plain_output = matches!(access.op, Op::Write(_)) && access.addr == u64::from(COALESCED_PORT);
        if plain_output && access.size == 1 && self.coalescer.wants_start() {
            self.notices.post(Notice::Output);
        }
        outcome
    }

    fn fill(&self, drain: Option<&crate::coalesce::Drain<'_>>, room: &mut [u8]) -> usize {
        let count = drain.map_or(0, |d| d.fill(room));
        self.collected.fetch_add(count as u64, Ordering::Relaxed);
        count
    }

    /// Delivers what is collected, without waiting for a console that is away. For the main thread, whose
    /// turn lasts until all that it took is delivered. `main` is the console's main link.
    pub fn flush(&self, link: &mut AccessLink, main: Option<BorrowedFd<'_>>) -> Flushed {
        let (Some(number), Some(main)) = (self.console.there(), main) else {
            let waits = link.is_pending() || self.coalescer.has_more();
            return if waits { Flushed::Waiting } else { Flushed::Nothing };
        };
        let drain = if link.is_pending() { self.coalescer.kept() } else { self.coalescer.try_drain() };
        let Some(drain) = drain else {
            return if self.coalescer.has_more() { Flushed::Waiting } else { Flushed::Nothing };
        };
        let pending = link.pending.take();
        let len = pending.unwrap_or_else(|| link.build(&NOTHING, |room| self.fill(Some(&drain), room)));
        if len == REQUEST_LEN {
            return Flushed::Nothing;
        }
        // A write to the collected port asks for nothing, so the action is of no interest.
        match link.exchange(len, number, &self.console, Some(main)) {
            Ok(_) => return Flushed::Delivered,
            Err(Trouble::Gone) => {}
            Err(Trouble::Broke(why)) => self.console.note_breach(number, why),
            Err(Trouble::Failed(why)) => {
                self.console.fail(why);
                return Flushed::Nothing;
            }
        }
        link.pending = Some(len);
        drain.keep();
        Flushed::Waiting
    }

    /// Drops what waits for the console, if that is given up.
    pub fn abandon(&self, link: &mut AccessLink) {
        if self.console.is_given_up() && link.pending.take().is_some() {
            drop(self.coalescer.kept());
        }
    }

    /// The counters, without resets.
    pub fn counters(&self) -> Counters {
        Counters {
            unclaimed: self.unclaimed.load(Ordering::Relaxed),
            forwarded: self.forwarded.load(Ordering::Relaxed),
            collected: self.collected.load(Ordering::Relaxed),
            resets: 0,
        }
    }
}
