//! Character devices, in the syntax of `-chardev` and in the short one of `-serial` and `-qmp`.

use super::Target;
use crate::cli::{Params, Problem, params::is_identifier, table::CHARDEV};

/// A `-chardev`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chardev {
    /// Its id.
    pub id: String,
    /// Its back end.
    pub backend: Backend,
}

/// Back end of a character device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Backend {
    /// Swallows output, gives no input.
    Null,
    /// Standard input and output.
    Stdio {
        /// Control keys of the terminal send signals.
        signal: bool,
    },
    /// Output to a file.
    File {
        /// Where.
        path: String,
        /// Keep what is there.
        append: bool,
    },
    /// A unix stream socket.
    Socket {
        /// Which.
        place: Place,
        /// Listen; else connect.
        server: bool,
        /// The VM starts when a client has connected.
        wait: bool,
        /// `reconnect=`: it is for a device's back end, with which the connection is made anew.
        reconnect: bool,
    },
}

/// Which socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// The one at this path.
    Path(String),
    /// The inherited one of this number.
    Fd(u32),
    /// The one on which a socket unit listens at this path.
    Unit(String),
}

/// Parameters that each back end takes beside `backend` and `id`.
const BACKENDS: [(&str, &[&str]); 4] = [
    ("socket", &["path", "fd", "server", "wait", "reconnect"]),
    ("stdio", &["signal"]),
    ("file", &["path", "append"]),
    ("null", &[]),
];

/// A `-chardev`.
pub fn chardev(params: &Params) -> Result<Chardev, Problem> {
    let id = params.text("id").ok_or(Problem::ChardevNoId)?.to_owned();
    let name = params.text("backend").ok_or_else(|| Problem::ChardevNoBackend(id.clone()))?;
    let Some((name, takes)) = BACKENDS.iter().find(|(known, _)| *known == name) else {
        return Err(Problem::ChardevBackend(name.to_owned()));
    };
    let foreign = |given: &&str| !matches!(*given, "backend" | "id") && !takes.contains(given);
    if let Some(other) = params.names().find(foreign) {
        return Err(Problem::InvalidParameter(other.to_owned()));
    }
    let backend = match *name {
        "socket" => socket(params)?,
        "stdio" => Backend::Stdio { signal: params.flag("signal").unwrap_or(true) },
        "file" => {
            let append = params.flag("append").unwrap_or(false);
            file(params.text("path").unwrap_or(""), append)?
        }
        _ => Backend::Null,
    };
    Ok(Chardev { id, backend })
}

/// The short syntax.
pub fn target(text: &str) -> Result<Target, Problem> {
    let backend = match text.split_once(':') {
        None if text == "null" => Backend::Null,
        None if text == "stdio" => Backend::Stdio { signal: true },
        Some(("chardev", id)) if is_identifier(id) => return Ok(Target::Chardev(id.to_owned())),
        Some(("chardev", id)) => return Err(Problem::ChardevNotFound(id.to_owned())),
        Some(("mon", _)) => return Err(Problem::MuxedMonitor),
        // As in QEMU, commas are part of the path here.
        Some(("file", path)) => file(path, false)?,
        Some(("unix", text)) => {
            let params = Params::parse_with(&CHARDEV, Some("path"), text)?;
            if let Some(other) = params.names().find(|name| !matches!(*name, "path" | "server" | "wait")) {
                return Err(Problem::InvalidParameter(other.to_owned()));
            }
            socket(&params)?
        }
        _ => return Err(Problem::CharDriver(text.to_owned())),
    };
    Ok(Target::Own(backend))
}

fn file(path: &str, append: bool) -> Result<Backend, Problem> {
    if path.is_empty() {
        return Err(Problem::FileNoPath);
    }
    Ok(Backend::File { path: path.to_owned(), append })
}

fn socket(params: &Params) -> Result<Backend, Problem> {
    let place = match (params.text("path").filter(|path| !path.is_empty()), params.text("fd")) {
        (Some(path), None) => Place::Path(path.to_owned()),
        (None, Some(number)) => Place::Fd(fd_number(number)?),
        _ => return Err(Problem::SocketPlace),
    };
    let server = params.flag("server").unwrap_or(false);
    let wait = params.flag("wait");
    if wait.is_some() && !server {
        return Err(Problem::WaitOnClient);
    }
    let reconnect = params.number("reconnect").is_some_and(|seconds| seconds > 0);
    if reconnect && server {
        return Err(Problem::ReconnectOnServer);
    }
    Ok(Backend::Socket { place, server, wait: server && wait.unwrap_or(true), reconnect })
}

