//! Beginning of a process: descriptors by name, surroundings checked, jail entered, ready.

use std::collections::BTreeMap;
use std::env;
use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

use bulkhead_control_api::opener::FromOpener;
use bulkhead_control_api::{MAX_CONFIG, VERSION, decode};
use nix::errno::Errno;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, connect, socket};
use nix::sys::uio::pread;
use serde::de::DeserializeOwned;

use crate::link::{Link, LinkError};
use crate::starter::Starter;
use crate::topology::Process;
use crate::{footprint, log, sandbox, surroundings};

/// First inherited descriptor (`sd_listen_fds(3)`).
const FIRST_FD: RawFd = 3;
/// What a unit's `BULKHEAD_STARTER` says.
pub const SYSTEMD: &str = "systemd";
/// Where a unit finds the opener of its VM, in its own root directory.
const OPENER: &str = "/run/bulkhead/opener";
/// Descriptors that the opener may give to one process.
const MAX_GIVEN: usize = 1024;

/// Why a process does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// It was started by hand.
    #[error("started without its descriptors ({0}); start VMs with `bulkhead run`")]
    Environment(&'static str),
    /// The starter gave a descriptor that the topology does not know.
    #[error("descriptor {0:?} is not one of this process's (see topology.toml)")]
    Foreign(String),
    /// A descriptor is missing.
    #[error("descriptor {0:?} is missing")]
    Missing(String),
    /// The configuration blob cannot be used.
    #[error("configuration: {0}")]
    Config(&'static str),
    /// The starter left something undone.
    #[error("jail incomplete: {0}")]
    Jail(String),
    /// The kernel refused a step of the jail.
    #[error("jail: {0}: {1}")]
    Step(&'static str, Errno),
    /// The opener did not give what the process needs.
    #[error("opener: {0} (its own log says why)")]
    Opener(#[from] LinkError),
}

/// A process that has its descriptors and is confined by everything but seccomp.
#[derive(Debug)]
pub struct Start {
    process: &'static Process,
    fds: BTreeMap<String, OwnedFd>,
    starter: Starter,
    opener: Option<Link>,
}

/// The inherited descriptors by number and name; none if a service manager started the process and has none.
fn inherited(starter: &str) -> Result<Vec<(RawFd, String)>, StartError> {
    if starter == SYSTEMD && env::var_os("LISTEN_FDS").is_none() {
        return Ok(Vec::new());
    }
    listen_fds()
}

/// Numbers and names of the descriptors that the starter gave (`sd_listen_fds(3)`).
///
/// # Errors
/// [`StartError::Environment`]: there are none, or they are not for this process, or not named one by one.
pub fn listen_fds() -> Result<Vec<(RawFd, String)>, StartError> {
    let var = |name: &'static str| env::var(name).map_err(|_| StartError::Environment(name));
    let pid: i32 = var("LISTEN_PID")?.parse().map_err(|_| StartError::Environment("LISTEN_PID"))?;
    if pid != nix::unistd::getpid().as_raw() {
        return Err(StartError::Environment("LISTEN_PID is another process"));
    }
    let count: usize = var("LISTEN_FDS")?.parse().map_err(|_| StartError::Environment("LISTEN_FDS"))?;
    let names = var("LISTEN_FDNAMES")?;
    let names: Vec<String> = names.split(':').filter(|n| !n.is_empty()).map(str::to_owned).collect();
    if names.len() != count {
        return Err(StartError::Environment("LISTEN_FDNAMES"));
    }
    Ok((FIRST_FD..).zip(names).collect())
}

#[expect(unsafe_code, reason = "inherited descriptors are numbers")]
fn adopt(fd: RawFd) -> OwnedFd {
    // SAFETY: called once per number in LISTEN_FDS (`begin` removes the variables and refuses a
    // second call), before anything else in the process could have taken that number.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

impl Start {
    /// Takes over what the starter gave, checks the surroundings and applies Landlock. Call it first
    /// in `main`, while there is one thread.
    ///
    /// # Errors
    /// [`StartError`], one line for the log; the process must then exit.
    pub fn begin(process: &'static Process) -> Result<Self, StartError> {
        log::init(process.binary);
        // A binary that was executed through a descriptor is named after its number until now.
        if let Ok(name) = CString::new(process.binary) {
            let _ = nix::sys::prctl::set_name(&name);
        }
        let starter =
            env::var("BULKHEAD_STARTER").map_err(|_| StartError::Environment("BULKHEAD_STARTER"))?;
        let list = inherited(&starter)?;
        let notify = env::var("NOTIFY_SOCKET").ok();
        let watchdog = env::var("WATCHDOG_USEC").ok().and_then(|text| text.parse().ok());
        sandbox::forget_environment();
        let end = FIRST_FD + RawFd::try_from(list.len()).unwrap_or(RawFd::MAX - FIRST_FD);
        let mut start = Self { process, fds: BTreeMap::new(), starter: Starter::default(), opener: None };
        for (number, name) in list {
            start.add(name, adopt(number))?;
        }
        surroundings::check(process, &starter, end)?;
        start.starter = match (start.fds.remove("notify"), notify) {
            (Some(fd), _) => Starter::new(Some(fd)),
            (None, Some(address)) if starter == SYSTEMD => {
                Starter::connect(&address).map_err(|e| StartError::Step("NOTIFY_SOCKET", e))?
            }
            (None, _) => Starter::default(),
        };
        start.starter.watchdog = watchdog.map(Duration::from_micros);
        // The word that asked for this process: left in its FIFO it would ask for another one.
        if let Some(trigger) = process.boots.trigger().and_then(|name| start.fds.get(name)) {
            let _ = nix::unistd::read(trigger, &mut [0; 64]);
        }
        start.ask_opener(&starter)?;
        for rule in process.fds.iter().filter(|r| !r.ends_with('?') && !r.ends_with('*')) {
            if !start.fds.contains_key(*rule) {
                return Err(StartError::Missing((*rule).to_owned()));
            }
        }
        sandbox::restrict_files(start.fds.get("proc").map(AsFd::as_fd))?;
        sandbox::catch_violations(process)?;
        Ok(start)
    }

    fn add(&mut self, name: String, fd: OwnedFd) -> Result<(), StartError> {
        if !self.process.may_have(&name) || self.fds.contains_key(&name) {
            return Err(StartError::Foreign(name));
        }
        self.fds.insert(name, fd);
        Ok(())
    }

    /// Takes what the opener gives. Under the launcher that is nothing yet: its end of the link is for later.
    fn ask_opener(&mut self, starter: &str) -> Result<(), StartError> {
        let fd = match self.fds.remove("opener") {
            Some(fd) => fd,
            None if starter == SYSTEMD => connect_to_opener()?,
            None => return Ok(()),
        };
        let mut link = Link::connect(fd, VERSION)?;
        for _ in 0..=MAX_GIVEN {
            let (message, fds) = link.recv_with::<FromOpener>(MsgFlags::empty())?;
            let mut fds = fds.into_iter();
            match (message, fds.next(), fds.next()) {
                (FromOpener::Given { name }, Some(fd), None) => self.add(name, fd)?,
                (FromOpener::Done, None, None) => {
                    if self.process.may_have("opener") {
                        self.opener = Some(link);
                    }
                    return Ok(());
                }
                _ => break,
            }
        }
        Err(LinkError::Malformed.into())
    }

    /// The descriptor of that name.
    ///
    /// # Errors
    /// [`StartError::Missing`].
    pub fn take(&mut self, name: &str) -> Result<OwnedFd, StartError> {
        self.fds.remove(name).ok_or_else(|| StartError::Missing(name.to_owned()))
    }

    /// The descriptor of that name, if the starter gave it.
    pub fn take_optional(&mut self, name: &str) -> Option<OwnedFd> {
        self.fds.remove(name)
    }

    /// The configuration blob.
    ///
    /// # Errors
    /// [`StartError::Config`].
    pub fn config<T: DeserializeOwned>(&mut self) -> Result<T, StartError> {
        read_config(self.take("config")?.as_fd())
    }

    /// The link on which the opener replaces connections later, if this process keeps it.
    pub const fn opener(&mut self) -> Option<Link> {
        self.opener.take()
    }

    /// The starter, for what is to be kept before the jail is entered.
    #[must_use]
    pub const fn starter(&self) -> &Starter {
        &self.starter
    }

    /// The memfd with the state that outlives the process: the one that its predecessor has left, or a new
    /// one, which is empty.
    ///
    /// # Errors
    /// The host has no memfd, or the starter cannot be told of it.
    pub fn state(&mut self) -> Result<OwnedFd, StartError> {
        if let Some(fd) = self.fds.remove("state") {
            return Ok(fd);
        }
        let fd = memfd_create("bulkhead-state", MFdFlags::MFD_CLOEXEC)
            .map_err(|e| StartError::Step("memfd", e))?;
        self.starter.keep("state", fd.as_fd()).map_err(|e| StartError::Step("keeping the state", e))?;
        Ok(fd)
    }

    /// What else the predecessor has left: the descriptors `kept.*`, by their whole names.
    pub fn kept(&mut self) -> BTreeMap<String, OwnedFd> {
        let (kept, others) =
            std::mem::take(&mut self.fds).into_iter().partition(|(name, _)| name.starts_with("kept."));
        self.fds = others;
        kept
    }

    /// Applies the seccomp filter to every thread, verifies it and tells the starter READY=1.
    ///
    /// # Errors
    /// [`StartError`]; the process must then exit. A descriptor that was not taken is closed.
    pub fn enter(self) -> Result<Starter, StartError> {
        sandbox::filter_system_calls(self.process)?;
        // The starter may be gone; that is not for this process to judge.
        let _ = self.starter.ready();
        footprint::shrink();
        Ok(self.starter)
    }
}

/// Reads a configuration blob, also inside the jail.
///
/// # Errors
/// [`StartError::Config`].
pub fn read_config<T: DeserializeOwned>(fd: BorrowedFd<'_>) -> Result<T, StartError> {
    let mut blob = vec![0; MAX_CONFIG + 1];
    let mut length = 0;
    while let Some(rest) = blob.get_mut(length..).filter(|rest| !rest.is_empty()) {
        let offset = i64::try_from(length).map_err(|_| StartError::Config("too large"))?;
        match pread(fd, rest, offset) {
            Ok(0) => {
                return decode(blob.get(..length).unwrap_or_default())
                    .map_err(|_| StartError::Config("of another version: install matching binaries"));
            }
            Ok(count) => length += count,
            Err(_) => return Err(StartError::Config("cannot be read")),
        }
    }
    Err(StartError::Config("too large"))
}

fn connect_to_opener() -> Result<OwnedFd, StartError> {
    let fd = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None);
    let fd = fd.map_err(|e| StartError::Step("socket", e))?;
    let address = UnixAddr::new(OPENER).map_err(|e| StartError::Step(OPENER, e))?;
    connect(fd.as_raw_fd(), &address).map_err(|e| StartError::Step(OPENER, e))?;
    Ok(fd)
}
