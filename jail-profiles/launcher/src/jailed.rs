//! The child's side of a start: from the fork to the exec of a compartment's binary.
//!
//! The child is a copy of the single-threaded launcher. Each step is one system call or two and has a
//! name, which is all that a failure reports.
#![expect(unsafe_code, reason = "prctl, capset, close_range and raw descriptors before the exec")]

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use bulkhead_bus_api::platform::ECAM;
use bulkhead_jail::surroundings::HOST_NAME;
use bulkhead_jail::topology::{FileSize, Namespace, Process};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl, open};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, SigmaskHow, sigprocmask};
use nix::sys::stat::Mode;
use nix::unistd::{self, Gid, Uid};

/// Number of the first inherited descriptor (`sd_listen_fds(3)`).
const FIRST_FD: RawFd = 3;

/// A step that failed, by name.
pub type Failed = (&'static str, Errno);

/// How the child gets its user and group id.
#[derive(Clone, Copy, Debug)]
pub enum Identity {
    /// Ids inside the user namespace, mapped from outside (`Mapped`) by the parent.
    Mapped {
        /// User and group id to take on, in the child's user namespace.
        inner: u32,
    },
    /// An ordinary user's own id, mapped by the child itself to `inner`.
    SelfMapped {
        /// The id inside.
        inner: u32,
        /// The invoking user.
        uid: u32,
        /// Its group.
        gid: u32,
    },
    /// No user namespace: take on this host id (root), or stay (ordinary user).
    Host {
        /// The host id to take on, if privileged.
        id: Option<u32>,
    },
}

/// Everything the child needs, prepared before the fork.
pub struct Child<'a> {
    /// What is started.
    pub process: &'static Process,
    /// Its executable.
    pub binary: BorrowedFd<'a>,
    /// `argv`.
    pub arguments: Vec<CString>,
    /// Its descriptors by name, in order.
    pub fds: Vec<(String, BorrowedFd<'a>)>,
    /// Where its log goes.
    pub log: BorrowedFd<'a>,
    /// Who it becomes.
    pub identity: Identity,
    /// `BULKHEAD_STARTER`.
    pub starter: &'static str,
    /// Namespaces that the fork has made.
    pub namespaces: Vec<Namespace>,
    /// Guest RAM in bytes, for RLIMIT_FSIZE.
    pub ram: u64,
    /// Gives one byte when the parent has mapped the ids, and the end when it has died.
    pub go: File,
}

impl Child<'_> {
    /// Becomes the compartment. Returns only if a step failed.
    pub fn run(mut self) -> Failed {
        match self.prepare() {
            Ok((binary, names)) => exec(&self, &binary, &names),
            Err(failed) => failed,
        }
    }

    /// Above every number that an inherited descriptor gets: those by name and `proc`.
    pub fn parking(&self) -> RawFd {
        RawFd::try_from(self.fds.len() + 1).map_or(RawFd::MAX, |count| count.saturating_add(FIRST_FD))
    }

    fn has(&self, namespace: Namespace) -> bool {
        self.namespaces.contains(&namespace)
    }

    fn prepare(&mut self) -> Result<(OwnedFd, Vec<String>), Failed> {
        die_with_launcher()?;
        self.wait_for_parent()?;
        unistd::setsid().map_err(|e| ("setsid", e))?;
        let tasks = if self.process.may_have("proc") { open_tasks() } else { None };
        let mut names: Vec<String> = self.fds.iter().map(|(name, _)| name.clone()).collect();
        if tasks.is_some() {
            names.push("proc".into());
        }
        let binary = self.place_descriptors(tasks)?;
        if self.has(Namespace::Mount) {
            empty_root()?;
        }
        unistd::chdir(c"/").map_err(|e| ("chdir", e))?;
        if self.has(Namespace::Uts) {
            unistd::sethostname(HOST_NAME).map_err(|e| ("sethostname", e))?;
        }
        self.limit()?;
        self.bound_capabilities()?;
        self.become_user()?;
        drop_capabilities()?;
        // The change of ids has cleared it.
        die_with_launcher()?;
        // SAFETY: prctl with constant arguments touches no memory of ours.
        if unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) } != 0 {
            return Err(("PR_SET_NO_NEW_PRIVS", Errno::last()));
        }
        sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None).map_err(|e| ("sigprocmask", e))?;
        Ok((binary, names))
    }

    fn wait_for_parent(&mut self) -> Result<(), Failed> {
        if let Identity::SelfMapped { inner, uid, gid } = self.identity {
            write_self("setgroups", "deny")?;
            write_self("uid_map", &format!("{inner} {uid} 1"))?;
            write_self("gid_map", &format!("{inner} {gid} 1"))?;
        }
        let mut byte = [0];
        match self.go.read(&mut byte) {
            Ok(1) => Ok(()),
            _ => Err(("waiting for the launcher", Errno::ESRCH)),
        }
    }

    /// Puts /dev/null on 0 and 1, the log on 2 and the named descriptors on 3 and up; returns the
    /// binary's descriptor, parked out of the way and closed by the exec.
    fn place_descriptors(&self, tasks: Option<File>) -> Result<OwnedFd, Failed> {
        let null = open(c"/dev/null", OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty())
            .map_err(|e| ("/dev/null", e))?;
        let parking = self.parking();
        let binary = park(self.binary, parking)?;
        let mut parked = Vec::new();
        for fd in [null.as_fd(), null.as_fd(), self.log] {
            parked.push(park(fd, parking)?);
        }
        for (_, fd) in &self.fds {
            parked.push(park(*fd, parking)?);
        }
        if let Some(tasks) = &tasks {
            parked.push(park(tasks.as_fd(), parking)?);
        }
        // From here on low numbers are others' than their owners think: close none of them.
        std::mem::forget((null, tasks));
        for (target, fd) in (0..).zip(&parked) {
            // SAFETY: dup2 onto numbers that only this process's copies of the launcher's owners
            // had; none of those is used or dropped before the exec.
            if unsafe { libc::dup2(fd.as_raw_fd(), target) } < 0 {
                return Err(("dup2", Errno::last()));
            }
        }
        Ok(binary)
    }

    fn limit(&self) -> Result<(), Failed> {
        // A host may allow less than the topology, never more.
        let set = |resource, value: u64| {
            let (_, hard) = getrlimit(resource).map_err(|e| ("getrlimit", e))?;
            setrlimit(resource, value.min(hard), value.min(hard)).map_err(|e| ("setrlimit", e))
        };
        let limits = &self.process.limits;
        set(Resource::RLIMIT_CORE, 0)?;
        set(Resource::RLIMIT_NOFILE, limits.nofile)?;
        set(Resource::RLIMIT_DATA, limits.data)?;
        match limits.fsize {
            FileSize::Bytes(bytes) => set(Resource::RLIMIT_FSIZE, bytes),
            FileSize::Ram => set(Resource::RLIMIT_FSIZE, self.ram.max(ECAM.len)),
            FileSize::Unlimited => Ok(()),
        }
    }

    /// Empties the bounding set. An ordinary user can do so only in a user namespace, and has nothing in it
    /// to gain elsewhere after no_new_privs.
    fn bound_capabilities(&self) -> Result<(), Failed> {
        if matches!(self.identity, Identity::Host { id: None }) {
            return Ok(());
        }
        for capability in 0..64 {
            // SAFETY: prctl with a number touches no memory of ours.
            if unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) } != 0 {
                return match Errno::last() {
                    // The kernel's last one was the one before.
                    Errno::EINVAL => Ok(()),
                    errno => Err(("PR_CAPBSET_DROP", errno)),
                };
            }
        }
        Ok(())
    }

    fn become_user(&self) -> Result<(), Failed> {
        let (Identity::Mapped { inner: id } | Identity::Host { id: Some(id) }) = self.identity else {
            return Ok(());
        };
        let (uid, gid) = (Uid::from_raw(id), Gid::from_raw(id));
        unistd::setgroups(&[]).map_err(|e| ("setgroups", e))?;
        unistd::setresgid(gid, gid, gid).map_err(|e| ("setresgid", e))?;
        unistd::setresuid(uid, uid, uid).map_err(|e| ("setresuid", e))
    }
}

