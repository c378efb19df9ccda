//! Roles of monitors, and who may connect.

use std::fs::Permissions;
use std::io::Read as _;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, Stdio};

use bulkhead_control_api::config::Role;
use bulkhead_control_api::core::{Event, RunState};
use bulkhead_framework::Result;
use bulkhead_jail::link::receive;
use bulkhead_qapi::table;
use bulkhead_qmp_tests::broker::{Broker, Kind, Limit};
use bulkhead_qmp_tests::wire::Wire;
use nix::sys::socket::MsgFlags;
use nix::unistd::{getegid, geteuid};
use serde_json::{Value, json};

const ROLES: [Limit<'_>; 3] =
    [(Role::Operator, &[], &[]), (Role::Monitor, &[], &[]), (Role::Console, &[], &[])];

/// A broker with a monitor of each role.
fn roles() -> Result<Broker> {
    Broker::start_limited(&[Kind::Server; 3], &ROLES, None, false, true)
}

fn limited(limits: &[Limit<'_>]) -> Result<Broker> {
    Broker::start_limited(&vec![Kind::Server; limits.len()], limits, None, false, true)
}

fn negotiated(broker: &Broker, monitor: usize, oob: bool) -> Result<Wire> {
    let mut wire = Wire::connect(&broker.path(monitor))?;
    wire.negotiate(oob)?;
    Ok(wire)
}

fn return_of(reply: &Value) -> Result<&Vec<Value>> {
    Ok(reply.get("return").and_then(Value::as_array).ok_or("no list")?)
}

/// The names in a reply's list, of those that `wanted` wants.
fn names(reply: &Value, wanted: impl Fn(&Value) -> bool) -> Result<Vec<String>> {
    let name = |entity: &Value| entity.get("name").and_then(Value::as_str).map(str::to_owned);
    Ok(return_of(reply)?.iter().filter(|entity| wanted(entity)).filter_map(name).collect())
}

#[test]
fn a_forbidden_command_is_answered_like_an_unknown_one() -> Result<()> {
    let broker = roles()?;
    for monitor in [1, 2] {
        for oob in [false, true] {
            let mut wire = Wire::connect(&broker.path(monitor))?;
            // Before negotiation, too.
            for negotiated in [false, true] {
                if negotiated {
                    wire.negotiate(oob)?;
                }
                for request in [
                    "{'execute': 'NAME'}",
                    "{'execute': 'NAME', 'id': [1]}",
                    "{'execute': 'NAME', 'arguments': {'surplus': 1}}",
                    "{'execute': 'NAME', 'arguments': 1}",
                    "{'exec-oob': 'NAME'}",
                    "{'exec-oob': 'NAME', 'arguments': {'x': 1}, 'id': null}",
                ] {
                    let mut answer = |name: &str| -> Result<String> {
                        let reply = wire.ask(&request.replace("NAME", name))?;
                        Ok(reply.to_string().replace(name, "NAME"))
                    };
                    for name in ["quit", "stop", "add-fd"] {
                        assert_eq!(answer(name)?, answer("no-such-command")?, "{request}");
                    }
                }
            }
        }
    }
    assert!(!broker.has_ended());
    Ok(())
}

/// A client that finds out what it may do, and tries everything else.
fn check_introspection(wire: &mut Wire) -> Result<Vec<String>> {
    let listed = names(&wire.ask("{'execute': 'query-commands'}")?, |_| true)?;
    let schema = wire.ask("{'execute': 'query-qmp-schema'}")?;
    let mut described = names(&schema, |entity| entity.get("meta-type") == Some(&json!("command")))?;
    described.sort_unstable();
    let mut sorted = listed.clone();
    sorted.sort_unstable();
    assert_eq!(described, sorted);
    let events = names(&wire.ask("{'execute': 'query-events'}")?, |_| true)?;
    assert_eq!(events, names(&schema, |entity| entity.get("meta-type") == Some(&json!("event")))?);
    for command in table::COMMANDS {
        let request = format!("{{'execute': '{}', 'arguments': {{'surplus': 1}}}}", command.name);
        let reply = wire.ask(&request)?;
        let unknown = format!("The command {} has not been found", command.name);
        let is_unknown = reply.pointer("/error/desc") == Some(&json!(unknown));
        assert_eq!(is_unknown, !listed.iter().any(|name| name == command.name), "{reply}");
    }
    Ok(listed)
}

#[test]
fn introspection_shows_what_the_role_may_do() -> Result<()> {
    let broker = roles()?;
    let mut lists = Vec::new();
    for monitor in 0..3 {
        lists.push(check_introspection(&mut negotiated(&broker, monitor, false)?)?);
    }
    let [operator, monitor, console] = <[Vec<String>; 3]>::try_from(lists).map_err(|_| "three lists")?;
    assert_eq!(operator.len(), table::COMMANDS.len());
    assert!(monitor.iter().all(|name| name.starts_with("query-") || name == "qmp_capabilities"));
    assert!(monitor.iter().any(|name| name == "query-status"));
    let common = ["qmp_capabilities", "query-version", "query-commands", "query-events", "query-qmp-schema"];
    let own = ["getfd", "closefd", "add_client"];
    assert!(console.iter().all(|name| common.contains(&name.as_str()) || own.contains(&name.as_str())));
    assert!(console.iter().any(|name| name == "getfd"));
    Ok(())
}

#[test]
fn events_go_to_operators_and_monitors_only() -> Result<()> {
    let broker = roles()?;
    let mut wires = (0..3).map(|n| negotiated(&broker, n, false)).collect::<Result<Vec<_>>>()?;
    broker.core.event(Event::Resume, RunState::Running);
    let [operator, monitor, console] = wires.as_mut_slice() else { return Err("three".into()) };
    operator.event("RESUME")?;
    monitor.event("RESUME")?;
    // Its next line is the reply.
    console.send(b"{'execute': 'query-version'}")?;
    assert!(console.line()?.get("return").is_some());
    Ok(())
}

/// Clients of the lesser roles cannot keep operators out.
#[test]
fn operators_find_room() -> Result<()> {
    let broker = roles()?;
    let mut served = Vec::new();
    let mut refused = 0;
    for number in 0..120 {
        let mut wire = Wire::over(UnixStream::connect(broker.path(1 + number % 2))?)?;
        let line = wire.line()?;
        match line.pointer("/error/desc") {
            None => {
                wire.negotiate(false)?;
                served.push(wire);
            }
            Some(desc) => {
                assert_eq!(desc, "Too many clients: 50 are connected");
                refused += 1;
            }
        }
    }
    assert_eq!((served.len(), refused), (50, 70));
    let mut operators = (0..50).map(|_| negotiated(&broker, 0, false)).collect::<Result<Vec<_>>>()?;
    let full = first_line(UnixStream::connect(broker.path(0))?)?;
    assert_eq!(full.pointer("/error/desc"), Some(&json!("Too many clients: 100 are connected")));
    for wire in operators.iter_mut().chain(&mut served) {
        assert!(wire.ask("{'execute': 'query-version'}")?.get("return").is_some());
    }
    Ok(())
}

#[test]
fn descriptors_wait_behind_a_forbidden_command() -> Result<()> {
    let broker = roles()?;
    let mut wire = negotiated(&broker, 2, false)?;
    let (passed, mut end) = UnixStream::pair()?;
    assert!(wire.ask_with("{'execute': 'add-fd'}", &[passed.as_fd()])?.get("error").is_some());
    drop(passed);
    let getfd = "{'execute': 'getfd', 'arguments': {'fdname': 'a'}}";
    assert_eq!(wire.ask(getfd)?, json!({"return": {}}));
    assert_eq!(wire.ask("{'execute': 'closefd', 'arguments': {'fdname': 'a'}}")?, json!({"return": {}}));
    assert_eq!(end.read(&mut [0; 1])?, 0);
    Ok(())
}

/// The first line that a connection brings; nothing may follow a refusal.
fn first_line(stream: UnixStream) -> Result<Value> {
    let mut wire = Wire::over(stream)?;
    let line = wire.line()?;
    if line.get("error").is_some() {
        assert!(wire.line().is_err(), "closed");
    }
    Ok(line)
}

fn is_denied(stream: UnixStream) -> Result<bool> {
    let line = first_line(stream)?;
    let denied = json!({"error": {"class": "GenericError",
        "desc": "Access denied: this peer may not use this monitor"}});
    assert!(line == denied || line.get("QMP").is_some(), "{line}");
    Ok(line == denied)
}

#[test]
fn lists_of_users_and_groups_limit_who_may_connect() -> Result<()> {
    let (uid, gid) = (geteuid().as_raw(), getegid().as_raw());
    let limits: [(Limit<'_>, bool); 7] = [
        ((Role::Operator, &[], &[]), false),
        ((Role::Operator, &[uid], &[]), false),
        ((Role::Operator, &[uid + 1, uid], &[gid + 1, gid]), false),
        ((Role::Operator, &[], &[gid]), false),
        ((Role::Operator, &[uid + 1], &[]), true),
        ((Role::Operator, &[uid], &[gid + 1]), true),
        ((Role::Monitor, &[uid + 1], &[gid]), true),
    ];
    let broker = limited(&limits.map(|(limit, _)| limit))?;
    for (number, (limit, denied)) in limits.iter().enumerate() {
        assert_eq!(is_denied(UnixStream::connect(broker.path(number))?)?, *denied, "{limit:?}");
    }
    Ok(())
}

/// A connection that a process of other ids made.
fn connect_as(uid: u32, gid: u32, path: &Path) -> Result<UnixStream> {
    const SCRIPT: &str = "import socket, sys
s = socket.socket(socket.AF_UNIX)
s.connect(sys.argv[1])
socket.send_fds(socket.socket(fileno=0), [b'x'], [s.fileno()])";
    let (ours, theirs) = UnixStream::pair()?;
    let mut command = Command::new("/usr/bin/python3");
    command.args(["-Ic", SCRIPT]).arg(path).current_dir("/").stdin(Stdio::from(OwnedFd::from(theirs)));
    assert!(command.uid(uid).gid(gid).status()?.success());
    drop(command);
    let received = receive(ours.as_fd(), &mut [0; 1], MsgFlags::empty()).map_err(std::io::Error::from)?;
    Ok(received.fds.into_iter().next().ok_or("no connection")?.into())
}

/// Peers of other users. Only root can make some.
#[test]
fn other_users_are_told_apart() -> Result<()> {
    if !geteuid().is_root() {
        println!("not run: it needs root");
        return Ok(());
    }
    let broker =
        limited(&[(Role::Operator, &[1234], &[]), (Role::Operator, &[], &[]), (Role::Operator, &[], &[77])])?;
    let all = Permissions::from_mode(0o777);
    for number in 0..3 {
        std::fs::set_permissions(broker.path(number), all.clone())?;
    }
    std::fs::set_permissions(broker.path(0).parent().ok_or("no directory")?, all)?;
    for (uid, gid, denied) in [
        (1234, 1234, [false, false, true]),
        (1235, 77, [true, false, false]),
        (1234, 77, [false, false, false]),
        (0, 0, [true, false, true]),
        // What a user without a mapping looks like is never let in.
        (65534, 77, [true, true, true]),
        (65534, 65534, [true, true, true]),
        (1235, 65534, [true, false, true]),
    ] {
        for (number, denied) in denied.into_iter().enumerate() {
            let stream = connect_as(uid, gid, &broker.path(number))?;
            assert_eq!(is_denied(stream)?, denied, "uid {uid} gid {gid} monitor {number}");
        }
    }
    Ok(())
}

/// Who is refused takes nobody's place and is not waited for.
#[test]
fn a_refused_peer_does_not_count() -> Result<()> {
    let limits: [Limit<'_>; 2] =
        [(Role::Operator, &[geteuid().as_raw() + 1], &[]), (Role::Operator, &[], &[])];
    let broker = Broker::start_limited(&[Kind::Waiting, Kind::Server], &limits, None, true, true)?;
    for _ in 0..150 {
        assert!(is_denied(UnixStream::connect(broker.path(0))?)?);
    }
    assert!(!broker.core.is_started());
    let mut wire = negotiated(&broker, 1, false)?;
    broker.limit(&[]);
    // The policy is replaced in the broker's own time.
    while first_line(UnixStream::connect(broker.path(0))?)?.get("QMP").is_none() {}
    wire.event("RESUME")?;
    Ok(())
}

#[test]
fn a_connected_socket_has_credentials_too() -> Result<()> {
    let uid = geteuid().as_raw();
    for (uids, denied) in [([uid], false), ([uid + 1], true)] {
        let (ours, theirs) = UnixStream::pair()?;
        let limit: Limit<'_> = (Role::Operator, &uids, &[]);
        let broker = Broker::start_limited(&[], &[limit], Some(theirs), false, true)?;
        assert_eq!(is_denied(ours)?, denied);
        drop(broker);
    }
    Ok(())
}

#[test]
fn a_new_policy_holds_for_the_next_command_and_the_next_client() -> Result<()> {
    let broker = limited(&[(Role::Operator, &[], &[])])?;
    let mut wire = negotiated(&broker, 0, false)?;
    let mut other = negotiated(&broker, 0, false)?;
    assert_eq!(wire.ask("{'execute': 'stop'}")?, json!({"return": {}}));
    broker.limit(&[(Role::Monitor, &[], &[])]);
    let unknown =
        json!({"error": {"class": "CommandNotFound", "desc": "The command stop has not been found"}});
    // The policy is replaced in the broker's own time.
    while wire.ask("{'execute': 'stop'}")? != unknown {}
    assert_eq!(other.ask("{'execute': 'stop'}")?, unknown);
    assert_eq!(negotiated(&broker, 0, false)?.ask("{'execute': 'stop'}")?, unknown);
    // Nobody of this user from now on.
    broker.limit(&[(Role::Monitor, &[geteuid().as_raw() + 1], &[])]);
    assert!(wire.line().is_err(), "disconnected");
    assert!(other.line().is_err(), "disconnected");
    assert!(is_denied(UnixStream::connect(broker.path(0))?)?);
    broker.limit(&[]);
    while first_line(UnixStream::connect(broker.path(0))?)?.get("QMP").is_none() {}
    assert_eq!(negotiated(&broker, 0, false)?.ask("{'execute': 'stop'}")?, json!({"return": {}}));
    Ok(())
}
