//! A bus daemon's main link: set-up of its access links, pause, resume and reset, and what pci asks meanwhile.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bulkhead_bus_api::main_link::{self, Command};
use bulkhead_bus_api::pci::{Ask, FromCore, Memory, ToCore};
use bulkhead_bus_api::platform::CONSOLE_GSIS;
use bulkhead_jail::door::Door;
use bulkhead_jail::link::LinkError;
use bulkhead_jail::{error, info};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::MsgFlags;
use vmm_sys_util::eventfd::EventFd;

use crate::bus::{self, MAX_WAIT_STEPS};
use crate::presence::{Daemon, Seat};
use crate::sys;
use crate::vm::Vm;
use crate::wiring::Wiring;

/// A wait for an answer looks up this often, in milliseconds.
const WAIT_STEP_MS: u8 = 100;
/// The most that pci asks while it carries out one command; all of its wires need some ten.
const MAX_ASKS: u32 = 4096;
/// So many breaches of the protocol ...
const MAX_BREACHES: u32 = 10;
/// ... within this make an end of a VM's daemons of one kind.
const BREACH_SPAN: Duration = Duration::from_secs(10);

/// Why a daemon did not do what it was told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It is gone; another one may come.
    Gone,
    /// It broke the protocol; another one may come.
    Broke(&'static str),
    /// It is too slow, and waiting for another one would be no better.
    Late(&'static str),
}

/// What a daemon is given beside its access links.
#[derive(Debug)]
pub enum Gifts {
    /// The console: eventfds of [`CONSOLE_GSIS`].
    Interrupts(Vec<EventFd>),
    /// Pci: guest memory, and what it asks for.
    Wiring(Wiring),
}

/// What a daemon said.
enum Heard {
    /// Nothing.
    Nothing,
    /// What is settled by now.
    Settled,
    /// A command is carried out.
    Done(u32),
}

/// What the main thread keeps of a bus daemon.
#[derive(Debug)]
pub struct Peer {
    /// Where it connects.
    pub door: Door,
    /// What vCPUs look at.
    pub seat: Arc<Seat>,
    /// The daemon's ends of the access links: one per vCPU, then the drainer's of the console.
    ends: Vec<OwnedFd>,
    gifts: Gifts,
    past: Past,
}

/// What is remembered over the daemon's lives.
#[derive(Debug, Default)]
struct Past {
    last_id: u32,
    paused: bool,
    /// A reset has not been carried out to its end.
    reset_due: bool,
    /// A press of the power button has not been carried out.
    button_due: bool,
    /// One has been here before.
    known: bool,
    breaches: u32,
    first_breach: Option<Instant>,
}

/// What became of a word to a daemon.
pub type Result = std::result::Result<(), Fault>;

impl Peer {
    /// A daemon that has not connected yet.
    pub fn new(door: Door, seat: Arc<Seat>, ends: Vec<OwnedFd>, gifts: Gifts) -> Self {
        Self { door, seat, ends, gifts, past: Past::default() }
    }

    /// Hands out the descriptors to the daemon that has just connected. One whose predecessor died learns
    /// what that has missed. The console is there from then on, pci when it says so.
    pub fn welcome(&mut self, vm: &Vm) -> Result {
        // What the predecessor has not read is asked again.
        for end in &self.ends {
            bus::empty(end.as_fd());
        }
        let Some(link) = self.door.link() else { return Err(Fault::Gone) };
        let mut fds: Vec<BorrowedFd<'_>> = self.ends.iter().map(AsFd::as_fd).collect();
        let links = u16::try_from(fds.len()).unwrap_or(u16::MAX);
        let sent = match &self.gifts {
            Gifts::Interrupts(events) => {
                fds.extend(events.iter().map(sys::borrow));
                let (vcpus, irqs) = (links.saturating_sub(1), CONSOLE_GSIS.to_vec());
                let welcome = main_link::FromCore::Welcome { vcpus, irqs };
                link.send_with(&welcome, &fds, MsgFlags::MSG_DONTWAIT)
            }
            Gifts::Wiring(wiring) => {
                fds.extend(vm.ram.iter().map(|ram| &ram.fd).chain([&wiring.ecam]).map(AsFd::as_fd));
                let memory = vm.ram.iter().map(|ram| Memory { base: ram.region.gpa, len: ram.region.len });
                let welcome = FromCore::Welcome { vcpus: links, memory: memory.collect() };
                link.send_with(&welcome, &fds, MsgFlags::MSG_DONTWAIT)
            }
        };
        sent.map_err(|error| fault(&error))?;
        self.catch_up(vm)?;
        if self.seat.daemon == Daemon::Console {
            self.seat.arrive();
        }
        Ok(())
    }

    /// Has a successor do what its predecessor missed.
    fn catch_up(&mut self, vm: &Vm) -> Result {
        if !std::mem::replace(&mut self.past.known, true) {
            return Ok(());
        }
        if self.past.reset_due {
            self.reset(vm)?;
        }
        if self.past.button_due {
            self.press_power_button(vm)?;
        }
        self.command(if self.past.paused { Command::Pause } else { Command::Resume }, vm)
    }

    /// Stops the devices' clocks.
    pub fn pause(&mut self, vm: &Vm) -> Result {
        self.past.paused = true;
        self.command(Command::Pause, vm)
    }

    /// Lets the devices' clocks go on, if they were stopped.
    pub fn resume(&mut self, vm: &Vm) -> Result {
        self.past.reset_due = false;
        if std::mem::take(&mut self.past.paused) { self.command(Command::Resume, vm) } else { Ok(()) }
    }

    /// Puts the devices into their reset state, now or when the next daemon comes.
    pub fn reset(&mut self, vm: &Vm) -> Result {
        self.past.reset_due = self.past.known;
        self.past.button_due = false;
        if self.door.is_linked() {
            self.command(Command::Reset, vm)?;
            // A pci that is not ready after it has a successor do it again.
            self.past.reset_due = self.seat.there().is_none();
        }
        Ok(())
    }

    /// Presses the power button.
    pub fn press_power_button(&mut self, vm: &Vm) -> Result {
        self.past.button_due = self.past.known;
        if self.door.is_linked() {
            self.command(Command::PressPowerButton, vm)?;
            self.past.button_due = false;
        }
        Ok(())
    }

    fn command(&mut self, what: Command, vm: &Vm) -> Result {
        self.past.last_id = self.past.last_id.wrapping_add(1);
        let id = self.past.last_id;
        let Some(link) = self.door.link() else { return Err(Fault::Gone) };
        link.send_with(&FromCore::Command { id, what }, &[], MsgFlags::MSG_DONTWAIT)
            .map_err(|error| fault(&error))?;
        let (mut looks, mut asks) = (0, 0);
        while looks < MAX_WAIT_STEPS && asks < MAX_ASKS {
            let Some(link) = self.door.link() else { return Err(Fault::Gone) };
            let _ =
                poll(&mut [PollFd::new(link.as_fd(), PollFlags::POLLIN)], PollTimeout::from(WAIT_STEP_MS));
            match self.listen(vm)? {
                Heard::Done(done) if done == id => return Ok(()),
                Heard::Done(_) => return Err(Fault::Broke("it answered another command")),
                Heard::Settled => asks += 1,
                Heard::Nothing => looks += 1,
            }
        }
        Err(Fault::Late("it did not carry out a command in time"))
    }

    /// Takes one message, and does what it asks.
    fn listen(&mut self, vm: &Vm) -> std::result::Result<Heard, Fault> {
        let Some(link) = self.door.link() else { return Ok(Heard::Nothing) };
        match link.recv_with(MsgFlags::empty()) {
            Ok((ToCore::Done { id }, fds)) if fds.is_empty() => return Ok(Heard::Done(id)),
            Ok(_) if self.seat.daemon == Daemon::Console => {
                return Err(Fault::Broke("it said what is not for it to say"));
            }
            Ok((ToCore::Ready, fds)) if fds.is_empty() => self.seat.arrive(),
            Ok((ToCore::NotReady, fds)) if fds.is_empty() => self.seat.leave(),
            Ok((ToCore::Ask { id, what }, fds)) if fds.len() == what.descriptors() => {
                self.serve(id, what, fds, vm)?;
            }
            Ok(_) => return Err(Fault::Broke("it sent the wrong number of descriptors")),
            Err(LinkError::WouldBlock) => return Ok(Heard::Nothing),
            Err(error) => return Err(fault(&error)),
        }
        Ok(Heard::Settled)
    }

    /// KVM notes from now on which pages of the daemon's windows the guest writes, or no longer.
    pub fn log_dirty(&mut self, vm: &Vm, on: bool) -> std::result::Result<(), kvm_ioctls::Error> {
        match &mut self.gifts {
            Gifts::Wiring(wiring) => wiring.windows.log_dirty(&vm.fd, on),
            Gifts::Interrupts(_) => Ok(()),
        }
    }

    fn serve(&mut self, id: u32, what: Ask, fds: Vec<OwnedFd>, vm: &Vm) -> Result {
        let (Gifts::Wiring(wiring), Some(link)) = (&mut self.gifts, self.door.link()) else { return Ok(()) };
        let result = match what {
            Ask::Eventfds { vectors, bells } => wiring.eventfds(&vectors, &bells),
            Ask::Apply(changes) => wiring.apply(vm, &changes, fds).map(|()| Vec::new()),
        };
        let (result, fds) = result.map_or_else(|refusal| (Err(refusal), Vec::new()), |fds| (Ok(()), fds));
        let answer = FromCore::Answer { id, result };
        link.send_with(&answer, &fds, MsgFlags::MSG_DONTWAIT).map_err(|error| fault(&error))
    }

    /// What a readable main link means outside of a command.
    ///
    /// # Errors
    /// What the daemon has done.
    pub fn unasked(&mut self, vm: &Vm) -> Result {
        match self.listen(vm)? {
            Heard::Done(_) => Err(Fault::Broke("it answered what nobody asked")),
            Heard::Nothing | Heard::Settled => Ok(()),
        }
    }

    /// Draws the consequences of a fault; whether accesses that are under way must look up.
    pub fn judge(&mut self, fault: Fault) -> bool {
        let name = self.seat.daemon.name();
        match fault {
            Fault::Gone if !self.door.is_linked() => return false,
            Fault::Gone => {
                info!("the {name} is gone; the machine waits for the next one where it needs it");
                self.door.close();
            }
            Fault::Broke(why) => {
                error!("{name}: {why}; it is cut off");
                self.cut_off();
            }
            Fault::Late(why) => {
                self.seat.fail(why);
                return false;
            }
        }
        self.seat.leave();
        true
    }

    /// Sends away a daemon that broke the protocol, so that another one may come, unless that happens too
    /// often.
    fn cut_off(&mut self) {
        if let Some(link) = self.door.link() {
            // One that does not read it does not end, and nobody comes in its place.
            let _ = link.send_with(&FromCore::Leave, &[], MsgFlags::MSG_DONTWAIT);
        }
        self.door.close();
        if self.past.first_breach.is_none_or(|first| first.elapsed() > BREACH_SPAN) {
            self.past.first_breach = Some(Instant::now());
            self.past.breaches = 0;
        }
        self.past.breaches += 1;
        if self.past.breaches >= MAX_BREACHES {
            self.seat.fail("too many of its kind broke the protocol");
        }
    }
}

/// What an error of the main link means.
fn fault(error: &LinkError) -> Fault {
    match error {
        LinkError::Closed => Fault::Gone,
        LinkError::WouldBlock => Fault::Broke("it does not read its main link"),
        _ => Fault::Broke("it sent a malformed message"),
    }
}