/// A copy of a descriptor with a number of at least `parking`.
pub fn park(fd: BorrowedFd<'_>, parking: RawFd) -> Result<OwnedFd, Failed> {
    let number = fcntl(fd, FcntlArg::F_DUPFD_CLOEXEC(parking)).map_err(|e| ("dup", e))?;
    // SAFETY: fcntl has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

fn die_with_launcher() -> Result<(), Failed> {
    // SAFETY: prctl with constant arguments touches no memory of ours.
    match unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) } {
        0 => Ok(()),
        _ => Err(("PR_SET_PDEATHSIG", Errno::last())),
    }
}

/// Empties every capability set: login sessions and service managers may pass inheritable ones on.
fn drop_capabilities() -> Result<(), Failed> {
    // SAFETY: prctl with constant arguments touches no memory of ours.
    if unsafe { libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) } != 0 {
        return Err(("PR_CAP_AMBIENT", Errno::last()));
    }
    // `_LINUX_CAPABILITY_VERSION_3` and pid 0; then two empty sets of three words each.
    let (header, empty) = ([0x2008_0522u32, 0], [0u32; 6]);
    // SAFETY: version 3 makes the kernel read two words and six words, which the arrays hold.
    if unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), empty.as_ptr()) } != 0 {
        return Err(("capset", Errno::last()));
    }
    Ok(())
}

