//! Changes of a command's surroundings between fork and exec: user, limits, namespaces, session.
#![expect(unsafe_code, reason = "pre_exec")]

use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl, open};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use nix::unistd::{Gid, Pid, Uid, chown, setgroups, setpgid, setresgid, setresuid, setsid, write};

/// Device number of /dev/kvm (`Documentation/admin-guide/devices.txt`: misc, 232).
const KVM: (u64, u64) = (10, 232);
/// Device number of /dev/null.
const NULL: (u64, u64) = (1, 3);

/// One change, made in the child.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Become this user, with this group and one supplementary group.
    User(u32, u32, Option<u32>),
    /// Set both limits of a resource.
    Limit(Resource, u64),
    /// A /dev without KVM.
    NoKvm,
    /// A /dev whose kvm belongs to root and this group.
    KvmOf(u32),
    /// A /dev whose kvm is another device.
    WrongKvm,
    /// No more user namespaces can be made.
    NoUserNamespaces,
    /// A process group of its own.
    Group,
    /// A session of its own, with standard input as its terminal.
    Terminal,
    /// The descriptor of this number stays open over the exec.
    Keep(i32),
}

/// Adds steps to a command.
pub trait Enter {
    /// Makes `steps` in order before the exec; one that fails fails the start.
    fn enter(&mut self, steps: &[Step]) -> &mut Self;
}

impl Enter for Command {
    fn enter(&mut self, steps: &[Step]) -> &mut Self {
        let steps = steps.to_vec();
        // SAFETY: between fork and exec the closure only makes system calls; nothing in `Step::make` allocates,
        // takes a lock or touches another thread's state.
        unsafe { self.pre_exec(move || steps.iter().try_for_each(|step| step.make())) }
    }
}

impl Step {
    fn make(self) -> io::Result<()> {
        match self {
            Self::User(uid, gid, group) => {
                let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
                match group.map(Gid::from_raw) {
                    Some(group) => setgroups(&[group])?,
                    None => setgroups(&[])?,
                }
                setresgid(gid, gid, gid)?;
                setresuid(uid, uid, uid)?;
            }
            Self::Limit(resource, value) => setrlimit(resource, value, value)?,
            Self::NoKvm => own_dev(None)?,
            Self::KvmOf(group) => {
                own_dev(Some(KVM))?;
                chown(c"/dev/kvm", None, Some(Gid::from_raw(group)))?;
            }
            Self::WrongKvm => own_dev(Some(NULL))?,
            Self::NoUserNamespaces => {
                unshare(CloneFlags::CLONE_NEWUSER)?;
                let file = open(c"/proc/sys/user/max_user_namespaces", OFlag::O_WRONLY, Mode::empty())?;
                write(&file, b"0")?;
            }
            Self::Group => setpgid(Pid::from_raw(0), Pid::from_raw(0))?,
            Self::Terminal => {
                setsid()?;
                // SAFETY: makes the terminal on descriptor 0 the session's own; no pointer is passed.
                nix::errno::Errno::result(unsafe { nix::libc::ioctl(0, nix::libc::TIOCSCTTY, 0) })?;
            }
            Self::Keep(number) => {
                // SAFETY: the test holds the descriptor open over the start.
                let fd = unsafe { BorrowedFd::borrow_raw(number) };
                fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty()))?;
            }
        }
        Ok(())
    }
}

/// A /dev of the child's own with null and, if given, a kvm that only root and its group may open.
fn own_dev(kvm: Option<(u64, u64)>) -> nix::Result<()> {
    let none = None::<&std::ffi::CStr>;
    unshare(CloneFlags::CLONE_NEWNS)?;
    mount(none, c"/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    mount(Some(c"dev"), c"/dev", Some(c"tmpfs"), MsFlags::empty(), none)?;
    let node = |path: &std::ffi::CStr, mode, (major, minor)| {
        let mode = Mode::from_bits_truncate(mode);
        mknod(path, SFlag::S_IFCHR, Mode::empty(), makedev(major, minor))?;
        nix::sys::stat::fchmodat(
            nix::fcntl::AT_FDCWD,
            path,
            mode,
            nix::sys::stat::FchmodatFlags::FollowSymlink,
        )
    };
    node(c"/dev/null", 0o666, NULL)?;
    match kvm {
        Some(number) => node(c"/dev/kvm", 0o660, number),
        None => Ok(()),
    }
}

/// Runs `act` as another user. Credentials are a thread's to the kernel, so it has one of its own.
///
/// # Errors
/// Not root.
pub fn as_user<T: Send>(uid: u32, gid: u32, act: impl FnOnce() -> T + Send) -> io::Result<T> {
    let change = move || -> io::Result<()> {
        for (call, id) in [(nix::libc::SYS_setresgid, gid), (nix::libc::SYS_setresuid, uid)] {
            // SAFETY: three numbers, no pointer; unlike the C library's function it changes this thread alone.
            nix::errno::Errno::result(unsafe { nix::libc::syscall(call, id, id, id) })?;
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let thread = scope.spawn(move || change().map(|()| act()));
        thread.join().unwrap_or_else(|_| Err(io::Error::other("a panic")))
    })
}

/// Limits the descriptors of another process: soft and hard limit.
///
/// # Errors
/// There is no such process, or it may not be changed.
pub fn limit_descriptors(pid: i32, soft: u64, hard: u64) -> io::Result<()> {
    let limit = nix::libc::rlimit { rlim_cur: soft, rlim_max: hard };
    // SAFETY: reads one rlimit, which lives over the call, and writes none.
    let done =
        unsafe { nix::libc::prlimit(pid, nix::libc::RLIMIT_NOFILE, &raw const limit, std::ptr::null_mut()) };
    nix::errno::Errno::result(done)?;
    Ok(())
}
