//! Where the back ends of the VM's devices listen, pci's requests for connections to them, and the broker's word on where
//! others listen.

use std::collections::BTreeMap;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use bulkhead_control_api::VERSION;
use bulkhead_control_api::opener::{FromOpener, MAX_NAME, MAX_PATH, ToOpener};
use bulkhead_jail::link::{Link, LinkError};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, socketpair};
use nix::sys::stat::{FileStat, SFlag, stat};

use crate::machine::Bus;
use crate::opener;
use crate::rendezvous::{Place, Rendezvous};

/// Requests that are answered in one go.
const MAX_REQUESTS: usize = 64;
/// Places of others that are known at a time.
const MAX_THEIRS: usize = 512;

/// The listeners of our own daemons, which outlive them, and the places of others'.
#[derive(Debug)]
pub struct Doors {
    ours: BTreeMap<String, Rendezvous>,
    theirs: BTreeMap<String, String>,
}

impl Doors {
    /// Makes the listeners.
    ///
    /// # Errors
    /// One line.
    pub fn new(bus: &Bus, place: &Place) -> Result<Self, String> {
        let mut ours = BTreeMap::new();
        for daemon in &bus.daemons {
            for (name, kind) in [("vhost", SockType::Stream), ("side", SockType::SeqPacket)] {
                ours.insert(format!("{name}.{}", daemon.key), place.listen(kind)?);
            }
        }
        Ok(Self { ours, theirs: bus.paths.clone() })
    }

    /// The listener of one of our daemons: `vhost` or `side` of a device.
    pub fn listener(&self, name: &str, key: &str) -> Option<BorrowedFd<'_>> {
        self.ours.get(&format!("{name}.{key}")).map(Rendezvous::listener)
    }

    /// A new connection to the back end of that name, or a copy of the one that the user has given; at once.
    ///
    /// # Errors
    /// EPERM: the configuration has no such back end; the kernel's.
    pub fn connect(&self, name: &str, given: &BTreeMap<String, OwnedFd>) -> Result<OwnedFd, Errno> {
        if let Some(ours) = self.ours.get(name) {
            return ours.try_connect();
        }
        if let Some(path) = self.theirs.get(name) {
            return opener::connect_now(path);
        }
        match given.get(name).filter(|_| name.starts_with("chardev.")) {
            Some(fd) => fd.try_clone().map_err(|_| Errno::EMFILE),
            None => Err(Errno::EPERM),
        }
    }
}

impl Doors {
    /// From now on a name stands for a path, as the broker says.
    ///
    /// # Errors
    /// EPERM: the name is not of a character device; EEXIST: it stands for something else; ENOENT and others of `stat(2)`:
    /// no socket is there although it must be.
    pub fn define(
        &mut self,
        (name, path, must_exist): (&str, &str, bool),
        given: &BTreeMap<String, OwnedFd>,
    ) -> Result<(), Errno> {
        let is_known = self.theirs.get(name);
        if !name.starts_with("chardev.") {
            return Err(Errno::EPERM);
        }
        if given.contains_key(name) || is_known.is_some_and(|known| known != path) {
            return Err(Errno::EEXIST);
        }
        if is_known.is_none() && self.theirs.len() >= MAX_THEIRS {
            return Err(Errno::ENOSPC);
        }
        UnixAddr::new(path)?;
        if must_exist && !is_socket(&stat(path)?) {
            // What connect(2) says then.
            return Err(Errno::ECONNREFUSED);
        }
        self.theirs.insert(name.to_owned(), path.to_owned());
        Ok(())
    }

    /// A name stands for nothing any more.
    ///
    /// # Errors
    /// ENOENT: it stood for no path.
    pub fn forget(&mut self, name: &str) -> Result<(), Errno> {
        self.theirs.remove(name).map(drop).ok_or(Errno::ENOENT)
    }
}

fn is_socket(file: &FileStat) -> bool {
    SFlag::from_bits_truncate(file.st_mode & SFlag::S_IFMT.bits()) == SFlag::S_IFSOCK
}

