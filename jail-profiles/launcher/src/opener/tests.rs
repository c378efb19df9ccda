use std::fs;
use std::io::{Read, Seek, Write};
use std::os::fd::{AsRawFd, IntoRawFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::PathBuf;

use super::*;

/// A directory of its own for each test, removed at its end.
struct Dir(PathBuf);

impl Dir {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("opener-{}-{name}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn path(&self, name: &str) -> String {
        self.0.join(name).into_os_string().into_string().unwrap()
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).unwrap();
    }
}

fn request(what: What) -> Open {
    Open { name: "x".to_owned(), at: "-opt".to_owned(), what }
}

/// The descriptor and the path that was created for it.
type One = (OwnedFd, Option<Created>);

fn open_with(what: What, inherited: Inherited) -> Result<One, String> {
    let mut seen = None;
    let mut created = |note: Note<'_>| {
        let Note::Created(new) = note else { return Ok(()) };
        seen = Some(new.clone());
        Ok(())
    };
    let mut fds = open(&[request(what)], inherited, &mut created).map_err(|e| e.to_string())?;
    Ok((fds.remove("x").unwrap(), seen))
}

fn open_it(what: What) -> Result<One, String> {
    open_with(what, Inherited::default())
}

fn file_of(one: One) -> fs::File {
    fs::File::from(one.0)
}

#[test]
fn inputs_are_regular_files() {
    let dir = Dir::new("input");
    let missing = dir.path("no");
    assert_eq!(open_it(What::Input(missing)).unwrap_err(), "-opt: No such file or directory");
    assert_eq!(open_it(What::Input(dir.path(""))).unwrap_err(), "-opt: not a regular file");
    let fifo = dir.path("fifo");
    nix::unistd::mkfifo(fifo.as_str(), nix::sys::stat::Mode::S_IRWXU).unwrap();
    assert_eq!(open_it(What::Input(fifo)).unwrap_err(), "-opt: not a regular file");
    fs::write(dir.path("f"), "x").unwrap();
    let mut file = file_of(open_it(What::Input(dir.path("f"))).unwrap());
    let mut text = String::new();
    file.read_to_string(&mut text).unwrap();
    assert_eq!(text, "x");
    assert!(file.write(b"y").is_err());
}

#[test]
fn files_of_tables_are_refused_in_qemus_words() {
    let dir = Dir::new("table");
    let refused = |path: &str| open_it(What::Table(path.to_owned())).unwrap_err();
    let missing = dir.path("no");
    assert_eq!(refused(&missing), format!("-opt: can't open file {missing}: No such file or directory"));
    assert_eq!(refused(""), "-opt: can't open file : No such file or directory");
    let set = "/dev/fdset/1";
    assert_eq!(refused(set), format!("-opt: can't open file {set}: No such file or directory"));
    let whole = dir.path("");
    assert_eq!(refused(&whole), format!("-opt: can't read file {whole}: not a regular file"));
    fs::write(dir.path("f"), "x").unwrap();
    let mut text = String::new();
    file_of(open_it(What::Table(dir.path("f"))).unwrap()).read_to_string(&mut text).unwrap();
    assert_eq!(text, "x");
    // The same where paths lead no further than a directory.
    let root = fs::File::open(dir.path("")).unwrap();
    let beneath = |path: &str| open_beneath(root.as_fd(), &request(What::Table(path.to_owned())));
    assert!(beneath("f").is_ok());
    assert_eq!(beneath("g").unwrap_err().to_string(), "-opt: can't open file g: No such file or directory");
    assert!(beneath("../f").unwrap_err().to_string().starts_with("-opt: can't open file ../f: "));
}

#[test]
fn outputs_truncate_or_append() {
    let dir = Dir::new("output");
    let path = dir.path("f");
    for (append, expected) in [(false, "ab"), (true, "abab"), (false, "ab")] {
        let mut file = file_of(open_it(What::Output { path: path.clone(), append }).unwrap());
        file.write_all(b"ab").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), expected);
    }
    let path = dir.path("no/f");
    let error = open_it(What::Output { path: path.clone(), append: false }).unwrap_err();
    assert_eq!(error, format!("-opt: Could not open '{path}': No such file or directory"));
}

