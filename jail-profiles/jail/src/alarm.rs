//! A limit for one system call that a less trusted peer could make wait for ever.
//!
//! An eventfd is such a case: its writers wait while its counter is full, its readers while that is 0, and O_NONBLOCK
//! belongs to the open file, so that whoever holds the descriptor, too, can take it away at any moment. A look
//! before the call (`poll`) does not help against one who changes the counter between the two. So a timer
//! interrupts the call.

use std::cell::RefCell;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::signal::{SaFlags, SigAction, SigEvent, SigHandler, SigSet, SigevNotify, Signal, sigaction};
use nix::sys::time::TimeSpec;
use nix::sys::timer::{Expiration, Timer, TimerSetTimeFlags};
use nix::time::ClockId;
use nix::unistd::gettid;

/// A timer that interrupts the system call under way in the thread that made it.
pub struct Alarm(RefCell<Timer>);

extern "C" fn on_alarm(_: libc::c_int) {}

impl Alarm {
    /// Takes SIGALRM over. To be made before the jail, which allows neither of the two calls.
    ///
    /// # Errors
    /// The host's.
    #[expect(unsafe_code, reason = "a signal handler")]
    pub fn new() -> Result<Self, Errno> {
        let action = SigAction::new(SigHandler::Handler(on_alarm), SaFlags::empty(), SigSet::empty());
        // SAFETY: the handler does nothing, which is async-signal-safe.
        unsafe { sigaction(Signal::SIGALRM, &action) }?;
        let thread_id = gettid().as_raw();
        let notify = SigevNotify::SigevThreadId { signal: Signal::SIGALRM, thread_id, si_value: 0 };
        Ok(Self(RefCell::new(Timer::new(ClockId::CLOCK_MONOTONIC, SigEvent::new(notify))?)))
    }

    /// Makes a call that ends with EINTR if it is not over in time.
    ///
    /// # Errors
    /// The call's, or `EINTR`.
    pub fn within<T>(&self, limit: Duration, call: impl FnOnce() -> Result<T, Errno>) -> Result<T, Errno> {
        let mut timer = self.0.try_borrow_mut().map_err(|_| Errno::EBUSY)?;
        let limit = TimeSpec::from(limit);
        // Again and again, as the first one may come before the call has begun.
        timer.set(Expiration::IntervalDelayed(limit, limit), TimerSetTimeFlags::empty())?;
        let result = call();
        timer.set(Expiration::OneShot(TimeSpec::from(Duration::ZERO)), TimerSetTimeFlags::empty())?;
        result
    }
}

impl std::fmt::Debug for Alarm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Alarm")
    }
}
