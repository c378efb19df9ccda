//! `/dev/fdset/N`: a path that stands for the member of an fd set that was opened in the same way.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};

/// What such a path begins with.
const PREFIX: &str = "/dev/fdset/";

/// The members of the sets, by id, in the order in which they were given.
#[derive(Debug, Default)]
pub struct Sets(BTreeMap<i64, Vec<OwnedFd>>);

impl Sets {
    /// Adds a member.
    ///
    /// # Errors
    /// It cannot be duplicated.
    pub fn add(&mut self, set: i64, fd: BorrowedFd<'_>) -> Result<(), Errno> {
        let fd = fd.try_clone_to_owned().map_err(|_| Errno::EMFILE)?;
        self.0.entry(set).or_default().push(fd);
        Ok(())
    }

    /// A duplicate of the member that was opened to read, if the path is one of a set. Its file status flags and its
    /// offset are those of the member.
    ///
    /// # Errors
    /// QEMU's: there is no such set, or no such member in it.
    pub fn input(&self, path: &str) -> Result<Option<OwnedFd>, Errno> {
        self.find(path, OFlag::O_RDONLY)
    }

    /// The same for one that was opened to write. It is truncated, or appended to from now on, also through
    /// other duplicates.
    ///
    /// # Errors
    /// As [`Self::input`], or it cannot be truncated, as pipes cannot.
    pub fn output(&self, path: &str, append: bool) -> Result<Option<OwnedFd>, Errno> {
        let Some(fd) = self.find(path, OFlag::O_WRONLY)? else { return Ok(None) };
        if append {
            let flags = flags_of(&fd)?;
            fcntl(&fd, FcntlArg::F_SETFL(flags | OFlag::O_APPEND))?;
            return Ok(Some(fd));
        }
        let file = File::from(fd);
        file.set_len(0).map_err(|e| e.raw_os_error().map_or(Errno::EIO, Errno::from_raw))?;
        Ok(Some(file.into()))
    }

    /// The same for one that was opened in that mode.
    ///
    /// # Errors
    /// As [`Self::input`].
    pub fn of_mode(&self, path: &str, mode: OFlag) -> Result<Option<OwnedFd>, Errno> {
        self.find(path, mode)
    }

    fn find(&self, path: &str, mode: OFlag) -> Result<Option<OwnedFd>, Errno> {
        let Some(set) = set_of(path) else { return Ok(None) };
        let members = self.0.get(&set?).ok_or(Errno::ENOENT)?;
        for member in members {
            let flags = flags_of(member)?;
            // A descriptor with O_PATH has no mode.
            if flags.contains(OFlag::O_PATH) || flags & OFlag::O_ACCMODE != mode {
                continue;
            }
            if flags.intersects(OFlag::O_SYNC) {
                return Err(Errno::EINVAL);
            }
            return member.try_clone().map(Some).map_err(|_| Errno::EMFILE);
        }
        Err(Errno::EACCES)
    }
}

fn flags_of(fd: impl AsFd) -> Result<OFlag, Errno> {
    Ok(OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?))
}

/// The set that a path names, if it is one of a set.
pub fn set_of(path: &str) -> Option<Result<i64, Errno>> {
    let id = path.strip_prefix(PREFIX)?;
    let id = id.parse::<i32>().ok().filter(|id| *id >= 0);
    Some(id.map(i64::from).ok_or(Errno::EINVAL))
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;
    use std::io::{Read as _, Seek as _, Write as _};
    use std::os::unix::fs::OpenOptionsExt as _;

    use super::*;

    fn scratch() -> (File, std::path::PathBuf) {
        static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let number = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("fdset-{}-{number}", std::process::id()));
        let mut file =
            OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
        file.write_all(b"hello").unwrap();
        file.rewind().unwrap();
        (file, path)
    }

    fn sets(members: &[(i64, &dyn AsFd)]) -> Sets {
        let mut sets = Sets::default();
        for (set, fd) in members {
            sets.add(*set, fd.as_fd()).unwrap();
        }
        sets
    }

    #[test]
    fn the_member_of_the_same_mode_is_taken() {
        let (both, path) = scratch();
        let read = File::open(&path).unwrap();
        let write = OpenOptions::new().write(true).open(&path).unwrap();
        let all = sets(&[(1, &both), (1, &read), (1, &write), (2, &both), (3, &read)]);
        let mut text = String::new();
        File::from(all.input("/dev/fdset/1").unwrap().unwrap()).read_to_string(&mut text).unwrap();
        assert_eq!(text, "hello");
        File::from(all.output("/dev/fdset/01", true).unwrap().unwrap()).write_all(b"!").unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "hello!");
        File::from(all.output("/dev/fdset/1", false).unwrap().unwrap()).write_all(b"new").unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "new");
        for (path, input, output) in [
            ("/dev/fdset/2", Errno::EACCES, Errno::EACCES),
            ("/dev/fdset/9", Errno::ENOENT, Errno::ENOENT),
            ("/dev/fdset/", Errno::EINVAL, Errno::EINVAL),
            ("/dev/fdset/x", Errno::EINVAL, Errno::EINVAL),
            ("/dev/fdset/0x1", Errno::EINVAL, Errno::EINVAL),
            ("/dev/fdset/1x", Errno::EINVAL, Errno::EINVAL),
            ("/dev/fdset/-1", Errno::EINVAL, Errno::EINVAL),
            ("/dev/fdset/2147483648", Errno::EINVAL, Errno::EINVAL),
        ] {
            assert_eq!(all.input(path).unwrap_err(), input, "{path}");
            assert_eq!(all.output(path, true).unwrap_err(), output, "{path}");
        }
        assert_eq!(all.output("/dev/fdset/3", true).unwrap_err(), Errno::EACCES);
        assert!(all.input("/dev/fdset").unwrap().is_none() && all.input("dev/fdset/1").unwrap().is_none());
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn what_qemu_does_not_take() {
        let (_, path) = scratch();
        let sync = OpenOptions::new().write(true).custom_flags(nix::libc::O_SYNC).open(&path).unwrap();
        let place = OpenOptions::new().read(true).custom_flags(nix::libc::O_PATH).open(&path).unwrap();
        let (_end, pipe) = nix::unistd::pipe().unwrap();
        let all = sets(&[(1, &sync), (2, &place), (3, &pipe)]);
        assert_eq!(all.output("/dev/fdset/1", true).unwrap_err(), Errno::EINVAL);
        assert_eq!(all.input("/dev/fdset/2").unwrap_err(), Errno::EACCES);
        assert_eq!(all.output("/dev/fdset/3", false).unwrap_err(), Errno::EINVAL);
        assert!(all.output("/dev/fdset/3", true).unwrap().is_some());
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn flags_of_the_description_are_left_alone() {
        let (_, path) = scratch();
        let file = OpenOptions::new().write(true).custom_flags(nix::libc::O_NONBLOCK).open(&path).unwrap();
        let all = sets(&[(1, &file)]);
        let taken = all.output("/dev/fdset/1", true).unwrap().unwrap();
        let flags = flags_of(&taken).unwrap();
        assert!(flags.contains(OFlag::O_NONBLOCK | OFlag::O_APPEND));
        std::fs::remove_file(path).unwrap();
    }
}
