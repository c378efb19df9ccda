//! Memory of memory devices: memfds, and files.

use std::fs::{File, OpenOptions};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt as _;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, FcntlArg, OFlag, SealFlag, fallocate, fcntl};
use nix::libc;
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::{Error, beneath};
use crate::options::Backing;

/// Mode of a file that is made here, less what the user's mask takes away.
const MODE: u32 = 0o644;

/// Opens or makes memory of `size` bytes.
///
/// # Errors
/// The kernel's; a file that is no regular one, or that has another length.
pub fn open(backing: &Backing, size: u64, prealloc: bool) -> Result<OwnedFd, Error> {
    let file = match backing {
        Backing::Memfd => memfd(size, None)?,
        Backing::HugePages(len) => memfd(size, Some(*len))?,
        Backing::File(path) => {
            let mut options = OpenOptions::new();
            options.read(true).write(true).create(true).truncate(false).mode(MODE);
            let file = options.custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path);
            sized(file.map_err(|e| Error::BackingStore(path.clone(), e.into()))?, path, size)?
        }
    };
    taken(file, size, prealloc)
}

/// The same; a file is in a directory that its path cannot leave.
///
/// # Errors
/// As [`open`].
pub fn open_beneath(
    dir: BorrowedFd<'_>,
    backing: &Backing,
    size: u64,
    prealloc: bool,
) -> Result<OwnedFd, Error> {
    let Backing::File(path) = backing else { return open(backing, size, prealloc) };
    let file = beneath::open(dir, path, OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_NONBLOCK);
    let file = File::from(file.map_err(|e| Error::BackingStore(path.clone(), e.into()))?);
    taken(sized(file, path, size)?, size, prealloc)
}

/// A memfd whose length never changes.
fn memfd(size: u64, huge_pages: Option<u64>) -> Result<File, Error> {
    let failed = |e: Errno| Error::Memfd(size, e.into());
    let mut flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    if let Some(len) = huge_pages {
        // Its logarithm, in the bits where the kernel has it (memfd_create(2)).
        let shift = len.trailing_zeros() << libc::MFD_HUGE_SHIFT;
        flags |= MFdFlags::MFD_HUGETLB | MFdFlags::from_bits_retain(shift);
    }
    let file = File::from(memfd_create("bulkhead-memory", flags).map_err(failed)?);
    file.set_len(size).map_err(|e| Error::Memfd(size, e.into()))?;
    let seals = SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_SEAL;
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals)).map_err(failed)?;
    Ok(file)
}

/// The file with at least `size` bytes. As in QEMU, an empty one gets them, and one that has others is left alone.
fn sized(file: File, path: &str, size: u64) -> Result<File, Error> {
    let failed = |e: std::io::Error| Error::BackingStore(path.to_owned(), e.into());
    let metadata = file.metadata().map_err(failed)?;
    if !metadata.is_file() {
        return Err(Error::BackingStoreKind(path.to_owned()));
    }
    match metadata.len() {
        0 => file.set_len(size).map_err(failed)?,
        len if len < size => return Err(Error::BackingStoreSize(len, size)),
        _ => {}
    }
    Ok(file)
}

/// All of it, if it is to be taken from the host at once.
fn taken(file: File, size: u64, prealloc: bool) -> Result<OwnedFd, Error> {
    if prealloc {
        let len = i64::try_from(size).map_err(|_| Error::Prealloc(Errno::EFBIG.into()))?;
        fallocate(&file, FallocateFlags::FALLOC_FL_KEEP_SIZE, 0, len)
            .map_err(|e| Error::Prealloc(e.into()))?;
    }
    Ok(file.into())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use super::*;

    fn said(backing: &Backing, size: u64) -> String {
        open(backing, size, false).unwrap_err().to_string()
    }

    #[test]
    fn the_length_of_a_memfd_never_changes() {
        let file = File::from(open(&Backing::Memfd, 1 << 20, false).unwrap());
        assert_eq!((file.metadata().unwrap().len(), file.metadata().unwrap().blocks()), (1 << 20, 0));
        assert!(file.set_len(1 << 21).is_err() && file.set_len(1 << 19).is_err());
        let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(&file, hole, 0, 4096).unwrap();
        let file = File::from(open(&Backing::Memfd, 1 << 20, true).unwrap());
        assert_eq!(file.metadata().unwrap().blocks(), 2048, "all of it is there at once");
        let error = said(&Backing::HugePages(3 << 20), 4 << 20);
        assert!(error.starts_with("failed to resize memfd to 4194304: "), "{error}");
    }

    #[test]
    fn a_file_has_the_length_that_is_asked_for() {
        let path = std::env::temp_dir().join(format!("bulkhead-memory-{}", std::process::id()));
        let text = path.to_str().unwrap().to_owned();
        let backing = Backing::File(text.clone());
        let file = File::from(open(&backing, 1 << 20, false).unwrap());
        assert_eq!(file.metadata().unwrap().len(), 1 << 20, "a new one");
        file.set_len(1 << 21).unwrap();
        open(&backing, 1 << 20, false).unwrap();
        assert_eq!(file.metadata().unwrap().len(), 1 << 21, "a longer one stays as it is");
        file.set_len(4096).unwrap();
        let short = "backing store size 0x1000 does not match 'size' option 0x100000";
        assert_eq!(said(&backing, 1 << 20), short);
        file.set_len(0).unwrap();
        let dir = File::open(std::env::temp_dir()).unwrap();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        open_beneath(std::os::fd::AsFd::as_fd(&dir), &Backing::File(name), 1 << 20, false).unwrap();
        assert_eq!(file.metadata().unwrap().len(), 1 << 20, "an empty one");
        std::fs::remove_file(&path).unwrap();
        for (path, cause) in [
            ("/nowhere/f", "No such file or directory"),
            ("/dev/null", "it is not a regular file"),
            ("/", "Is a directory"),
        ] {
            let error = format!("can't open backing store {path} for guest RAM: {cause}");
            assert_eq!(said(&Backing::File(path.to_owned()), 4096), error);
        }
    }
}
