//! Monitors: where clients come from.

use std::cell::{Cell, RefCell};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net as std_net;
use std::rc::Rc;
use std::time::Duration;

use bulkhead_control_api::config::{self, ChardevKind};
use bulkhead_jail::{notice, warn};
use bulkhead_qapi::table::Role;
use nix::sys::socket::{UnixAddr, getpeername, getsockopt, sockopt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Notify;
use tokio::task::{spawn_local, yield_now};
use tokio::time::sleep;

use crate::client::serve;
use crate::hub::Hub;
use crate::stream::{Shared, Stream};

/// The most clients at a time, over all monitors.
pub const MAX_CLIENTS: usize = 100;
/// The most of them that are no operators: those must not keep operators out.
pub const MAX_OTHERS: usize = 50;
/// A client that has not negotiated for so long gives way when there are too many.
const SILENT: Duration = Duration::from_secs(5);
/// Pause after an `accept` that failed for lack of resources.
const RETRY: Duration = Duration::from_millis(100);

/// Why a monitor cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum MonitorError {
    /// `server=on` with a socket that does not listen.
    #[error("monitor {0}: the socket does not listen; give a listening one, or say server=off")]
    NotListening(String),
    /// `server=off` with a socket without a peer.
    #[error("monitor {0}: the socket is not connected; give a connected one, or say server=on")]
    NotConnected(String),
    /// A monitor on something else.
    #[error("monitor {0}: needs a socket or stdio")]
    Unsuitable(String),
    /// The starter did not give what the configuration names.
    #[error("monitor {0}: descriptor {1:?} is missing")]
    Missing(String, String),
    /// The kernel refused.
    #[error("monitor {0}: {1}")]
    Io(String, std::io::Error),
}

/// A monitor's state.
#[derive(Debug)]
pub struct Monitor {
    /// Id of its character device.
    pub label: String,
    /// Its address, as in QEMU's descriptions.
    address: String,
    /// Path of the socket that accepted a client, once one has.
    path: RefCell<Option<String>>,
    server: bool,
    wait: bool,
    clients: Cell<usize>,
    connected: Notify,
}

impl Monitor {
    /// A monitor without clients.
    #[must_use]
    pub fn new(monitor: &config::Monitor) -> Self {
        let (address, server, wait) = match &monitor.chardev.kind {
            ChardevKind::Socket { address, server, wait, .. } => (address.clone(), *server, *wait && *server),
            _ => ("stdio".to_owned(), false, false),
        };
        Self {
            label: monitor.chardev.id.clone(),
            address,
            path: RefCell::default(),
            server,
            wait,
            clients: Cell::default(),
            connected: Notify::new(),
        }
    }

    /// QEMU's description of the character device.
    #[must_use]
    pub fn filename(&self) -> String {
        let is_path = !self.address.starts_with("fd:");
        let address = if is_path { format!("unix:{}", self.address) } else { self.address.clone() };
        // 5.1 writes the short form; ",server=on" came with 6.0.
        let server = if self.server { ",server" } else { "" };
        match &*self.path.borrow() {
            _ if self.address == "stdio" => self.address.clone(),
            _ if self.clients.get() == 0 => format!("disconnected:{address}{server}"),
            Some(path) => format!("unix:{path}{server}"),
            None => format!("{address}{server}"),
        }
    }

    /// Whether the machine waits for a client.
    #[must_use]
    pub fn is_waited_for(&self) -> bool {
        self.wait && self.path.borrow().is_none()
    }

    /// Waits until a client has connected, if the configuration says so.
    pub async fn wait(&self) {
        if self.is_waited_for() {
            notice!("waiting for connection on: {}", self.filename().trim_start_matches("disconnected:"));
            self.connected.notified().await;
        }
    }

    async fn serve(self: Rc<Self>, hub: Rc<Hub>, stream: Stream) {
        self.clients.set(self.clients.get() + 1);
        serve(hub, Rc::clone(&self), stream).await;
        self.clients.set(self.clients.get() - 1);
    }

    async fn accept_loop(self: Rc<Self>, hub: Rc<Hub>, listener: UnixListener) {
        let local = listener.local_addr().ok();
        let path = local.and_then(|local| Some(local.as_pathname()?.display().to_string()));
        // What the user called it is better than the path as the opener sees it.
        let named = if self.address.starts_with("fd:") { path } else { Some(self.address.clone()) };
        loop {
            match listener.accept().await {
                Ok((stream, _)) => {
                    let stream = Stream::Socket(stream);
                    if !self.admit(&hub, &stream) {
                        continue;
                    }
                    self.path.replace(Some(named.clone().unwrap_or_default()));
                    self.connected.notify_one();
                    spawn_local(Rc::clone(&self).serve(Rc::clone(&hub), stream));
                    // The next one is judged when this one counts and the one that gave way does not.
                    yield_now().await;
                }
                Err(error) => {
                    warn!("monitor {}: accept: {error}", self.label);
                    sleep(RETRY).await;
                }
            }
        }
    }
}

