//! TAP interfaces.
#![expect(unsafe_code, reason = "ioctl of TAP interfaces")]

use std::collections::BTreeMap;
use std::ffi::CStr;
use std::fs::{File, OpenOptions};
use std::os::fd::{AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt as _;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::libc;

use super::Error;
use super::error::Cause;

/// What our daemon expects: frames without a head of their own, with the offloads' head before each.
const FLAGS: i16 = 0x0002 | 0x1000 | 0x4000;
/// IFF_MULTI_QUEUE.
const SEVERAL: i16 = 0x0100;
/// IFF_DETACH_QUEUE.
const DETACH: i16 = 0x0400;

/// `struct ifreq` of linux/if.h, as far as TAP interfaces use it.
#[repr(C)]
struct Request {
    name: [u8; libc::IFNAMSIZ],
    flags: i16,
    rest: [u8; 22],
}

impl Request {
    fn new(name: &str, flags: i16) -> Self {
        let mut request = Self { name: [0; libc::IFNAMSIZ], flags, rest: [0; 22] };
        // The last byte stays 0.
        let room = request.name.iter_mut().take(libc::IFNAMSIZ - 1);
        room.zip(name.bytes()).for_each(|(place, byte)| *place = byte);
        request
    }

    fn name(&self) -> String {
        CStr::from_bytes_until_nul(&self.name)
            .map_or_else(|_| String::new(), |n| n.to_string_lossy().into_owned())
    }
}

/// The interfaces to which the host has given a name, by their network back end.
#[derive(Debug, Default)]
pub struct Taps(BTreeMap<String, String>);

impl Taps {
    /// Opens a queue pair of an interface, which is made if it does not exist.
    ///
    /// # Errors
    /// The kernel's, with a remedy where there is one.
    pub fn open(&mut self, netdev: &str, name: Option<&str>, several: bool) -> Result<OwnedFd, Error> {
        let given = name.map(str::to_owned).or_else(|| self.0.get(netdev).cloned());
        let name = given.unwrap_or_else(|| "tap%d".to_owned());
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun");
        let file = file.map_err(|e| Error::Tun(e.into()))?;
        let flags = if several { FLAGS | SEVERAL } else { FLAGS };
        let mut request = Request::new(&name, flags);
        set_interface(&file, &mut request).map_err(|errno| match errno {
            Errno::EPERM => Error::TapPermission(name.clone()),
            Errno::EBUSY => Error::TapBusy(name.clone()),
            errno => Error::Tap(name.clone(), errno.into()),
        })?;
        self.0.insert(netdev.to_owned(), request.name());
        Ok(file.into())
    }
}

/// Checks an inherited descriptor, and makes it non-blocking.
///
/// # Errors
/// It is not of a TAP interface with the head of offloads.
pub fn check(fd: OwnedFd, number: u32) -> Result<OwnedFd, Error> {
    let file = File::from(fd);
    let mut request = Request::new("", 0);
    interface(&file, &mut request).map_err(|_| Error::NotATap(number))?;
    if request.flags & FLAGS != FLAGS {
        return Err(Error::TapFlags(number));
    }
    let nonblocking = || {
        let flags = OFlag::from_bits_retain(fcntl(&file, FcntlArg::F_GETFL)?);
        fcntl(&file, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))
    };
    nonblocking().map_err(|e| Error::Io(Cause(e)))?;
    Ok(file.into())
}

/// Has the interface put no packets into a queue: nobody reads it.
pub fn leave(fd: BorrowedFd<'_>) {
    let mut request = Request::new("", DETACH);
    // SAFETY: TUNSETQUEUE reads one `struct ifreq` of 40 bytes, the size of `Request`.
    // EINVAL: it is so already.
    let _ = unsafe { libc::ioctl(fd.as_raw_fd(), 0x4004_54d9, &raw mut request) };
}

/// TUNSETIFF.
fn set_interface(file: &File, request: &mut Request) -> Result<(), Errno> {
    // SAFETY: the kernel reads and writes one `struct ifreq` of 40 bytes, the size of `Request`.
    Errno::result(unsafe { libc::ioctl(file.as_raw_fd(), 0x4004_54ca, &raw mut *request) }).map(drop)
}

/// TUNGETIFF.
fn interface(file: &File, request: &mut Request) -> Result<(), Errno> {
    // SAFETY: as above; another file refuses the call.
    Errno::result(unsafe { libc::ioctl(file.as_raw_fd(), 0x8004_54d2, &raw mut *request) }).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_left(fd: &OwnedFd) -> bool {
        let mut request = Request::new("", 0);
        interface(&fd.try_clone().unwrap().into(), &mut request).unwrap();
        request.flags & DETACH != 0
    }

    /// A device has one pair of the two that its interface has, or both: what is not read gets nothing.
    #[test]
    fn queues_that_a_device_does_not_use_are_left() {
        for (mq, left) in [("off", true), ("on", false)] {
            let line =
                format!("-netdev tap,id=n,ifname=tap0,queues=2 -device virtio-net-pci,netdev=n,id=d,mq={mq}");
            let daemon = crate::machine::tests::planned(&line).bus.daemons.remove(0);
            let mut taps = Taps::default();
            // Only the administrator makes interfaces.
            let Ok(first) = taps.open("n", None, true) else { return };
            let fds = [first, taps.open("n", None, true).unwrap()];
            let fds = ["tap.d.0", "tap.d.1"].map(str::to_owned).into_iter().zip(fds).collect();
            for _ in 0..2 {
                crate::opener::leave_unused(&daemon, &fds);
                assert_eq!((is_left(&fds["tap.d.0"]), is_left(&fds["tap.d.1"])), (false, left), "mq={mq}");
            }
        }
    }

    #[test]
    fn a_request_has_the_kernels_size_and_a_name_that_ends() {
        assert_eq!(size_of::<Request>(), 40);
        assert_eq!(Request::new("tap0", FLAGS).name(), "tap0");
        assert_eq!(Request::new("averyverylongname", FLAGS).name(), "averyverylongna");
    }

    #[test]
    fn other_descriptors_are_no_taps() {
        let null = File::open("/dev/null").unwrap();
        assert_eq!(check(null.into(), 7).unwrap_err(), Error::NotATap(7));
    }
}