/// The number of an inherited descriptor.
pub fn fd_number(text: &str) -> Result<u32, Problem> {
    let number = text.parse().ok().filter(|n| *n <= i32::MAX.unsigned_abs());
    number.filter(|_| !text.starts_with('+')).ok_or_else(|| Problem::FdNumber(text.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn long(text: &str) -> Result<Backend, String> {
        let parsed = Params::parse(&CHARDEV, text).and_then(|params| chardev(&params));
        parsed.map(|chardev| chardev.backend).map_err(|e| e.to_string())
    }

    fn socket_at(path: &str, server: bool, wait: bool) -> Backend {
        Backend::Socket { place: Place::Path(path.into()), server, wait, reconnect: false }
    }

    #[test]
    fn long_syntax() {
        for (text, backend) in [
            ("null,id=a", Backend::Null),
            ("stdio,id=a", Backend::Stdio { signal: true }),
            ("id=a,backend=stdio,signal=off", Backend::Stdio { signal: false }),
            ("file,id=a,path=/f", Backend::File { path: "/f".into(), append: false }),
            ("file,id=a,path=/f,,g,append=on", Backend::File { path: "/f,g".into(), append: true }),
            ("socket,id=a,path=/s", socket_at("/s", false, false)),
            ("socket,id=a,path=/s,server=on", socket_at("/s", true, true)),
            ("socket,id=a,path=/s,server,nowait", socket_at("/s", true, false)),
            (
                "socket,id=m,fd=7,server=on,wait=off",
                Backend::Socket { place: Place::Fd(7), server: true, wait: false, reconnect: false },
            ),
        ] {
            assert_eq!(long(text), Ok(backend), "{text}");
        }
    }

    #[test]
    fn long_syntax_refused() {
        for (text, error) in [
            ("socket", "chardev: no id specified"),
            ("id=a", "chardev: \"a\" missing backend"),
            ("pty,id=a", "'pty' is not a valid char driver name: socket, stdio, file and null exist"),
            ("null,id=a,path=/x", "Invalid parameter 'path'"),
            ("socket,id=a,host=h", "Invalid parameter 'host'"),
            ("file,id=a", "chardev: file: no filename given"),
            ("socket,id=a", "one of 'path' and 'fd' is required"),
            ("socket,id=a,path=/x,fd=3", "one of 'path' and 'fd' is required"),
            (
                "socket,id=a,path=/x,wait=off",
                "'wait' option is incompatible with socket in client connect mode",
            ),
            ("socket,id=a,fd=x", "Unable to parse FD number x"),
            ("socket,id=a,fd=-1", "Unable to parse FD number -1"),
            ("socket,id=a,fd=+1", "Unable to parse FD number +1"),
            ("socket,id=a,fd=4294967295", "Unable to parse FD number 4294967295"),
            ("socket,id=a,path=/x,server=yes", "Parameter 'server' expects 'on' or 'off'"),
            (
                "null,id=9",
                "Parameter 'id' expects an identifier: letters, digits, '-', '.', '_', starting with a letter",
            ),
        ] {
            assert_eq!(long(text).unwrap_err(), error, "{text}");
        }
    }

    #[test]
    fn short_syntax() {
        for (text, backend) in [
            ("null", Backend::Null),
            ("stdio", Backend::Stdio { signal: true }),
            ("file:/a,b", Backend::File { path: "/a,b".into(), append: false }),
            ("unix:q.sock", socket_at("q.sock", false, false)),
            ("unix:/a,,b,server=on,wait=off", socket_at("/a,b", true, false)),
            ("unix:/a,server,nowait", socket_at("/a", true, false)),
        ] {
            assert_eq!(target(text), Ok(Target::Own(backend)), "{text}");
        }
        assert_eq!(target("chardev:a"), Ok(Target::Chardev("a".into())));
    }

    #[test]
    fn short_syntax_refused() {
        let not_valid = "is not a valid char driver: stdio, null, file:PATH, unix:PATH and chardev:ID exist";
        for (text, error) in [
            ("foo", format!("'foo' {not_valid}")),
            ("none", format!("'none' {not_valid}")),
            ("vc:80x25", format!("'vc:80x25' {not_valid}")),
            ("mon:stdio", "mon: is not available: there is no human monitor; use -qmp".to_owned()),
            ("unix:", "one of 'path' and 'fd' is required".to_owned()),
            ("unix:/a,id=x", "Invalid parameter 'id'".to_owned()),
            ("unix:/a,foo=x", "Invalid parameter 'foo'".to_owned()),
            ("file:", "chardev: file: no filename given".to_owned()),
            ("chardev:", "chardev \"\" not found".to_owned()),
        ] {
            assert_eq!(target(text).unwrap_err().to_string(), error, "{text}");
        }
    }
}