impl Monitor {
    /// Whether a peer is to be served. One that is not is told why.
    fn admit(&self, hub: &Hub, stream: &Stream) -> bool {
        let peer = stream.credentials();
        let desc = match hub.admit(self, peer).map(|role| make_room(hub, role)) {
            Ok(None) => return true,
            Ok(Some(limit)) => {
                hub.log_refusal(self, peer, "too-many-clients");
                format!("Too many clients: {limit} are connected")
            }
            Err(_) => "Access denied: this peer may not use this monitor".to_owned(),
        };
        let line = format!("{{\"error\": {{\"class\": \"GenericError\", \"desc\": \"{desc}\"}}}}\r\n");
        stream.say(line.as_bytes());
        false
    }
}

/// Which limit forbids one more client of this role, if one does. The oldest one that has not negotiated gives way;
/// an operator only for another one.
fn make_room(hub: &Hub, role: Role) -> Option<usize> {
    let operator = role == Role::Operator;
    let limit = if !operator && hub.others() >= MAX_OTHERS {
        MAX_OTHERS
    } else if hub.clients() >= MAX_CLIENTS {
        MAX_CLIENTS
    } else {
        return None;
    };
    let silent = hub.oldest_silent(operator).filter(|silent| silent.age() > SILENT);
    if let Some(silent) = &silent {
        warn!("{limit} QMP clients: one that has not negotiated is disconnected");
        silent.drop_it();
    }
    silent.is_none().then_some(limit)
}

/// What a monitor's descriptor turned out to be.
#[derive(Debug)]
pub enum Source {
    /// Clients connect.
    Listener(UnixListener),
    /// The one client is connected.
    Connected(Stream),
    /// The one client's connection ended with a predecessor of this process, or there is no listener.
    Gone,
}

/// Prepares a monitor's descriptors; `find` gives them by name. Needs the runtime's context.
///
/// # Errors
/// See [`MonitorError`].
pub fn open(
    monitor: &config::Monitor,
    mut find: impl FnMut(&str) -> Option<OwnedFd>,
) -> Result<Source, MonitorError> {
    let id = &monitor.chardev.id;
    let missing = |name: &str| MonitorError::Missing(id.clone(), name.to_owned());
    let io = |error| MonitorError::Io(id.clone(), error);
    match &monitor.chardev.kind {
        ChardevKind::Socket { fd, server: true, .. } => {
            let Some(fd) = find(fd) else {
                // systemd gives a service no socket of a unit that was restarted alone until the service itself was.
                warn!("monitor {id}: descriptor {fd:?} is missing: nobody can connect");
                return Ok(Source::Gone);
            };
            if !getsockopt(&fd, sockopt::AcceptConn).unwrap_or(false) {
                return Err(MonitorError::NotListening(id.clone()));
            }
            let listener = std_net::UnixListener::from(fd);
            listener.set_nonblocking(true).map_err(io)?;
            Ok(Source::Listener(UnixListener::from_std(listener).map_err(io)?))
        }
        ChardevKind::Socket { fd, .. } => {
            let Some(fd) = find(fd) else { return Ok(Source::Gone) };
            if getpeername::<UnixAddr>(fd.as_raw_fd()).is_err() {
                return Err(MonitorError::NotConnected(id.clone()));
            }
            let stream = std_net::UnixStream::from(fd);
            stream.set_nonblocking(true).map_err(io)?;
            Ok(Source::Connected(Stream::Socket(UnixStream::from_std(stream).map_err(io)?)))
        }
        ChardevKind::Stdio => {
            let input = Shared::new(find("stdio.in").ok_or_else(|| missing("stdio.in"))?).map_err(io)?;
            let output = Shared::new(find("stdio.out").ok_or_else(|| missing("stdio.out"))?).map_err(io)?;
            Ok(Source::Connected(Stream::Stdio(input, output)))
        }
        ChardevKind::Null | ChardevKind::File { .. } => Err(MonitorError::Unsuitable(id.clone())),
    }
}

/// Serves a monitor from now on.
pub fn start(hub: &Rc<Hub>, monitor: &Rc<Monitor>, source: Source) {
    let (hub, monitor) = (Rc::clone(hub), Rc::clone(monitor));
    match source {
        Source::Listener(listener) => drop(spawn_local(monitor.accept_loop(hub, listener))),
        Source::Connected(stream) => {
            if monitor.admit(&hub, &stream) {
                drop(spawn_local(monitor.serve(hub, stream)));
            }
        }
        Source::Gone => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_monitor_whose_listener_is_missing_begins_without() {
        let kind = |server| ChardevKind::Socket {
            fd: "chardev.qmp".to_owned(),
            address: "/qmp".to_owned(),
            server,
            wait: false,
        };
        for server in [true, false] {
            let chardev = config::Chardev { id: "qmp".to_owned(), kind: kind(server) };
            let monitor =
                config::Monitor { chardev, role: config::Role::Operator, uids: vec![], gids: vec![] };
            assert!(matches!(open(&monitor, |_| None).unwrap(), Source::Gone));
        }
    }
}
