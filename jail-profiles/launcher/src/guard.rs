//! The guard: a process that outlives the launcher by a moment and leaves nothing behind.
//!
//! It is forked before anything else exists, learns of every compartment (a pidfd) and every path
//! that the launcher creates, and waits for the launcher's end, whatever ends it. Then it kills what
//! still runs, removes the paths that are still the launcher's own, gives the terminal its modes
//! back and exits.
#![expect(unsafe_code, reason = "fork, close_range, pidfd_send_signal and _exit")]

use std::cell::RefCell;
use std::ffi::OsStr;
use std::fs::Metadata;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use bulkhead_jail::link::{LinkError, recv_packet, send_packet};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::signal::{SigSet, SigmaskHow, sigprocmask};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, socketpair};
use nix::sys::termios::{SetArg, Termios, tcgetattr, tcsetattr};
use nix::unistd::{ForkResult, Pid, Uid, fork};

use crate::opener::{self, Note};

/// The longest path that is remembered, in bytes (`PATH_MAX`).
const MAX_PATH: usize = 4096;

/// How long killed compartments may take to be gone, in milliseconds.
const KILL_TIME: u16 = 2000;

/// The launcher's end.
#[derive(Debug)]
pub struct Guard {
    link: OwnedFd,
    pid: Pid,
    /// The terminal's modes before the VM.
    terminal: Option<Termios>,
    /// The paths it was told of, for a successor.
    paths: RefCell<Vec<Vec<u8>>>,
}

/// What the guard remembers.
#[derive(Default)]
struct Memory {
    processes: Vec<OwnedFd>,
    paths: Vec<(PathBuf, u64, u64)>,
    directories: Vec<PathBuf>,
    /// Sockets (`s`) and PID files (`f`) that were to be created and may have been.
    coming: Vec<(u8, String)>,
}

impl Guard {
    /// Forks the guard. Call it while the launcher has one thread and nothing to lose.
    ///
    /// # Errors
    /// One line.
    pub fn fork() -> Result<Self, String> {
        let terminal = tcgetattr(io::stdin()).ok();
        let (link, pid) = start(terminal.as_ref())?;
        Ok(Self { link, pid, terminal, paths: RefCell::new(Vec::new()) })
    }

    /// Forks a successor of a guard that was killed; it knows the paths, not the processes.
    ///
    /// # Errors
    /// One line.
    pub fn replace(&mut self) -> Result<(), String> {
        let _ = nix::sys::wait::waitpid(self.pid, None);
        (self.link, self.pid) = start(self.terminal.as_ref())?;
        self.paths.borrow().iter().try_for_each(|packet| self.send(packet, &[]))
    }

    fn send(&self, packet: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), String> {
        send_packet(self.link.as_fd(), packet, fds, MsgFlags::empty())
            .map_err(|e| format!("the guard died: {e}"))
    }

    /// A compartment to kill.
    ///
    /// # Errors
    /// The guard is gone.
    pub fn process(&self, pidfd: BorrowedFd<'_>) -> Result<(), String> {
        self.send(b"k", &[pidfd])
    }

    /// A path to remove, as long as it is still this file.
    fn path(&self, path: &Path, device: u64, inode: u64) -> Result<(), String> {
        let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        let mut packet = vec![b'p'];
        packet.extend(device.to_le_bytes());
        packet.extend(inode.to_le_bytes());
        packet.extend(absolute.as_os_str().as_encoded_bytes());
        let sent = self.send(&packet, &[]);
        self.paths.borrow_mut().push(packet);
        sent
    }

    /// What the opener is about to create, and what it has created.
    ///
    /// # Errors
    /// The guard is gone.
    pub fn note(&self, note: Note<'_>) -> Result<(), String> {
        match note {
            Note::Socket(path) => self.send(&[b"s", path.as_bytes()].concat(), &[]),
            Note::PidFile(path) => self.send(&[b"f", path.as_bytes()].concat(), &[]),
            Note::Created(new) => self.path(&new.path, new.dev, new.ino),
        }
    }

    /// A directory that is about to be made, under a name that nobody else would choose.
    ///
    /// # Errors
    /// The guard is gone.
    pub fn directory(&self, path: &Path) -> Result<(), String> {
        let packet = [b"d", path.as_os_str().as_encoded_bytes()].concat();
        self.send(&packet, &[])
    }

    /// The guard's life line: it hangs up when the guard has died.
    #[must_use]
    pub fn life(&self) -> BorrowedFd<'_> {
        self.link.as_fd()
    }

    /// Lets the guard do its work now and waits for it.
    pub fn finish(self) {
        drop(self.link);
        let _ = nix::sys::wait::waitpid(self.pid, None);
    }
}

