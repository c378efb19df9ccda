//! Character devices: the broker's monitors, the console's, those of devices' back ends, and those that came while the
//! machine ran.

use bulkhead_control_api::config::ChardevKind;
use bulkhead_control_api::console;
use bulkhead_control_api::pci::Function;
use bulkhead_qapi::Error;
use bulkhead_qapi::types::char::{
    ChardevAddArg, ChardevBackendKind, ChardevInfo, ChardevRemoveArg, ChardevReturn,
};
use nix::errno::Errno;
use serde_json::{Map, Value, json};

use crate::commands::{Reply, parse, reply};
use crate::hub::Hub;
use crate::opener::Failed;
use crate::registry::{Chardev, Kind, MAX_ENTRIES, MAX_ID, MAX_PATH, socket_name};

/// A socket character device of a device's back end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Socket {
    /// Its id.
    pub id: String,
    /// Path, or `fd:N`.
    pub address: String,
    /// The back end connects to us.
    pub server: bool,
}

impl Socket {
    /// The device behind it, if there is one.
    pub fn user<'a>(&self, functions: &'a [Function]) -> Option<&'a Function> {
        let name = socket_name(&self.id);
        let uses = |function: &&Function| function.back_end.as_ref().is_some_and(|end| end.socket == name);
        functions.iter().find(uses)
    }

    fn info(&self, functions: &[Function]) -> ChardevInfo {
        let user = self.user(functions);
        let connected = user.and_then(|user| user.back_end.as_ref()).is_some_and(|end| end.connected);
        let address = if self.address.starts_with("fd:") { "" } else { "unix:" }.to_owned() + &self.address;
        let server = if self.server { ",server" } else { "" };
        let state = if connected { "" } else { "disconnected:" };
        ChardevInfo {
            label: self.id.clone(),
            filename: format!("{state}{address}{server}"),
            frontend_open: user.is_some(),
        }
    }
}

/// What a client wants a character device to be.
struct Wanted {
    kind: Kind,
    /// It fails if nothing is there to connect to.
    at_once: bool,
}

/// What a backend is, if it is one that can be added while the machine runs.
fn wanted(kind: ChardevBackendKind, backend: &Value) -> Result<Wanted, Error> {
    let what = kind_name(kind);
    match kind {
        ChardevBackendKind::Null => return Ok(Wanted { kind: Kind::Null, at_once: false }),
        ChardevBackendKind::Socket => {}
        _ => {
            let desc = format!("a character device of kind '{what}' can be given on the command line only");
            return Err(Error::generic(desc));
        }
    }
    let data = |member: &str| backend.pointer(&format!("/data/{member}"));
    let flag = |member| data(member).and_then(Value::as_bool);
    // Without `server` QEMU listens.
    if flag("server").unwrap_or(true) {
        return Err(Error::generic("a socket that listens can be given on the command line only"));
    }
    if flag("wait").is_some() {
        return Err(Error::generic("'wait' option is incompatible with socket in client connect mode"));
    }
    let special = ["tls-creds", "tls-authz"].iter().any(|member| data(member).is_some())
        || ["telnet", "tn3270", "websocket"].iter().any(|member| flag(member) == Some(true));
    if special {
        return Err(Error::generic("a back end speaks vhost-user: no TLS, telnet or WebSocket"));
    }
    let path =
        match (data("addr/type").and_then(Value::as_str), data("addr/data/path").and_then(Value::as_str)) {
            (Some("unix"), Some(path)) => path,
            _ => return Err(Error::generic("only a unix socket can be added while the machine runs")),
        };
    if path.len() > MAX_PATH {
        return Err(Error::generic(format!("UNIX socket path '{path}' is too long")));
    }
    let reconnect = data("reconnect").and_then(Value::as_i64).unwrap_or(0);
    Ok(Wanted { kind: Kind::Socket(path.to_owned()), at_once: reconnect <= 0 })
}

fn kind_name(kind: ChardevBackendKind) -> String {
    let name = serde_json::to_value(kind).unwrap_or_default();
    name.as_str().unwrap_or_default().to_owned()
}

fn busy(id: &str) -> Error {
    Error::generic(format!("Chardev '{id}' is busy"))
}

impl Hub {
    /// The socket character devices of back ends, used or not.
    pub(crate) fn sockets(&self) -> Vec<Socket> {
        let registry = self.store.registry.borrow();
        let given = self.config.back_ends.iter().filter_map(|chardev| match &chardev.kind {
            ChardevKind::Socket { address, server, .. } if !registry.removed.contains(&chardev.id) => {
                Some(Socket { id: chardev.id.clone(), address: address.clone(), server: *server })
            }
            _ => None,
        });
        let added = registry.chardevs.iter().filter_map(|chardev| match &chardev.kind {
            Kind::Socket(path) => {
                Some(Socket { id: chardev.id.clone(), address: path.clone(), server: false })
            }
            Kind::Null => None,
        });
        given.chain(added).collect()
    }

    /// All character devices: the monitors, the console's, those of back ends, and those that nothing uses.
    pub(crate) async fn chardevs(&self) -> Result<Vec<ChardevInfo>, Error> {
        let monitor =
            |label: &String, filename| ChardevInfo { label: label.clone(), filename, frontend_open: true };
        let mut all: Vec<ChardevInfo> =
            self.monitors.iter().map(|own| monitor(&own.label, own.filename())).collect();
        let console::Answer::Chardevs(chardevs) = self.ask_console(console::Op::Chardevs).await? else {
            return Err(Error::generic("the console answered something else"));
        };
        all.extend(chardevs.into_iter().map(|chardev| ChardevInfo {
            label: chardev.label,
            filename: chardev.filename,
            frontend_open: chardev.frontend_open,
        }));
        let sockets = self.sockets();
        if !sockets.is_empty() {
            let functions = self.functions().await?;
            all.extend(sockets.iter().map(|socket| socket.info(&functions)));
        }
        let registry = self.store.registry.borrow();
        all.extend(registry.chardevs.iter().filter(|chardev| chardev.kind == Kind::Null).map(|chardev| {
            ChardevInfo { label: chardev.id.clone(), filename: "null".to_owned(), frontend_open: false }
        }));
        Ok(all)
    }

