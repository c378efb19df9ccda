//! QMP of a VM that runs: crowds, misbehaviour, and every way to a session.

use std::io::{Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

use bulkhead_framework::{Qmp, Result};
use bulkhead_native_tests::{Guest, SOON, Setup, Step, eventually};
use serde_json::{Value, json};

const QUERY: &[u8] = b"{\"execute\":\"query-status\"}\n";

/// A fresh session is answered, and the guest counts on.
fn is_well(guest: &Guest) -> Result<()> {
    let mut qmp = guest.qmp()?;
    guest.check(qmp.status()? == "running", "not running")?;
    guest.console().take_new();
    let count: u64 = guest.line("count ")?.parse().unwrap_or(0);
    guest.expect(&format!("count {}\r\n", count + 3))
}

fn counting(args: &[&str]) -> Result<Guest> {
    let guest = Guest::boot("test=counter ms=1", args)?;
    guest.running()?;
    Ok(guest)
}

fn connect(path: &Path) -> Result<UnixStream> {
    eventually("a connection", SOON, || UnixStream::connect(path).map_err(|error| error.to_string()))
}

#[test]
fn a_thousand_connections() -> Result<()> {
    let guest = counting(&[])?;
    let path = guest.trace().dir().join("q.sock");
    for _ in 0..1000 {
        Qmp::connect(&path, SOON)?.status()?;
    }
    is_well(&guest)?;
    guest.quit()
}

#[test]
fn a_thousand_connections_that_say_nothing() -> Result<()> {
    let guest = counting(&[])?;
    let path = guest.trace().dir().join("q.sock");
    for _ in 0..1000 {
        drop(connect(&path)?);
    }
    is_well(&guest)?;
    guest.quit()
}

/// A hundred clients are served; the next ones are told so, and the places of those that go are free again.
#[test]
fn more_connections_than_places() -> Result<()> {
    let guest = counting(&[])?;
    let path = guest.trace().dir().join("q.sock");
    let mut served = Vec::new();
    let mut refused = 0;
    for _ in 0..300 {
        match Qmp::negotiate(connect(&path)?) {
            Ok(qmp) => served.push(qmp),
            Err(failure) if failure.message().contains("Too many clients: 100 are connected") => refused += 1,
            Err(failure) => return Err(guest.explain(failure)),
        }
    }
    guest.check(
        served.len() <= 100 && refused >= 200,
        &format!("{} served, {refused} refused", served.len()),
    )?;
    for qmp in &mut served {
        qmp.status()?;
    }
    drop(served);
    eventually("a free place", SOON, || guest.qmp().map(drop).map_err(|failure| failure.to_string()))?;
    is_well(&guest)?;
    guest.quit()
}

/// Clients that send and send and never read; each is stopped or cut off, and nobody else notices.
#[test]
fn clients_that_never_read() -> Result<()> {
    let guest = counting(&[])?;
    let path = guest.trace().dir().join("q.sock");
    let mut silent = Vec::new();
    for _ in 0..4 {
        let mut stream = connect(&path)?;
        stream.set_write_timeout(Some(Duration::from_millis(300)))?;
        stream.write_all(b"{\"execute\":\"qmp_capabilities\"}\n")?;
        let flood = QUERY.repeat(1000);
        // Until its buffers are full: 100,000 commands would be 5 MB of replies.
        let _ = (0..100).try_for_each(|_| stream.write_all(&flood));
        silent.push(stream);
        is_well(&guest)?;
    }
    let broker = guest.process("broker")?;
    let status = std::fs::read_to_string(format!("/proc/{}/status", broker.pid))?;
    let rss = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap_or_default();
    let kib: u64 = rss.trim().trim_end_matches(" kB").parse().unwrap_or(u64::MAX);
    guest.check(kib < 64 << 10, &format!("the broker has grown to {kib} KiB"))?;
    drop(silent);
    is_well(&guest)?;
    guest.quit()
}

#[test]
fn garbage() -> Result<()> {
    let guest = counting(&[])?;
    let path = guest.trace().dir().join("q.sock");
    let pieces: [&[u8]; 8] = [
        b"\xff\xfe\x00\x01",
        b"{\"execute\": @}",
        b"]]]]]}}}}",
        b"{\"execute\":{\"execute\":[",
        b"'",
        b"GET / HTTP/1.1\r\n\r\n",
        b"{\"execute\":\"nothing-of-the-kind\",\"arguments\":7}\n",
        b"{\"QMP\": {}}",
    ];
    for round in 0..50 {
        let mut stream = connect(&path)?;
        for piece in pieces.iter().cycle().skip(round).take(pieces.len()) {
            // The server may hang up on such a client.
            if stream.write_all(&piece.repeat(1 + round)).is_err() {
                break;
            }
        }
    }
    let mut deep = connect(&path)?;
    let _ = deep.write_all(&b"[".repeat(1 << 20));
    is_well(&guest)?;
    guest.quit()
}

#[test]
fn a_client_that_is_cut_off_in_a_command() -> Result<()> {
    let guest = counting(&[])?;
    let path = guest.trace().dir().join("q.sock");
    for _ in 0..50 {
        let mut stream = connect(&path)?;
        let mut greeting = [0; 16];
        stream.read_exact(&mut greeting)?;
        stream.write_all(b"{\"execute\":\"qmp_capabilities\"}{\"execute\":\"st")?;
    }
    is_well(&guest)?;
    guest.quit()
}

#[test]
fn several_sockets_share_one_vm() -> Result<()> {
    let second = ["-qmp", "unix:second,server=on,wait=off", "-qmp", "unix:third,server=on,wait=off"];
    let guest = counting(&second)?;
    let mut sessions = vec![guest.qmp()?];
    for name in ["second", "third"] {
        sessions.push(Qmp::connect(&guest.trace().dir().join(name), SOON)?);
    }
    for asking in 0..sessions.len() {
        for (command, event) in [("stop", "STOP"), ("cont", "RESUME")] {
            let asker = sessions.get_mut(asking).ok_or("a session is missing")?;
            asker.execute(command, json!({}))?;
            for session in &mut sessions {
                session.event(event, SOON).map_err(|failure| guest.explain(failure))?;
            }
        }
    }
    guest.quit()
}

#[test]
fn wait_holds_the_start_until_a_client_connects() -> Result<()> {
    let args = ["-qmp", "unix:gate,server=on,wait=on"];
    let guest = Guest::boot("test=hello", &args)?;
    let mut other = guest.qmp()?;
    // Nothing tells that something will not happen; a start takes far less.
    std::thread::sleep(Duration::from_millis(300));
    guest.check(guest.console().text().is_empty(), "the guest runs before the client is there")?;
    guest.check(other.status()? == "prelaunch", "not in run state prelaunch")?;
    let mut gate = Qmp::connect(&guest.trace().dir().join("gate"), SOON)?;
    guest.expect("done: hello")?;
    guest.check(gate.status()? == "running", "not running")?;
    drop(gate);
    guest.check(other.status()? == "running", "it stops when that client goes")?;
    guest.quit()
}

#[test]
fn a_vm_that_waits_can_be_ended() -> Result<()> {
    Guest::boot("test=hello", &["-qmp", "unix:gate,server=on,wait=on"])?.quit()
}

/// Accepts one connection of the VM.
fn accept(listener: &UnixListener) -> Result<UnixStream> {
    listener.set_nonblocking(true)?;
    let (stream, _) = eventually("the VM connects", SOON, || listener.accept().map_err(|e| e.to_string()))?;
    stream.set_nonblocking(false)?;
    Ok(stream)
}

#[test]
fn the_vm_can_be_the_client() -> Result<()> {
    let mut listener = None;
    let chardev = ["-chardev", "socket,id=m,path=peer", "-mon", "chardev=m,mode=control"];
    let guest = Setup::new("test=counter ms=1", &chardev).leaves("peer").start_in(|dir| {
        listener = Some(UnixListener::bind(dir.join("peer"))?);
        Ok(())
    })?;
    let stream = accept(listener.as_ref().ok_or("no listener")?)?;
    let mut qmp = Qmp::negotiate(stream)?;
    eventually("running", SOON, || match qmp.status() {
        Ok(status) if status == "running" => Ok(()),
        other => Err(format!("{other:?}")),
    })?;
    is_well(&guest)?;
    drop(qmp);
    is_well(&guest)?;
    guest.quit()
}

#[test]
fn an_inherited_listener() -> Result<()> {
    let dir = bulkhead_framework::Scratch::new()?;
    let path = dir.path().join("inherited");
    let listener = UnixListener::bind(&path)?;
    let fd = listener.as_raw_fd();
    let chardev = format!("socket,id=m,fd={fd},server=on,wait=off");
    let args = ["-chardev", &chardev, "-mon", "chardev=m,mode=control"];
    let guest = Setup::new("test=counter ms=1", &args).steps(&[Step::Keep(fd)]).start()?;
    guest.running()?;
    for _ in 0..3 {
        let mut qmp = Qmp::connect(&path, SOON)?;
        qmp.status()?;
    }
    is_well(&guest)?;
    guest.quit()?;
    assert!(path.exists(), "the socket is its owner's, not the VM's");
    Ok(())
}

#[test]
fn an_inherited_connection() -> Result<()> {
    let (ours, theirs) = UnixStream::pair()?;
    let fd = theirs.as_raw_fd();
    let chardev = format!("socket,id=m,fd={fd}");
    let args = ["-chardev", &chardev, "-mon", "chardev=m,mode=control"];
    let guest = Setup::new("test=counter ms=1", &args).steps(&[Step::Keep(fd)]).start()?;
    drop(theirs);
    let mut qmp = Qmp::negotiate(ours)?;
    qmp.execute("query-version", json!({}))?;
    qmp.execute("quit", json!({}))?;
    guest.event(&mut qmp, "SHUTDOWN", &json!({"guest": false, "reason": "host-qmp-quit"}))?;
    guest.ends(0)
}

#[test]
fn what_was_configured_is_reported() -> Result<()> {
    let uuid = "8d8b4d8e-5ac4-4ee1-8d3c-a4a9f0c4b9f2";
    let guest = counting(&["-uuid", uuid, "-m", "24"])?;
    let mut qmp = guest.qmp()?;
    let reply = qmp.execute("query-uuid", json!({}))?;
    guest.check(reply == json!({"UUID": uuid}), &reply.to_string())?;
    let name = qmp.execute("query-name", json!({}))?;
    guest.check(name["name"].as_str().is_some_and(|name| name.starts_with("native-")), &name.to_string())?;
    let memory = qmp.execute("query-memory-size-summary", json!({}))?;
    guest.check(memory == json!({"base-memory": 24 << 20, "plugged-memory": 0}), &memory.to_string())?;
    let kvm = qmp.execute("query-kvm", json!({}))?;
    guest.check(kvm == json!({"enabled": true, "present": true}), &kvm.to_string())?;
    let chardevs = qmp.execute("query-chardev", json!({}))?;
    let listed = chardevs.as_array().map(Vec::as_slice).unwrap_or_default();
    let labels: Vec<&str> = listed.iter().filter_map(|chardev| chardev["label"].as_str()).collect();
    let both = labels.contains(&"serial0") && labels.contains(&"compat_monitor0");
    guest.check(both, &Value::from(labels).to_string())?;
    guest.quit()
}

/// While core cannot answer, what the broker knows itself is still answered.
#[test]
fn a_stopped_core_does_not_stop_the_broker() -> Result<()> {
    use nix::sys::signal::{Signal, kill};
    use nix::unistd::Pid;
    let guest = counting(&[])?;
    let core = Pid::from_raw(guest.process("core")?.pid);
    kill(core, Signal::SIGSTOP).map_err(|error| error.to_string())?;
    let mut qmp = guest.qmp()?;
    let version = qmp.execute("query-version", json!({}))?;
    guest.check(version["qemu"]["major"] == 5, &version.to_string())?;
    kill(core, Signal::SIGCONT).map_err(|error| error.to_string())?;
    is_well(&guest)?;
    guest.quit()
}

#[test]
fn the_dirty_log_goes_on_and_off_while_the_guest_runs() -> Result<()> {
    let guest = counting(&["-m", "4G"])?;
    let mut qmp = guest.qmp()?;
    for enable in [true, true, false, false] {
        let reply = qmp.execute("xen-set-global-dirty-log", json!({"enable": enable}))?;
        guest.check(reply == json!({}), &reply.to_string())?;
        is_well(&guest)?;
    }
    guest.quit()
}
