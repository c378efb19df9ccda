//! Connections that become clients of a character device, in a VM and in Debian's QEMU.

use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

use bulkhead_control_api::core::RunState;
use bulkhead_framework::{Result, Vm, descendants};
use bulkhead_qmp_tests::broker::{Broker, Kind};
use bulkhead_qmp_tests::qemu::Qemu;
use bulkhead_qmp_tests::vms_run_here;
use bulkhead_qmp_tests::wire::{LIMIT, Wire};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

fn negotiated(path: &Path) -> Result<Wire> {
    let mut wire = Wire::connect(path)?;
    wire.negotiate(false)?;
    Ok(wire)
}

/// Names a descriptor and gives it to `chardev`; the error's text, if there is one.
fn add(wire: &mut Wire, chardev: &str, fd: impl Into<OwnedFd>) -> Result<Option<String>> {
    let fd = fd.into();
    let getfd = "{'execute': 'getfd', 'arguments': {'fdname': 'a'}}";
    assert_eq!(wire.ask_with(getfd, &[fd.as_fd()])?, json!({"return": {}}));
    drop(fd);
    let arguments = format!("{{'protocol': '{chardev}', 'fdname': 'a'}}");
    let answer = wire.ask(&format!("{{'execute': 'add_client', 'arguments': {arguments}}}"))?;
    Ok(answer.pointer("/error/desc").and_then(Value::as_str).map(str::to_owned))
}

/// QEMU's description of a character device, in the words of 5.1.
fn filename(wire: &mut Wire, chardev: &str) -> Result<String> {
    let listed = wire.ask("{'execute': 'query-chardev'}")?;
    let all = listed.get("return").and_then(Value::as_array).cloned().unwrap_or_default();
    let found = all.iter().find(|info| info.get("label").and_then(Value::as_str) == Some(chardev));
    let name = found.and_then(|info| info.get("filename")).and_then(Value::as_str).unwrap_or_default();
    Ok(name.replace(",server=on", ",server"))
}

fn assert_closed(mut end: &UnixStream) -> Result<()> {
    end.set_read_timeout(Some(LIMIT))?;
    assert_eq!(end.read(&mut [0; 1])?, 0);
    Ok(())
}

