//! Thread ids as the host sees them.

use std::collections::BTreeMap;
use std::io::Read as _;
use std::os::fd::{AsFd, OwnedFd};

use nix::dir::Dir;
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;

use crate::error::{Result, system};

/// The longest `status` file that is read, in bytes.
const MAX_STATUS: u64 = 16 * 1024;

/// Thread id outside and inside, from a `status` file of procfs (`NSpid`: outermost first).
fn ids(status: &str) -> Option<(u32, i32)> {
    let mut ids = status.lines().find_map(|line| line.strip_prefix("NSpid:"))?.split_whitespace();
    let outer = ids.next()?;
    let inner = ids.next_back().unwrap_or(outer);
    Some((outer.parse().ok()?, inner.parse().ok()?))
}

/// Maps thread ids of this pid namespace to those of the namespace of `tasks`, the `task` directory of
/// this process in an outer procfs.
pub fn outside(tasks: OwnedFd) -> Result<BTreeMap<i32, u32>> {
    let mut dir = Dir::from_fd(tasks).map_err(system("task directory"))?;
    let names: Vec<_> = dir.iter().flatten().map(|entry| entry.file_name().to_owned()).collect();
    let mut map = BTreeMap::new();
    for name in names {
        let path = [name.to_bytes(), b"/status"].concat();
        let Ok(file) =
            openat(dir.as_fd(), path.as_slice(), OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())
        else {
            continue; // "." and "..", which have no such file
        };
        let mut status = String::new();
        if std::fs::File::from(file).take(MAX_STATUS).read_to_string(&mut status).is_ok() {
            map.extend(ids(&status).map(|(outer, inner)| (inner, outer)));
        }
    }
    Ok(map)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ends_of_the_namespace_chain() {
        assert_eq!(ids("Name:\tx\nNSpid:\t4711\t12\t3\n"), Some((4711, 3)));
        assert_eq!(ids("NSpid:\t4711\n"), Some((4711, 4711)));
        assert_eq!(ids("Name:\tx\n"), None);
        assert_eq!(ids("NSpid:\tx\n"), None);
    }

    #[test]
    fn the_own_threads_are_found() {
        let dir = std::fs::File::open("/proc/self/task").unwrap();
        let own = nix::unistd::gettid().as_raw();
        assert_eq!(outside(dir.into()).unwrap().get(&own), Some(&own.unsigned_abs()));
    }
}
