//! Disks, and the locks that keep two programs from writing one of them.
//!
//! The locks are those that QEMU's programs take on an image, so that they exclude each other: a lock to read on byte 100
//! and up for each thing that the holder does with the image, and on byte 200 and up for each thing that nobody else may
//! do meanwhile. They belong to the open file description: they last as long as somebody has the disk.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt as _, OpenOptionsExt as _};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::libc;

use super::fdset::Sets;
use super::{Error, beneath};

/// First byte of what is done.
const DONE: i64 = 100;
/// First byte of what nobody else may do.
const DENIED: i64 = 200;
/// What is done with an image, as a distance from these bytes.
const READ: i64 = 0;
const WRITE: i64 = 1;

/// Opens a disk and locks it.
///
/// # Errors
/// The kernel's; it is neither a regular file nor a block device; somebody has it.
pub fn open(path: &str, read_only: bool, sets: &Sets) -> Result<OwnedFd, Error> {
    let failed = |e: Errno| Error::Output(path.to_owned(), e.into());
    let mode = if read_only { OFlag::O_RDONLY } else { OFlag::O_RDWR };
    let file = match sets.of_mode(path, mode).map_err(failed)? {
        Some(member) => File::from(member),
        None => {
            let mut options = OpenOptions::new();
            options.read(true).write(!read_only).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY);
            options.open(path).map_err(|e| Error::Output(path.to_owned(), e.into()))?
        }
    };
    checked(file, path, read_only)
}

/// The same in a directory that `path` cannot leave.
///
/// # Errors
/// As [`open`].
pub fn open_beneath(dir: BorrowedFd<'_>, path: &str, read_only: bool) -> Result<OwnedFd, Error> {
    let mode = if read_only { OFlag::O_RDONLY } else { OFlag::O_RDWR };
    let fd = beneath::open(dir, path, mode | OFlag::O_NONBLOCK);
    checked(File::from(fd.map_err(|e| Error::Output(path.to_owned(), e.into()))?), path, read_only)
}

fn checked(file: File, path: &str, read_only: bool) -> Result<OwnedFd, Error> {
    let kind = file.metadata().map_err(|e| Error::Output(path.to_owned(), e.into()))?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(Error::NotADisk(path.to_owned()));
    }
    lock(&file, path, read_only)?;
    Ok(file.into())
}

fn byte(at: i64, kind: i32) -> libc::flock {
    libc::flock {
        l_type: i16::try_from(kind).unwrap_or_default(),
        l_whence: i16::try_from(libc::SEEK_SET).unwrap_or_default(),
        l_start: at,
        l_len: 1,
        l_pid: 0,
    }
}

/// Says what is done and what nobody else may do, then looks whether others have said otherwise.
fn lock(file: &File, path: &str, read_only: bool) -> Result<(), Error> {
    let failed = |e: Errno| Error::Output(path.to_owned(), e.into());
    let done = if read_only { &[READ][..] } else { &[READ, WRITE] };
    let mine = done.iter().map(|what| DONE + what).chain([DENIED + WRITE]);
    for at in mine {
        fcntl(file.as_fd(), FcntlArg::F_OFD_SETLK(&byte(at, libc::F_RDLCK))).map_err(failed)?;
    }
    let is_taken = |at: i64| {
        let mut found = byte(at, libc::F_WRLCK);
        fcntl(file.as_fd(), FcntlArg::F_OFD_GETLK(&mut found)).map_err(failed)?;
        Ok(i32::from(found.l_type) != libc::F_UNLCK)
    };
    for what in done {
        if is_taken(DENIED + what)? {
            let name = if *what == WRITE { "write" } else { "consistent read" };
            return Err(Error::DiskLock(name, path.to_owned()));
        }
    }
    if is_taken(DONE + WRITE)? {
        return Err(Error::DiskSharedLock(path.to_owned()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scratch(name: &str) -> String {
        let path = std::env::temp_dir().join(format!("bulkhead-disk-{}-{name}", std::process::id()));
        std::fs::write(&path, [0; 512]).unwrap();
        path.into_os_string().into_string().unwrap()
    }

    fn try_open(path: &str, read_only: bool) -> Result<OwnedFd, String> {
        open(path, read_only, &Sets::default()).map_err(|e| e.to_string())
    }

    #[test]
    fn nobody_else_writes_a_disk() {
        let path = scratch("locked");
        let writer = try_open(&path, false).unwrap();
        let taken = format!("Failed to get \"write\" lock: is another process using the image [{path}]?");
        assert_eq!(try_open(&path, false).unwrap_err(), taken);
        let shared =
            format!("Failed to get shared \"write\" lock: is another process using the image [{path}]?");
        assert_eq!(try_open(&path, true).unwrap_err(), shared);
        // It lasts as long as a copy of the descriptor.
        let copy = writer.try_clone().unwrap();
        drop(writer);
        assert_eq!(try_open(&path, false).unwrap_err(), taken);
        drop(copy);
        let readers = (try_open(&path, true).unwrap(), try_open(&path, true).unwrap());
        assert_eq!(try_open(&path, false).unwrap_err(), taken);
        drop(readers);
        drop(try_open(&path, false).unwrap());
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn what_is_no_disk() {
        let error = try_open("/dev/null", false).unwrap_err();
        assert_eq!(error, "'/dev/null' is neither a regular file nor a block device");
        let error = try_open("/nowhere/disk", false).unwrap_err();
        assert_eq!(error, "Could not open '/nowhere/disk': No such file or directory");
    }
}
