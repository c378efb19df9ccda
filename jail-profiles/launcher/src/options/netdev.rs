//! `-netdev` and `-object iothread`.

use super::chardev::fd_number;
use crate::cli::{Params, Problem};

/// The most queue pairs of a network device.
pub const MAX_PAIRS: u64 = 16;
/// The longest name of an interface, in bytes (IFNAMSIZ without its NUL).
const MAX_NAME: usize = 15;
/// QEMU's default of `poll-max-ns`.
const POLL_MAX: u64 = 32768;

/// A `-netdev`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetDev {
    /// Its id.
    pub id: String,
    /// What it is.
    pub backend: NetBackend,
}

/// Back end of a network device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NetBackend {
    /// A TAP interface.
    Tap {
        /// Its name; none if the host chooses one.
        name: Option<String>,
        /// Queue pairs.
        queues: u16,
    },
    /// Inherited descriptors of a TAP interface.
    TapFds(Vec<u32>),
    /// A vhost-user back end.
    VhostUser {
        /// Its character device.
        chardev: String,
        /// Queue pairs.
        queues: u16,
    },
}

/// A `-object iothread`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IoThread {
    /// Its id.
    pub id: String,
    /// Longest busy polling, in nanoseconds.
    pub poll_max_ns: u64,
    /// Factor by which polling grows.
    pub poll_grow: u64,
    /// Divisor by which it shrinks.
    pub poll_shrink: u64,
}

/// A `-netdev`.
pub fn netdev(params: &Params) -> Result<NetDev, Problem> {
    let text = |name: &'static str| params.text(name).map(str::to_owned);
    let id = text("id").ok_or(Problem::MissingParameter("id"))?;
    let backend = match params.text("type") {
        Some("vhost-user") => NetBackend::VhostUser {
            chardev: text("chardev").ok_or(Problem::MissingParameter("chardev"))?,
            queues: queues(params)?,
        },
        _ => tap(params)?,
    };
    Ok(NetDev { id, backend })
}

fn queues(params: &Params) -> Result<u16, Problem> {
    let number = params.number("queues").unwrap_or(1);
    let fits = (1..=MAX_PAIRS).contains(&number);
    u16::try_from(number).ok().filter(|_| fits).ok_or(Problem::Range("queues", 1, MAX_PAIRS))
}

fn tap(params: &Params) -> Result<NetBackend, Problem> {
    for script in ["script", "downscript"] {
        if let Some(other) = params.text(script).filter(|value| *value != "no") {
            return Err(Problem::BadValue(script, other.to_owned()));
        }
    }
    let others = |but: &str| params.names().any(|name| !["type", "id", but].contains(&name));
    if let Some(fd) = params.text("fd") {
        return if others("fd") {
            Err(Problem::TapFdAlone)
        } else {
            Ok(NetBackend::TapFds(vec![fd_number(fd)?]))
        };
    }
    if let Some(fds) = params.text("fds") {
        if others("fds") {
            return Err(Problem::TapFdsAlone);
        }
        let fds = fds.split(':').map(fd_number).collect::<Result<Vec<_>, _>>()?;
        let pairs = fds.len() as u64;
        return if pairs > MAX_PAIRS {
            Err(Problem::Range("fds", 1, MAX_PAIRS))
        } else {
            Ok(NetBackend::TapFds(fds))
        };
    }
    let name = params.text("ifname").map(str::to_owned);
    let plain = |name: &String| {
        (1..=MAX_NAME).contains(&name.len())
            && name.bytes().all(|b| b.is_ascii_graphic() && b != b'/' && b != b'%')
    };
    if let Some(bad) = name.clone().filter(|name| !plain(name)) {
        return Err(Problem::BadValue("ifname", bad));
    }
    Ok(NetBackend::Tap { name, queues: queues(params)? })
}

