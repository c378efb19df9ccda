//! A terminal, as a user's emulator would make it.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::process::Stdio;

use bulkhead_framework::{Result, Transcript};
use nix::pty::openpty;
use nix::sys::termios::{Termios, tcgetattr};

/// A pseudo terminal; the test holds both ends.
pub struct Pty {
    master: OwnedFd,
    slave: OwnedFd,
    screen: Transcript,
}

impl Pty {
    /// Opens one with the system's default modes.
    ///
    /// # Errors
    /// There is no terminal left.
    pub fn open() -> Result<Self> {
        let pair = openpty(None, None).map_err(|error| format!("openpty: {error}"))?;
        let screen = Transcript::of("terminal", File::from(pair.master.try_clone()?));
        Ok(Self { master: pair.master, slave: pair.slave, screen })
    }

    /// The terminal as a standard stream of a child.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn stdio(&self) -> Result<Stdio> {
        Ok(self.slave.try_clone()?.into())
    }

    /// Its present modes.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn modes(&self) -> Result<Termios> {
        Ok(tcgetattr(&self.slave).map_err(|error| format!("tcgetattr: {error}"))?)
    }

    /// What was written to it.
    pub fn screen(&self) -> &Transcript {
        &self.screen
    }

    /// Types.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn type_in(&self, text: &str) -> Result<()> {
        nix::unistd::write(&self.master, text.as_bytes()).map_err(|error| format!("terminal: {error}"))?;
        Ok(())
    }
}
