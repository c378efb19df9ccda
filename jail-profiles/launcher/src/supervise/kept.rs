//! What a compartment says to the launcher in the words of `sd_notify(3)`, and the descriptors that the
//! launcher keeps for it beyond its death.

use std::collections::BTreeMap;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use bulkhead_jail::link::{LinkError, recv_packet};
use bulkhead_jail::pace::Pace;
use bulkhead_jail::topology::Process;
use nix::sys::socket::MsgFlags;

/// The longest message, in bytes.
const MAX_WORDS: usize = 512;
/// Messages that are read in one go.
const MAX_MESSAGES: usize = 2048;

/// The descriptors of one compartment by name.
#[derive(Debug)]
pub struct Kept {
    fds: BTreeMap<String, OwnedFd>,
    /// How often refusals are told.
    pace: Pace,
    /// Refusals that have not been told.
    untold: usize,
}

impl Default for Kept {
    fn default() -> Self {
        Self { fds: BTreeMap::new(), pace: Pace::new(1), untold: 0 }
    }
}

/// What came of listening.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Heard {
    /// The compartment is ready.
    pub ready: bool,
    /// How many descriptors were refused: too many, or not the topology's. It is said once a second.
    pub unkept: usize,
    /// It has closed its end.
    pub closed: bool,
}

impl Kept {
    /// The descriptors with their names.
    pub fn iter(&self) -> impl Iterator<Item = (&String, BorrowedFd<'_>)> {
        self.fds.iter().map(|(name, fd)| (name, fd.as_fd()))
    }

    /// Reads what the compartment has said, and does it.
    pub fn listen(&mut self, process: &Process, notify: BorrowedFd<'_>) -> Heard {
        let mut heard = Heard::default();
        let mut words = [0; MAX_WORDS];
        for _ in 0..MAX_MESSAGES {
            let (len, fds) = match recv_packet(notify, &mut words, MsgFlags::MSG_DONTWAIT) {
                Err(LinkError::WouldBlock) => break,
                Ok((0, _)) | Err(LinkError::Closed | LinkError::Io(_) | LinkError::Version { .. }) => {
                    heard.closed = true;
                    break;
                }
                Err(LinkError::Malformed) => {
                    self.untold += 1;
                    continue;
                }
                Ok(received) => received,
            };
            let text = std::str::from_utf8(words.get(..len).unwrap_or_default()).unwrap_or_default();
            heard.ready |= text == "READY=1";
            self.untold += self.obey(process, text, fds);
        }
        if self.untold > 0 && self.pace.ask().is_some() {
            heard.unkept = std::mem::take(&mut self.untold);
        }
        heard
    }

    /// Carries out one message; returns how many descriptors were refused.
    fn obey(&mut self, process: &Process, text: &str, fds: Vec<OwnedFd>) -> usize {
        let says = |what: &str| text.lines().any(|line| line == what);
        let name = text.lines().find_map(|line| line.strip_prefix("FDNAME=")).unwrap_or_default();
        if says("FDSTOREREMOVE=1") {
            self.fds.remove(name);
        }
        let mut refused = 0;
        for fd in fds {
            let room = self.fds.len() < process.store && !self.fds.contains_key(name);
            if says("FDSTORE=1") && process.may_keep(name) && room {
                self.fds.insert(name.to_owned(), fd);
            } else {
                refused += 1;
            }
        }
        refused
    }
}

#[cfg(test)]
mod tests {
    use bulkhead_jail::starter::Starter;
    use bulkhead_jail::topology;
    use nix::errno::Errno;
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

    use super::*;

    fn pair() -> (OwnedFd, Starter) {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).unwrap();
        (ours, Starter::new(Some(theirs)))
    }

    fn names(kept: &Kept) -> Vec<&str> {
        kept.iter().map(|(name, _)| name.as_str()).collect()
    }

    #[test]
    fn descriptors_are_kept_under_the_topologys_names() {
        let (ours, starter) = pair();
        let mut kept = Kept::default();
        let null = std::fs::File::open("/dev/null").unwrap();
        let refused =
            ["kept.", "kept.a", "kept.1:2", "kept.-1", "kept.000000000000000000001", "config", "core"];
        for name in ["state", "kept.7"].into_iter().chain(refused).chain(["kept.7"]) {
            starter.keep(name, null.as_fd()).unwrap();
        }
        starter.ready().unwrap();
        let heard = kept.listen(&topology::BROKER, ours.as_fd());
        assert_eq!(heard, Heard { ready: true, unkept: 8, closed: false });
        assert_eq!(names(&kept), ["kept.7", "state"]);
        starter.forget("kept.7").unwrap();
        starter.forget("kept.8").unwrap();
        drop(starter);
        let heard = kept.listen(&topology::BROKER, ours.as_fd());
        assert_eq!(heard, Heard { ready: false, unkept: 0, closed: true });
        assert_eq!(names(&kept), ["state"]);
    }

    #[test]
    fn what_is_kept_is_bounded() {
        let (ours, starter) = pair();
        let mut kept = Kept::default();
        let null = std::fs::File::open("/dev/null").unwrap();
        for number in 0..topology::CONSOLE.store + 3 {
            if starter.keep(&format!("kept.{number}"), null.as_fd()) == Err(Errno::EAGAIN) {
                assert_eq!(kept.listen(&topology::CONSOLE, ours.as_fd()).unkept, 0);
                starter.keep(&format!("kept.{number}"), null.as_fd()).unwrap();
            }
        }
        assert_eq!(kept.listen(&topology::CONSOLE, ours.as_fd()).unkept, 3);
        assert_eq!(kept.fds.len(), topology::CONSOLE.store);
        // The next ones within the second are counted.
        for _ in 0..5 {
            starter.keep("kept.0", null.as_fd()).unwrap();
            assert_eq!(kept.listen(&topology::CONSOLE, ours.as_fd()).unkept, 0);
        }
        kept.pace = Pace::new(1);
        assert_eq!(kept.listen(&topology::CONSOLE, ours.as_fd()).unkept, 5);
    }
}
