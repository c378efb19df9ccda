//! Connections that the broker hands over.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test that cannot go on fails")]

mod common;

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::time::{Duration, Instant};

use bulkhead_control_api::config::ChardevKind;
use bulkhead_control_api::console::{Answer, Client};
use common::{LSR, Rig, THRE, chardev, collected, eventually, socket_server};
use nix::fcntl::{FcntlArg, OFlag, fcntl};

fn added() -> Answer {
    Answer::Client(Client::Added)
}

fn refused() -> Answer {
    Answer::Client(Client::Refused)
}

/// A console whose serial port is a socket that nobody has connected to.
fn free(test: &str, wait: bool) -> Rig {
    let path = std::env::temp_dir().join(format!("bulkhead-add-{test}-{}", std::process::id()));
    let _ = std::fs::remove_file(&path);
    let listener = UnixListener::bind(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    let mut rig = Rig::silent(&socket_server(wait, &path), vec![("chardev.serial0", listener.into())]);
    if !wait {
        rig.greet();
        rig.welcome(1);
    }
    rig
}

fn tcp() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (near, listener.accept().unwrap().0)
}

#[test]
fn an_adopted_client_talks_to_the_guest() {
    let mut rig = free("talks", false);
    for round in 0..3u8 {
        let (mut near, far) = UnixStream::pair().unwrap();
        rig.vcpu().print(b"before");
        assert_eq!(rig.add_client("serial0", Some(far.into())), added());
        assert_eq!(rig.filename(), "unix:,server");
        let (_, other) = UnixStream::pair().unwrap();
        assert_eq!(rig.add_client("serial0", Some(other.into())), refused(), "busy");
        near.write_all(b"in").unwrap();
        assert!(eventually(|| rig.vcpu().inb(LSR) & 1 != 0));
        assert_eq!([rig.vcpu().inb(0x3f8), rig.vcpu().inb(0x3f8)], [u64::from(b'i'), u64::from(b'n')]);
        rig.vcpu().print(&[round]);
        let mut got = [0xff];
        near.read_exact(&mut got).unwrap();
        assert_eq!(got, [round], "nothing from before it came");
        drop(near);
        assert!(eventually(|| rig.filename().starts_with("disconnected:unix:")));
    }
    assert_eq!(rig.end().0, Ok(()));
}

#[test]
fn an_adopted_client_counts_as_the_one_that_is_awaited() {
    let mut rig = free("awaited", true);
    let (near, far) = tcp();
    let name = format!("tcp:{},server <-> {}", far.local_addr().unwrap(), far.peer_addr().unwrap());
    assert_eq!(rig.add_client("serial0", Some(far.into())), added());
    assert_eq!(rig.filename(), name);
    rig.greet();
    rig.welcome(1);
    rig.vcpu().print(b"x");
    let mut got = [0];
    (&near).read_exact(&mut got).unwrap();
    assert_eq!(&got, b"x");
}

#[test]
fn the_flags_of_the_description_are_left_alone_and_nothing_blocks() {
    let mut rig = free("flags", false);
    let (near, far) = UnixStream::pair().unwrap();
    let shared = far.try_clone().unwrap();
    assert_eq!(rig.add_client("serial0", Some(far.into())), added());
    // A client that never reads holds the driver, not the bus.
    assert!(eventually(|| {
        rig.vcpu().access(&[collected(0x3f8, b'x'); 170], 0, 1, bulkhead_bus_api::Op::Flush);
        rig.vcpu().inb(LSR) & THRE == 0
    }));
    let flags = OFlag::from_bits_truncate(fcntl(&shared, FcntlArg::F_GETFL).unwrap());
    assert!(!flags.contains(OFlag::O_NONBLOCK));
    drop((near, shared));
    assert!(eventually(|| rig.vcpu().inb(LSR) & THRE != 0));
}

fn linger(socket: &impl AsFd) {
    let linger = nix::libc::linger { l_onoff: 1, l_linger: 3 };
    nix::sys::socket::setsockopt(socket, nix::sys::socket::sockopt::Linger, &linger).unwrap();
}

