//! A descriptor that a client passed, and which others are the same.
//!
//! systemd keeps one file description once, so what is kept beyond this process's death is counted by
//! file description, not by how often clients have passed it.
#![expect(unsafe_code, reason = "kcmp has no safe wrapper")]

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::rc::Rc;

/// `KCMP_FILE` of linux/kcmp.h: whether two descriptors share a file description.
const KCMP_FILE: libc::c_int = 0;

/// A descriptor with the number under which it is kept. Whoever shares it keeps it open.
#[derive(Clone, Debug)]
pub struct Held(Rc<(u64, OwnedFd)>);

impl Held {
    /// Under a number that no other one has or had.
    #[must_use]
    pub fn new(key: u64, fd: OwnedFd) -> Self {
        Self(Rc::new((key, fd)))
    }

    /// The number under which it is kept.
    #[must_use]
    pub fn key(&self) -> u64 {
        self.0.0
    }

    /// Whether nobody else shares it.
    #[must_use]
    pub fn is_last(&self) -> bool {
        Rc::strong_count(&self.0) == 1
    }

    /// The descriptor itself: the own one, or a copy while others share it.
    ///
    /// # Errors
    /// This process is at its limit of descriptors.
    pub fn into_fd(self) -> std::io::Result<OwnedFd> {
        Rc::try_unwrap(self.0).map_or_else(|shared| shared.1.try_clone(), |(_, fd)| Ok(fd))
    }

    /// Whether `fd` is of the same file description. A kernel that does not tell says no.
    #[must_use]
    pub fn is_same(&self, fd: &OwnedFd) -> bool {
        let process = libc::c_long::from(nix::unistd::getpid().as_raw());
        let (ours, theirs) = (self.0.1.as_raw_fd(), fd.as_raw_fd());
        // SAFETY: kcmp takes five numbers and touches no memory of ours; both descriptors are open, being
        // borrowed.
        let order = unsafe { libc::syscall(libc::SYS_kcmp, process, process, KCMP_FILE, ours, theirs) };
        order == 0
    }
}

impl AsFd for Held {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.1.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[test]
    fn copies_are_the_same_and_other_openings_are_not() {
        let file = File::open("/dev/null").unwrap();
        let held = Held::new(1, file.try_clone().unwrap().into());
        assert!(held.is_same(&file.into()));
        assert!(!held.is_same(&File::open("/dev/null").unwrap().into()));
    }

    #[test]
    fn what_is_shared_stays_open() {
        let held = Held::new(7, File::open("/dev/null").unwrap().into());
        let other = held.clone();
        let copy = held.into_fd().unwrap();
        assert!(other.is_same(&copy), "a copy");
        assert_eq!(other.key(), 7);
        assert!(other.into_fd().is_ok());
    }
}