/// Forks a guard; returns the launcher's end of its link.
fn start(terminal: Option<&Termios>) -> Result<(OwnedFd, Pid), String> {
    let fail = |e: Errno| format!("cannot start the guard: {e}");
    let (flags, launcher) = (SockFlag::SOCK_CLOEXEC, std::process::id());
    let (link, other) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).map_err(fail)?;
    // SAFETY: the launcher has one thread, so the child's copy of the process is whole.
    match unsafe { fork() }.map_err(fail)? {
        ForkResult::Parent { child } => Ok((link, child)),
        ForkResult::Child => {
            drop(link);
            watch(&other, terminal, launcher);
            // SAFETY: _exit does not return; the copy's destructors belong to the launcher.
            unsafe { libc::_exit(0) }
        }
    }
}

/// The guard's life.
fn watch(link: &OwnedFd, terminal: Option<&Termios>, launcher: u32) {
    // A terminal's Ctrl-C or a service manager's SIGTERM is for the launcher.
    let _ = sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::all()), None);
    let _ = nix::unistd::setsid();
    let _ = nix::sys::prctl::set_name(c"bulkhead-guard");
    close_others(link);
    let mut memory = Memory::default();
    let mut packet = [0; MAX_PATH + 17];
    loop {
        match recv_packet(link.as_fd(), &mut packet, MsgFlags::empty()) {
            Ok((0, _)) | Err(LinkError::Closed | LinkError::Io(_) | LinkError::Version { .. }) => break,
            Ok((len, fds)) => memory.learn(packet.get(..len).unwrap_or(&[]), fds),
            // Only the launcher's end ends the watch.
            Err(LinkError::Malformed | LinkError::WouldBlock) => {}
        }
    }
    memory.clean(launcher);
    if let Some(modes) = terminal {
        let _ = tcsetattr(io::stdin(), SetArg::TCSANOW, modes);
    }
}

/// Gives up everything but the terminal and the link: a descriptor kept here would keep a peer waiting.
fn close_others(link: &OwnedFd) {
    let keep = link.as_raw_fd().unsigned_abs();
    for (first, last) in [(3, keep.saturating_sub(1)), (keep + 1, u32::MAX)] {
        if first <= last {
            // SAFETY: the guard never returns to the code that owns these copies and ends by _exit.
            unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
        }
    }
}

/// Whether a process has ended, or does so within so many milliseconds.
fn ended(pidfd: &OwnedFd, milliseconds: u16) -> bool {
    let mut poll_fds = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
    matches!(poll(&mut poll_fds, milliseconds), Ok(1))
}

fn path_of(bytes: &[u8]) -> PathBuf {
    OsStr::from_bytes(bytes).into()
}

impl Memory {
    fn learn(&mut self, packet: &[u8], fds: Vec<OwnedFd>) {
        match packet.split_first() {
            Some((b'k', _)) => {
                // Every boot brings a loader: forget those that have ended.
                self.processes.retain(|pidfd| !ended(pidfd, 0));
                self.processes.extend(fds);
            }
            Some((b'p', rest)) => {
                let number =
                    |at: usize| rest.get(at..).and_then(|r| r.first_chunk()).map(|b| u64::from_le_bytes(*b));
                if let (Some(device), Some(inode), Some(path)) = (number(0), number(8), rest.get(16..)) {
                    let path = path_of(path);
                    self.coming.retain(|(_, coming)| !std::path::absolute(coming).is_ok_and(|p| p == path));
                    self.paths.push((path, device, inode));
                }
            }
            Some((kind @ (b's' | b'f'), path)) => {
                self.coming.push((*kind, String::from_utf8_lossy(path).into_owned()));
            }
            Some((b'd', path)) => self.directories.push(path_of(path)),
            _ => {}
        }
    }

    fn clean(self, launcher: u32) {
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
            match std::fs::symlink_metadata(path) {
                Ok(found) if found.dev() != *device || found.ino() != *inode => {}
                Ok(_) => drop(std::fs::remove_file(path)),
                Err(_) => {}
            }
        }
        for (kind, path) in &self.coming {
            match kind {
                b's' => opener::abandon_socket(path),
                _ => opener::abandon_pid_file(path, launcher),
            }
        }
        for path in &self.directories {
            let ours = |found: Metadata| found.is_dir() && found.uid() == Uid::effective().as_raw();
            if std::fs::symlink_metadata(path).is_ok_and(ours) {
                crate::rendezvous::remove(path);
            }
        }
        for pidfd in &self.processes {
            ended(pidfd, KILL_TIME);
        }
    }
}
