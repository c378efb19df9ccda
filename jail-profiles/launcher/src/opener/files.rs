//! Files: kernels, outputs, the PID file, the embedded guest and /dev/kvm.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, SealFlag, fcntl};
use nix::libc;
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::{Error, beneath};

/// How often a PID file that goes away under our hands is created anew.
const PID_FILE_TRIES: u32 = 16;

/// More than a PID file holds, in bytes.
const PID_FILE_SIZE: u64 = 32;

/// A path that we created.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Created {
    /// Absolute path.
    pub path: PathBuf,
    /// Device of the file that we made there.
    pub dev: u64,
    /// Inode of that file.
    pub ino: u64,
}

impl Created {
    /// What is at `path` now.
    ///
    /// # Errors
    /// If it cannot be looked at.
    pub fn at(path: &Path) -> io::Result<Self> {
        let metadata = fs::symlink_metadata(path)?;
        Ok(Self { path: std::path::absolute(path)?, dev: metadata.dev(), ino: metadata.ino() })
    }

    /// Removes it, unless something else is there by now.
    pub fn remove(&self) {
        if Self::at(&self.path).is_ok_and(|now| now == *self) {
            // It may be gone between the two calls; then there is nothing to do.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// A regular file to read. `O_NONBLOCK`: a FIFO must be refused, not waited for.
pub fn input(path: &str) -> Result<OwnedFd, Error> {
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path);
    regular(file.map_err(|e| Error::Io(e.into()))?)
}

/// The file, if it is a regular one.
pub fn regular(file: File) -> Result<OwnedFd, Error> {
    let metadata = file.metadata().map_err(|e| Error::Io(e.into()))?;
    if metadata.is_file() { Ok(file.into()) } else { Err(Error::NotRegular) }
}

/// A regular file to read, in a directory that `path` cannot leave.
pub fn input_beneath(dir: BorrowedFd<'_>, path: &str) -> Result<OwnedFd, Error> {
    let flags = OFlag::O_RDONLY | OFlag::O_NONBLOCK;
    regular(File::from(beneath::open(dir, path, flags).map_err(|e| Error::Io(e.into()))?))
}

/// A file to write, created if need be, in a directory that `path` cannot leave.
pub fn output_beneath(dir: BorrowedFd<'_>, path: &str, append: bool) -> Result<OwnedFd, Error> {
    let how = if append { OFlag::O_APPEND } else { OFlag::O_TRUNC };
    let opened = beneath::open(dir, path, OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_NONBLOCK | how);
    // Also a FIFO without a reader is refused: nobody waits here.
    regular(File::from(opened.map_err(|e| Error::Output(path.to_owned(), e.into()))?))
}

/// A file to write, created if need be.
pub fn output(path: &str, append: bool) -> Result<OwnedFd, Error> {
    let mut options = OpenOptions::new();
    options.create(true).custom_flags(libc::O_NOCTTY);
    if append {
        options.append(true)
    } else {
        options.write(true).truncate(true)
    };
    let file = options.open(path).map_err(|e| Error::Output(path.to_owned(), e.into()))?;
    Ok(file.into())
}

/// A memfd that nobody can change any more.
pub fn sealed(name: &str, bytes: &[u8]) -> Result<OwnedFd, Error> {
    let io = |e: io::Error| Error::Io(e.into());
    let fd = memfd_create(name, MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING);
    let mut file = File::from(fd.map_err(|e| Error::Io(e.into()))?);
    file.write_all(bytes).map_err(io)?;
    let seals =
        SealFlag::F_SEAL_WRITE | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_SEAL;
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals)).map_err(|e| Error::Io(e.into()))?;
    Ok(file.into())
}

/// /dev/kvm.
pub fn kvm() -> Result<OwnedFd, Error> {
    kvm_at(Path::new("/dev/kvm"))
}

/// The KVM device at `path`.
pub fn kvm_at(path: &Path) -> Result<OwnedFd, Error> {
    let file = OpenOptions::new().read(true).write(true).open(path).map_err(|e| kvm_error(e.into()))?;
    Ok(file.into())
}

/// What the failure to open /dev/kvm means.
pub fn kvm_error(cause: super::error::Cause) -> Error {
    match cause.0 {
        Errno::ENOENT => Error::KvmMissing,
        Errno::EACCES | Errno::EPERM => Error::KvmPermission(user()),
        _ => Error::KvmUnavailable(cause),
    }
}

/// The user's name for a remedy to copy. Only a plausible one: the environment is not checked.
pub fn user() -> String {
    let plausible = |name: &String| {
        !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
    };
    ["USER", "LOGNAME"]
        .iter()
        .filter_map(|name| std::env::var(name).ok())
        .find(plausible)
        .unwrap_or_else(|| "$(id -un)".to_owned())
}

/// A file with the launcher's process id, locked as long as it stays open.
///
/// The lock is of the kind that QEMU takes (it also excludes ordinary record locks).
pub fn pid_file(path: &str) -> Result<(OwnedFd, Created), Error> {
    let failed = |e: io::Error| Error::PidFile(path.to_owned(), e.into());
    for _ in 0..PID_FILE_TRIES {
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(libc::O_NOCTTY | libc::O_NONBLOCK)
            .open(path)
            .map_err(failed)?;
        lock(&file, path)?;
        // Its former owner may have removed it between our open and its unlock.
        let metadata = file.metadata().map_err(failed)?;
        match Created::at(Path::new(path)) {
            Ok(created) if (created.dev, created.ino) == (metadata.dev(), metadata.ino()) => {
                file.set_len(0).map_err(failed)?;
                file.write_all(format!("{}\n", std::process::id()).as_bytes()).map_err(failed)?;
                return Ok((file.into(), created));
            }
            Ok(_) | Err(_) => {}
        }
    }
    Err(Error::PidFileLocked)
}

/// Removes the PID file of a launcher that was killed while it wrote it: nobody holds it, and it is empty
/// or that launcher's.
pub fn abandon_pid_file(path: &str, launcher: u32) {
    let file =
        OpenOptions::new().read(true).write(true).custom_flags(libc::O_NOCTTY | libc::O_NONBLOCK).open(path);
    let Ok(file) = file else { return };
    let (Ok(metadata), Ok(created)) = (file.metadata(), Created::at(Path::new(path))) else { return };
    let same = (created.dev, created.ino) == (metadata.dev(), metadata.ino());
    if !metadata.is_file() || !same || lock(&file, path).is_err() {
        return;
    }
    let mut text = String::new();
    let read = (&file).take(PID_FILE_SIZE).read_to_string(&mut text);
    if read.is_ok() && (text.is_empty() || text.trim_end() == launcher.to_string()) {
        created.remove();
    }
}

fn lock(file: &File, path: &str) -> Result<(), Error> {
    let whole = libc::flock {
        l_type: i16::try_from(libc::F_WRLCK).unwrap_or_default(),
        l_whence: i16::try_from(libc::SEEK_SET).unwrap_or_default(),
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    match fcntl(file, FcntlArg::F_OFD_SETLK(&whole)) {
        Ok(_) => Ok(()),
        Err(Errno::EAGAIN | Errno::EACCES) => Err(Error::PidFileLocked),
        Err(errno) => Err(Error::PidFile(path.to_owned(), errno.into())),
    }
}