/// A `-object iothread`.
pub fn iothread(params: &Params) -> Result<IoThread, Problem> {
    let id = params.text("id").map(str::to_owned).ok_or(Problem::MissingParameter("id"))?;
    // QEMU keeps them in signed 64 bits.
    let number = |name: &'static str, default| match params.number(name) {
        Some(number) if i64::try_from(number).is_err() => {
            Err(Problem::Range(name, 0, i64::MAX.unsigned_abs()))
        }
        number => Ok(number.unwrap_or(default)),
    };
    Ok(IoThread {
        id,
        poll_max_ns: number("poll-max-ns", POLL_MAX)?,
        poll_grow: number("poll-grow", 0)?,
        poll_shrink: number("poll-shrink", 0)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::devices::{NETDEV, OBJECT};

    fn a_netdev(text: &str) -> Result<NetBackend, String> {
        let parsed = Params::parse_kinds(&NETDEV, text).and_then(|params| netdev(&params));
        parsed.map(|netdev| netdev.backend).map_err(|e| e.to_string())
    }

    #[test]
    fn network_back_ends() {
        let tap = |name: Option<&str>, queues| Ok(NetBackend::Tap { name: name.map(str::to_owned), queues });
        assert_eq!(a_netdev("tap,id=n,ifname=tap0,script=no,downscript=no"), tap(Some("tap0"), 1));
        assert_eq!(a_netdev("tap,id=n,queues=4"), tap(None, 4));
        assert_eq!(a_netdev("tap,id=n,fd=7"), Ok(NetBackend::TapFds(vec![7])));
        assert_eq!(a_netdev("tap,id=n,fds=7:8"), Ok(NetBackend::TapFds(vec![7, 8])));
        let vhost = NetBackend::VhostUser { chardev: "c".into(), queues: 2 };
        assert_eq!(a_netdev("type=vhost-user,id=n,chardev=c,queues=2"), Ok(vhost));
        for (text, error) in [
            ("tap", "Parameter 'id' is missing"),
            ("id=n", "Parameter 'type' is missing"),
            ("foo,id=n", "Parameter 'type' does not accept value 'foo'"),
            ("tap,id=n,foo=1", "Invalid parameter 'foo'"),
            ("tap,id=n,script=/x", "Parameter 'script' does not accept value '/x'"),
            (
                "tap,id=n,ifname=averyverylongname",
                "Parameter 'ifname' does not accept value 'averyverylongname'",
            ),
            ("tap,id=n,ifname=tap%d", "Parameter 'ifname' does not accept value 'tap%d'"),
            ("tap,id=n,queues=17", "queues must be from 1 to 16"),
            ("tap,id=n,fd=x", "Unable to parse FD number x"),
            ("tap,id=n,fds=3:", "Unable to parse FD number "),
            (
                "tap,id=n,fd=3,ifname=a",
                "ifname=, script=, downscript=, vnet_hdr=, helper=, queues=, fds=, and vhostfds= are invalid with fd=",
            ),
            (
                "tap,id=n,fds=3:4,queues=2",
                "ifname=, script=, downscript=, vnet_hdr=, helper=, queues=, and vhostfd= are invalid with fds=",
            ),
            ("vhost-user,id=n", "Parameter 'chardev' is missing"),
        ] {
            assert_eq!(a_netdev(text).unwrap_err(), error, "{text}");
        }
    }

    #[test]
    fn threads() {
        let thread = |text: &str| {
            Params::parse_kinds(&OBJECT, text).and_then(|params| iothread(&params)).map_err(|e| e.to_string())
        };
        let plain = IoThread { id: "i".into(), poll_max_ns: 32768, poll_grow: 0, poll_shrink: 0 };
        assert_eq!(thread("iothread,id=i"), Ok(plain));
        let given = IoThread { id: "i".into(), poll_max_ns: 0, poll_grow: 4, poll_shrink: 2 };
        assert_eq!(thread("qom-type=iothread,id=i,poll-max-ns=0,poll-grow=4,poll-shrink=2"), Ok(given));
        for (text, error) in [
            ("iothread", "Parameter 'id' is missing"),
            ("foo,id=a", "Parameter 'qom-type' does not accept value 'foo'"),
            ("iothread,id=i,foo=1", "Invalid parameter 'foo'"),
            ("iothread,id=i,poll-max-ns=x", "Parameter 'poll-max-ns' expects a number"),
            (
                "iothread,id=i,poll-grow=9223372036854775808",
                "poll-grow must be from 0 to 9223372036854775807",
            ),
        ] {
            assert_eq!(thread(text).unwrap_err(), error, "{text}");
        }
    }
}
