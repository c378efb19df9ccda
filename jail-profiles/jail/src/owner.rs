//! A thread that a descriptor names, for a process in another pid namespace.
//!
//! Thread ids mean something in their own pid namespace only. The owner of a descriptor (`F_SETOWN_EX` of `fcntl(2)`) is the
//! thread itself: whoever reads it gets the number that the thread has in the reader's namespace, and nobody can name a
//! thread that it does not see.
#![expect(unsafe_code, reason = "nix has no F_SETOWN_EX and F_GETOWN_EX")]

use std::os::fd::{AsRawFd as _, BorrowedFd};

use nix::errno::Errno;

/// `struct f_owner_ex` of linux/fcntl.h.
#[repr(C)]
struct Owner {
    kind: libc::c_int,
    id: libc::pid_t,
}

/// `F_OWNER_TID`.
const THREAD: libc::c_int = 0;
/// `F_SETOWN_EX` and `F_GETOWN_EX`.
const SET: libc::c_int = 15;
const GET: libc::c_int = 16;

/// Makes this thread the owner.
///
/// # Errors
/// The kernel's.
pub fn name_this_thread(fd: BorrowedFd<'_>) -> Result<(), Errno> {
    let owner = Owner { kind: THREAD, id: nix::unistd::gettid().as_raw() };
    // SAFETY: the kernel reads one `f_owner_ex`, which lives across the call.
    Errno::result(unsafe { libc::fcntl(fd.as_raw_fd(), SET, &raw const owner) }).map(drop)
}

/// The id of the thread that owns a descriptor, here; none if no thread does, it has ended, or it is not seen from here.
#[must_use]
pub fn thread_named_by(fd: BorrowedFd<'_>) -> Option<u32> {
    let mut owner = Owner { kind: -1, id: 0 };
    // SAFETY: the kernel writes one `f_owner_ex`, which lives across the call.
    let got = Errno::result(unsafe { libc::fcntl(fd.as_raw_fd(), GET, &raw mut owner) });
    let id = u32::try_from(owner.id).ok().filter(|id| *id > 0);
    if got.is_ok() && owner.kind == THREAD { id } else { None }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd as _;
    use std::os::unix::net::UnixStream;
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn a_thread_is_named_by_its_descriptor_while_it_lives() {
        let (fd, copy) = UnixStream::pair().unwrap();
        assert_eq!(thread_named_by(fd.as_fd()), None, "nobody's");
        name_this_thread(fd.as_fd()).unwrap();
        let own = u32::try_from(nix::unistd::gettid().as_raw()).unwrap();
        assert_eq!(thread_named_by(fd.try_clone().unwrap().as_fd()), Some(own));
        let other = std::thread::spawn(move || {
            name_this_thread(copy.as_fd()).unwrap();
            assert!(thread_named_by(copy.as_fd()).is_some_and(|id| id != own));
            copy
        });
        let orphan = other.join().unwrap();
        // A thread can be joined a moment before the kernel forgets its id.
        let patience = Instant::now() + Duration::from_secs(10);
        while thread_named_by(orphan.as_fd()).is_some() {
            assert!(Instant::now() < patience, "it has ended");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}
