//! Who may connect to which monitor, and what its clients may do.

use std::collections::BTreeMap;
use std::fmt;
use std::os::fd::AsFd;

use bulkhead_control_api::config;
use bulkhead_qapi::table::Role;
use nix::sys::socket::{getsockopt, sockopt};

/// What the kernel gives for a user id that has no mapping in our namespace.
const OVERFLOW: u32 = 65534;

/// The process at the other end of a connection, as the kernel saw it when it connected
/// (`SO_PEERCRED`): effective ids, no supplementary groups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Credentials {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Process id; 0 for a process of another pid namespace.
    pub pid: i32,
}

impl Credentials {
    /// Those of a connected unix socket's peer; none for anything else.
    #[must_use]
    pub fn of(fd: impl AsFd) -> Option<Self> {
        let peer = getsockopt(&fd, sockopt::PeerCredentials).ok()?;
        // A socket of another family has an answer, too: no user at all.
        let known = peer.uid() != u32::MAX;
        known.then(|| Self { uid: peer.uid(), gid: peer.gid(), pid: peer.pid() })
    }
}

/// What holds for one monitor.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Rule {
    role: Role,
    uids: Vec<u32>,
    gids: Vec<u32>,
}

/// Why a peer may not connect.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Denied {
    /// Its user or process has no number in our namespaces.
    #[error("unmapped")]
    Unmapped,
    /// There are lists and it has no credentials.
    #[error("no-credentials")]
    NoCredentials,
    /// Its user is not listed.
    #[error("uid")]
    Uid,
    /// Its group is not listed.
    #[error("gid")]
    Gid,
    /// Nothing is known of its monitor.
    #[error("monitor")]
    Monitor,
}

/// The rules of all monitors, by label.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Policy(BTreeMap<String, Rule>);

impl Policy {
    /// The policy of a configuration.
    #[must_use]
    pub fn new(monitors: &[config::Monitor]) -> Self {
        let rule = |monitor: &config::Monitor| {
            let role = match monitor.role {
                config::Role::Operator => Role::Operator,
                config::Role::Monitor => Role::Monitor,
                config::Role::Console => Role::Console,
            };
            let rule = Rule { role, uids: monitor.uids.clone(), gids: monitor.gids.clone() };
            (monitor.chardev.id.clone(), rule)
        };
        Self(monitors.iter().map(rule).collect())
    }

    /// The role of the clients of a monitor; of one that is not known, the one that may nothing.
    #[must_use]
    pub fn role(&self, monitor: &str) -> Role {
        self.0.get(monitor).map_or(Role::Any, |rule| rule.role)
    }

    /// The role of a peer as a monitor's client. Each list that there is limits.
    ///
    /// # Errors
    /// It may not be one.
    pub fn admit(&self, monitor: &str, peer: Option<Credentials>) -> Result<Role, Denied> {
        let rule = self.0.get(monitor).ok_or(Denied::Monitor)?;
        match peer {
            Some(peer) if peer.uid == OVERFLOW || peer.pid == 0 => Err(Denied::Unmapped),
            Some(peer) if !lists(&rule.uids, peer.uid) => Err(Denied::Uid),
            Some(peer) if !lists(&rule.gids, peer.gid) => Err(Denied::Gid),
            None if !rule.uids.is_empty() || !rule.gids.is_empty() => Err(Denied::NoCredentials),
            _ => Ok(rule.role),
        }
    }
}

fn lists(list: &[u32], id: u32) -> bool {
    list.is_empty() || list.contains(&id)
}

/// The name of a role on the command line and in logs.
#[must_use]
pub const fn role_name(role: Role) -> &'static str {
    match role {
        Role::Any => "none",
        Role::Monitor => "monitor",
        Role::Console => "console",
        Role::Operator => "operator",
    }
}

/// Whom a line of the log is about, as `key=value`.
#[derive(Clone, Copy, Debug)]
pub struct Subject<'a> {
    /// Label of the monitor.
    pub monitor: &'a str,
    /// The role there.
    pub role: Role,
    /// The client.
    pub peer: Option<Credentials>,
}

impl fmt::Display for Subject<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "monitor={} role={} ", self.monitor, role_name(self.role))?;
        match self.peer {
            Some(Credentials { uid, gid, pid }) => write!(f, "uid={uid} gid={gid} pid={pid}"),
            None => write!(f, "uid=- gid=- pid=-"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    fn monitor(id: &str, role: config::Role, uids: &[u32], gids: &[u32]) -> config::Monitor {
        let chardev = config::Chardev { id: id.to_owned(), kind: config::ChardevKind::Stdio };
        config::Monitor { chardev, role, uids: uids.to_vec(), gids: gids.to_vec() }
    }

    fn peer(uid: u32, gid: u32) -> Option<Credentials> {
        Some(Credentials { uid, gid, pid: 7 })
    }

    #[test]
    fn each_list_limits() {
        let policy = Policy::new(&[
            monitor("open", config::Role::Monitor, &[], &[]),
            monitor("users", config::Role::Operator, &[1, 2], &[]),
            monitor("both", config::Role::Console, &[1, 2], &[5]),
        ]);
        for (name, peer, expected) in [
            ("open", peer(9, 9), Ok(Role::Monitor)),
            ("open", None, Ok(Role::Monitor)),
            ("users", peer(2, 9), Ok(Role::Operator)),
            ("users", peer(3, 9), Err(Denied::Uid)),
            ("users", peer(0, 0), Err(Denied::Uid)),
            ("users", None, Err(Denied::NoCredentials)),
            ("both", peer(1, 5), Ok(Role::Console)),
            ("both", peer(1, 6), Err(Denied::Gid)),
            ("other", peer(0, 0), Err(Denied::Monitor)),
        ] {
            assert_eq!(policy.admit(name, peer), expected, "{name} {peer:?}");
        }
        assert_eq!((policy.role("both"), policy.role("other")), (Role::Console, Role::Any));
    }

    #[test]
    fn peers_without_a_mapping_are_refused() {
        let policy = Policy::new(&[monitor("open", config::Role::Operator, &[], &[])]);
        assert_eq!(policy.admit("open", peer(65534, 0)), Err(Denied::Unmapped));
        let elsewhere = Some(Credentials { uid: 0, gid: 0, pid: 0 });
        assert_eq!(policy.admit("open", elsewhere), Err(Denied::Unmapped));
        assert_eq!(policy.admit("open", peer(65533, 65534)), Ok(Role::Operator));
    }

    #[test]
    fn credentials_are_those_of_unix_sockets() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let pid = i32::try_from(std::process::id()).unwrap();
        assert_eq!(Credentials::of(&ours).unwrap().pid, pid);
        assert_eq!(Credentials::of(std::fs::File::open("/dev/null").unwrap()), None);
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        assert_eq!(Credentials::of(&stream), None);
    }
}
