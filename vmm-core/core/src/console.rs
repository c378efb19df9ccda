//! The console's main link: set-up of its access links and interrupts, pause, resume and reset.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use bulkhead_bus_api::main_link::{Command, FromCore, ToCore};
use bulkhead_bus_api::platform::CONSOLE_GSIS;
use bulkhead_jail::link::LinkError;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::MsgFlags;

use crate::bus::MAX_WAIT_STEPS;
use crate::door::Door;

/// A wait for an answer looks up this often, in milliseconds.
const WAIT_STEP_MS: u8 = 100;

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
}

type Result = std::result::Result<(), &'static str>;

impl Console {
    /// A console that has not connected yet.
    pub fn new(door: Door, ends: Vec<OwnedFd>, interrupts: Vec<OwnedFd>) -> Self {
        Self { door, ends, interrupts, last_id: 0, paused: false }
    }

    /// Hands out the descriptors to the daemon that has just connected.
    pub fn welcome(&mut self) -> Result {
        let vcpus = u16::try_from(self.ends.len().saturating_sub(1)).unwrap_or(u16::MAX);
        let message = FromCore::Welcome { vcpus, irqs: CONSOLE_GSIS.to_vec() };
        let fds: Vec<BorrowedFd<'_>> = self.ends.iter().chain(&self.interrupts).map(AsFd::as_fd).collect();
        let Some(link) = self.door.link() else { return Err("it is not connected") };
        link.send_with(&message, &fds, MsgFlags::MSG_DONTWAIT).map_err(|_| "it does not read its main link")
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

    /// Puts the devices into their reset state.
    pub fn reset(&mut self) -> Result {
        if self.door.is_linked() { self.command(Command::Reset) } else { Ok(()) }
    }

    /// Presses the power button.
    pub fn press_power_button(&mut self) -> Result {
        self.command(Command::PressPowerButton)
    }

    fn command(&mut self, what: Command) -> Result {
        self.last_id = self.last_id.wrapping_add(1);
        let id = self.last_id;
        let Some(link) = self.door.link() else { return Err("it is not connected") };
        link.send_with(&FromCore::Command { id, what }, &[], MsgFlags::MSG_DONTWAIT)
            .map_err(|_| "it does not read its main link")?;
        for _ in 0..MAX_WAIT_STEPS {
            let _ =
                poll(&mut [PollFd::new(link.as_fd(), PollFlags::POLLIN)], PollTimeout::from(WAIT_STEP_MS));
            match link.recv::<ToCore>() {
                Ok(ToCore::Done { id: done }) if done == id => return Ok(()),
                Ok(ToCore::Done { .. }) => return Err("it answered another command"),
                Err(LinkError::WouldBlock) => {}
                Err(LinkError::Closed) => return Err("it closed its main link"),
                Err(_) => return Err("it sent a malformed message"),
            }
        }
        Err("it did not carry out a command in time")
    }

    /// What a readable main link means outside of a command: never anything good.
    ///
    /// # Errors
    /// Why the daemon is given up.
    pub fn unasked(&mut self) -> Result {
        let Some(link) = self.door.link() else { return Ok(()) };
        match link.recv::<ToCore>() {
            Err(LinkError::WouldBlock) => Ok(()),
            Err(LinkError::Closed) => Err("it closed its main link"),
            Ok(_) => Err("it answered what nobody asked"),
            Err(_) => Err("it sent a malformed message"),
        }
    }
}
