//! What a user can do to a VM: tried for real, as that user, without any sandbox.

use std::fs::{self, OpenOptions};
use std::io::{IoSliceMut, Read as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use bulkhead_framework::{Failure, Result};
use nix::errno::Errno;
use nix::sys::ptrace;
use nix::sys::signal::kill;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::Pid;

use super::units::{SOCKETS, tool};

/// How long a server may take to greet; one that does not want the client closes at once.
const GREETING: Duration = Duration::from_secs(5);

/// Prints a line for each thing that this process can do to the sockets of VM `name` and to the processes `pids`.
pub fn print(name: &str, pids: &[String]) {
    for path in SOCKETS.map(|path| format!("/run/{}", path.replace("NAME", name))) {
        if reaches(&path) {
            println!("{path}");
        }
    }
    for pid in pids.iter().filter_map(|pid| pid.parse().ok()) {
        for what in done_to(pid) {
            println!("{what} {pid}");
        }
    }
}

/// True if a server greets there, or, where servers do not, takes the connection.
fn reaches(path: &str) -> bool {
    if let Ok(mut stream) = UnixStream::connect(path) {
        // The serial port greets nobody, but only its owner gets as far as this. Who may not talk to a broker is told so.
        let greets = !path.ends_with("/serial");
        let mut first = [0; 16];
        let limited = stream.set_read_timeout(Some(GREETING)).is_ok();
        return !greets || (limited && stream.read(&mut first).is_ok() && first.starts_with(b"{\"QMP\""));
    }
    let sequence = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None);
    let connected = sequence.and_then(|socket| connect(socket.as_raw_fd(), &UnixAddr::new(path)?));
    connected.is_ok() || OpenOptions::new().write(true).open(path).is_ok()
}

fn done_to(pid: i32) -> Vec<&'static str> {
    let target = Pid::from_raw(pid);
    let own = |what: &str| format!("/proc/{pid}/{what}");
    let mut buffer = [0; 1];
    let read =
        process_vm_readv(target, &mut [IoSliceMut::new(&mut buffer)], &[RemoteIoVec { base: 0, len: 1 }]);
    let tried = [
        ("signal", kill(target, None).is_ok()),
        ("memory", OpenOptions::new().read(true).open(own("mem")).is_ok()),
        ("maps", fs::read(own("maps")).is_ok_and(|text| !text.is_empty())),
        ("descriptors", fs::read_dir(own("fd")).is_ok_and(|mut entries| entries.next().is_some())),
        ("environment", fs::read(own("environ")).is_ok()),
        ("process_vm_readv", !matches!(read, Err(Errno::EPERM | Errno::ESRCH))),
        ("ptrace", ptrace::seize(target, ptrace::Options::empty()).is_ok()),
    ];
    tried.into_iter().filter_map(|(what, done)| done.then_some(what)).collect()
}

/// What user `uid` can do.
///
/// # Errors
/// The probe cannot run.
pub fn as_user(uid: u32, name: &str, pids: &[i32]) -> Result<Vec<String>> {
    let uid = uid.to_string();
    let pids: Vec<String> = pids.iter().map(ToString::to_string).collect();
    let mut words = vec!["setpriv", "--reuid", &uid, "--regid", &uid, "--clear-groups"];
    words.extend(["/usr/bin/bulkhead-lab", "probe", name]);
    words.extend(pids.iter().map(String::as_str));
    let said = tool(&words).map_err(|failure| Failure::new(failure.to_string()))?;
    Ok(said.lines().map(str::to_owned).collect())
}