    pub(crate) async fn chardev_add(&self, args: Map<String, Value>) -> Reply {
        let (id, wanted) = requested(args)?;
        if self.chardevs().await?.iter().any(|chardev| chardev.label == id) {
            let desc = format!("attempt to add duplicate property '{id}' to object (type 'container')");
            return Err(Error::generic(desc));
        }
        if id.len() > MAX_ID || self.store.registry.borrow().chardevs.len() >= MAX_ENTRIES {
            let desc = format!("at most {MAX_ENTRIES} character devices with ids of at most {MAX_ID} bytes");
            return Err(Error::generic(desc));
        }
        self.define(&id, &wanted).await?;
        self.store.registry.borrow_mut().chardevs.push(Chardev { id, kind: wanted.kind });
        self.commit().await;
        reply(ChardevReturn { pty: None })
    }

    /// One that nothing uses becomes another one.
    pub(crate) async fn chardev_change(&self, args: Map<String, Value>) -> Reply {
        let (id, wanted) = requested(args)?;
        if !self.chardevs().await?.iter().any(|chardev| chardev.label == id) {
            return Err(Error::generic(format!("Chardev '{id}' does not exist")));
        }
        let known = self.store.registry.borrow().chardevs.iter().any(|chardev| chardev.id == id);
        if !known || self.is_used(&id).await? {
            return Err(Error::generic("Chardev user does not support chardev hotswap"));
        }
        self.forget(&id).await?;
        let defined = self.define(&id, &wanted).await;
        {
            let mut registry = self.store.registry.borrow_mut();
            if defined.is_err() {
                // The old path is forgotten: there is nothing left of it.
                registry.chardevs.retain(|chardev| chardev.id != id);
            }
            if let Some(chardev) = registry.chardevs.iter_mut().find(|chardev| chardev.id == id) {
                chardev.kind = wanted.kind;
            }
        }
        self.commit().await;
        defined?;
        reply(ChardevReturn { pty: None })
    }

    pub(crate) async fn chardev_remove(&self, args: ChardevRemoveArg) -> Reply {
        let id = args.id;
        if !self.chardevs().await?.iter().any(|chardev| chardev.label == id) {
            return Err(Error::generic(format!("Chardev '{id}' not found")));
        }
        let added = self.store.registry.borrow().chardevs.iter().any(|chardev| chardev.id == id);
        let given = self.sockets().iter().any(|socket| socket.id == id && !socket.server);
        if !(added || given) || self.is_used(&id).await? {
            return Err(busy(&id));
        }
        self.forget(&id).await?;
        {
            let mut registry = self.store.registry.borrow_mut();
            registry.chardevs.retain(|chardev| chardev.id != id);
            if !added {
                registry.removed.push(id);
            }
        }
        self.commit().await;
        Ok(json!({}))
    }

    async fn is_used(&self, id: &str) -> Result<bool, Error> {
        let Some(socket) = self.sockets().into_iter().find(|socket| socket.id == id) else {
            return Ok(false);
        };
        Ok(socket.user(&self.functions().await?).is_some())
    }

    /// Lets pci ask for a connection, and says what QEMU says if there is nothing to connect to.
    async fn define(&self, id: &str, wanted: &Wanted) -> Result<(), Error> {
        let Kind::Socket(path) = &wanted.kind else { return Ok(()) };
        match self.opener.define(&socket_name(id), path, wanted.at_once).await {
            Ok(()) => Ok(()),
            Err(Failed::Away) => Err(no_opener()),
            Err(Failed::Refused(errno)) => {
                Err(Error::generic(format!("Failed to connect to '{path}': {}", errno.desc())))
            }
        }
    }

    async fn forget(&self, id: &str) -> Result<(), Error> {
        if !self.sockets().iter().any(|socket| socket.id == id) {
            return Ok(());
        }
        match self.opener.forget(&socket_name(id)).await {
            Ok(()) | Err(Failed::Refused(Errno::ENOENT)) => Ok(()),
            Err(Failed::Refused(errno)) => Err(Error::generic(errno.desc())),
            Err(Failed::Away) => Err(no_opener()),
        }
    }

    /// Tells the opener what it was told before.
    pub(crate) async fn define_again(&self) {
        let (chardevs, removed) = {
            let registry = self.store.registry.borrow();
            (registry.chardevs.clone(), registry.removed.clone())
        };
        for id in removed {
            let _ = self.opener.forget(&socket_name(&id)).await;
        }
        for Chardev { id, kind } in chardevs {
            // One that is refused now is missed when a device is to use it.
            let _ = self.define(&id, &Wanted { kind, at_once: false }).await;
        }
    }
}

fn no_opener() -> Error {
    Error::generic("there is no opener that would reach a path")
}

/// Id and kind of what a client asks for.
fn requested(mut args: Map<String, Value>) -> Result<(String, Wanted), Error> {
    let backend = args.get("backend").cloned().unwrap_or_default();
    // What the variants have beside the kind is read from the JSON.
    if let Some(Value::Object(backend)) = args.get_mut("backend") {
        backend.retain(|name, _| name == "type");
    }
    let ChardevAddArg { id, backend: common } = parse(args)?;
    Ok((id, wanted(common.kind, &backend)?))
}
