//! Starts one compartment: fork into its namespaces, map its ids, watch it by a pidfd.
#![expect(unsafe_code, reason = "clone3 has no safe wrapper")]

use std::ffi::CString;
use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::Instant;

use bulkhead_jail::topology::{Namespace, PROCESSES, Process};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigHandler, Signal, signal};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::{self, Gid, Pid, Uid};

use crate::jailed::{Child, Identity, park};
use crate::supervise::{JOBS, Part};

/// Descriptors that the launcher and a child have open beside those that are kept: of links, logs and binaries,
/// what the command line names, and a copy of a compartment's own in its child.
const OTHERS: usize = 600;
/// User and group id of a compartment inside its user namespace.
const INNER_ID: u32 = 1000;
/// First host id of the compartments when root starts them. It lies above what distributions and
/// systemd's containers hand out (up to 1,879,048,191), and the last one below 2^31.
const FIRST_HOST_ID: u32 = 0x7000_0000;
/// Host ids that one VM may use. With more compartments than that some device daemons share one; their namespaces
/// keep them apart, as they do those of an ordinary user.
const IDS_PER_VM: u32 = 64;
/// Ids of the VM's other compartments: device daemons begin here.
const FIRST_DEVICE_ID: u32 = 16;
/// Descriptors for each device daemon: listeners, disk or interfaces, log, pidfd, links.
const OF_A_DEVICE: usize = 32;

/// `CLONE_CLEAR_SIGHAND` of linux/sched.h: signals that the launcher handles are back to their default
/// actions in the child.
const CLONE_CLEAR_SIGHAND: u64 = 0x1_0000_0000;

/// A compartment that was started.
#[derive(Debug)]
pub struct Started {
    /// Its pid on the host.
    pub pid: Pid,
    /// Readable when it has ended.
    pub pidfd: OwnedFd,
    /// Its log; the end comes when it has ended.
    pub log: File,
    /// Says which step failed if it could not be started.
    pub failure: File,
    /// When it was forked.
    pub since: Instant,
}

/// What all compartments of a VM have in common.
#[derive(Debug)]
pub struct Host {
    binaries: Vec<(&'static str, File)>,
    privileged: bool,
    uid: u32,
    gid: u32,
    network: Option<Network>,
}

/// One empty network for all compartments of a VM, which belongs to none of them. To make one takes longer than
/// all other namespaces of a compartment together, and nobody in it can make a socket.
#[derive(Debug)]
struct Network {
    host: File,
    empty: File,
}

impl Network {
    fn new() -> Result<Self, String> {
        let fail =
            |step: &str, e: &dyn std::fmt::Display| format!("cannot make a network namespace: {step}: {e}");
        // A thread has a network, and only this one changes.
        let path = "/proc/thread-self/ns/net";
        let current = || File::open(path).map_err(|e| fail(path, &e));
        let host = current()?;
        unshare(CloneFlags::CLONE_NEWNET).map_err(|e| fail("unshare", &format!("{e}{}", remedy(e))))?;
        let empty = current();
        setns(&host, CloneFlags::CLONE_NEWNET).map_err(|e| fail("setns", &e))?;
        Ok(Self { host, empty: empty? })
    }

    /// Forks with the other namespaces; the child stays in the empty network. `None` in the child.
    fn clone3(&self, namespaces: &[Namespace]) -> Result<Option<(Pid, OwnedFd)>, Errno> {
        setns(&self.empty, CloneFlags::CLONE_NEWNET)?;
        let forked = clone3(namespaces);
        if !matches!(forked, Ok(None)) {
            setns(&self.host, CloneFlags::CLONE_NEWNET)?;
        }
        forked
    }
}

/// A compartment to start.
pub struct Order<'a> {
    /// What it is.
    pub process: &'static Process,
    /// Its number among the device daemons, if it is one.
    pub device: Option<usize>,
    /// What it is for: the VM's name, the device, as `ps` shows it.
    pub names: Vec<&'a str>,
    /// Its descriptors by name.
    pub fds: Vec<(String, BorrowedFd<'a>)>,
    /// Guest RAM in bytes.
    pub ram: u64,
}

impl Host {
    /// Finds the binaries of a VM's compartments, and of those that come and go: beside the launcher, or
    /// `../libexec/bulkhead` from there.
    ///
    /// # Errors
    /// One line that names what is missing.
    pub fn look(parts: &[Part]) -> Result<Self, String> {
        let own = std::env::current_exe().map_err(|e| format!("cannot find the launcher's own file: {e}"))?;
        let beside = own.parent().unwrap_or_else(|| "/".as_ref()).to_owned();
        let places = [beside.clone(), beside.join("../libexec/bulkhead")];
        let Some(place) = places.iter().find(|p| p.join("bulkhead-core").exists()) else {
            return Err(format!(
                "bulkhead-core is neither in {} nor in {}: install all binaries together",
                places[0].display(),
                places[1].display()
            ));
        };
        // Opened once: after an upgrade of the package a reset still gets the loader that fits.
        let mut binaries = Vec::new();
        for Part { process, .. } in parts.iter().chain(&JOBS) {
            if binaries.iter().any(|(known, _)| *known == process.binary) {
                continue;
            }
            let path = place.join(process.binary);
            let file = File::open(&path).map_err(|e| format!("{}: {e}", path.display()))?;
            binaries.push((process.binary, file));
        }
        enough_descriptors(parts)?;
        enough_file_size()?;
        let privileged = Uid::effective().is_root();
        // An ordinary user could only enter one that belongs to the compartment's user namespace.
        let network = if privileged { Some(Network::new()?) } else { None };
        let (uid, gid) = (Uid::effective().as_raw(), Gid::effective().as_raw());
        Ok(Self { binaries, privileged, uid, gid, network })
    }

