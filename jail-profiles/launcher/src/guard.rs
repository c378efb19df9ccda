//! The guard: a process that outlives the launcher by a moment and leaves nothing behind.
//!
//! It is forked before anything else exists, learns of every compartment (a pidfd) and every path
//! that the launcher creates, and waits for the launcher's end, whatever ends it. Then it kills what
//! still runs, removes the paths that are still the launcher's own, gives the terminal its modes
//! back and exits.
#![expect(unsafe_code, reason = "fork, pidfd_send_signal and _exit")]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use bulkhead_jail::link::{LinkError, recv_packet, send_packet};
use nix::errno::Errno;
use nix::sys::signal::{SigSet, SigmaskHow, sigprocmask};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, socketpair};
use nix::sys::termios::{SetArg, Termios, tcgetattr, tcsetattr};
use nix::unistd::{ForkResult, Pid, fork};

/// The longest path that is remembered, in bytes (`PATH_MAX`).
const MAX_PATH: usize = 4096;

/// The launcher's end.
#[derive(Debug)]
pub struct Guard {
    link: OwnedFd,
    pid: Pid,
}

/// What the guard remembers.
#[derive(Default)]
struct Memory {
    processes: Vec<OwnedFd>,
    paths: Vec<(PathBuf, u64, u64)>,
}

impl Guard {
    /// Forks the guard. Call it while the launcher has one thread and nothing to lose.
    ///
    /// # Errors
    /// One line.
    pub fn fork() -> Result<Self, String> {
        let fail = |e: Errno| format!("cannot start the guard: {e}");
        let kind = (AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC);
        let (link, other) = socketpair(kind.0, kind.1, None, kind.2).map_err(fail)?;
        let terminal = tcgetattr(io::stdin()).ok();
        // SAFETY: the launcher has one thread, so the child's copy of the process is whole.
        match unsafe { fork() }.map_err(fail)? {
            ForkResult::Parent { child } => Ok(Self { link, pid: child }),
            ForkResult::Child => {
                drop(link);
                watch(&other, terminal.as_ref());
                // SAFETY: _exit does not return; the copy's destructors belong to the launcher.
                unsafe { libc::_exit(0) }
            }
        }
    }

    /// A compartment to kill.
    ///
    /// # Errors
    /// The guard is gone.
    pub fn process(&self, pidfd: BorrowedFd<'_>) -> Result<(), String> {
        send_packet(self.link.as_fd(), b"k", &[pidfd], MsgFlags::empty())
            .map_err(|e| format!("the guard died: {e}"))
    }

    /// A path to remove, as long as it is still this file.
    ///
    /// # Errors
    /// The guard is gone.
    pub fn path(&self, path: &Path, device: u64, inode: u64) -> Result<(), String> {
        let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        let mut packet = vec![b'p'];
        packet.extend(device.to_le_bytes());
        packet.extend(inode.to_le_bytes());
        packet.extend(absolute.as_os_str().as_encoded_bytes());
        send_packet(self.link.as_fd(), &packet, &[], MsgFlags::empty())
            .map_err(|e| format!("the guard died: {e}"))
    }

    /// Lets the guard do its work now and waits for it.
    pub fn finish(self) {
        drop(self.link);
        let _ = nix::sys::wait::waitpid(self.pid, None);
    }
}

/// The guard's life.
fn watch(link: &OwnedFd, terminal: Option<&Termios>) {
    // A terminal's Ctrl-C or a service manager's SIGTERM is for the launcher.
    let _ = sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::all()), None);
    let _ = nix::unistd::setsid();
    let _ = nix::sys::prctl::set_name(c"bulkhead-guard");
    let mut memory = Memory::default();
    let mut packet = [0; MAX_PATH + 17];
    loop {
        match recv_packet(link.as_fd(), &mut packet, MsgFlags::empty()) {
            Ok((0, _)) | Err(LinkError::Closed | LinkError::Io(_) | LinkError::Version { .. }) => break,
            Ok((len, fds)) => memory.learn(packet.get(..len).unwrap_or(&[]), fds),
            Err(LinkError::Malformed | LinkError::WouldBlock) => {}
        }
    }
    memory.clean();
    if let Some(modes) = terminal {
        let _ = tcsetattr(io::stdin(), SetArg::TCSANOW, modes);
    }
}

impl Memory {
    fn learn(&mut self, packet: &[u8], fds: Vec<OwnedFd>) {
        match packet.split_first() {
            Some((b'k', _)) => self.processes.extend(fds),
            Some((b'p', rest)) => {
                let number =
                    |at: usize| rest.get(at..).and_then(|r| r.first_chunk()).map(|b| u64::from_le_bytes(*b));
                if let (Some(device), Some(inode), Some(path)) = (number(0), number(8), rest.get(16..)) {
                    use std::os::unix::ffi::OsStrExt as _;
                    let path = PathBuf::from(std::ffi::OsStr::from_bytes(path));
                    self.paths.push((path, device, inode));
                }
            }
            _ => {}
        }
    }

    fn clean(self) {
        for pidfd in &self.processes {
            // SAFETY: the descriptor is a pidfd that we own; no siginfo is passed.
            unsafe {
                libc::syscall(
                    libc::SYS_pidfd_send_signal,
                    pidfd.as_raw_fd(),
                    libc::SIGKILL,
                    std::ptr::null::<u8>(),
                    0,
                )
            };
        }
        for (path, device, inode) in &self.paths {
            let own = std::fs::symlink_metadata(path).is_ok_and(|m| m.dev() == *device && m.ino() == *inode);
            if own {
                let _ = std::fs::remove_file(path);
            }
        }
    }
}
