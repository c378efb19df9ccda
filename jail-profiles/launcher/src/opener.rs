//! The one place that sees paths: opens what a plan asks for, with the invoking user's rights.
//!
//! Runs before any process of the VM is started. What it creates in the file system is reported before
//! and as it comes into being, so that whoever cleans up after a kill knows it.

mod beneath;
mod disk;
mod error;
mod fdset;
mod files;
mod inherited;
mod memory;
mod output;
mod sockets;
mod tap;

pub use error::Error;
pub use fdset::set_of;
pub use files::{Created, abandon_pid_file, kvm, sealed};
pub use inherited::{Inherited, from_service_manager};
pub use output::{output_now, output_now_beneath};
pub use sockets::{abandon as abandon_socket, connect_now};

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::machine::{Daemon, Open, What};
use fdset::Sets;
use tap::Taps;

/// What whoever cleans up after a kill has to know.
#[derive(Clone, Copy, Debug)]
pub enum Note<'a> {
    /// A socket is about to be bound here.
    Socket(&'a str),
    /// A PID file is about to be created here.
    PidFile(&'a str),
    /// This exists now and is ours.
    Created(&'a Created),
}

/// Opens everything, in order; tells `note` of each new path before and after it comes into being. The
/// result is by name, all close-on-exec.
///
/// # Errors
/// The first one that fails. What was created until then stays: whoever was told removes it.
pub fn open(
    opens: &[Open],
    mut inherited: Inherited,
    note: &mut dyn FnMut(Note<'_>) -> Result<(), String>,
) -> Result<BTreeMap<String, OwnedFd>, Error> {
    let mut fds = BTreeMap::new();
    let mut memory = Memory::default();
    for request in opens {
        match &request.what {
            What::Listener(path) => note(Note::Socket(path)).map_err(Error::Guard)?,
            What::PidFile(path) => note(Note::PidFile(path)).map_err(Error::Guard)?,
            _ => {}
        }
        let (fd, new) = open_one(request, &mut inherited, &mut memory).map_err(|e| e.of(&request.at))?;
        if let Some(new) = new {
            note(Note::Created(&new)).map_err(Error::Guard)?;
        }
        fds.insert(request.name.clone(), fd);
    }
    Ok(fds)
}

/// What later requests refer to.
#[derive(Default)]
struct Memory {
    sets: Sets,
    taps: Taps,
}

fn open_one(
    request: &Open,
    inherited: &mut Inherited,
    memory: &mut Memory,
) -> Result<(OwnedFd, Option<Created>), Error> {
    let Memory { sets, taps } = memory;
    let fd = match &request.what {
        What::Kvm => files::kvm()?,
        What::Input(path) => match sets.input(path).map_err(|e| Error::Io(e.into()))? {
            Some(member) => files::regular(member.into())?,
            None => files::input(path)?,
        },
        What::Table(path) => {
            let failed = |e| Error::of_table(path, e);
            match sets.input(path).map_err(|e| failed(Error::Io(e.into())))? {
                Some(member) => files::regular(member.into()).map_err(failed)?,
                None => files::input(path).map_err(failed)?,
            }
        }
        What::NativeGuest => files::sealed("native-guest", bulkhead_guest::ELF)?,
        What::StandardInput => duplicate(io::stdin())?,
        What::StandardOutput => duplicate(io::stdout())?,
        What::Output { path, append } => {
            let member = sets.output(path, *append).map_err(|e| Error::Output(path.to_owned(), e.into()))?;
            member.map_or_else(|| files::output(path, *append), Ok)?
        }
        What::Member { fd, set } => {
            let fd = inherited.duplicate(*fd)?;
            sets.add(*set, fd.as_fd()).map_err(|e| Error::Io(e.into()))?;
            fd
        }
        What::Disk { path, read_only } => disk::open(path, *read_only, sets)?,
        What::Memory { backing, size, prealloc } => memory::open(backing, *size, *prealloc)?,
        What::Tap { netdev, name, several } => taps.open(netdev, name.as_deref(), *several)?,
        What::TapFd(fd) => tap::check(inherited.any(*fd)?, *fd)?,
        What::Connection(path) => sockets::connect(path)?,
        What::Inherited { fd, listening } => inherited.claim(*fd, *listening)?,
        What::Listener(path) => {
            let (fd, created) = sockets::listen(path)?;
            return Ok((fd, Some(created)));
        }
        What::PidFile(path) => {
            let (fd, created) = files::pid_file(path)?;
            return Ok((fd, Some(created)));
        }
    };
    Ok((fd, None))
}

/// Opens what a machine file names, in the VM's directory, which no path of it leaves.
///
/// # Errors
/// The kernel's, or it is something that no unit can have.
pub fn open_beneath(dir: BorrowedFd<'_>, request: &Open) -> Result<OwnedFd, Error> {
    let opened = match &request.what {
        What::Kvm => files::kvm(),
        What::Input(path) => files::input_beneath(dir, path),
        What::Table(path) => files::input_beneath(dir, path).map_err(|e| Error::of_table(path, e)),
        What::NativeGuest => files::sealed("native-guest", bulkhead_guest::ELF),
        What::Output { path, append } => files::output_beneath(dir, path, *append),
        What::Disk { path, read_only } => disk::open_beneath(dir, path, *read_only),
        What::Memory { backing, size, prealloc } => memory::open_beneath(dir, backing, *size, *prealloc),
        // Prepared by the administrator, for the opener's group.
        What::Tap { netdev, name, several } => {
            Taps::default().open(netdev, name.as_deref(), *several).map_err(Error::in_a_unit)
        }
        What::StandardInput
        | What::StandardOutput
        | What::TapFd(_)
        | What::Connection(_)
        | What::Inherited { .. }
        | What::Member { .. }
        | What::Listener(_)
        | What::PidFile(_) => Err(Error::NotInAUnit),
    };
    opened.map_err(|e| e.of(&request.at))
}

/// The copy shares its file description, and so O_NONBLOCK, with the user's shell: leave that alone.
fn duplicate(stream: impl AsFd) -> Result<OwnedFd, Error> {
    stream.as_fd().try_clone_to_owned().map_err(|e| Error::Io(e.into()))
}

/// Has the network put nothing into the queue pairs that a daemon's device does not use, of those that were opened for it:
/// what a flow is given there is lost.
pub fn leave_unused(daemon: &Daemon, fds: &BTreeMap<String, OwnedFd>) {
    let given = daemon.given();
    let unused = daemon.fds.iter().filter(|pair| !given.contains(pair));
    unused.filter_map(|(opened, _)| fds.get(opened)).for_each(|fd| tap::leave(fd.as_fd()));
}

#[cfg(test)]
mod tests;