    fn starter(&self) -> &'static str {
        if self.privileged { "root" } else { "user" }
    }

    /// The host id of a compartment when root starts it: one per launcher process and compartment.
    fn host_id(order: &Order<'_>) -> u32 {
        let place = PROCESSES.iter().position(|p| p.name == order.process.name);
        let number = |number: usize| u32::try_from(number).unwrap_or(0);
        let index = match order.device {
            Some(device) => FIRST_DEVICE_ID + number(device) % (IDS_PER_VM - FIRST_DEVICE_ID),
            None => number(place.unwrap_or(0)),
        };
        FIRST_HOST_ID + (std::process::id() & 0x3f_ffff) * IDS_PER_VM + index
    }

    fn identity(&self, host: u32, namespaces: &[Namespace]) -> Identity {
        match (namespaces.contains(&Namespace::User), self.privileged) {
            (true, true) => Identity::Mapped { inner: INNER_ID },
            (true, false) => Identity::SelfMapped { inner: INNER_ID, uid: self.uid, gid: self.gid },
            (false, true) => Identity::Host { id: Some(host) },
            (false, false) => Identity::Host { id: None },
        }
    }

    fn clone3(&self, namespaces: &[Namespace]) -> Result<Option<(Pid, OwnedFd)>, Errno> {
        let others: Vec<Namespace> =
            namespaces.iter().copied().filter(|namespace| *namespace != Namespace::Net).collect();
        match &self.network {
            Some(network) if namespaces.contains(&Namespace::Net) => network.clone3(&others),
            _ => clone3(namespaces),
        }
    }

