//! The console's main link: set-up of its access links and interrupts, pause, resume and reset.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use bulkhead_bus_api::main_link::{Command, FromCore, ToCore};
use bulkhead_bus_api::platform::CONSOLE_GSIS;
use bulkhead_jail::link::LinkError;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::MsgFlags;

use crate::bus::{self, MAX_WAIT_STEPS};
use crate::door::Door;

/// A wait for an answer looks up this often, in milliseconds.
const WAIT_STEP_MS: u8 = 100;

/// So many breaches of the protocol ...
const MAX_BREACHES: u32 = 10;
/// ... within this make an end of a VM's consoles.
const BREACH_SPAN: Duration = Duration::from_secs(10);

/// Why the console did not do what it was told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It is gone; another one may come.
    Gone,
    /// It broke the protocol; another one may come.
    Broke(&'static str),
    /// It is too slow, and waiting for another one would be no better.
    Late(&'static str),
}

/// What core keeps of the console.
#[derive(Debug)]
pub struct Console {
    /// Where it connects.
    pub door: Door,
    /// The daemon's ends of the access links: one per vCPU, then the drainer's.
    ends: Vec<OwnedFd>,
    /// Eventfds of [`CONSOLE_GSIS`].
    interrupts: Vec<OwnedFd>,
    last_id: u32,
    paused: bool,
    /// A reset has not been carried out.
    reset_due: bool,
    /// A press of the power button has not been carried out.
    button_due: bool,
    /// One has been here before.
    known: bool,
    breaches: u32,
    first_breach: Option<Instant>,
}

type Result = std::result::Result<(), Fault>;

impl Console {
    /// A console that has not connected yet.
    pub fn new(door: Door, ends: Vec<OwnedFd>, interrupts: Vec<OwnedFd>) -> Self {
        Self {
            door,
            ends,
            interrupts,
            last_id: 0,
            paused: false,
            reset_due: false,
            button_due: false,
            known: false,
            breaches: 0,
            first_breach: None,
        }
    }

    /// Hands out the descriptors to the daemon that has just connected. One whose predecessor died learns
    /// what that has missed.
    pub fn welcome(&mut self) -> Result {
        // What the predecessor has not read is asked again.
        for end in &self.ends {
            bus::empty(end.as_fd());
        }
        let vcpus = u16::try_from(self.ends.len().saturating_sub(1)).unwrap_or(u16::MAX);
        let message = FromCore::Welcome { vcpus, irqs: CONSOLE_GSIS.to_vec() };
        let fds: Vec<BorrowedFd<'_>> = self.ends.iter().chain(&self.interrupts).map(AsFd::as_fd).collect();
        let Some(link) = self.door.link() else { return Err(Fault::Gone) };
        link.send_with(&message, &fds, MsgFlags::MSG_DONTWAIT).map_err(|error| fault(&error))?;
        if !std::mem::replace(&mut self.known, true) {
            return Ok(());
        }
        if self.reset_due {
            self.reset()?;
        }
        if self.button_due {
            self.press_power_button()?;
        }
        self.command(if self.paused { Command::Pause } else { Command::Resume })
    }

    /// Stops the devices' clocks.
    pub fn pause(&mut self) -> Result {
        self.paused = true;
        self.command(Command::Pause)
    }

    /// Lets the devices' clocks go on, if they were stopped.
    pub fn resume(&mut self) -> Result {
        if std::mem::take(&mut self.paused) { self.command(Command::Resume) } else { Ok(()) }
    }

    /// Puts the devices into their reset state, now or when the next console comes.
    pub fn reset(&mut self) -> Result {
        self.reset_due = self.known;
        self.button_due = false;
        if self.door.is_linked() {
            self.command(Command::Reset)?;
            self.reset_due = false;
        }
        Ok(())
    }

    /// Presses the power button.
    pub fn press_power_button(&mut self) -> Result {
        self.button_due = self.known;
        if self.door.is_linked() {
            self.command(Command::PressPowerButton)?;
            self.button_due = false;
        }
        Ok(())
    }

    fn command(&mut self, what: Command) -> Result {
        self.last_id = self.last_id.wrapping_add(1);
        let id = self.last_id;
        let Some(link) = self.door.link() else { return Err(Fault::Gone) };
        link.send_with(&FromCore::Command { id, what }, &[], MsgFlags::MSG_DONTWAIT)
            .map_err(|error| fault(&error))?;
        for _ in 0..MAX_WAIT_STEPS {
            let _ =
                poll(&mut [PollFd::new(link.as_fd(), PollFlags::POLLIN)], PollTimeout::from(WAIT_STEP_MS));
            match link.recv::<ToCore>() {
                Ok(ToCore::Done { id: done }) if done == id => return Ok(()),
                Ok(ToCore::Done { .. }) => return Err(Fault::Broke("it answered another command")),
                Err(LinkError::WouldBlock) => {}
                Err(error) => return Err(fault(&error)),
            }
        }
        Err(Fault::Late("it did not carry out a command in time"))
    }

    /// What a readable main link means outside of a command: never anything good.
    ///
    /// # Errors
    /// What the daemon has done.
    pub fn unasked(&mut self) -> Result {
        let Some(link) = self.door.link() else { return Ok(()) };
        match link.recv::<ToCore>() {
            Err(LinkError::WouldBlock) => Ok(()),
            Err(error) => Err(fault(&error)),
            Ok(_) => Err(Fault::Broke("it answered what nobody asked")),
        }
    }

    /// Sends away a daemon that broke the protocol, so that another one may come; false if that happens
    /// too often.
    pub fn cut_off(&mut self) -> bool {
        if let Some(link) = self.door.link() {
            // One that does not read it does not end, and nobody comes in its place.
            let _ = link.send_with(&FromCore::Leave, &[], MsgFlags::MSG_DONTWAIT);
        }
        self.door.close();
        if self.first_breach.is_none_or(|first| first.elapsed() > BREACH_SPAN) {
            self.first_breach = Some(Instant::now());
            self.breaches = 0;
        }
        self.breaches += 1;
        self.breaches < MAX_BREACHES
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
