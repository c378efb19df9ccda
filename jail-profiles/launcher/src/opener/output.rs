//! The file of a memory dump, opened while the machine runs, as a client names it.

use std::os::fd::{BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl, open};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat};
use nix::unistd::ftruncate;

use super::beneath;

/// Never waits: a FIFO without a reader is an error. What is there is not touched before it is known to be free.
const FLAGS: OFlag = OFlag::O_WRONLY
    .union(OFlag::O_CREAT)
    .union(OFlag::O_NOCTTY)
    .union(OFlag::O_NONBLOCK)
    .union(OFlag::O_CLOEXEC);

/// A file to write, empty, and made for its owner alone if it is not there.
///
/// # Errors
/// The kernel's; EBUSY: the machine itself uses the file.
pub fn output_now(path: &str, in_use: &[BorrowedFd<'_>]) -> Result<OwnedFd, Errno> {
    ready(open(path, FLAGS, Mode::S_IRUSR | Mode::S_IWUSR)?, in_use)
}

/// The same in a directory that the path cannot leave, and a regular file.
///
/// # Errors
/// As [`output_now`]; EACCES: the path leaves the directory; EINVAL: it is no regular file.
pub fn output_now_beneath(
    dir: BorrowedFd<'_>,
    path: &str,
    in_use: &[BorrowedFd<'_>],
) -> Result<OwnedFd, Errno> {
    let fd = beneath::open(dir, path, FLAGS)?;
    if is(&fstat(&fd)?, SFlag::S_IFREG) { ready(fd, in_use) } else { Err(Errno::EINVAL) }
}

fn is(file: &FileStat, kind: SFlag) -> bool {
    SFlag::from_bits_truncate(file.st_mode & SFlag::S_IFMT.bits()) == kind
}

/// Empties it, and makes its writer wait for room.
fn ready(fd: OwnedFd, in_use: &[BorrowedFd<'_>]) -> Result<OwnedFd, Errno> {
    let file = fstat(&fd)?;
    let regular = is(&file, SFlag::S_IFREG);
    let is_it = |other: &FileStat| (other.st_dev, other.st_ino) == (file.st_dev, file.st_ino);
    // A disk, a kernel, a log. Devices such as /dev/null, and terminals, may have many users.
    let counts = regular || is(&file, SFlag::S_IFBLK);
    if counts && in_use.iter().filter_map(|used| fstat(used).ok()).any(|other| is_it(&other)) {
        return Err(Errno::EBUSY);
    }
    if regular {
        ftruncate(&fd, 0)?;
    }
    let flags = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL)?);
    fcntl(&fd, FcntlArg::F_SETFL(flags - OFlag::O_NONBLOCK))?;
    Ok(fd)
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::os::fd::AsFd as _;
    use std::os::unix::fs::{PermissionsExt as _, symlink};
    use std::path::PathBuf;

    use nix::unistd::mkfifo;

    use super::*;

    fn scratch(name: &str) -> PathBuf {
        let dir = std::env::temp_dir().join(format!("bulkhead-output-{name}-{}", std::process::id()));
        fs::create_dir_all(dir.join("vm")).unwrap();
        dir
    }

    fn flags(fd: &OwnedFd) -> OFlag {
        OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL).unwrap())
    }

    #[test]
    fn the_output_is_empty_and_its_owners_and_nobody_waits() {
        let dir = scratch("now");
        let at = |name: &str| dir.join(name).display().to_string();
        let fd = output_now(&at("new"), &[]).unwrap();
        assert!(!flags(&fd).contains(OFlag::O_NONBLOCK));
        assert_eq!(fs::metadata(at("new")).unwrap().permissions().mode() & 0o777, 0o600);
        fs::write(at("old"), "old").unwrap();
        output_now(&at("old"), &[]).unwrap();
        assert_eq!(fs::metadata(at("old")).unwrap().len(), 0);
        fs::write(at("disk"), "disk").unwrap();
        let disk = File::open(at("disk")).unwrap();
        assert_eq!(output_now(&at("disk"), &[disk.as_fd()]).unwrap_err(), Errno::EBUSY);
        assert_eq!(fs::read_to_string(at("disk")).unwrap(), "disk");
        let null = File::open("/dev/null").unwrap();
        output_now("/dev/null", &[null.as_fd()]).unwrap();
        mkfifo(dir.join("fifo").as_path(), Mode::S_IRWXU).unwrap();
        assert_eq!(output_now(&at("fifo"), &[]).unwrap_err(), Errno::ENXIO);
        assert_eq!(output_now(&at("vm"), &[]).unwrap_err(), Errno::EISDIR);
        assert_eq!(output_now(&at("none/x"), &[]).unwrap_err(), Errno::ENOENT);
        assert_eq!(output_now("", &[]).unwrap_err(), Errno::ENOENT);
        assert_eq!(output_now("a\0b", &[]).unwrap_err(), Errno::EINVAL);
        fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn under_units_the_output_is_a_regular_file_of_the_vm() {
        let dir = scratch("beneath");
        let vm = File::open(dir.join("vm")).unwrap();
        symlink("../out", dir.join("vm/link")).unwrap();
        mkfifo(dir.join("vm/fifo").as_path(), Mode::S_IRWXU).unwrap();
        let _reader = File::options().read(true).write(true).open(dir.join("vm/fifo")).unwrap();
        let now = |path: &str| output_now_beneath(vm.as_fd(), path, &[]);
        now("dump").unwrap();
        for (path, errno) in [
            ("../dump", Errno::EACCES),
            ("/tmp/dump", Errno::EACCES),
            ("link", Errno::EACCES),
            ("fifo", Errno::EINVAL),
            ("none/dump", Errno::ENOENT),
        ] {
            assert_eq!(now(path).unwrap_err(), errno, "{path}");
        }
        assert!(!dir.join("out").exists() && dir.join("vm/dump").exists());
        fs::remove_dir_all(&dir).unwrap();
    }
}