/// The name under which a request is answered; none if something in it is too long.
fn name_of(request: &ToOpener) -> Option<&str> {
    let name = match request {
        ToOpener::Output { path, .. } if path.len() > MAX_PATH => return None,
        ToOpener::Output { name, .. }
        | ToOpener::Connect { name }
        | ToOpener::Define { name, .. }
        | ToOpener::Forget { name }
        | ToOpener::Begin { name, .. }
        | ToOpener::End { name } => name,
    };
    (name.len() <= MAX_NAME).then_some(name)
}

/// The opener's end of its link to a compartment.
#[derive(Debug)]
pub struct Asker {
    link: Link,
    greeted: bool,
    /// Answers wait for the compartment to read.
    full: bool,
}

impl Asker {
    /// A link that has begun, with nothing to give yet; the second end is the compartment's.
    ///
    /// # Errors
    /// One line.
    pub fn pair() -> Result<(Self, OwnedFd), String> {
        let fail = |e: &dyn std::fmt::Display| format!("opener's link: {e}");
        let flags = SockFlag::SOCK_CLOEXEC;
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).map_err(|e| fail(&e))?;
        let link = Link::begin(ours, VERSION).map_err(|e| fail(&e))?;
        link.send(&FromOpener::Done).map_err(|e| fail(&e))?;
        Ok((Self { link, greeted: false, full: false }, theirs))
    }

    /// One that a predecessor has begun.
    pub fn resume(fd: OwnedFd) -> Self {
        Self::begun(Link::resume(fd))
    }

    /// One on which hellos have been exchanged.
    pub const fn begun(link: Link) -> Self {
        Self { link, greeted: true, full: false }
    }

    /// Whether the other end is still there.
    pub fn lives(&self) -> bool {
        let mut fds = [PollFd::new(self.link.as_fd(), PollFlags::empty())];
        let _ = poll(&mut fds, PollTimeout::ZERO);
        !fds.iter().any(|fd| fd.any() == Some(true))
    }

    /// What to wait for.
    pub fn poll_fd(&self) -> PollFd<'_> {
        let events = if self.full { PollFlags::POLLOUT } else { PollFlags::POLLIN };
        PollFd::new(self.link.as_fd(), events)
    }

    /// Gives a descriptor.
    ///
    /// # Errors
    /// The compartment does not read, or is dying: then its successor gets one.
    pub fn give(&self, name: &str, fd: BorrowedFd<'_>) -> Result<(), LinkError> {
        let given = FromOpener::Given { name: name.to_owned() };
        self.link.send_with(&given, &[fd], MsgFlags::MSG_DONTWAIT)
    }

    /// Answers what the compartment has asked, each with the descriptor that `act` gives, or that it is done. False at the
    /// end of the link.
    pub fn serve(&mut self, mut act: impl FnMut(&ToOpener) -> Result<Option<OwnedFd>, Errno>) -> bool {
        let dontwait = MsgFlags::MSG_DONTWAIT;
        if !self.greeted {
            match self.link.finish(VERSION, dontwait) {
                Ok(()) => self.greeted = true,
                Err(LinkError::WouldBlock) => return true,
                Err(_) => return false,
            }
        }
        for _ in 0..MAX_REQUESTS {
            // An answer that finds room now finds it in a moment, too: nobody else writes here.
            let mut room = [PollFd::new(self.link.as_fd(), PollFlags::POLLOUT)];
            self.full = !matches!(poll(&mut room, PollTimeout::ZERO), Ok(1));
            if self.full {
                return true;
            }
            let request = match self.link.recv_with::<ToOpener>(dontwait) {
                Ok((request, fds)) if fds.is_empty() => request,
                Err(LinkError::WouldBlock) => return true,
                Ok(_) | Err(_) => return false,
            };
            let Some(name) = name_of(&request).map(str::to_owned) else { return false };
            let answered = match act(&request) {
                Ok(None) => self.link.send_with(&FromOpener::Defined { name }, &[], dontwait),
                Ok(Some(fd)) => self.link.send_with(&FromOpener::Given { name }, &[fd.as_fd()], dontwait),
                Err(errno) => {
                    let errno = errno as i32;
                    self.link.send_with(&FromOpener::NotGiven { name, errno }, &[], dontwait)
                }
            };
            if answered.is_err() {
                return false;
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::io::Write as _;
    use std::os::fd::AsRawFd as _;
    use std::os::unix::net::{UnixListener, UnixStream};

    use bulkhead_control_api::config;
    use bulkhead_control_api::plug::What;
    use nix::sys::socket;

    use super::*;
    use crate::machine::{Daemon, DaemonConfig};

    fn bus() -> Bus {
        let iothread = config::IoThread::default();
        let net = config::Net { life: 0, id: "n".into(), taps: Vec::new(), mac: [0; 6], iothread };
        let what = What::Net { id: "n".into(), mac: [0; 6], pairs: 1 };
        let config = DaemonConfig::Net(net);
        let daemon = Daemon { key: "n".into(), config, fds: Vec::new(), what, used: true };
        let config = config::Pci { life: 0, devices: Vec::new() };
        Bus { config, daemons: vec![daemon], paths: BTreeMap::new(), memory: Vec::new() }
    }

    fn connected(doors: &Doors, name: &str) -> Result<OwnedFd, Errno> {
        doors.connect(name, &BTreeMap::new())
    }

    fn place() -> Place {
        Place::new(|_| Ok(())).unwrap()
    }

    #[test]
    fn our_daemons_listeners_outlive_them() {
        let doors = Doors::new(&bus(), &place()).unwrap();
        for name in ["vhost", "side"] {
            let listener = doors.listener(name, "n").unwrap();
            for _ in 0..3 {
                let _end = connected(&doors, &format!("{name}.n")).unwrap();
                assert!(socket::accept(listener.as_raw_fd()).is_ok());
            }
        }
        for name in ["", "vhost.", "vhost.m", "side", "chardev.n", "kernel"] {
            assert_eq!(connected(&doors, name).unwrap_err(), Errno::EPERM, "{name}");
        }
        assert!(doors.listener("vhost", "m").is_none());
    }

    #[test]
    fn others_are_connected_to_where_they_listen() {
        let path = std::env::temp_dir().join(format!("bulkhead-doors-{}", std::process::id()));
        let mut bus = bus();
        bus.paths.insert("chardev.c".to_owned(), path.to_str().unwrap().to_owned());
        let doors = Doors::new(&bus, &place()).unwrap();
        assert_eq!(connected(&doors, "chardev.c").unwrap_err(), Errno::ENOENT);
        let listener = UnixListener::bind(&path).unwrap();
        // One that does not accept makes nobody wait.
        let mut waiting = Vec::new();
        let full = loop {
            match connected(&doors, "chardev.c") {
                Ok(fd) => waiting.push(fd),
                Err(errno) => break errno,
            }
        };
        assert!(full == Errno::EAGAIN && !waiting.is_empty());
        drop(listener);
        assert_eq!(connected(&doors, "chardev.c").unwrap_err(), Errno::ECONNREFUSED);
        std::fs::remove_file(path).unwrap();
        let (_one, other) = UnixStream::pair().unwrap();
        let given =
            BTreeMap::from([("chardev.d".to_owned(), other.into()), ("kvm".to_owned(), waiting.remove(0))]);
        assert!(doors.connect("chardev.d", &given).is_ok());
        assert_eq!(doors.connect("kvm", &given).unwrap_err(), Errno::EPERM);
    }

    #[test]
    fn the_broker_says_where_others_listen() {
        let path = std::env::temp_dir().join(format!("bulkhead-defined-{}", std::process::id()));
        let text = path.to_str().unwrap();
        let mut doors = Doors::new(&bus(), &place()).unwrap();
        let given = BTreeMap::from([("chardev.g".to_owned(), UnixStream::pair().unwrap().0.into())]);
        let mut define = |name: &str, path: &str, must| doors.define((name, path, must), &given);
        for name in ["", "kernel", "vhost.n", "side.n"] {
            assert_eq!(define(name, text, false), Err(Errno::EPERM), "{name}");
        }
        assert_eq!(define("chardev.g", text, false), Err(Errno::EEXIST));
        assert_eq!(define("chardev.c", text, true), Err(Errno::ENOENT));
        std::fs::write(&path, "").unwrap();
        assert_eq!(define("chardev.c", text, true), Err(Errno::ECONNREFUSED), "no socket");
        std::fs::remove_file(&path).unwrap();
        let _listener = UnixListener::bind(&path).unwrap();
        assert_eq!(define("chardev.c", text, true), Ok(()));
        assert_eq!(define("chardev.c", text, false), Ok(()), "again");
        assert_eq!(define("chardev.c", "/other", false), Err(Errno::EEXIST));
        assert_eq!(define("chardev.long", &"x".repeat(200), false), Err(Errno::ENAMETOOLONG));
        assert!(doors.connect("chardev.c", &given).is_ok());
        std::fs::remove_file(&path).unwrap();
        assert_eq!(doors.forget("chardev.c"), Ok(()));
        assert_eq!(doors.forget("chardev.c"), Err(Errno::ENOENT));
        assert_eq!(doors.connect("chardev.c", &given).unwrap_err(), Errno::EPERM);
        for number in 0..MAX_THEIRS {
            assert_eq!(doors.define((&format!("chardev.{number}"), "/p", false), &given), Ok(()));
        }
        assert_eq!(doors.define(("chardev.more", "/p", false), &given), Err(Errno::ENOSPC));
    }

    fn asked(asker: &mut Asker, calls: &Cell<usize>) -> bool {
        asker.serve(|request| {
            calls.set(calls.get() + 1);
            match request {
                ToOpener::Connect { name } if name == "vhost.n" => {
                    Ok(Some(UnixStream::pair().unwrap().0.into()))
                }
                ToOpener::Forget { .. } => Ok(None),
                _ => Err(Errno::EPERM),
            }
        })
    }

    #[test]
    fn requests_are_answered_under_their_names() {
        let (mut asker, theirs) = Asker::pair().unwrap();
        let calls = Cell::new(0);
        assert!(asked(&mut asker, &calls));
        let mut link = Link::connect(theirs, VERSION).unwrap();
        assert_eq!(link.recv::<FromOpener>().unwrap(), FromOpener::Done);
        for name in ["vhost.n", "disk.n"] {
            link.send(&ToOpener::Connect { name: name.to_owned() }).unwrap();
        }
        assert!(asked(&mut asker, &calls));
        let (answer, fds) = link.recv_with::<FromOpener>(MsgFlags::empty()).unwrap();
        assert_eq!((answer, fds.len()), (FromOpener::Given { name: "vhost.n".to_owned() }, 1));
        let refused = FromOpener::NotGiven { name: "disk.n".to_owned(), errno: Errno::EPERM as i32 };
        assert_eq!(link.recv::<FromOpener>().unwrap(), refused);
        link.send(&ToOpener::Forget { name: "chardev.c".to_owned() }).unwrap();
        assert!(asked(&mut asker, &calls));
        let done = FromOpener::Defined { name: "chardev.c".to_owned() };
        assert_eq!(link.recv::<FromOpener>().unwrap(), done);
        link.send(&ToOpener::Connect { name: "x".repeat(MAX_NAME + 1) }).unwrap();
        assert!(!asked(&mut asker, &calls));
        assert_eq!(calls.get(), 3);
    }

    #[test]
    fn who_asks_and_does_not_read_waits() {
        let (mut asker, theirs) = Asker::pair().unwrap();
        let link = {
            let mut link = Link::begin(theirs, VERSION).unwrap();
            link.finish(VERSION, MsgFlags::empty()).unwrap();
            link
        };
        let calls = Cell::new(0);
        let ask = ToOpener::Connect { name: "none".to_owned() };
        // Until the queue in each direction is full.
        for _ in 0..10_000 {
            let sent = link.send_with(&ask, &[], MsgFlags::MSG_DONTWAIT);
            assert!(asked(&mut asker, &calls));
            if sent.is_err() {
                break;
            }
        }
        let answered = calls.get();
        assert!(asker.full && answered > 0);
        assert!(asked(&mut asker, &calls) && calls.get() == answered);
        drop(link);
        while asked(&mut asker, &calls) {}
    }

    #[test]
    fn a_link_that_says_something_else_is_given_up() {
        let (mut asker, theirs) = Asker::pair().unwrap();
        UnixStream::from(theirs).write_all(b"no hello").unwrap();
        assert!(!asked(&mut asker, &Cell::new(0)));
    }
}
