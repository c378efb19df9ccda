//! Roles and lists of a VM's monitors, through the command line and within the jail.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};

use bulkhead_framework::{Qmp, QmpError, Result, VmBuilder};
use bulkhead_native_tests::{Guest, SOON, Setup, as_user, eventually};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use nix::unistd::{geteuid, getpid};
use serde_json::{Value, json};

fn not_found(command: &str) -> QmpError {
    let desc = format!("The command {command} has not been found");
    QmpError { class: "CommandNotFound".to_owned(), desc }
}

fn session(guest: &Guest, socket: &str) -> Result<Qmp> {
    Qmp::connect(&guest.trace().dir().join(socket), SOON)
}

/// Waits for a line of the log that has all of these words.
fn logged(guest: &Guest, words: &[&str]) -> Result<()> {
    eventually("a line of the log", SOON, || {
        let text = guest.stderr();
        let found = text.lines().any(|line| words.iter().all(|word| line.split(' ').any(|w| w == *word)));
        if found { Ok(()) } else { Err(format!("{words:?} in {text}")) }
    })
}

#[test]
fn each_socket_has_its_role() -> Result<()> {
    let args = [
        "-chardev",
        "socket,id=w,path=watch,server=on,wait=off",
        "-mon",
        "chardev=w,mode=control,role=monitor",
        "-chardev",
        "socket,id=c,path=attach,server=on,wait=off",
        "-mon",
        "chardev=c,mode=control,role=console",
    ];
    let guest = Guest::boot("test=counter ms=1", &args)?;
    let mut operator = guest.running()?;
    let (mut monitor, mut console) = (session(&guest, "watch")?, session(&guest, "attach")?);
    for command in ["stop", "quit", "getfd", "add_client", "system_reset"] {
        assert_eq!(monitor.try_execute(command, json!({}))?, Err(not_found(command)));
    }
    for command in ["stop", "quit", "query-status", "query-chardev", "add-fd"] {
        assert_eq!(console.try_execute(command, json!({}))?, Err(not_found(command)));
    }
    operator.execute("stop", json!({}))?;
    monitor.event("STOP", SOON)?;
    guest.check(monitor.status()? == "paused", "not paused")?;
    let pid = format!("pid={}", getpid());
    let uid = format!("uid={}", geteuid());
    let who = [uid.as_str(), pid.as_str()];
    logged(
        &guest,
        &[&["monitor=w", "role=monitor", "command=quit", "outcome=forbidden"], &who[..]].concat(),
    )?;
    logged(
        &guest,
        &[&["monitor=c", "role=console", "command=add-fd", "outcome=forbidden"], &who[..]].concat(),
    )?;
    let stop = ["monitor=compat_monitor0", "role=operator", "command=stop", "outcome=ok"];
    logged(&guest, &[&stop, &who[..]].concat())?;
    guest.quit()
}

/// A line of `human-monitor-command` is logged as the QMP command that it stands for, if that changes state.
#[test]
fn lines_are_logged_as_what_they_do() -> Result<()> {
    let guest = Guest::boot("test=counter ms=1", &[])?;
    let mut operator = guest.running()?;
    for line in ["info status", "nope", "system_wakeup", "stop"] {
        operator.execute("human-monitor-command", json!({ "command-line": line }))?;
    }
    logged(&guest, &["role=operator", "command=stop", "outcome=ok"])?;
    logged(&guest, &["role=operator", "command=system_wakeup", "outcome=GenericError"])?;
    let text = guest.stderr();
    for command in ["human-monitor-command", "query-status", "nope"] {
        guest.check(!text.contains(&format!("command={command} ")), &format!("{command} in {text}"))?;
    }
    guest.quit()
}

