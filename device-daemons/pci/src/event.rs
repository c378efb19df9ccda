//! Eventfds that back ends hold, too: a call on one of them never waits, whatever they do to it.

use std::cell::OnceCell;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use bulkhead_jail::alarm::Alarm;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::{read, write};

/// How long a back end that plays with a counter can hold this process up.
const LIMIT: Duration = Duration::from_millis(10);

thread_local! {
    static ALARM: OnceCell<Alarm> = const { OnceCell::new() };
}

/// Makes ready. To be called before the jail.
///
/// # Errors
/// The host's.
pub fn prepare() -> Result<(), Errno> {
    let alarm = Alarm::new()?;
    // A second call changes nothing.
    ALARM.with(|cell| cell.set(alarm)).or(Ok(()))
}

fn within<T>(call: impl FnOnce() -> Result<T, Errno>) -> Result<T, Errno> {
    ALARM.with(|cell| {
        if cell.get().is_none() {
            prepare()?;
        }
        cell.get().ok_or(Errno::ENOSYS)?.within(LIMIT, call)
    })
}

fn is_ready(fd: &OwnedFd, what: PollFlags) -> bool {
    let mut list = [PollFd::new(fd.as_fd(), what)];
    poll(&mut list, PollTimeout::ZERO) == Ok(1)
}

/// Whether it has counted something.
#[must_use]
pub fn is_signalled(fd: &OwnedFd) -> bool {
    is_ready(fd, PollFlags::POLLIN)
}

/// Signals it. One whose counter is full is signalled already.
///
/// # Errors
/// The host's; `EINTR` if somebody played with the counter at the same time.
pub fn signal(fd: &OwnedFd) -> Result<(), Errno> {
    if is_ready(fd, PollFlags::POLLOUT) {
        within(|| write(fd, &1u64.to_ne_bytes()))?;
    }
    Ok(())
}

/// Takes back what it has counted, if anything.
pub fn drain(fd: &OwnedFd) {
    if is_signalled(fd) {
        // What somebody else has taken at the same time is gone as well.
        let _taken = within(|| read(fd, &mut [0; 8]));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::thread;
    use std::time::Instant;

    use nix::sys::eventfd::{EfdFlags, EventFd};

    use super::*;

    const FULL: u64 = u64::MAX - 1;

    fn eventfd(count: u64) -> OwnedFd {
        let fd: OwnedFd = EventFd::from_flags(EfdFlags::EFD_CLOEXEC).unwrap().into();
        write(&fd, &count.to_ne_bytes()).unwrap();
        fd
    }

    fn take(fd: &OwnedFd) -> u64 {
        let mut count = [0; 8];
        read(fd, &mut count).unwrap();
        u64::from_ne_bytes(count)
    }

    #[test]
    fn signals_count_and_are_taken_back() {
        let fd = eventfd(0);
        assert!(!is_signalled(&fd));
        signal(&fd).unwrap();
        signal(&fd).unwrap();
        assert!(is_signalled(&fd));
        assert_eq!(take(&fd), 2);
        signal(&fd).unwrap();
        drain(&fd);
        drain(&fd);
        assert!(!is_signalled(&fd));
    }

    #[test]
    fn a_full_counter_is_left_alone_and_a_call_that_waits_ends() {
        let fd = eventfd(FULL);
        signal(&fd).unwrap();
        assert_eq!(within(|| write(&fd, &1u64.to_ne_bytes())), Err(Errno::EINTR));
        assert_eq!(take(&fd), FULL);
        assert_eq!(within(|| read(&fd, &mut [0; 8])), Err(Errno::EINTR));
    }

    #[test]
    fn one_who_plays_with_the_counter_holds_nobody_up() {
        let fd = Arc::new(eventfd(0));
        let over = Arc::new(AtomicBool::new(false));
        let player = thread::spawn({
            let (fd, over) = (Arc::clone(&fd), Arc::clone(&over));
            move || {
                while !over.load(Ordering::Relaxed) {
                    write(&fd, &FULL.to_ne_bytes()).unwrap();
                    read(&fd, &mut [0; 8]).unwrap();
                }
            }
        });
        let (begun, mut calls, mut waits) = (Instant::now(), 0, 0);
        while !player.is_finished() {
            over.store(waits == 1 || begun.elapsed() > Duration::from_secs(3), Ordering::Relaxed);
            calls += 1;
            let call = Instant::now();
            waits += usize::from(signal(&fd) == Err(Errno::EINTR));
            drain(&fd);
            assert!(call.elapsed() < Duration::from_secs(2), "call {calls}");
        }
        player.join().unwrap();
    }
}