#[test]
fn the_native_guest_cannot_be_changed() {
    let mut file = file_of(open_it(What::NativeGuest).unwrap());
    let mut bytes = Vec::new();
    file.rewind().unwrap();
    file.read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes, bulkhead_guest::ELF);
    assert!(file.write(b"x").is_err() && file.set_len(0).is_err() && file.set_len(1 << 20).is_err());
}

#[test]
fn listeners_are_bound_and_removed() {
    let dir = Dir::new("listen");
    let path = dir.path("s");
    let (_listener, created) = open_it(What::Listener(path.clone())).unwrap();
    UnixStream::connect(&path).unwrap();
    let error = open_it(What::Listener(path.clone())).unwrap_err();
    let expected = "Address already in use: another process listens there";
    assert_eq!(error, format!("-opt: Failed to bind socket to {path}: {expected}"));
    created.unwrap().remove();
    assert!(!fs::exists(&path).unwrap());
}

#[test]
fn a_stale_socket_is_replaced_and_a_file_is_not() {
    let dir = Dir::new("stale");
    let path = dir.path("s");
    drop(UnixListener::bind(&path).unwrap());
    let opened = open_it(What::Listener(path.clone())).unwrap();
    UnixStream::connect(&path).unwrap();
    drop(opened);
    fs::remove_file(&path).unwrap();
    fs::write(&path, "precious").unwrap();
    let error = open_it(What::Listener(path.clone())).unwrap_err();
    let expected = "something that is not a socket is there: remove it or choose another path";
    assert_eq!(error, format!("-opt: Failed to bind socket to {path}: {expected}"));
    assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
    // A datagram socket that is in use refuses streams, but somebody is there.
    let path = dir.path("d");
    let _datagram = UnixDatagram::bind(&path).unwrap();
    assert!(open_it(What::Listener(path)).unwrap_err().contains("another process listens there"));
}

#[test]
fn socket_paths_are_checked() {
    let dir = Dir::new("paths");
    let path = dir.path("no/s");
    let error = open_it(What::Listener(path.clone())).unwrap_err();
    assert_eq!(error, format!("-opt: Failed to bind socket to {path}: No such file or directory"));
    let error = open_it(What::Connection(path.clone())).unwrap_err();
    assert_eq!(error, format!("-opt: Failed to connect to '{path}': No such file or directory"));
    let long = "a".repeat(108);
    let error = open_it(What::Listener(long.clone())).unwrap_err();
    assert_eq!(error, format!("-opt: UNIX socket path '{long}' is too long: it must be less than 108 bytes"));
}

#[test]
fn connections() {
    let dir = Dir::new("connect");
    let path = dir.path("s");
    let listener = UnixListener::bind(&path).unwrap();
    let opened = open_it(What::Connection(path)).unwrap();
    listener.accept().unwrap();
    assert_eq!(opened.1, None);
}

#[test]
fn a_lost_guard_is_an_error() {
    let dir = Dir::new("guard");
    let opens = [request(What::Listener(dir.path("s")))];
    let error = open(&opens, Inherited::default(), &mut |_| Err("the guard died".into())).unwrap_err();
    assert_eq!(error.to_string(), "the guard died");
}

#[test]
fn what_a_kill_leaves_is_removed_and_nothing_else() {
    let dir = Dir::new("abandoned");
    let (socket, pid) = (dir.path("s"), dir.path("pid"));
    let listening = open_it(What::Listener(socket.clone())).unwrap();
    abandon_socket(&socket);
    assert!(fs::exists(&socket).unwrap(), "somebody listens");
    drop(listening);
    abandon_socket(&socket);
    assert!(!fs::exists(&socket).unwrap());
    let held = open_it(What::PidFile(pid.clone())).unwrap();
    abandon_pid_file(&pid, std::process::id());
    assert!(fs::exists(&pid).unwrap(), "somebody holds it");
    drop(held);
    abandon_pid_file(&pid, 1);
    assert!(fs::exists(&pid).unwrap(), "it is another launcher's");
    abandon_pid_file(&pid, std::process::id());
    assert!(!fs::exists(&pid).unwrap());
    fs::write(&pid, "").unwrap();
    abandon_socket(&pid);
    assert!(fs::exists(&pid).unwrap(), "it is no socket");
    abandon_pid_file(&pid, 1);
    assert!(!fs::exists(&pid).unwrap());
}