    /// Starts a compartment. A step that fails in the child is reported by [`Started::failure`].
    /// `register` learns of its pidfd before it can do anything.
    ///
    /// # Errors
    /// One line that names the step.
    pub fn start(
        &self,
        order: Order<'_>,
        register: impl FnOnce(BorrowedFd<'_>) -> Result<(), String>,
    ) -> Result<Started, String> {
        let process = order.process;
        let fail = |step: &str, errno: Errno| format!("cannot start {}: {step}: {errno}", process.binary);
        let path = CString::new(process.binary).map_err(|_| fail("name", Errno::EINVAL))?;
        let binary = self.binaries.iter().find(|(name, _)| *name == process.binary);
        let (_, binary) = binary.ok_or_else(|| fail("open", Errno::ENOENT))?;
        let pipe = |flags| unistd::pipe2(flags | OFlag::O_CLOEXEC).map_err(|e| fail("pipe", e));
        // Neither a flood nor a stalled launcher may block the other side of a log.
        let (log, log_in) = pipe(OFlag::O_NONBLOCK)?;
        let (go_out, go) = pipe(OFlag::empty())?;
        let (failure, failure_in) = pipe(OFlag::empty())?;
        let namespaces: Vec<Namespace> = process.namespaces_under(self.starter()).collect();
        let mut arguments = vec![path];
        arguments.extend(order.names.iter().filter_map(|name| CString::new(*name).ok()));
        let host = Self::host_id(&order);
        let child = Child {
            process,
            binary: binary.as_fd(),
            arguments,
            fds: order.fds,
            log: log_in.as_fd(),
            identity: self.identity(host, &namespaces),
            starter: self.starter(),
            namespaces: namespaces.clone(),
            ram: order.ram,
            go: File::from(go_out),
        };
        let since = Instant::now();
        let (pid, pidfd) =
            match self.clone3(&namespaces).map_err(|e| format!("{}{}", fail("clone3", e), remedy(e)))? {
                Some(parent) => parent,
                None => {
                    drop(go);
                    fail_in_child(child, &failure_in)
                }
            };
        drop(child);
        let started = Started { pid, pidfd, log: File::from(log), failure: File::from(failure), since };
        let mapped = matches!(self.identity(host, &namespaces), Identity::Mapped { .. });
        let prepared =
            register(started.pidfd.as_fd()).and_then(|()| if mapped { map_ids(pid, host) } else { Ok(()) });
        if let Err(error) = prepared {
            started.undo();
            return Err(format!("cannot start {}: {error}", process.binary));
        }
        // A child that died meanwhile says why through its failure pipe.
        let _ = File::from(go).write_all(&[1]);
        Ok(started)
    }
}

/// The child's life; it returns only into `_exit`.
fn fail_in_child(child: Child<'_>, failure_in: &OwnedFd) -> ! {
    // Its own number may be given to another descriptor before it is needed.
    let report = park(failure_in.as_fd(), child.parking());
    let (step, errno) = child.run();
    if let Ok(report) = report {
        let _ = File::from(report).write_all(format!("{step}: {errno}{}", remedy(errno)).as_bytes());
    }
    // SAFETY: _exit does not return and runs no destructors of the launcher's copy.
    unsafe { libc::_exit(1) }
}

/// What the operator can do about an error of a start, if it is known.
fn remedy(errno: Errno) -> &'static str {
    match errno {
        Errno::ENOSPC => " (no more user namespaces: raise sysctl user.max_user_namespaces)",
        Errno::EPERM => " (not allowed here: `bulkhead doctor` says what is missing)",
        Errno::EACCES => " (the binaries must be executable for everyone, on a file system without noexec)",
        _ => "",
    }
}

/// Descriptors that a launcher with everything kept has open: what is kept for all, and in the child that is to
/// be one of them a copy of what that one has.
fn most_descriptors(parts: &[Part]) -> usize {
    let stores = || parts.iter().map(|part| part.process.store);
    let devices = parts.iter().filter(|part| part.device.is_some()).count();
    stores().sum::<usize>() + stores().max().unwrap_or(0) + OTHERS + devices * OF_A_DEVICE
}

/// Raises the limit of descriptors to what the host allows.
fn enough_descriptors(parts: &[Part]) -> Result<(), String> {
    let least = u64::try_from(most_descriptors(parts)).unwrap_or(u64::MAX);
    let fail = |e: Errno| format!("RLIMIT_NOFILE: {e}");
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).map_err(fail)?;
    if hard < least {
        return Err(format!(
            "only {hard} open files are allowed, {least} are needed: raise `ulimit -Hn` to that"
        ));
    }
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).map_err(fail)
}

/// The broker's state is the largest: two slots of 4 MiB.
const LEAST_FILE_SIZE: u64 = 8 << 20;

/// What compartments leave to their successors must fit into memfds, which count as files.
fn enough_file_size() -> Result<(), String> {
    let fail = |e: Errno| format!("RLIMIT_FSIZE: {e}");
    let (_, hard) = getrlimit(Resource::RLIMIT_FSIZE).map_err(fail)?;
    if hard < LEAST_FILE_SIZE {
        return Err(format!(
            "RLIMIT_FSIZE allows files of {} KiB only, memory counts as such: raise `ulimit -Hf`",
            hard >> 10
        ));
    }
    setrlimit(Resource::RLIMIT_FSIZE, hard, hard).map_err(fail)
}

/// Makes the kernel keep the exit status of children: SIGCHLD may be ignored by inheritance.
pub fn expect_children() {
    // SAFETY: the default action is no handler.
    let _ = unsafe { signal(Signal::SIGCHLD, SigHandler::SigDfl) };
}

