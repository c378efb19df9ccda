//! A TAP interface's queue: its offloads, and whether it takes part.
#![expect(unsafe_code, reason = "ioctl of TAP interfaces")]

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};

use crate::device::{F_GUEST_CSUM, F_GUEST_TSO4, F_GUEST_TSO6};

/// `struct ifreq` of linux/if.h, as far as TAP interfaces use it.
#[repr(C)]
struct Request {
    name: [u8; libc::IFNAMSIZ],
    flags: i16,
    rest: [u8; 22],
}

const ATTACH: i16 = 0x0200;
const DETACH: i16 = 0x0400;

/// A queue of an interface.
#[derive(Debug)]
pub struct Tap {
    file: File,
}

impl Tap {
    /// Takes a descriptor over: no call on it waits, a packet has a head of `head` bytes.
    ///
    /// # Errors
    /// The kernel's: it is no TAP interface with `IFF_VNET_HDR`.
    pub fn new(fd: OwnedFd, head: i32) -> Result<Self, Errno> {
        let flags = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL)?);
        fcntl(&fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        let file = File::from(fd);
        // SAFETY: TUNSETVNETHDRSZ reads one int.
        Errno::result(unsafe { libc::ioctl(file.as_raw_fd(), 0x4004_54d8, &raw const head) })?;
        Ok(Self { file })
    }

    /// The kernel hands over what a driver with these features takes.
    ///
    /// # Errors
    /// The kernel's.
    pub fn set_offloads(&self, features: u64) -> Result<(), Errno> {
        // Segments come without checksums only.
        let mut offloads: libc::c_ulong = 0;
        if features & F_GUEST_CSUM != 0 {
            offloads |= 1;
            offloads |= if features & F_GUEST_TSO4 != 0 { 2 } else { 0 };
            offloads |= if features & F_GUEST_TSO6 != 0 { 4 } else { 0 };
        }
        // SAFETY: TUNSETOFFLOAD takes its flags by value.
        Errno::result(unsafe { libc::ioctl(self.file.as_raw_fd(), 0x4004_54d0, offloads) }).map(drop)
    }

    /// The interface puts packets into this queue, or does not.
    ///
    /// # Errors
    /// The kernel's; `EINVAL` if it is so already, or if the interface has one queue.
    pub fn attach(&self, attached: bool) -> Result<(), Errno> {
        let flags = if attached { ATTACH } else { DETACH };
        let mut request = Request { name: [0; libc::IFNAMSIZ], flags, rest: [0; 22] };
        // SAFETY: TUNSETQUEUE reads one `struct ifreq` of 40 bytes, the size of `Request`.
        Errno::result(unsafe { libc::ioctl(self.file.as_raw_fd(), 0x4004_54d9, &raw mut request) }).map(drop)
    }

    /// The file.
    #[must_use]
    pub const fn file(&self) -> &File {
        &self.file
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_descriptors_are_refused() {
        assert_eq!(size_of::<Request>(), 40);
        let null = File::open("/dev/null").unwrap();
        assert!(Tap::new(null.into(), 12).is_err());
    }
}
