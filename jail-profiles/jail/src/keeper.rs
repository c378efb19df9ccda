//! Descriptors that the starter keeps beyond the process's death, under numbers: `kept.N`.

use std::os::fd::AsFd;

use nix::errno::Errno;

use crate::starter::Starter;
use crate::warn;

/// The way to the starter.
#[derive(Debug, Default)]
pub struct Keeper {
    starter: Starter,
    /// What the starter is still to be told to forget.
    backlog: Vec<u32>,
}

/// The name of the descriptor that is kept under a number.
#[must_use]
pub fn name(number: u32) -> String {
    format!("kept.{number}")
}

impl Keeper {
    /// Tells this starter.
    #[must_use]
    pub const fn new(starter: Starter) -> Self {
        Self { starter, backlog: Vec::new() }
    }

    /// The starter, for what else it is to hear.
    #[must_use]
    pub const fn starter(&self) -> &Starter {
        &self.starter
    }

    /// Keeps a descriptor under a number that is not in use.
    ///
    /// # Errors
    /// `EAGAIN`: the starter has no room now. Of anything else there is a warning.
    pub fn keep(&self, number: u32, fd: impl AsFd) -> Result<(), Errno> {
        let result = self.starter.keep(&name(number), fd.as_fd());
        if let Err(error) = result
            && error != Errno::EAGAIN
        {
            warn!("a descriptor is not kept and will be lost if this process dies: {error}");
        }
        result
    }

    /// Keeps it no longer. Its other end sees that it is closed when the starter has heard of it.
    pub fn forget(&mut self, number: u32) {
        self.backlog.push(number);
        self.retry();
    }

    /// Tells what could not be told before; false if something is left.
    pub fn retry(&mut self) -> bool {
        self.backlog.retain(|number| self.starter.forget(&name(*number)) == Err(Errno::EAGAIN));
        self.backlog.is_empty()
    }
}