/// Waits until the character device has no client.
fn wait_free(wire: &mut Wire) -> Result<()> {
    let end = Instant::now() + LIMIT;
    while !filename(wire, "free")?.starts_with("disconnected:") {
        assert!(Instant::now() < end, "{}", filename(wire, "free")?);
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// What the character device `free` does with connections.
fn clients_come_and_go(path: &Path) -> Result<()> {
    let mut wire = negotiated(path)?;
    let refused = Some("failed to add client".to_owned());
    for _ in 0..3 {
        let (passed, end) = UnixStream::pair()?;
        assert_eq!(add(&mut wire, "free", passed)?, None);
        assert_eq!(filename(&mut wire, "free")?, "unix:,server");
        let (second, second_end) = UnixStream::pair()?;
        assert_eq!(add(&mut wire, "free", second)?, refused);
        assert_closed(&second_end)?;
        end.set_nonblocking(true)?;
        assert_eq!((&end).read(&mut [0; 1]).map_err(|error| error.kind()), Err(ErrorKind::WouldBlock));
        drop(end);
        wait_free(&mut wire)?;
    }
    assert_eq!(add(&mut wire, "free", std::fs::File::open("/dev/null")?)?, refused);
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let near = TcpStream::connect(listener.local_addr()?)?;
    let (far, _) = listener.accept()?;
    let expected = format!("tcp:{},server <-> {}", far.local_addr()?, far.peer_addr()?);
    assert_eq!(add(&mut wire, "free", far)?, None);
    assert_eq!(filename(&mut wire, "free")?, expected);
    // Nobody reads from this device, so QEMU does not notice the end of a TCP connection.
    drop(near);
    Ok(())
}

#[test]
fn qemu_takes_connections() -> Result<()> {
    clients_come_and_go(&Qemu::start()?.path())
}

fn vm() -> Result<Vm> {
    Vm::builder()
        .args(["-S", "-m", "256M", "-chardev", "socket,id=free,path=free.sock,server=on,wait=off"])
        .start()
}

#[test]
fn a_vm_takes_connections() -> Result<()> {
    if !vms_run_here() {
        return Ok(());
    }
    let vm = vm()?;
    clients_come_and_go(&vm.dir().join("q.sock"))
        .map_err(|failure| failure.with_logs(&[vm.console().clone(), vm.stderr().clone()]))
}

/// Sends `text` and reads it back from the guest.
fn echoes(stream: &mut (impl Read + Write), text: &[u8]) -> Result<()> {
    stream.write_all(text)?;
    let mut got = vec![0; text.len()];
    stream.read_exact(&mut got)?;
    assert_eq!(got, text);
    Ok(())
}

/// The guest's serial port goes over one connection after the other, while the guest runs.
#[test]
fn a_guest_echoes_over_an_adopted_connection() -> Result<()> {
    if !vms_run_here() {
        return Ok(());
    }
    let args = ["-S", "-append", "test=echo", "-m", "64M"];
    let socket = ["-chardev", "socket,id=free,path=free.sock,server=on,wait=off", "-serial", "chardev:free"];
    let vm = Vm::builder().without_serial().args(args).args(socket).start()?;
    let mut wire = negotiated(&vm.dir().join("q.sock"))?;
    let text: Vec<u8> = (b'!'..=b'~').cycle().take(3000).collect();
    for round in 0..3 {
        let (passed, mut end) = UnixStream::pair()?;
        end.set_read_timeout(Some(LIMIT))?;
        assert_eq!(add(&mut wire, "free", passed)?, None);
        if round == 0 {
            wire.ask("{'execute': 'cont'}")?;
            let mut greeting = Vec::new();
            while !greeting.ends_with(b"ready\r\n") {
                let mut byte = [0];
                end.read_exact(&mut byte)?;
                greeting.extend(byte);
            }
        }
        echoes(&mut end, &text)?;
        drop(end);
        wait_free(&mut wire)?;
    }
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let mut near = TcpStream::connect(listener.local_addr()?)?;
    near.set_read_timeout(Some(LIMIT))?;
    assert_eq!(add(&mut wire, "free", listener.accept()?.0)?, None);
    echoes(&mut near, &text)?;
    drop(near);
    wait_free(&mut wire)?;
    // A client that connects is served like before.
    let mut client = UnixStream::connect(vm.dir().join("free.sock"))?;
    client.set_read_timeout(Some(LIMIT))?;
    echoes(&mut client, b"again")
}

/// Nobody but the console holds such a connection, so that it ends with it.
#[test]
fn an_adopted_connection_ends_with_its_console() -> Result<()> {
    if !vms_run_here() {
        return Ok(());
    }
    let vm = vm()?;
    let mut wire = negotiated(&vm.dir().join("q.sock"))?;
    for _ in 0..3 {
        let (passed, end) = UnixStream::pair()?;
        assert_eq!(add(&mut wire, "free", passed)?, None);
        let console = descendants(vm.pid())?.into_iter().find(|process| process.name == "bulkhead-consol");
        let pid = Pid::from_raw(console.ok_or("no console")?.pid);
        kill(pid, Signal::SIGKILL).map_err(std::io::Error::from)?;
        assert_closed(&end)?;
        // The next one is there, without it.
        wait_free(&mut wire)?;
    }
    Ok(())
}

/// What QEMU takes and then drops is refused at once.
#[test]
fn descriptors_that_are_no_connections_are_refused() -> Result<()> {
    if !vms_run_here() {
        return Ok(());
    }
    let vm = vm()?;
    let path = vm.dir().join("q.sock");
    let mut wire = negotiated(&path)?;
    let unconnected = nix::sys::socket::socket(
        nix::sys::socket::AddressFamily::Unix,
        nix::sys::socket::SockType::Stream,
        nix::sys::socket::SockFlag::empty(),
        None,
    );
    let lingering = {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let stream = TcpStream::connect(listener.local_addr()?)?;
        let linger = nix::libc::linger { l_onoff: 1, l_linger: 3600 };
        nix::sys::socket::setsockopt(&stream, nix::sys::socket::sockopt::Linger, &linger)
            .map_err(std::io::Error::from)?;
        stream
    };
    let fds: Vec<OwnedFd> = vec![
        UnixListener::bind(vm.dir().join("listener"))?.into(),
        TcpListener::bind("127.0.0.1:0")?.into(),
        UnixDatagram::pair()?.0.into(),
        std::io::pipe()?.0.into(),
        std::io::pipe()?.1.into(),
        unconnected.map_err(std::io::Error::from)?,
        lingering.into(),
        std::fs::File::open("/proc")?.into(),
    ];
    for (number, fd) in fds.into_iter().enumerate() {
        assert_eq!(add(&mut wire, "free", fd)?.as_deref(), Some("failed to add client"), "{number}");
    }
    // A QMP connection of our own is a connection like another.
    assert_eq!(add(&mut wire, "free", UnixStream::connect(&path)?)?, None);
    assert_eq!(
        add(&mut wire, "nobody", UnixStream::connect(&path)?)?.as_deref(),
        Some("protocol 'nobody' is invalid")
    );
    Ok(())
}

#[test]
fn a_console_that_is_away_costs_the_connection_and_nothing_else() -> Result<()> {
    let broker = Broker::start_with(&[Kind::Server], None, false, false)?;
    let mut wire = negotiated(&broker.path(0))?;
    let (passed, end) = UnixStream::pair()?;
    let answer = add(&mut wire, "serial0", passed)?;
    assert_eq!(answer.as_deref(), Some("The console cannot be reached: not connected"));
    assert_closed(&end)?;
    assert_eq!(broker.core.state(), RunState::Prelaunch);
    Ok(())
}

#[test]
fn a_client_that_closes_in_the_middle_loses_the_connection() -> Result<()> {
    let broker = Broker::start(&[Kind::Server], false)?;
    for protocol in ["serial0", "x", "compat_monitor0", "spice", "vnc"] {
        let (passed, end) = UnixStream::pair()?;
        let mut wire = negotiated(&broker.path(0))?;
        let getfd = "{'execute': 'getfd', 'arguments': {'fdname': 'a'}}";
        let request = format!(
            "{getfd}{{'execute': 'add_client', 'arguments': {{'protocol': '{protocol}', 'fdname': 'a'}}}}"
        );
        wire.send_fds(request.as_bytes(), &[passed.as_fd()])?;
        drop((wire, passed));
        // The second command may have been given up with its client; then the name is still there.
        negotiated(&broker.path(0))?.ask("{'execute': 'closefd', 'arguments': {'fdname': 'a'}}")?;
        assert_closed(&end)?;
    }
    Ok(())
}
