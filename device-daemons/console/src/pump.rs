//! Threads that copy between a descriptor whose reads or writes may block (a terminal, a pipe, a
//! file) and one end of a socket pair. The rest of the process holds the other end and never waits;
//! no mode of an inherited descriptor is changed, as others may share it.

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Barrier};
use std::thread;

use bulkhead_jail::{info, warn};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::state::PIECE;

/// Stack of a pump in bytes; its largest part is one chunk.
const STACK: usize = 64 * 1024;
/// Bytes copied at once: so many are lost when the process dies at the wrong moment.
const CHUNK: usize = PIECE;

/// Starts the pumps of one character device over the far end of a pair; `source` may be missing.
///
/// Output ends when the near end is shut down for writing; when all of it is written, the near end
/// reads end of file.
///
/// # Errors
/// The host has no thread left.
pub fn start(label: &str, far: OwnedFd, source: Option<OwnedFd>, sink: OwnedFd) -> io::Result<()> {
    let far = Arc::new(UnixStream::from(far));
    // What a thread does to begin is over when this function returns: a filter may follow.
    let begun = Arc::new(Barrier::new(if source.is_some() { 3 } else { 2 }));
    if let Some(source) = source {
        let (far, begun) = (Arc::clone(&far), Arc::clone(&begun));
        thread::Builder::new().stack_size(STACK).spawn(move || {
            begun.wait();
            pump_in(&source, &far);
        })?;
    }
    let (label, here) = (label.to_owned(), Arc::clone(&begun));
    thread::Builder::new().stack_size(STACK).spawn(move || {
        here.wait();
        pump_out(&label, &far, &sink);
        // The other side may be gone already.
        let _ = far.shutdown(Shutdown::Write);
    })?;
    begun.wait();
    Ok(())
}

/// Waits where somebody else has made the descriptor non-blocking.
fn wait(fd: &OwnedFd, events: PollFlags) {
    // An error shows itself in the read or write that follows.
    let _ = poll(&mut [PollFd::new(fd.as_fd(), events)], PollTimeout::NONE);
}

fn pump_in(source: &OwnedFd, far: &UnixStream) {
    let mut buffer = [0; CHUNK];
    loop {
        match nix::unistd::read(source, &mut buffer) {
            Ok(0) => return,
            Ok(len) => {
                let Some(bytes) = buffer.get(..len) else { return };
                if io::Write::write_all(&mut &*far, bytes).is_err() {
                    return;
                }
            }
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => wait(source, PollFlags::POLLIN),
            // A terminal that hung up: no more input.
            Err(_) => return,
        }
    }
}

fn pump_out(label: &str, far: &UnixStream, sink: &OwnedFd) {
    let mut buffer = [0; CHUNK];
    let mut dropped: u64 = 0;
    loop {
        let bytes = match nix::unistd::read(far, &mut buffer) {
            Ok(0) => break,
            Ok(len) => buffer.get(..len).unwrap_or_default(),
            Err(Errno::EINTR) => continue,
            Err(_) => break,
        };
        if let Err((errno, left)) = write_all(sink, bytes) {
            if dropped == 0 {
                warn!("chardev {label}: cannot write: {}; output is dropped", errno.desc());
            }
            dropped = dropped.saturating_add(left);
        }
    }
    if dropped > 0 {
        info!("chardev {label}: {dropped} bytes of output were dropped");
    }
}

/// Writes all bytes, or says why not and how many are left.
fn write_all(sink: &OwnedFd, mut bytes: &[u8]) -> Result<(), (Errno, u64)> {
    while !bytes.is_empty() {
        match nix::unistd::write(sink, bytes) {
            Ok(len) => bytes = bytes.get(len..).unwrap_or_default(),
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => wait(sink, PollFlags::POLLOUT),
            Err(errno) => return Err((errno, u64::try_from(bytes.len()).unwrap_or(u64::MAX))),
        }
    }
    Ok(())
}
