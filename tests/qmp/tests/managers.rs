//! Servers driven as programs that manage VMs drive QEMU.

use std::fs;
use std::fs::File;
use std::io::Read as _;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use bulkhead_framework::{Failure, Result, Scratch};
use bulkhead_qmp_tests::broker::{Broker, Kind};
use bulkhead_qmp_tests::qemu::Qemu;
use bulkhead_qmp_tests::started::Server;
use bulkhead_qmp_tests::vms_run_here;
use bulkhead_qmp_tests::wire::Wire;
use serde_json::{Value, json};

fn execute(command: &str, id: &str, arguments: &str) -> String {
    format!("{{\"execute\":\"{command}\",\"id\":\"{id}\",\"arguments\":{{{arguments}}}}}\r\n")
}

/// The replies to these ids in their order; events are dropped.
fn replies(wire: &mut Wire, ids: &[&str]) -> Result<Vec<Value>> {
    let mut values = Vec::new();
    while values.len() < ids.len() {
        let mut line = wire.line()?;
        if line.get("event").is_some() {
            continue;
        }
        let id = line.get("id").and_then(Value::as_str).map(str::to_owned);
        let value = line.get_mut("return").map(Value::take);
        match (id, value) {
            (Some(id), Some(value)) if ids.get(values.len()) == Some(&id.as_str()) => values.push(value),
            _ => return Err(Failure::new(format!("{line}"))),
        }
    }
    Ok(values)
}

/// As systemd-vmspawn does: everything is sent at once, each descriptor with its command and an id of the client's own
/// for its set, which is removed before the first reply has come.
fn pipelines(path: &Path) -> Result<()> {
    let mut wire = Wire::connect(path)?;
    wire.send(execute("qmp_capabilities", "0", "").as_bytes())?;
    wire.send(execute("cont", "1", "").as_bytes())?;
    let null = File::open("/dev/null")?;
    for (set, ids) in [(10, ["2", "3"]), (11, ["4", "5"]), (10, ["6", "7"])] {
        let [add, remove] = ids;
        let add = execute("add-fd", add, &format!("\"fdset-id\":{set},\"opaque\":\"drive\""));
        wire.send_fds(add.as_bytes(), &[null.as_fd()])?;
        wire.send(execute("remove-fd", remove, &format!("\"fdset-id\":{set}")).as_bytes())?;
    }
    wire.send((execute("query-fdsets", "8", "") + &execute("stop", "9", "")).as_bytes())?;
    let values = replies(&mut wire, &["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"])?;
    for (at, set) in [(2, 10), (4, 11), (6, 10)] {
        assert_eq!(values.get(at).and_then(|value| value.get("fdset-id")), Some(&json!(set)), "{values:?}");
    }
    for at in [0, 1, 3, 5, 7, 9] {
        assert_eq!(values.get(at), Some(&json!({})), "{values:?}");
    }
    assert_eq!(values.get(8), Some(&json!([])), "{values:?}");
    Ok(())
}

#[test]
fn a_client_that_waits_for_nothing_is_served() -> Result<()> {
    pipelines(&Broker::start(&[Kind::Server], false)?.path(0))
}

#[test]
fn qemu_serves_a_client_that_waits_for_nothing() -> Result<()> {
    pipelines(&Qemu::start()?.path())
}

/// As libvirt does: the monitor's socket listens before the server is started and has a client in its queue; the disks'
/// descriptors come by `-add-fd`; the machine is started by `cont`.
fn pre_opened(server: Server) -> Result<()> {
    let scratch = Scratch::new()?;
    let path = scratch.path().join("monitor.sock");
    let listener = UnixListener::bind(&path)?;
    let client = UnixStream::connect(&path)?;
    let args = "-name guest=vm,debug-threads=on -no-user-config -display none -add-fd fd=8,set=0,opaque=drive0 \
                -chardev socket,id=charmonitor,fd=7,server=on,wait=off -mon chardev=charmonitor,id=monitor,mode=control";
    let mut command = server.command(scratch.path(), "exec 7<&0 8</dev/null 0</dev/null", args);
    let mut child = command.stdin(OwnedFd::from(listener)).spawn()?;
    drop(command);
    let driven = drive(client, &path);
    if driven.is_err() {
        child.kill()?;
    }
    let status = child.wait()?;
    let log = fs::read_to_string(scratch.path().join("errors"))?;
    driven.map_err(|failure| Failure::new(format!("{server:?}: {failure}: {log}")))?;
    assert!(status.success(), "{status}: {log}");
    Ok(())
}

