//! Descriptors that the starter keeps beyond the process's death, under numbers.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use bulkhead_control_api::config::Chardev as Config;
use bulkhead_jail::start::{Start, StartError};
use bulkhead_jail::starter::Starter;
use bulkhead_jail::warn;
use nix::errno::Errno;

use crate::chardev::{Chardev, Inherited, needs_pair};
use crate::state::{Names, State};

/// The way to the starter.
#[derive(Debug, Default)]
pub struct Keeper {
    starter: Starter,
    /// What the starter is still to be told to forget.
    backlog: Vec<u32>,
}

fn name(number: u32) -> String {
    format!("kept.{number}")
}

impl Keeper {
    /// Tells this starter.
    #[must_use]
    pub const fn new(starter: Starter) -> Self {
        Self { starter, backlog: Vec::new() }
    }

    /// Keeps a descriptor under a new number, if the starter can.
    pub fn keep(&self, state: &mut State, fd: impl AsFd) -> Option<u32> {
        keep(&self.starter, state, fd)
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

/// Keeps a descriptor under a new number, if the starter can.
fn keep(starter: &Starter, state: &mut State, fd: impl AsFd) -> Option<u32> {
    let number = state.next_name();
    match starter.keep(&name(number), fd.as_fd()) {
        Ok(()) => Some(number),
        Err(error) => {
            warn!("a connection is not kept and will be lost if this process dies: {error}");
            None
        }
    }
}

/// Takes what a predecessor has left of a character device out of what has come back.
fn inherit(kept: &mut BTreeMap<String, OwnedFd>, names: Names, restarted: bool) -> Inherited {
    let mut take = |number: Option<u32>| {
        let fd = kept.remove(&name(number?));
        if fd.is_none() {
            warn!("a descriptor that was kept has not come back; its client is lost");
        }
        fd
    };
    Inherited { restarted, peer: take(names.peer), far: take(names.far) }
}

/// Opens the character devices, with what a predecessor has left of them.
///
/// # Errors
/// As [`Chardev::new`].
pub fn open<E: From<StartError> + From<std::io::Error>>(
    start: &mut Start,
    configs: &[Config],
    state: &mut State,
    restarted: bool,
) -> Result<Vec<Chardev>, E> {
    let mut kept = start.kept();
    if !restarted {
        // What they were for is not known any more, and their numbers begin anew.
        for (name, _) in std::mem::take(&mut kept) {
            let _ = start.starter().forget(&name);
        }
    }
    let mut chardevs = Vec::new();
    for (index, config) in configs.iter().enumerate() {
        let mut inherited = inherit(&mut kept, state.names(index), restarted);
        if needs_pair(config) && (inherited.peer.is_none() || inherited.far.is_none()) {
            let (near, far) = UnixStream::pair()?;
            let peer = keep(start.starter(), state, &near);
            let far_name = keep(start.starter(), state, &far);
            state.set_names(index, Names { peer, far: far_name });
            (inherited.peer, inherited.far) = (Some(near.into()), Some(far.into()));
        }
        let chardev = Chardev::new(config, inherited, |name| start.take(name).map_err(E::from))?;
        if let (Some(peer), None) = (chardev.peer(), state.names(index).peer) {
            let peer = keep(start.starter(), state, peer);
            state.set_names(index, Names { peer, far: None });
        }
        chardevs.push(chardev);
    }
    for name in kept.keys() {
        // Kept by a predecessor that died before it noted what for.
        let _ = start.starter().forget(name);
    }
    Ok(chardevs)
}
