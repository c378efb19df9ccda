//! The opener of one VM under systemd: gives each process of the VM its descriptors.
//!
//! A process connects before it enters its jail, to a socket that only its own unit can reach: the name of the socket
//! says which process it is. It asks nothing and cannot say anything but hello.

use std::collections::BTreeMap;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;

use bulkhead_control_api::VERSION;
use bulkhead_control_api::opener::{FromOpener, ToOpener};
use bulkhead_jail::link::{Link, LinkError};
use bulkhead_jail::starter::Starter;
use bulkhead_jail::topology::{BROKER, LINKS, PCI, Process, Restart};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, UnixAddr, getsockname, setsockopt, sockopt};
use nix::sys::time::{TimeVal, TimeValLike as _};

use super::life::{self, Life, Member, Places};
use crate::machine::Plan;
use crate::relay::say;
use crate::supervise::{Asker, parts};

/// What the opener calls itself in messages.
const NAME: &str = "bulkhead-opener";
/// How long a process may take to say hello and to read, in seconds.
const PATIENCE: i64 = 5;

/// Whether a process's link to the opener is kept: core's tells whether core lives, others are given more later, and pci
/// asks for connections.
fn is_kept(process: &Process) -> bool {
    matches!(process.name, "core" | "broker") || parts::keeps_opener(process)
}

/// A socket on which one process connects.
struct Door {
    member: Member,
    listener: UnixListener,
}

/// The opener.
pub struct Opener {
    /// What the machine file says, or what is wrong with it.
    plan: Result<Plan, String>,
    places: Places,
    starter: Starter,
    doors: Vec<Door>,
    life: Life,
    /// Links to processes, by name.
    links: BTreeMap<String, Asker>,
}

/// Beginning of the name in the store of a process's link.
const LINK: &str = "link.";

impl Opener {
    /// Takes what the service manager gave: the sockets, and what a predecessor has kept.
    ///
    /// # Errors
    /// One line.
    pub fn new(
        plan: Result<Plan, String>,
        places: Places,
        starter: Starter,
        given: Vec<(String, OwnedFd)>,
    ) -> Result<Self, String> {
        let (doors, store): (Vec<_>, Vec<_>) = given.into_iter().partition(|(name, _)| name == "opener");
        let doors = doors.into_iter().map(|(_, fd)| door(fd)).collect::<Result<Vec<_>, _>>()?;
        let (mut links, mut rest) = (BTreeMap::new(), BTreeMap::new());
        for (name, fd) in store {
            match name.strip_prefix(LINK) {
                Some(process) => drop(links.insert(process.to_owned(), Asker::resume(fd))),
                None => drop(rest.insert(name, fd)),
            }
        }
        links.retain(|_, link| link.lives());
        let store = rest;
        let life = if links.contains_key("core") {
            say("<5>", NAME, "goes on with what its predecessor has opened");
            if let Err(why) = &plan {
                say("<3>", NAME, &format!("the machine file is not read anew: {why}"));
            }
            Life::go_on(plan.as_ref().ok(), store)?
        } else {
            links.clear();
            let former = life::given_of(store);
            Life::begin(plan.as_ref().map_err(Clone::clone)?, &places, &starter, &former)?
        };
        let mut opener = Self { plan, places, starter, doors, life, links };
        opener.tell_broker();
        Ok(opener)
    }

