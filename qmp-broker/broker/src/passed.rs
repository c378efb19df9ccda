//! Receives what a client sends together with the descriptors in it (`SCM_RIGHTS`).
//!
//! A read ends behind the first message that carries descriptors, but begins as far before it as
//! bytes wait there. Which request a descriptor belongs to depends on where its message begins, and
//! the kernel does not tell: where descriptors wait, bytes are read one by one, as QEMU always does.

use std::io::IoSliceMut;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use bulkhead_jail::link::receive as receive_all;
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recvmsg};

/// What came with some bytes.
#[derive(Debug)]
pub enum Passed {
    /// No descriptor.
    Nothing,
    /// The first descriptor of a message. No command can take another one, so the others are closed.
    First(OwnedFd),
    /// Descriptors that this process has no room for. All of the message are closed.
    Cut,
}

/// Receives bytes, 0 at the end, from a stream socket. Does not wait. Descriptors belong to a message
/// that begins with the last byte.
///
/// # Errors
/// `EAGAIN` if there is nothing, or the socket's error.
pub fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> Result<(usize, Passed), Errno> {
    let (len, carries) = peek(socket, buffer)?;
    let Some(waiting) = buffer.get_mut(..len).filter(|waiting| !waiting.is_empty()) else {
        return Ok((0, Passed::Nothing));
    };
    if !carries {
        return receive_part(socket, waiting);
    }
    for (before, byte) in waiting.chunks_mut(1).enumerate() {
        let (len, passed) = receive_part(socket, byte)?;
        if len == 0 || !matches!(passed, Passed::Nothing) {
            return Ok((before + len, passed));
        }
    }
    Ok((len, Passed::Nothing))
}

fn receive_part(socket: BorrowedFd<'_>, part: &mut [u8]) -> Result<(usize, Passed), Errno> {
    let received = receive_all(socket, part, MsgFlags::MSG_DONTWAIT)?;
    let passed = match received.fds.into_iter().next() {
        _ if received.cut => Passed::Cut,
        Some(first) => Passed::First(first),
        None => Passed::Nothing,
    };
    Ok((received.len, passed))
}

/// How many bytes wait, and whether descriptors may come with them, or soon after.
fn peek(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> Result<(usize, bool), Errno> {
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    loop {
        match recvmsg::<()>(socket.as_raw_fd(), &mut [IoSliceMut::new(buffer)], None, flags) {
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error),
            // There is no room for control data: that it was cut shows that there is some.
            Ok(seen) => return Ok((seen.bytes, seen.flags.contains(MsgFlags::MSG_CTRUNC))),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{IoSlice, Read, Write};
    use std::os::fd::{AsFd, RawFd};
    use std::os::unix::net::UnixStream;

    use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
    use nix::sys::socket::{ControlMessage, sendmsg};

    use super::*;

    fn send(stream: &UnixStream, bytes: &[u8], fds: &[RawFd]) {
        let rights = [ControlMessage::ScmRights(fds)];
        sendmsg::<()>(stream.as_raw_fd(), &[IoSlice::new(bytes)], &rights, MsgFlags::empty(), None).unwrap();
    }

    fn next(stream: &UnixStream) -> (Vec<u8>, Passed) {
        let mut buffer = [0; 4096];
        let (len, passed) = receive(stream.as_fd(), &mut buffer).unwrap();
        (buffer[..len].to_vec(), passed)
    }

    #[test]
    fn descriptors_stay_with_their_bytes() {
        let (mut client, server) = UnixStream::pair().unwrap();
        assert_eq!(receive(server.as_fd(), &mut [0; 9]).unwrap_err(), Errno::EAGAIN);
        let null = File::open("/dev/null").unwrap();
        for before in [0, 1, 2, 3, 7, 100, 4095] {
            client.write_all(&vec![b'a'; before]).unwrap();
            send(&client, b"bb", &[null.as_raw_fd()]);
            client.write_all(b"c").unwrap();
            let (bytes, passed) = next(&server);
            assert_eq!(bytes, [vec![b'a'; before], vec![b'b']].concat());
            assert!(matches!(passed, Passed::First(_)));
            assert!(matches!(next(&server), (bytes, Passed::Nothing) if bytes == b"bc"));
        }
        client.write_all(&[b'a'; 4096]).unwrap();
        send(&client, b"b", &[null.as_raw_fd()]);
        assert!(matches!(next(&server), (bytes, Passed::Nothing) if bytes.len() == 4096));
        assert!(matches!(next(&server), (bytes, Passed::First(_)) if bytes == b"b"));
        drop(client);
        assert!(matches!(next(&server), (bytes, Passed::Nothing) if bytes.is_empty()));
    }

    #[test]
    fn a_message_larger_than_the_buffer_passes_once() {
        let (client, server) = UnixStream::pair().unwrap();
        let null = File::open("/dev/null").unwrap();
        send(&client, &[b'x'; 10_000], &[null.as_raw_fd()]);
        assert!(matches!(next(&server), (bytes, Passed::First(_)) if bytes.len() == 1));
        assert!(matches!(next(&server), (bytes, Passed::Nothing) if bytes.len() == 4096));
        assert!(matches!(next(&server), (bytes, Passed::Nothing) if bytes.len() == 4096));
        assert!(matches!(next(&server), (bytes, Passed::Nothing) if bytes.len() == 1807));
    }

    #[test]
    fn the_first_is_kept_and_the_others_are_closed() {
        let (client, server) = UnixStream::pair().unwrap();
        let (first, mut first_end) = UnixStream::pair().unwrap();
        let (other, mut other_end) = UnixStream::pair().unwrap();
        let mut fds = vec![other.as_raw_fd(); 253];
        fds[0] = first.as_raw_fd();
        send(&client, b"x", &fds);
        drop((first, other));
        let (_, passed) = next(&server);
        let Passed::First(kept) = passed else { panic!("{passed:?}") };
        assert_eq!(other_end.read(&mut [0; 1]).unwrap(), 0, "closed");
        first_end.write_all(b"y").unwrap();
        let flags = fcntl(&kept, FcntlArg::F_GETFD).unwrap();
        assert!(FdFlag::from_bits_truncate(flags).contains(FdFlag::FD_CLOEXEC));
    }

    #[test]
    fn the_description_is_left_alone() {
        let (client, server) = UnixStream::pair().unwrap();
        let (passed, _end) = UnixStream::pair().unwrap();
        passed.set_nonblocking(true).unwrap();
        send(&client, b"x", &[passed.as_raw_fd()]);
        assert!(matches!(next(&server).1, Passed::First(_)));
        let flags = OFlag::from_bits_truncate(fcntl(&passed, FcntlArg::F_GETFL).unwrap());
        assert!(flags.contains(OFlag::O_NONBLOCK));
    }
}