/// Forks into new namespaces; `None` in the child.
fn clone3(namespaces: &[Namespace]) -> Result<Option<(Pid, OwnedFd)>, Errno> {
    let mut pidfd: libc::c_int = -1;
    let flags = namespaces.iter().fold(CLONE_CLEAR_SIGHAND | libc::CLONE_PIDFD as u64, |acc, n| {
        let flag = match n {
            Namespace::User => libc::CLONE_NEWUSER,
            Namespace::Mount => libc::CLONE_NEWNS,
            Namespace::Pid => libc::CLONE_NEWPID,
            Namespace::Net => libc::CLONE_NEWNET,
            Namespace::Ipc => libc::CLONE_NEWIPC,
            Namespace::Uts => libc::CLONE_NEWUTS,
        };
        acc | u64::from(flag.unsigned_abs())
    });
    // The fields of `clone_args` of linux/sched.h: flags, pidfd, child_tid, parent_tid, exit_signal, ...
    let mut args = [flags, &raw mut pidfd as u64, 0, 0, libc::SIGCHLD as u64, 0, 0, 0];
    // SAFETY: eight words are `clone_args` of size 64 (CLONE_ARGS_SIZE_VER0); without CLONE_VM and a
    // stack it behaves like fork, and the launcher has one thread, so the child's copy is whole.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, args.as_mut_ptr(), size_of_val(&args)) };
    match pid {
        -1 => Err(Errno::last()),
        0 => Ok(None),
        // SAFETY: CLONE_PIDFD has made this descriptor for us.
        pid => Ok(Some((Pid::from_raw(i32::try_from(pid).unwrap_or(-1)), unsafe {
            OwnedFd::from_raw_fd(pidfd)
        }))),
    }
}

fn map_ids(pid: Pid, host: u32) -> Result<(), String> {
    let map = format!("{INNER_ID} {host} 1");
    for file in ["uid_map", "gid_map"] {
        let path = format!("/proc/{pid}/{file}");
        fs::write(&path, &map).map_err(|e| {
            format!("{path}: {e} (root of a container may not map ids: run bulkhead as an ordinary user)")
        })?;
    }
    Ok(())
}

impl Started {
    /// Sends a signal; a process that has ended is none of our concern.
    pub fn signal(&self, signal: Signal) {
        // SAFETY: the descriptor is a pidfd that we own; no siginfo is passed.
        unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                self.pidfd.as_raw_fd(),
                signal as i32,
                std::ptr::null::<u8>(),
                0,
            )
        };
    }

    /// Ends a child that waits for its launcher, and leaves nothing of it.
    fn undo(&self) {
        self.signal(Signal::SIGKILL);
        let _ = waitid(Id::PIDFd(self.pidfd.as_fd()), WaitPidFlag::WEXITED);
    }

    /// Its exit, once its pidfd is readable; `None` while it runs.
    pub fn reap(&self) -> Option<WaitStatus> {
        let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG;
        match waitid(Id::PIDFd(self.pidfd.as_fd()), flags) {
            Ok(WaitStatus::StillAlive) => None,
            Ok(status) => Some(status),
            Err(_) => Some(WaitStatus::Exited(self.pid, 1)),
        }
    }

    /// The step that failed before the exec, if one did.
    pub fn failed_step(&mut self) -> io::Result<Option<String>> {
        let mut text = String::new();
        (&mut self.failure).take(256).read_to_string(&mut text)?;
        Ok(if text.is_empty() { None } else { Some(text) })
    }
}

#[cfg(test)]
mod tests {
    use bulkhead_jail::topology::{BLOCK, BROKER, CONSOLE, CORE, PCI};

    use super::*;

    /// What the changelog says.
    #[test]
    fn the_limit_of_descriptors_follows_from_the_parts() {
        let mut parts = vec![Part::of(&CORE), Part::of(&CONSOLE), Part::of(&BROKER)];
        assert_eq!(most_descriptors(&parts), 3056);
        parts.push(Part::of(&PCI));
        assert_eq!(most_descriptors(&parts), 3356);
        parts.extend([0, 1].map(|device| Part { process: &BLOCK, device: Some(device) }));
        assert_eq!(most_descriptors(&parts), 3356 + 2 * 33);
    }

    #[test]
    fn host_ids_stay_in_their_range() {
        let id = |process, device| {
            Host::host_id(&Order { process, device, names: Vec::new(), fds: Vec::new(), ram: 0 })
        };
        let all = [
            id(&CORE, None),
            id(&PCI, None),
            id(&BLOCK, Some(0)),
            id(&BLOCK, Some(47)),
            id(&BLOCK, Some(254)),
        ];
        for (index, id) in all.iter().enumerate() {
            assert!((FIRST_HOST_ID..=i32::MAX.unsigned_abs()).contains(id));
            assert!(!all[..index].contains(id), "{all:x?}");
        }
        // A device's number counts round.
        assert_eq!(id(&BLOCK, Some(48)), id(&BLOCK, Some(0)));
    }
}
