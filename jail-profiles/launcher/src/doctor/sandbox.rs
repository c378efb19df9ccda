//! Whether the parts of a jail work, by using them.

use std::fs;

use nix::errno::Errno;
use nix::libc;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{getgid, getuid};

use super::sys;
use crate::opener;

/// The step at which namespaces fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Blocked {
    /// What was tried.
    pub step: &'static str,
    /// The answer.
    pub errno: Errno,
}

/// The steps, in their order; a child reports a failed one by its place here.
const STEPS: [&str; 3] = ["unshare", "mapping user ids", "mounting"];

/// Tries all namespaces of a jail in a child, as the invoking user.
pub fn namespaces() -> Result<(), Blocked> {
    let failed = |step| move |errno| Blocked { step, errno };
    let (result, report) = nix::unistd::pipe().map_err(failed("pipe"))?;
    let child = sys::in_child(|| {
        let (step, errno) = match enter() {
            Ok(()) => (u8::MAX, 0),
            Err((step, errno)) => (step, errno as i32),
        };
        let [a, b, c, d] = errno.to_le_bytes();
        // A parent that is not told takes it for killed.
        let _ = nix::unistd::write(&report, &[step, a, b, c, d]);
    });
    let child = child.map_err(failed("fork"))?;
    drop(report);
    let mut packet = [0; 5];
    let read = nix::unistd::read(&result, &mut packet);
    let ended = waitpid(child, None);
    match (read, ended, packet) {
        (Ok(5), Ok(WaitStatus::Exited(_, 0)), [u8::MAX, ..]) => Ok(()),
        (Ok(5), _, [step, a, b, c, d]) => Err(Blocked {
            step: STEPS.get(usize::from(step)).copied().unwrap_or("namespaces"),
            errno: Errno::from_raw(i32::from_le_bytes([a, b, c, d])),
        }),
        // A seccomp filter of whoever started us did that.
        _ => Err(Blocked { step: "unshare (killed)", errno: Errno::EPERM }),
    }
}

fn enter() -> Result<(), (u8, Errno)> {
    let (uid, gid) = (getuid(), getgid());
    let all = CloneFlags::CLONE_NEWUSER
        | CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWPID
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWUTS;
    unshare(all).map_err(|errno| (0, errno))?;
    for (file, text) in [
        ("setgroups", "deny".to_owned()),
        ("uid_map", format!("0 {uid} 1")),
        ("gid_map", format!("0 {gid} 1")),
    ] {
        let errno = |e: std::io::Error| e.raw_os_error().map_or(Errno::UnknownErrno, Errno::from_raw);
        fs::write(format!("/proc/self/{file}"), text).map_err(|e| (1, errno(e)))?;
    }
    // AppArmor lets some users make a user namespace and then refuses everything in it.
    let flags = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(None::<&str>, "/", None::<&str>, flags, None::<&str>).map_err(|errno| (2, errno))
}

/// Names of the filter actions that the jails and their tests use.
pub const ACTION_NAMES: [&str; 3] = ["kill_process", "trap", "errno"];
const ACTIONS: [u32; 3] = [libc::SECCOMP_RET_KILL_PROCESS, libc::SECCOMP_RET_TRAP, libc::SECCOMP_RET_ERRNO];

/// Whether the kernel has the filter actions; else the names of those it lacks.
pub fn seccomp_actions() -> Result<(), Vec<&'static str>> {
    let actions = ACTION_NAMES.iter().zip(ACTIONS);
    let missing: Vec<&'static str> =
        actions.filter(|(_, action)| !sys::has_seccomp_action(*action)).map(|(name, _)| *name).collect();
    if missing.is_empty() { Ok(()) } else { Err(missing) }
}

/// Whether a memfd can be made and sealed.
pub fn sealed_memfd() -> Result<(), String> {
    opener::sealed("doctor", b"x").map(drop).map_err(|e| e.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_seccomp_actions_of_any_kernel_of_today() {
        assert_eq!(seccomp_actions(), Ok(()));
    }

    #[test]
    fn memfds_can_be_sealed() {
        assert_eq!(sealed_memfd(), Ok(()));
    }
}