/// What the role is for: a client puts a connection of its own in the place of a serial client.
#[test]
fn a_console_attaches_itself() -> Result<()> {
    let args = [
        "-chardev",
        "socket,id=s,path=serial,server=on,wait=off",
        "-serial",
        "chardev:s",
        "-chardev",
        "socket,id=c,path=attach,server=on,wait=off",
        "-mon",
        "chardev=c,mode=control,role=console",
    ];
    let guest = Setup::new("test=counter ms=1", &args).with(VmBuilder::without_serial).start()?;
    guest.running()?;
    let stream = UnixStream::connect(guest.trace().dir().join("attach"))?;
    let mut console = Qmp::negotiate(stream.try_clone()?)?;
    let (ours, theirs) = UnixStream::pair()?;
    let fds = [std::os::fd::AsRawFd::as_raw_fd(&theirs.as_fd())];
    let rights = [ControlMessage::ScmRights(&fds)];
    // It waits for the command that takes it.
    let space = [std::io::IoSlice::new(b" ")];
    let raw = std::os::fd::AsRawFd::as_raw_fd(&stream);
    sendmsg::<()>(raw, &space, &rights, MsgFlags::empty(), None).map_err(std::io::Error::from)?;
    drop(theirs);
    console.execute("getfd", json!({"fdname": "me"}))?;
    console.execute("add_client", json!({"protocol": "s", "fdname": "me"}))?;
    ours.set_read_timeout(Some(SOON))?;
    let mut line = String::new();
    let mut reader = BufReader::new(ours);
    // The first one may have begun before.
    for _ in 0..2 {
        line.clear();
        reader.read_line(&mut line)?;
    }
    guest.check(line.starts_with("count "), &format!("not the guest: {line:?}"))?;
    guest.quit()
}

/// The first line that a process of another user gets.
fn greeting_of(uid: u32, gid: u32, path: &Path) -> Result<Value> {
    let greeting = || -> std::io::Result<String> {
        let mut line = String::new();
        BufReader::new(UnixStream::connect(path)?).read_line(&mut line)?;
        Ok(line)
    };
    let text = as_user(uid, gid, greeting)??;
    Ok(serde_json::from_str(&text).map_err(|error| format!("{error}: {text}"))?)
}

/// Only root can be several users.
#[test]
fn each_socket_has_its_users() -> Result<()> {
    use std::fs::{Permissions, set_permissions};
    use std::os::unix::fs::PermissionsExt as _;
    if !geteuid().is_root() {
        println!("not run: it needs root");
        return Ok(());
    }
    let args = [
        "-chardev",
        "socket,id=w,path=watch,server=on,wait=off",
        "-mon",
        "chardev=w,mode=control,role=monitor,uid=4001,uid=4002,gid=4100",
    ];
    let guest = Guest::boot("test=counter ms=1", &args)?;
    guest.running()?;
    let path = guest.trace().dir().join("watch");
    set_permissions(&path, Permissions::from_mode(0o777))?;
    for (uid, gid, reason) in [
        (4001, 4100, None),
        (4002, 4100, None),
        (4003, 4100, Some("reason=uid")),
        (4001, 4001, Some("reason=gid")),
        (0, 0, Some("reason=uid")),
        (65534, 4100, Some("reason=unmapped")),
    ] {
        let line = greeting_of(uid, gid, &path)?;
        let Some(reason) = reason else {
            guest.check(line.get("QMP").is_some(), &format!("{uid}: {line}"))?;
            continue;
        };
        let desc = line.pointer("/error/desc").and_then(Value::as_str);
        let denied = desc == Some("Access denied: this peer may not use this monitor");
        guest.check(denied, &format!("{uid}: {line}"))?;
        let (uid, gid) = (format!("uid={uid}"), format!("gid={gid}"));
        logged(&guest, &["monitor=w", "role=monitor", &uid, &gid, "outcome=refused", reason])?;
    }
    guest.quit()
}

/// A socket as standard input has credentials; a pipe has none.
#[test]
fn lists_hold_on_stdio_too() -> Result<()> {
    let own = geteuid().as_raw();
    for (uid, served) in [(own, true), (own + 1, false)] {
        let (mut ours, theirs) = UnixStream::pair()?;
        let mon = format!("m,mode=control,uid={uid}");
        let chardev = ["-nodefaults", "-chardev", "stdio,id=m,signal=off", "-mon", &mon];
        let mut child = Command::new(bulkhead_framework::launcher_path())
            .arg("run")
            .args(chardev)
            .stdin(Stdio::from(std::os::fd::OwnedFd::from(theirs.try_clone()?)))
            .stdout(Stdio::from(std::os::fd::OwnedFd::from(theirs)))
            .stderr(Stdio::null())
            .spawn()?;
        ours.set_read_timeout(Some(SOON))?;
        let mut line = String::new();
        let mut reader = BufReader::new(ours.try_clone()?);
        reader.read_line(&mut line)?;
        assert_eq!(line.starts_with("{\"QMP\""), served, "{line}");
        if served {
            ours.write_all(b"{'execute': 'qmp_capabilities'}{'execute': 'quit'}")?;
        } else {
            assert!(line.contains("Access denied"), "{line}");
            let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id()).unwrap_or_default());
            nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).map_err(std::io::Error::from)?;
        }
        assert!(child.wait()?.success());
    }
    Ok(())
}
