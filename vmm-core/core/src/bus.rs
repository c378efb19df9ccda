//! The bus: accesses of vCPUs to the daemon that claims the address.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use bulkhead_bus_api::platform::{COALESCED_PORT, CONSOLE_PORTS};
use bulkhead_bus_api::{Access, Action, MAX_REQUEST_LEN, Op, REPLY_LEN, Reply, Request, Space, WRITE_LEN};
use bulkhead_control_api::core::Counters;
use nix::errno::Errno;
use nix::sys::socket::sockopt::ReceiveTimeout;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, send, setsockopt, socketpair};
use nix::sys::time::{TimeVal, TimeValLike};

use crate::coalesce::Coalescer;
use crate::error::{Result, system};
use crate::notice::{Notice, Notices};

/// A wait for a reply looks up this often, in milliseconds.
const WAIT_STEP_MS: i64 = 100;
/// A reply that has not come after so many looks is late: the daemon is given up. Looks rather than
/// time, so that a VM whose processes were all stopped for a while goes on.
pub const MAX_WAIT_STEPS: u32 = 50;

/// Core's end of one access link, with room for one request.
#[derive(Debug)]
pub struct AccessLink {
    fd: OwnedFd,
    seq: u32,
    packet: [u8; MAX_REQUEST_LEN],
}

impl AccessLink {
    /// A link; the second descriptor is for the daemon.
    pub fn pair() -> Result<(Self, OwnedFd)> {
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
                .map_err(system("socketpair"))?;
        // The wait for a reply must end even if no reply ever comes, see `exchange`.
        setsockopt(&ours, ReceiveTimeout, &TimeVal::milliseconds(WAIT_STEP_MS))
            .map_err(system("SO_RCVTIMEO"))?;
        Ok((Self { fd: ours, seq: 0, packet: [0; MAX_REQUEST_LEN] }, theirs))
    }

    /// Builds the request in the packet; `writes` fills in what was collected and says how much.
    fn build(&mut self, access: &Access, writes: impl FnOnce(&mut [u8]) -> usize) -> usize {
        self.seq = self.seq.wrapping_add(1);
        let head = Request::encode_head(self.seq, access);
        let (start, rest) = self.packet.split_at_mut(head.len());
        start.copy_from_slice(&head);
        head.len() + writes(rest) * WRITE_LEN
    }

    /// Sends the built request and waits for its reply.
    fn exchange(&self, len: usize, given_up: &AtomicBool) -> std::result::Result<Reply, &'static str> {
        let packet = self.packet.get(..len).unwrap_or(&self.packet);
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        // A full queue cannot be: there is one request at a time.
        send(self.fd.as_raw_fd(), packet, flags).map_err(|_| "its access link is closed")?;
        let mut steps = 0;
        // One byte more than a reply, so that a longer packet shows.
        let mut buffer = [0; REPLY_LEN + 1];
        loop {
            match nix::unistd::read(&self.fd, &mut buffer) {
                Ok(0) => return Err("its access link is closed"),
                Ok(n) => {
                    let reply = Reply::decode(buffer.get(..n).unwrap_or_default())
                        .map_err(|_| "it sent a malformed reply")?;
                    return if reply.seq == self.seq { Ok(reply) } else { Err("it replied out of order") };
                }
                Err(Errno::EAGAIN) => steps += 1,
                Err(Errno::EINTR) => {}
                Err(_) => return Err("its access link failed"),
            }
            if given_up.load(Ordering::Relaxed) {
                return Err("it was given up");
            }
            if steps >= MAX_WAIT_STEPS {
                return Err("it did not reply in time");
            }
        }
    }
}

/// What the vCPU does after an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// Data of a read.
    pub data: u64,
    /// What the guest asked for by it; `None` if the daemon is given up.
    pub action: Option<Action>,
}

/// The answer of an address that nobody claims.
const UNCLAIMED: Outcome = Outcome { data: u64::MAX, action: Some(Action::None) };
/// The answer of a daemon that is given up.
const FAILED: Outcome = Outcome { data: u64::MAX, action: None };

/// What all vCPUs share of the bus.
#[derive(Debug)]
pub struct Bus {
    notices: Arc<Notices>,
    /// Collected writes to the console.
    pub coalescer: Coalescer,
    /// The console broke the protocol or died.
    console_failed: AtomicBool,
    unclaimed: AtomicU64,
    forwarded: AtomicU64,
    collected: AtomicU64,
}

fn claimed(access: &Access) -> bool {
    let size = u64::from(access.size);
    access.space == Space::Pio && CONSOLE_PORTS.iter().any(|r| r.contains(access.addr, size))
}

impl Bus {
    /// The bus with the console's drainer.
    pub fn new(notices: Arc<Notices>, coalescer: Coalescer) -> Self {
        Self {
            notices,
            coalescer,
            console_failed: AtomicBool::new(false),
            unclaimed: AtomicU64::new(0),
            forwarded: AtomicU64::new(0),
            collected: AtomicU64::new(0),
        }
    }

    /// Whether the console is given up.
    pub fn console_failed(&self) -> bool {
        self.console_failed.load(Ordering::Relaxed)
    }

    /// Gives the console up; the first reason counts.
    pub fn fail_console(&self, why: &'static str) {
        if !self.console_failed.swap(true, Ordering::SeqCst) {
            self.notices.post(Notice::PeerFailed("console", why));
        }
    }

    /// Carries out one access over the vCPU's link.
    pub fn access(&self, link: &mut AccessLink, access: &Access) -> Outcome {
        if !claimed(access) {
            self.unclaimed.fetch_add(1, Ordering::Relaxed);
            return UNCLAIMED;
        }
        if self.console_failed() {
            return FAILED;
        }
        self.forwarded.fetch_add(1, Ordering::Relaxed);
        // Held until the reply, so that nobody overtakes the writes that go along.
        let drain = self.coalescer.drain();
        let len = link.build(access, |room| self.fill(drain.as_ref(), room));
        let reply = link.exchange(len, &self.console_failed);
        drop(drain);
        let plain_output = matches!(access.op, Op::Write(_)) && access.addr == u64::from(COALESCED_PORT);
        if plain_output && access.size == 1 && self.coalescer.wants_start() {
            self.notices.post(Notice::Output);
        }
        match reply {
            Ok(reply) => Outcome { data: reply.data, action: Some(reply.action) },
            Err(why) => {
                self.fail_console(why);
                FAILED
            }
        }
    }

    fn fill(&self, drain: Option<&crate::coalesce::Drain<'_>>, room: &mut [u8]) -> usize {
        let count = drain.map_or(0, |d| d.fill(room));
        self.collected.fetch_add(count as u64, Ordering::Relaxed);
        count
    }

    /// Delivers what is collected; true if there was something. For the main thread.
    pub fn flush(&self, link: &mut AccessLink) -> bool {
        let Some(drain) = self.coalescer.drain() else { return false };
        let nothing = Access { space: Space::Pio, addr: u64::from(COALESCED_PORT), size: 1, op: Op::Flush };
        let mut count = 0;
        let len = link.build(&nothing, |room| {
            count = self.fill(Some(&drain), room);
            count
        });
        if count > 0 && !self.console_failed() {
            // A write to the collected port asks for nothing, so the action is of no interest.
            if let Err(why) = link.exchange(len, &self.console_failed) {
                self.fail_console(why);
            }
        }
        count > 0
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