#[test]
fn only_our_own_is_removed() {
    let dir = Dir::new("own");
    let path = dir.path("s");
    let opened = open_it(What::Listener(path.clone())).unwrap();
    fs::rename(&path, dir.path("moved")).unwrap();
    let _other = UnixListener::bind(&path).unwrap();
    opened.1.unwrap().remove();
    assert!(fs::symlink_metadata(&path).unwrap().file_type().is_socket());
}

#[test]
fn inherited_sockets() {
    let dir = Dir::new("inherited");
    let claim = |fd: i32, listening| {
        let fd = fd.unsigned_abs();
        let opened = open_with(What::Inherited { fd, listening }, Inherited::at_start().unwrap());
        opened.map(drop)
    };
    let listener = || UnixListener::bind(dir.path("s")).unwrap().into_raw_fd();
    let fd = listener();
    assert_eq!(claim(fd, true), Ok(()));
    fs::remove_file(dir.path("s")).unwrap();
    let fd = listener();
    assert_eq!(claim(fd, false).unwrap_err(), format!("-opt: File descriptor '{fd}' listens: use server=on"));
    let fd = UnixStream::pair().unwrap().0.into_raw_fd();
    let error = claim(fd, true).unwrap_err();
    let expected = "does not listen: with server=on it must be a listening socket";
    assert_eq!(error, format!("-opt: File descriptor '{fd}' {expected}"));
    let fd = UnixDatagram::unbound().unwrap().into_raw_fd();
    let error = claim(fd, false).unwrap_err();
    assert_eq!(error, format!("-opt: File descriptor '{fd}' is not a unix stream socket"));
    let fd = std::net::TcpListener::bind("127.0.0.1:0").unwrap().into_raw_fd();
    let error = claim(fd, true).unwrap_err();
    assert_eq!(error, format!("-opt: File descriptor '{fd}' is not a unix stream socket"));
    let fd = fs::File::open("/dev/null").unwrap().into_raw_fd();
    assert_eq!(claim(fd, true).unwrap_err(), format!("-opt: File descriptor '{fd}' is not a socket"));
}

#[test]
fn descriptors_that_cannot_be_inherited() {
    for fd in 0..3 {
        let error = open_it(What::Inherited { fd, listening: true }).unwrap_err();
        let expected = "is a standard stream: pass a socket as 3 or above";
        assert_eq!(error, format!("-opt: File descriptor '{fd}' {expected}"));
    }
    // Open, but not inherited.
    let own = UnixStream::pair().unwrap().0;
    let fd = own.as_raw_fd().unsigned_abs();
    let error = open_it(What::Inherited { fd, listening: false }).unwrap_err();
    assert_eq!(error, format!("-opt: File descriptor '{fd}' is not a socket: it is not open"));
}

#[test]
fn the_pid_file_is_locked() {
    let dir = Dir::new("pid");
    let path = dir.path("p");
    fs::write(&path, "left over from earlier, and longer").unwrap();
    let opened = open_it(What::PidFile(path.clone())).unwrap();
    assert_eq!(fs::read_to_string(&path).unwrap(), format!("{}\n", std::process::id()));
    let error = open_it(What::PidFile(path.clone())).unwrap_err();
    assert_eq!(error, "-opt: cannot create PID file: Cannot lock pid file: another process holds it");
    opened.1.unwrap().remove();
    assert!(!fs::exists(&path).unwrap());
    let path = dir.path("no/p");
    let error = open_it(What::PidFile(path.clone())).unwrap_err();
    let expected = "No such file or directory";
    assert_eq!(error, format!("-opt: cannot create PID file: Could not create '{path}': {expected}"));
}

#[test]
fn kvm_failures_have_a_remedy() {
    let dir = Dir::new("kvm");
    let missing = files::kvm_at(&dir.0.join("kvm")).unwrap_err().to_string();
    assert!(missing.starts_with("No such file or directory: KVM is not loaded: sudo modprobe"), "{missing}");
    let denied = files::kvm_error(nix::errno::Errno::EACCES.into()).to_string();
    assert!(denied.starts_with("Permission denied: add yourself to group kvm: sudo usermod -aG kvm "));
    let none = files::kvm_error(nix::errno::Errno::ENODEV.into()).to_string();
    assert!(none.starts_with("No such device: KVM is not available: enable virtualization"), "{none}");
    assert!(!files::user().contains(char::is_control));
}