/// The thread directory of this very process as the host sees it, while the host's /proc is there.
fn open_tasks() -> Option<File> {
    File::open("/proc/self/task").ok()
}

fn write_self(file: &'static str, text: &str) -> Result<(), Failed> {
    let path = format!("/proc/self/{file}");
    let errno = |e: std::io::Error| ("mapping ids", Errno::from_raw(e.raw_os_error().unwrap_or(0)));
    File::options().write(true).open(path).and_then(|mut f| f.write_all(text.as_bytes())).map_err(errno)
}

/// Leaves the host's file system for an empty, read-only one.
fn empty_root() -> Result<(), Failed> {
    let none = None::<&CStr>;
    mount(none, c"/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
        .map_err(|e| ("private mounts", e))?;
    let flags = MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    // /proc is where every host has a directory to mount on.
    mount(Some(c"bulkhead"), c"/proc", Some(c"tmpfs"), flags, Some(c"size=4k,nr_inodes=2,mode=0555"))
        .map_err(|e| ("mount of an empty root", e))?;
    unistd::chdir(c"/proc").map_err(|e| ("chdir", e))?;
    match unistd::pivot_root(c".", c".") {
        Ok(()) => {
            umount2(c".", MntFlags::MNT_DETACH).map_err(|e| ("leaving the old root", e))?;
        }
        // A host that runs from its initramfs: the root cannot be pivoted, only covered.
        Err(Errno::EINVAL) => {
            mount(Some(c"."), c"/", none, MsFlags::MS_MOVE, none).map_err(|e| ("covering the root", e))?;
            unistd::chroot(c".").map_err(|e| ("chroot", e))?;
        }
        Err(errno) => return Err(("pivot_root", errno)),
    }
    Ok(())
}

fn exec(child: &Child<'_>, binary: &OwnedFd, names: &[String]) -> Failed {
    let count = RawFd::try_from(names.len()).unwrap_or(RawFd::MAX - FIRST_FD);
    let first = u32::try_from(FIRST_FD + count).unwrap_or(u32::MAX);
    // SAFETY: marks numbers close-on-exec; it closes nothing now.
    if unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) } != 0 {
        return ("close_range", Errno::last());
    }
    let variables = [
        format!("LISTEN_PID={}", unistd::getpid()),
        format!("LISTEN_FDS={count}"),
        format!("LISTEN_FDNAMES={}", names.join(":")),
        format!("BULKHEAD_STARTER={}", child.starter),
    ];
    let environment: Vec<CString> = variables.into_iter().filter_map(|v| CString::new(v).ok()).collect();
    let result =
        unistd::execveat(binary, c"", &child.arguments, &environment, nix::fcntl::AtFlags::AT_EMPTY_PATH);
    match result {
        Err(errno) => ("exec", errno),
        Ok(never) => match never {},
    }
}
