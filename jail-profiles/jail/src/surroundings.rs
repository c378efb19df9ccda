//! What the starter must have done: verified before anything else happens.
#![expect(unsafe_code, reason = "prctl, capget and close_range have no safe wrapper")]

use std::os::fd::RawFd;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use nix::unistd::getpid;

use crate::start::{SYSTEMD, StartError};
use crate::topology::{FileSize, Namespace, Process};

/// What a unit's `ExecStop=` runs, in the same root directory.
const STOPPER: &str = "bulkhead";
/// Entries that a unit's root directory may have.
const MAX_ROOT: usize = 512;
/// What the kernel has there.
const KERNEL: [&str; 3] = ["/proc", "/sys", "/dev"];

/// Host name inside a UTS namespace that a starter made.
pub const HOST_NAME: &str = "bulkhead";

fn missing(what: impl Into<String>) -> StartError {
    StartError::Jail(what.into())
}

/// Checks everything that can be seen from inside; `end` is one past the last inherited descriptor.
pub(crate) fn check(process: &Process, starter: &str, end: RawFd) -> Result<(), StartError> {
    for namespace in process.namespaces_under(starter) {
        match namespace {
            Namespace::Mount => empty_root()?,
            Namespace::Pid if getpid().as_raw() != 1 => {
                return Err(missing("not in a pid namespace of its own"));
            }
            Namespace::Uts => own_host_name()?,
            Namespace::Net => empty_network(starter)?,
            // Nothing inside tells these from the host's; tests look at them from outside.
            Namespace::Pid | Namespace::User | Namespace::Ipc => {}
        }
    }
    if starter == SYSTEMD && process.namespaces.contains(&Namespace::Mount) {
        small_root(process.binary)?;
    }
    no_capabilities()?;
    limits(process)?;
    close_others(end)?;
    // SAFETY: prctl with constant arguments touches no memory of ours.
    if unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0) } != 0 {
        return Err(StartError::Step("PR_SET_DUMPABLE", Errno::last()));
    }
    Ok(())
}

fn empty_root() -> Result<(), StartError> {
    let entries = std::fs::read_dir("/").map_err(|e| missing(format!("root directory: {e}")))?;
    match entries.count() {
        0 => Ok(()),
        _ => Err(missing("the root directory is not empty")),
    }
}

/// A unit's root cannot be written, and holds no file with content but its executable: directories to mount on,
/// the sockets of its starters, and what systemd puts into every root.
fn small_root(binary: &str) -> Result<(), StartError> {
    let root = nix::sys::statvfs::statvfs("/").map_err(|e| StartError::Step("statvfs", e))?;
    if !root.flags().contains(nix::sys::statvfs::FsFlags::ST_RDONLY) {
        return Err(missing("the root directory can be written"));
    }
    let mut left = vec![PathBuf::from("/")];
    let mut seen = 0;
    while let Some(directory) = left.pop() {
        // A directory that this user cannot read holds nothing for it.
        for entry in std::fs::read_dir(&directory).into_iter().flatten().flatten() {
            seen += 1;
            if seen > MAX_ROOT {
                return Err(missing(format!("the root directory has more than {MAX_ROOT} entries")));
            }
            let path = entry.path();
            let Ok(metadata) = entry.metadata() else { continue };
            if metadata.is_dir() {
                if !KERNEL.iter().any(|kernel| path == Path::new(kernel)) {
                    left.push(path);
                }
            } else if metadata.is_file()
                && metadata.len() > 0
                && ![binary, STOPPER].iter().any(|known| entry.file_name() == *known)
            {
                return Err(missing(format!("the root directory has {}", path.display())));
            }
        }
    }
    Ok(())
}

fn own_host_name() -> Result<(), StartError> {
    let name = nix::unistd::gethostname().map_err(|e| StartError::Step("gethostname", e))?;
    if name == HOST_NAME { Ok(()) } else { Err(missing("not in a UTS namespace of its own")) }
}

/// A new namespace may hold tunnel devices that the kernel makes in each; none of them is up. systemd brings the
/// loopback interface up, which leads nowhere.
fn empty_network(starter: &str) -> Result<(), StartError> {
    let addresses = match nix::ifaddrs::getifaddrs() {
        // A unit's sockets are limited to those of the host (RestrictAddressFamilies=).
        Err(Errno::EAFNOSUPPORT) if starter == SYSTEMD && no_internet() => return Ok(()),
        result => result.map_err(|e| StartError::Step("getifaddrs", e))?,
    };
    for interface in addresses {
        let loopback = interface.flags.contains(nix::net::if_::InterfaceFlags::IFF_LOOPBACK);
        if interface.flags.contains(nix::net::if_::InterfaceFlags::IFF_UP)
            && !(starter == SYSTEMD && loopback)
        {
            return Err(missing(format!("network interface {} is up", interface.interface_name)));
        }
    }
    Ok(())
}

/// Whether no socket of the internet families can be made.
fn no_internet() -> bool {
    let refused = |family| {
        let made = socket(family, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None);
        made.is_err_and(|e| e == Errno::EAFNOSUPPORT)
    };
    refused(AddressFamily::Inet) && refused(AddressFamily::Inet6)
}

fn no_capabilities() -> Result<(), StartError> {
    #[repr(C)]
    #[derive(Default)]
    struct Header {
        version: u32,
        pid: i32,
    }
    #[repr(C)]
    #[derive(Clone, Copy, Default)]
    struct Sets {
        effective: u32,
        permitted: u32,
        inheritable: u32,
    }
    /// `_LINUX_CAPABILITY_VERSION_3`: two words per set.
    const VERSION_3: u32 = 0x2008_0522;
    let mut header = Header { version: VERSION_3, pid: 0 };
    let mut sets = [Sets::default(); 2];
    // SAFETY: version 3 makes the kernel write two `Sets`, which the array holds.
    let result = unsafe { libc::syscall(libc::SYS_capget, &raw mut header, &raw mut sets) };
    if result != 0 {
        return Err(StartError::Step("capget", Errno::last()));
    }
    if sets.iter().any(|s| s.effective | s.permitted | s.inheritable != 0) {
        return Err(missing("capabilities are left"));
    }
    Ok(())
}

fn limits(process: &Process) -> Result<(), StartError> {
    let hard =
        |resource| getrlimit(resource).map(|(_, hard)| hard).map_err(|e| StartError::Step("getrlimit", e));
    if hard(Resource::RLIMIT_CORE)? != 0 {
        return Err(missing("core dumps are on"));
    }
    if hard(Resource::RLIMIT_NOFILE)? > process.limits.nofile {
        return Err(missing("RLIMIT_NOFILE is above the topology's"));
    }
    if hard(Resource::RLIMIT_DATA)? > process.limits.data {
        return Err(missing("RLIMIT_DATA is above the topology's"));
    }
    match process.limits.fsize {
        FileSize::Bytes(bytes) if hard(Resource::RLIMIT_FSIZE)? > bytes => {
            Err(missing("RLIMIT_FSIZE is above the topology's"))
        }
        _ => Ok(()),
    }
}

/// Closes whatever the starter left open beyond the named descriptors.
fn close_others(end: RawFd) -> Result<(), StartError> {
    let first = u32::try_from(end).unwrap_or(u32::MAX);
    // SAFETY: closes numbers that no value in this process owns: `begin` has adopted all below.
    if unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, 0) } != 0 {
        return Err(StartError::Step("close_range", Errno::last()));
    }
    Ok(())
}