#[test]
fn a_connection_that_is_made_to_linger_when_it_was_taken_holds_nothing_up() {
    let mut rig = free("lingers", false);
    let (near, far) = tcp();
    nix::sys::socket::setsockopt(&near, nix::sys::socket::sockopt::RcvBuf, &4096).unwrap();
    nix::sys::socket::setsockopt(&far, nix::sys::socket::sockopt::SndBuf, &4096).unwrap();
    let shared = far.try_clone().unwrap();
    assert_eq!(rig.add_client("serial0", Some(far.into())), added());
    // Until so much is under way that the client would have to read for all of it to be gone.
    assert!(eventually(|| {
        rig.vcpu().access(&[collected(0x3f8, b'x'); 170], 0, 1, bulkhead_bus_api::Op::Flush);
        rig.vcpu().inb(LSR) & THRE == 0
    }));
    linger(&shared);
    drop(shared);
    let start = Instant::now();
    near.shutdown(Shutdown::Write).unwrap();
    assert!(eventually(|| rig.filename().starts_with("disconnected:")));
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
    // One that is not taken may have something under way, too.
    let (_near, far) = tcp();
    far.set_nonblocking(true).unwrap();
    while (&far).write(&[0; 65536]).is_ok() {}
    linger(&far);
    let start = Instant::now();
    assert_eq!(rig.add_client("serial0", Some(far.into())), refused());
    rig.filename();
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
}

#[test]
fn what_is_no_connection_is_refused_and_closed() {
    let mut rig = free("refused", false);
    let (lingering, _far) = tcp();
    linger(&lingering);
    let fds: Vec<OwnedFd> = vec![
        TcpListener::bind("127.0.0.1:0").unwrap().into(),
        UnixDatagram::pair().unwrap().0.into(),
        common::pair().0,
        nix::unistd::pipe().unwrap().0,
        std::fs::File::open("/dev/null").unwrap().into(),
        std::fs::File::open("/proc").unwrap().into(),
        lingering.into(),
    ];
    for fd in fds {
        let number = fd.as_raw_fd();
        assert_eq!(rig.add_client("serial0", Some(fd)), refused(), "{number}");
    }
    let (mut near, far) = UnixStream::pair().unwrap();
    assert_eq!(rig.add_client("serial1", Some(far.into())), Answer::Client(Client::NoChardev));
    assert_eq!(near.read(&mut [0]).unwrap(), 0, "closed");
    assert_eq!(rig.add_client("serial0", None), refused());
    assert!(rig.filename().starts_with("disconnected:"));
    // The peer of an adopted connection may be gone already.
    let (near, far) = UnixStream::pair().unwrap();
    drop(near);
    rig.add_client("serial0", Some(far.into()));
    assert!(eventually(|| rig.filename().starts_with("disconnected:")));
    assert_eq!(rig.end().0, Ok(()));
}

#[test]
fn only_sockets_take_clients() {
    let mut rig = Rig::up(&chardev(ChardevKind::Null), vec![], 1);
    let (_near, far) = UnixStream::pair().unwrap();
    assert_eq!(rig.add_client("serial0", Some(far.into())), refused());
}

#[test]
fn a_client_side_device_takes_another_when_its_peer_is_gone() {
    let (near, far) = UnixStream::pair().unwrap();
    let kind = ChardevKind::Socket {
        fd: "chardev.serial0".into(),
        address: "/far/end".into(),
        server: false,
        wait: false,
    };
    let mut rig = Rig::up(&chardev(kind), vec![("chardev.serial0", far.into())], 1);
    drop(near);
    assert!(eventually(|| rig.filename().starts_with("disconnected:")));
    let (mut near, far) = UnixStream::pair().unwrap();
    assert_eq!(rig.add_client("serial0", Some(far.into())), added());
    assert_eq!(rig.filename(), "unix:");
    rig.vcpu().print(b"x");
    near.read_exact(&mut [0]).unwrap();
}