fn drive(client: UnixStream, path: &Path) -> Result<()> {
    let mut wire = Wire::over(client)?;
    let greeting = wire.line()?;
    if greeting.get("QMP").is_none() {
        return Err(Failure::new(greeting.to_string()));
    }
    let one = |wire: &mut Wire, command: &str, arguments: &str| -> Result<Value> {
        wire.send(execute(command, "libvirt-1", arguments).as_bytes())?;
        Ok(replies(wire, &["libvirt-1"])?.pop().unwrap_or_default())
    };
    one(&mut wire, "qmp_capabilities", "")?;
    let sets = one(&mut wire, "query-fdsets", "")?;
    let name = one(&mut wire, "query-name", "")?;
    let chardevs = one(&mut wire, "query-chardev", "")?;
    let known = sets.pointer("/0/fds/0/opaque") == Some(&json!("drive0")) && name == json!({"name": "vm"});
    let monitor = chardevs.as_array().and_then(|all| all.iter().find(|one| one["label"] == "charmonitor"));
    if !known || monitor.is_none_or(|monitor| monitor["frontend-open"] != true) {
        return Err(Failure::new(format!("{sets} {name} {chardevs}")));
    }
    one(&mut wire, "cont", "")?;
    one(&mut wire, "remove-fd", "\"fdset-id\":0")?;
    // The manager is started anew.
    drop(wire);
    let mut wire = Wire::connect(path)?;
    one(&mut wire, "qmp_capabilities", "")?;
    one(&mut wire, "quit", "")?;
    Ok(())
}

#[test]
fn a_monitor_that_was_opened_before() -> Result<()> {
    if !vms_run_here() {
        return Ok(());
    }
    pre_opened(Server::Bulkhead)
}

#[test]
fn qemu_takes_a_monitor_that_was_opened_before() -> Result<()> {
    pre_opened(Server::Qemu)
}

/// QEMU reads its standard input as a file, also where it is a socket: descriptors do not come that way.
fn over_stdio(server: Server) -> Result<()> {
    let scratch = Scratch::new()?;
    let (ours, theirs) = UnixStream::pair()?;
    let mut command = server.command(scratch.path(), "true", "-qmp stdio");
    command.stdin(OwnedFd::from(theirs.try_clone()?)).stdout(OwnedFd::from(theirs));
    let mut child = command.spawn()?;
    drop(command);
    let answered = ask_over_stdio(ours);
    if answered.is_err() {
        child.kill()?;
    }
    let status = child.wait()?;
    let log = fs::read_to_string(scratch.path().join("errors"))?;
    answered.map_err(|failure| Failure::new(format!("{server:?}: {failure}: {log}")))?;
    assert!(status.success(), "{status}: {log}");
    Ok(())
}

fn ask_over_stdio(stream: UnixStream) -> Result<()> {
    let mut wire = Wire::over(stream)?;
    wire.line()?;
    wire.negotiate(false)?;
    let (passed, mut end) = UnixStream::pair()?;
    end.set_read_timeout(Some(bulkhead_qmp_tests::wire::LIMIT))?;
    let refused = wire.ask_with(&execute("getfd", "", "\"fdname\":\"a\""), &[passed.as_fd()])?;
    drop(passed);
    let closed = end.read(&mut [0; 1])? == 0;
    wire.ask("{'execute': 'quit'}")?;
    let desc = refused.pointer("/error/desc").and_then(Value::as_str);
    if closed && desc == Some("No file descriptor supplied via SCM_RIGHTS") {
        return Ok(());
    }
    Err(Failure::new(format!("closed: {closed}, {refused}")))
}

#[test]
fn no_descriptor_comes_over_stdio() -> Result<()> {
    if !vms_run_here() {
        return Ok(());
    }
    over_stdio(Server::Bulkhead)
}

#[test]
fn none_comes_to_qemu_over_stdio() -> Result<()> {
    over_stdio(Server::Qemu)
}
