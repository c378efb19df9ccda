//! Beginning of a process: descriptors by name, surroundings checked, jail entered, ready.

use std::collections::BTreeMap;
use std::env;
use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};

use bulkhead_control_api::{MAX_CONFIG, decode};
use nix::errno::Errno;
use nix::sys::socket::{self, MsgFlags};
use serde::de::DeserializeOwned;

use crate::topology::Process;
use crate::{log, sandbox, surroundings};

/// First inherited descriptor (`sd_listen_fds(3)`).
const FIRST_FD: RawFd = 3;

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
}

/// A process that has its descriptors and is confined by everything but seccomp.
#[derive(Debug)]
pub struct Start {
    process: &'static Process,
    fds: BTreeMap<String, OwnedFd>,
}

/// The inherited descriptors by number and name.
fn inherited() -> Result<Vec<(RawFd, String)>, StartError> {
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
        let list = inherited()?;
        sandbox::forget_environment();
        let mut fds = BTreeMap::new();
        let mut end = FIRST_FD;
        for (number, name) in list {
            if !process.may_have(&name) {
                return Err(StartError::Foreign(name));
            }
            if fds.insert(name.clone(), adopt(number)).is_some() {
                return Err(StartError::Foreign(name));
            }
            end = number + 1;
        }
        for rule in process.fds.iter().filter(|r| !r.ends_with('?') && !r.ends_with('*')) {
            if !fds.contains_key(*rule) {
                return Err(StartError::Missing((*rule).to_owned()));
            }
        }
        surroundings::check(process, &starter, end)?;
        sandbox::restrict_files(fds.get("proc").map(AsFd::as_fd))?;
        sandbox::catch_violations(process)?;
        Ok(Self { process, fds })
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
        let fd = self.take("config")?;
        let size = nix::sys::stat::fstat(&fd).map_err(|_| StartError::Config("no size"))?.st_size;
        let size = usize::try_from(size).unwrap_or(usize::MAX);
        if size > MAX_CONFIG {
            return Err(StartError::Config("too large"));
        }
        let mut blob = vec![0; size];
        let mut at = 0;
        while let Some(rest) = blob.get_mut(at..).filter(|rest| !rest.is_empty()) {
            let offset = i64::try_from(at).map_err(|_| StartError::Config("too large"))?;
            match nix::sys::uio::pread(&fd, rest, offset) {
                Ok(0) | Err(_) => return Err(StartError::Config("cannot be read")),
                Ok(n) => at += n,
            }
        }
        decode(&blob).map_err(|_| StartError::Config("of another version: install matching binaries"))
    }

    /// Applies the seccomp filter to every thread, verifies it and tells the starter READY=1.
    ///
    /// # Errors
    /// [`StartError`]; the process must then exit. A descriptor that was not taken is closed.
    pub fn enter(mut self) -> Result<(), StartError> {
        let notify = self.fds.remove("notify");
        sandbox::filter_system_calls(self.process)?;
        if let Some(fd) = notify {
            // The starter may be gone; that is not for this process to judge.
            let _ = socket::send(fd.as_raw_fd(), b"READY=1", MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT);
        }
        Ok(())
    }
}
