//! Files in a directory that a path cannot leave.
//!
//! The kernel has `RESOLVE_BENEATH` for this, but in `openat2(2)`, which a unit with `DynamicUser=` cannot call: with it
//! comes `RestrictSUIDSGID=`, whose filter answers ENOSYS because it cannot see the mode. So every part of a path is
//! opened by itself, and a directory that was opened once stays the one that `..` returns to.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, openat, readlinkat};
use nix::sys::stat::Mode;

/// Symbolic links in one path, as many as the kernel follows.
const MAX_LINKS: usize = 40;

/// Opens `path`, relative to `dir`, for the reader or writer that `flags` tells; a new file is its owner's alone.
///
/// # Errors
/// EACCES for a path that leaves the directory, or the kernel's.
pub fn open(dir: BorrowedFd<'_>, path: &str, flags: OFlag) -> Result<OwnedFd, Errno> {
    let mode = if flags.contains(OFlag::O_CREAT) { Mode::S_IRUSR | Mode::S_IWUSR } else { Mode::empty() };
    let flags = flags | OFlag::O_CLOEXEC | OFlag::O_NOCTTY | OFlag::O_NOFOLLOW;
    let mut left = parts(Path::new(path))?;
    let mut below: Vec<OwnedFd> = Vec::new();
    let mut links = 0;
    while let Some(part) = left.pop_front() {
        let here = below.last().map_or(dir, |fd| fd.as_fd());
        let Part::Name(name) = part else {
            below.pop().ok_or(Errno::EACCES)?;
            continue;
        };
        // A link ends an open with O_NOFOLLOW with ELOOP, and one of a directory with ENOTDIR.
        let opened = if left.is_empty() {
            openat(here, name.as_os_str(), flags, mode)
        } else {
            let directory = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
            openat(here, name.as_os_str(), directory, Mode::empty())
        };
        match opened {
            Ok(fd) if left.is_empty() => return Ok(fd),
            Ok(fd) => below.push(fd),
            Err(error @ (Errno::ELOOP | Errno::ENOTDIR)) => {
                links += 1;
                let target = readlinkat(here, name.as_os_str()).map_err(|_| error)?;
                if links > MAX_LINKS {
                    return Err(Errno::ELOOP);
                }
                for part in parts(&PathBuf::from(target))?.into_iter().rev() {
                    left.push_front(part);
                }
            }
            Err(error) => return Err(error),
        }
    }
    // The path ends at a directory.
    Err(Errno::EISDIR)
}

enum Part {
    Name(OsString),
    Parent,
}

fn parts(path: &Path) -> Result<VecDeque<Part>, Errno> {
    let mut parts = VecDeque::new();
    for component in path.components() {
        match component {
            Component::Normal(name) => parts.push_back(Part::Name(name.to_owned())),
            Component::ParentDir => parts.push_back(Part::Parent),
            Component::CurDir => {}
            Component::RootDir | Component::Prefix(_) => return Err(Errno::EACCES),
        }
    }
    if parts.is_empty() { Err(Errno::ENOENT) } else { Ok(parts) }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::io::Read as _;
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;

    fn read(dir: &Path, path: &str) -> Result<String, Errno> {
        let dir = File::open(dir).unwrap();
        let mut text = String::new();
        File::from(open(dir.as_fd(), path, OFlag::O_RDONLY)?).read_to_string(&mut text).unwrap();
        Ok(text)
    }

    #[test]
    fn a_path_stays_in_its_directory() {
        let outside = std::env::temp_dir().join(format!("bulkhead-beneath-{}", std::process::id()));
        let dir = outside.join("vm");
        fs::create_dir_all(dir.join("a/b")).unwrap();
        fs::write(outside.join("secret"), "secret").unwrap();
        fs::write(dir.join("kernel"), "kernel").unwrap();
        fs::write(dir.join("a/b/file"), "file").unwrap();
        for (link, target) in [
            ("to-kernel", "kernel"),
            ("a/up", "../kernel"),
            ("to-b", "a/./b"),
            ("out", "../secret"),
            ("to-out", "a/../out"),
            ("absolute", "/etc/hostname"),
            ("loop", "loop"),
            ("outside", ".."),
        ] {
            symlink(target, dir.join(link)).unwrap();
        }
        for good in
            ["kernel", "./kernel", "a/../kernel", "to-kernel", "a/up", "a/b/../up", "to-b/../../kernel"]
        {
            assert_eq!(read(&dir, good).as_deref(), Ok("kernel"), "{good}");
        }
        assert_eq!(read(&dir, "to-b/file").as_deref(), Ok("file"));
        for (bad, error) in [
            ("../secret", Errno::EACCES),
            ("a/../../secret", Errno::EACCES),
            ("/etc/hostname", Errno::EACCES),
            ("out", Errno::EACCES),
            ("to-out", Errno::EACCES),
            ("absolute", Errno::EACCES),
            ("outside/secret", Errno::EACCES),
            ("loop", Errno::ELOOP),
            ("loop/file", Errno::ELOOP),
            ("kernel/file", Errno::ENOTDIR),
            ("none", Errno::ENOENT),
            ("none/file", Errno::ENOENT),
            ("", Errno::ENOENT),
            ("a/..", Errno::EISDIR),
        ] {
            assert_eq!(read(&dir, bad), Err(error), "{bad}");
        }
        let at = File::open(&dir).unwrap();
        let write = OFlag::O_WRONLY | OFlag::O_CREAT;
        assert_eq!(open(at.as_fd(), "../new", write).unwrap_err(), Errno::EACCES);
        open(at.as_fd(), "a/new", write).unwrap();
        let mode = fs::metadata(dir.join("a/new")).unwrap().permissions().mode();
        assert_eq!(mode & 0o177, 0);
        fs::remove_dir_all(&outside).unwrap();
    }
}
