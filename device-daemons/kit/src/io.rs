//! System calls on guest memory.
#![expect(unsafe_code, reason = "vectors of guest memory for readv, writev and their kin; madvise")]

use std::os::fd::{AsRawFd as _, BorrowedFd};

use nix::errno::Errno;
use vm_memory::{GuestAddress, GuestMemoryBackend as _, MmapRegion};

use crate::chain::Bytes;
use crate::memory::Memory;

/// The most vectors of one system call (`IOV_MAX`).
const MAX_VECTORS: usize = 1024;

/// A mapping of guest memory never gets into a core dump.
pub(crate) fn keep_out_of_dumps(region: &MmapRegion) {
    // SAFETY: the range is the mapping's own; MADV_DONTDUMP changes no content.
    let result = unsafe { libc::madvise(region.as_ptr().cast(), region.size(), libc::MADV_DONTDUMP) };
    // Core dumps are off anyway (RLIMIT_CORE); this is the second lock.
    debug_assert!(result == 0);
}

/// Scratch room for vectors, kept from call to call.
#[derive(Debug, Default)]
pub struct Vectors {
    list: Vec<libc::iovec>,
}

// SAFETY: between calls the list's content is not used: `fill` begins it anew.
unsafe impl Send for Vectors {}

/// The memory is gone.
fn gone() -> Errno {
    Errno::EFAULT
}

impl Vectors {
    /// Lists the pieces of `bytes` in memory, at most [`MAX_VECTORS`]; returns how many bytes they hold.
    fn fill(&mut self, memory: &Memory, bytes: &Bytes<'_>) -> Result<u64, Errno> {
        self.list.clear();
        let mut total = 0;
        for (addr, len) in bytes.pieces() {
            let len = usize::try_from(len).map_err(|_| gone())?;
            for slice in memory.get_slices(GuestAddress(addr), len) {
                let slice = slice.map_err(|_| gone())?;
                if self.list.len() == MAX_VECTORS {
                    return Ok(total);
                }
                let base = slice.ptr_guard_mut().as_ptr().cast();
                self.list.push(libc::iovec { iov_base: base, iov_len: slice.len() });
                total += u64::try_from(slice.len()).map_err(|_| gone())?;
            }
        }
        Ok(total)
    }

    /// Calls once with the vectors of `bytes`.
    fn call(
        &mut self,
        memory: &Memory,
        bytes: &Bytes<'_>,
        call: impl Fn(*const libc::iovec, libc::c_int) -> isize,
    ) -> Result<u64, Errno> {
        self.fill(memory, bytes)?;
        let count = libc::c_int::try_from(self.list.len()).map_err(|_| gone())?;
        loop {
            match u64::try_from(call(self.list.as_ptr(), count)) {
                Ok(done) => return Ok(done),
                Err(_) if Errno::last() == Errno::EINTR => {}
                Err(_) => return Err(Errno::last()),
            }
        }
    }

    /// Reads from a file at `offset` into guest memory, all of it.
    ///
    /// # Errors
    /// The kernel's; `EIO` at the end of the file.
    pub fn read_at(
        &mut self,
        fd: BorrowedFd<'_>,
        memory: &Memory,
        bytes: Bytes<'_>,
        offset: u64,
    ) -> Result<(), Errno> {
        let fd = fd.as_raw_fd();
        self.all(memory, bytes, offset, |list, count, at| {
            // SAFETY: the vectors are inside mappings that `memory` holds for the whole call; the kernel writes at most
            // their lengths. The guest may change the content meanwhile: nobody holds a reference to it.
            unsafe { libc::preadv(fd, list, count, at) }
        })
    }

    /// Reads in the same way what needs no wait; false if that is not all of it, and then what was written to guest
    /// memory means nothing.
    ///
    /// # Errors
    /// The kernel's; `EOPNOTSUPP` where a file cannot be read so.
    pub fn read_cached(
        &mut self,
        fd: BorrowedFd<'_>,
        memory: &Memory,
        bytes: &Bytes<'_>,
        offset: u64,
    ) -> Result<bool, Errno> {
        let (fd, at) = (fd.as_raw_fd(), i64::try_from(offset).map_err(|_| Errno::EINVAL)?);
        let result = self.call(memory, bytes, |list, count| {
            // SAFETY: as in `read_at`.
            unsafe { libc::preadv2(fd, list, count, at, libc::RWF_NOWAIT) }
        });
        match result {
            Ok(done) => Ok(done == bytes.len()),
            Err(Errno::EAGAIN) => Ok(false),
            Err(errno) => Err(errno),
        }
    }

    /// Writes guest memory to a file at `offset`, all of it.
    ///
    /// # Errors
    /// The kernel's.
    pub fn write_at(
        &mut self,
        fd: BorrowedFd<'_>,
        memory: &Memory,
        bytes: Bytes<'_>,
        offset: u64,
    ) -> Result<(), Errno> {
        let fd = fd.as_raw_fd();
        self.all(memory, bytes, offset, |list, count, at| {
            // SAFETY: as in `read_at`; the kernel reads at most the vectors' lengths.
            unsafe { libc::pwritev(fd, list, count, at) }
        })
    }

    fn all(
        &mut self,
        memory: &Memory,
        mut bytes: Bytes<'_>,
        mut offset: u64,
        call: impl Fn(*const libc::iovec, libc::c_int, i64) -> isize,
    ) -> Result<(), Errno> {
        while bytes.len() > 0 {
            let at = i64::try_from(offset).map_err(|_| Errno::EINVAL)?;
            let done = self.call(memory, &bytes, |list, count| call(list, count, at))?;
            if done == 0 {
                return Err(Errno::EIO);
            }
            bytes = bytes.slice(done, bytes.len().saturating_sub(done)).ok_or(Errno::EIO)?;
            offset = offset.checked_add(done).ok_or(Errno::EINVAL)?;
        }
        Ok(())
    }

    /// Reads once from a descriptor with an own sense of position or packets (`readv(2)`); returns the bytes read.
    ///
    /// # Errors
    /// The kernel's.
    pub fn read(&mut self, fd: BorrowedFd<'_>, memory: &Memory, bytes: &Bytes<'_>) -> Result<u64, Errno> {
        let fd = fd.as_raw_fd();
        self.call(memory, bytes, |list, count| {
            // SAFETY: as in `read_at`.
            unsafe { libc::readv(fd, list, count) }
        })
    }

    /// Writes once (`writev(2)`); returns the bytes written.
    ///
    /// # Errors
    /// The kernel's.
    pub fn write(&mut self, fd: BorrowedFd<'_>, memory: &Memory, bytes: &Bytes<'_>) -> Result<u64, Errno> {
        let fd = fd.as_raw_fd();
        self.call(memory, bytes, |list, count| {
            // SAFETY: as in `write_at`.
            unsafe { libc::writev(fd, list, count) }
        })
    }
}