    /// Serves for ever.
    ///
    /// # Errors
    /// One line: the host failed.
    pub fn serve(mut self) -> Result<u8, String> {
        self.starter.ready().map_err(|e| format!("READY=1: {e}"))?;
        loop {
            let mut fds: Vec<_> =
                self.doors.iter().map(|door| PollFd::new(door.listener.as_fd(), PollFlags::POLLIN)).collect();
            // No others ask.
            fds.extend(
                [PCI.name, BROKER.name].iter().filter_map(|name| self.links.get(*name)).map(Asker::poll_fd),
            );
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(e) => return Err(format!("poll: {e}")),
            }
            let ready: Vec<bool> = fds.iter().map(|fd| fd.any() == Some(true)).collect();
            self.connect_back_ends();
            for (index, _) in ready.into_iter().enumerate().filter(|(_, ready)| *ready) {
                let Some(door) = self.doors.get(index) else { continue };
                let member = door.member.clone();
                // The standard library's listener accepts whatever type of socket it is.
                match door.listener.accept() {
                    Ok((connection, _)) => {
                        if let Err(why) = self.give(&member, connection.into()) {
                            say("<3>", NAME, &format!("{}: {why}", member.name()));
                        }
                    }
                    Err(e) => say("<4>", NAME, &format!("accept: {e}")),
                }
            }
        }
    }

    /// Answers pci, and the broker: where back ends of units listen is the machine file's to say, the file of a dump the
    /// broker's.
    fn connect_back_ends(&mut self) {
        let Self { life, places, links, .. } = self;
        for process in [PCI.name, BROKER.name] {
            let act = |request: &ToOpener| match request {
                ToOpener::Connect { name } if process == PCI.name => life.back_end(name, places).map(Some),
                ToOpener::Output { path, .. } if process == BROKER.name => {
                    life.output(path, places).map(Some)
                }
                ToOpener::Begin { name, settings } if process == BROKER.name => {
                    life.may_begin(name, settings).map(|()| None)
                }
                // The service manager ends it with the machine.
                ToOpener::End { .. } if process == BROKER.name => Ok(None),
                _ => Err(Errno::EPERM),
            };
            if links.get_mut(process).is_some_and(|link| !link.serve(act)) {
                links.remove(process);
            }
        }
    }

    /// Gives a process that has connected what it is started with.
    fn give(&mut self, member: &Member, fd: OwnedFd) -> Result<(), String> {
        let process = member.process;
        let time = TimeVal::seconds(PATIENCE);
        let timeouts = setsockopt(&fd, sockopt::ReceiveTimeout, &time)
            .and_then(|()| setsockopt(&fd, sockopt::SendTimeout, &time));
        timeouts.map_err(|e| format!("setsockopt: {e}"))?;
        if process.name == "core" && self.links.contains_key("core") {
            // Another life: what the last one had opened is not for this one.
            self.links.clear();
            let plan = self.plan.as_mut().map_err(|why| why.clone())?;
            plan.renew();
            let former = self.life.let_go();
            self.life = Life::begin(plan, &self.places, &self.starter, &former)?;
        }
        let kept = fd.try_clone().map_err(|e| format!("dup: {e}"))?;
        let link = Link::accept(fd, VERSION).map_err(|e| e.to_string())?;
        for (name, fd) in self.life.for_process(member, &self.places)? {
            give_one(&link, name, &fd).map_err(|e| e.to_string())?;
        }
        link.send(&FromOpener::Done).map_err(|e| e.to_string())?;
        if is_kept(process) {
            life::keep(&self.starter, &format!("{LINK}{}", member.name()), kept.as_fd())?;
            self.links.insert(member.name(), Asker::begun(link));
        }
        self.connect_peers(process);
        Ok(())
    }

    /// A process that peers connect to was started: they get new connections to it.
    fn connect_peers(&mut self, process: &Process) {
        if process.restart == Restart::Never {
            return;
        }
        for link in LINKS.iter().filter(|link| link.listener == process.name) {
            let is_peer = |name: &str| Member::find(name).is_some_and(|m| m.process.name == link.connector);
            let Some((_, peer)) = self.links.iter().find(|(name, _)| is_peer(name)) else { continue };
            let given = self.life.connection(link, &self.places).and_then(|connection| {
                let given = peer.give(link.as_name, connection.as_fd());
                given.map_err(|e| format!("{}: {e}", link.connector))
            });
            if let Err(why) = given {
                say("<4>", NAME, &format!("link {}: {why}", link.name));
            }
        }
    }

    /// The machine file may say something else about who may connect than when the broker was started.
    fn tell_broker(&mut self) {
        let Some(broker) = self.links.get("broker") else { return };
        let Some(config) = self.life.config("broker") else { return };
        if let Err(error) = broker.give("config", config) {
            say("<4>", NAME, &format!("the broker does not hear of its new configuration: {error}"));
        }
    }
}

fn give_one(link: &Link, name: String, fd: &OwnedFd) -> Result<(), LinkError> {
    link.send_with(&FromOpener::Given { name }, &[fd.as_fd()], MsgFlags::empty())
}

/// A socket of the socket unit; its name is that of the process.
fn door(listener: OwnedFd) -> Result<Door, String> {
    let address = getsockname::<UnixAddr>(listener.as_raw_fd()).map_err(|e| format!("getsockname: {e}"))?;
    let name = address.path().and_then(Path::file_name).and_then(|name| name.to_str()).unwrap_or_default();
    let member = Member::find(name).ok_or_else(|| format!("a socket named {name:?} is for no process"))?;
    Ok(Door { member, listener: listener.into() })
}
