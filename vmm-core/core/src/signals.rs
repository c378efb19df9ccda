//! Signals: termination as a descriptor, the kick of a vCPU thread as an empty handler.
//!
//! Core is the first process of its pid namespace, where a signal without a handler is dropped.

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use vmm_sys_util::signal::register_signal_handler;

use crate::error::{Error, Result, system};
use crate::sys::KICK_SIGNAL;

extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// Sets signals up for all threads that are made after this; returns the descriptor that tells of
/// SIGTERM, SIGINT and SIGHUP, which end the VM, and SIGPWR, which presses its power button.
pub fn set_up() -> Result<SignalFd> {
    // SIGXFSZ: a RAM larger than RLIMIT_FSIZE is to be an error, not a death.
    for signal in [KICK_SIGNAL, libc::SIGXFSZ] {
        register_signal_handler(signal, nothing)
            .map_err(|e| Error::System("sigaction", nix::errno::Errno::from_raw(e.errno())))?;
    }
    let taken = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGPWR];
    let taken: SigSet = taken.into_iter().collect();
    taken.thread_block().map_err(system("sigprocmask"))?;
    SignalFd::with_flags(&taken, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK).map_err(system("signalfd"))
}
