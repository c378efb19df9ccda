//! Links: typed messages with descriptors over connected `SOCK_SEQPACKET` sockets.
//!
//! Each link begins with a [`Hello`] each way (the connecting side speaks first), so that two
//! processes of different versions part with a clear word.

use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use bulkhead_control_api::{Hello, MAGIC, MAX_MESSAGE, decode, encode};
use nix::errno::Errno;
use nix::sys::socket::{self, ControlMessage, MsgFlags};
use serde::{Serialize, de::DeserializeOwned};

/// The most descriptors in one message (`SCM_MAX_FD` of Linux).
pub const MAX_FDS: usize = 253;

/// `struct cmsghdr` of 64-bit Linux, in bytes.
const CMSG_HEADER: usize = 16;
/// Room for [`MAX_FDS`] descriptors with their header, in words.
const CONTROL_WORDS: usize = (CMSG_HEADER + MAX_FDS * size_of::<RawFd>()).div_ceil(8);

/// Why a link is of no more use.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The peer has closed it.
    #[error("closed by the peer")]
    Closed,
    /// The peer sent what is no message here, or the wrong number of descriptors.
    #[error("malformed message")]
    Malformed,
    /// The peer speaks another version.
    #[error("the peer speaks version {theirs}, this process version {ours}: install matching binaries")]
    Version {
        /// Version of this process.
        ours: u16,
        /// Version of the peer.
        theirs: u16,
    },
    /// Nothing to receive, or no room to send, at the moment (non-blocking calls only).
    #[error("would block")]
    WouldBlock,
    /// The socket failed.
    #[error("{0}")]
    Io(Errno),
}

impl From<Errno> for LinkError {
    fn from(errno: Errno) -> Self {
        match errno {
            Errno::EAGAIN => Self::WouldBlock,
            Errno::EPIPE | Errno::ECONNRESET => Self::Closed,
            other => Self::Io(other),
        }
    }
}

/// One end of a link.
#[derive(Debug)]
pub struct Link {
    fd: OwnedFd,
    buffer: Vec<u8>,
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for Link {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

/// Sends one packet with descriptors.
///
/// # Errors
/// The socket's error; `EAGAIN` with `MSG_DONTWAIT` when the peer does not read.
pub fn send_packet(
    fd: BorrowedFd<'_>,
    packet: &[u8],
    fds: &[BorrowedFd<'_>],
    flags: MsgFlags,
) -> Result<(), Errno> {
    let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control: &[ControlMessage<'_>] = if raw.is_empty() { &[] } else { &rights };
    loop {
        let flags = flags | MsgFlags::MSG_NOSIGNAL;
        match socket::sendmsg::<()>(fd.as_raw_fd(), &[IoSlice::new(packet)], control, flags, None) {
            Err(Errno::EINTR) => {}
            result => return result.map(drop),
        }
    }
}

/// Receives one packet with at most [`MAX_FDS`] descriptors; returns its length, 0 at the end.
///
/// # Errors
/// [`LinkError::Malformed`] if the packet or its descriptors did not fit (also because this process
/// is at its limit of descriptors); what came is closed.
pub fn recv_packet(
    fd: BorrowedFd<'_>,
    buffer: &mut [u8],
    flags: MsgFlags,
) -> Result<(usize, Vec<OwnedFd>), LinkError> {
    let received = receive(fd, buffer, flags)?;
    if received.cut { Err(LinkError::Malformed) } else { Ok((received.len, received.fds)) }
}

/// What one call received.
#[derive(Debug)]
pub struct Received {
    /// Bytes, 0 at the end.
    pub len: usize,
    /// Descriptors, close-on-exec.
    pub fds: Vec<OwnedFd>,
    /// Something did not fit: bytes of a packet, or descriptors (also because this process is at its
    /// limit of them).
    pub cut: bool,
}

/// Receives bytes or a packet with at most [`MAX_FDS`] descriptors.
///
/// # Errors
/// The socket's error.
pub fn receive(fd: BorrowedFd<'_>, buffer: &mut [u8], flags: MsgFlags) -> Result<Received, Errno> {
    receive_with(fd, buffer, &mut [0; CONTROL_WORDS], flags)
}

/// The same without descriptors: the kernel drops what comes along, and the result says that something was cut.
///
/// # Errors
/// The socket's error.
pub fn receive_bytes(fd: BorrowedFd<'_>, buffer: &mut [u8], flags: MsgFlags) -> Result<Received, Errno> {
    receive_with(fd, buffer, &mut [], flags)
}

fn receive_with(
    fd: BorrowedFd<'_>,
    buffer: &mut [u8],
    control: &mut [u64],
    flags: MsgFlags,
) -> Result<Received, Errno> {
    let (len, control_len, seen) = loop {
        match recvmsg(fd, buffer, control, flags | MsgFlags::MSG_CMSG_CLOEXEC) {
            Err(Errno::EINTR) => {}
            result => break result?,
        }
    };
    // Taken into ownership before anything is judged, so that a refusal closes them.
    let bytes: Vec<u8> = control.iter().flat_map(|word| word.to_ne_bytes()).take(control_len).collect();
    let fds: Vec<OwnedFd> = rights(&bytes).into_iter().map(own).collect();
    Ok(Received { len, fds, cut: seen.intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC) })
}

/// `recvmsg(2)`; returns the lengths of packet and control data, and the flags.
#[expect(unsafe_code, reason = "nix drops the descriptors of truncated control data unclosed")]
fn recvmsg(
    fd: BorrowedFd<'_>,
    buffer: &mut [u8],
    control: &mut [u64],
    flags: MsgFlags,
) -> Result<(usize, usize, MsgFlags), Errno> {
    let mut part = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    let mut header = libc::msghdr {
        msg_name: std::ptr::null_mut(),
        msg_namelen: 0,
        msg_iov: &raw mut part,
        msg_iovlen: 1,
        msg_control: control.as_mut_ptr().cast(),
        msg_controllen: size_of_val(control),
        msg_flags: 0,
    };
    // SAFETY: the kernel writes at most `iov_len` bytes to the buffer and `msg_controllen` bytes to
    // the control words, both borrowed exclusively for the call.
    let len = unsafe { libc::recvmsg(fd.as_raw_fd(), &raw mut header, flags.bits()) };
    let len = usize::try_from(len).map_err(|_| Errno::last())?;
    Ok((len, header.msg_controllen, MsgFlags::from_bits_truncate(header.msg_flags)))
}

/// The descriptors in control data (`cmsg(3)`: length, level, type, data, padded to words).
fn rights(mut control: &[u8]) -> Vec<RawFd> {
    let mut fds = Vec::new();
    while let Some((header, _)) = control.split_first_chunk::<CMSG_HEADER>() {
        let (len, kind) = header.split_at(8);
        let len = usize::from_ne_bytes(len.try_into().unwrap_or_default());
        let scm_rights = [libc::SOL_SOCKET.to_ne_bytes(), libc::SCM_RIGHTS.to_ne_bytes()].concat();
        let Some(data) = control.get(CMSG_HEADER..len) else { break };
        if kind == scm_rights.as_slice() {
            fds.extend(data.chunks_exact(4).map(|n| RawFd::from_ne_bytes(n.try_into().unwrap_or([0xff; 4]))));
        }
        control = control.get(len.next_multiple_of(8)..).unwrap_or(&[]);
    }
    fds
}

#[expect(unsafe_code, reason = "descriptors arrive as numbers")]
pub(crate) fn own(fd: RawFd) -> OwnedFd {
    // SAFETY: the kernel has just installed this descriptor for us by SCM_RIGHTS or `accept4`; nobody else in the
    // process knows its number, so it is ours alone and open.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

impl Link {
    fn new(fd: OwnedFd) -> Self {
        Self { fd, buffer: Vec::new() }
    }

    /// Takes over a link on which a predecessor of this process has exchanged hellos.
    #[must_use]
    pub fn resume(fd: OwnedFd) -> Self {
        Self::new(fd)
    }

    fn hello(&self, version: u16) -> Result<(), LinkError> {
        self.send(&Hello { magic: MAGIC, version })
    }

    fn expect_hello(&mut self, version: u16) -> Result<(), LinkError> {
        self.finish(version, MsgFlags::empty())
    }

    /// Begins a link on the connecting side without waiting: the peer's hello is still to come, see
    /// [`Self::finish`].
    ///
    /// # Errors
    /// The peer closed.
    pub fn begin(fd: OwnedFd, version: u16) -> Result<Self, LinkError> {
        let link = Self::new(fd);
        link.hello(version)?;
        Ok(link)
    }

    /// Receives the peer's hello on a link that [`Self::begin`] began, with flags (`MSG_DONTWAIT`).
    ///
    /// # Errors
    /// The peer closed, or speaks another version or protocol.
    pub fn finish(&mut self, version: u16, flags: MsgFlags) -> Result<(), LinkError> {
        match self.recv_with::<Hello>(flags)? {
            (Hello { magic: MAGIC, version: theirs }, fds) if fds.is_empty() => {
                if theirs == version {
                    Ok(())
                } else {
                    Err(LinkError::Version { ours: version, theirs })
                }
            }
            _ => Err(LinkError::Malformed),
        }
    }

    /// Begins a link on the connecting side. Blocks for the peer's hello.
    ///
    /// # Errors
    /// The peer closed, or speaks another version or protocol.
    pub fn connect(fd: OwnedFd, version: u16) -> Result<Self, LinkError> {
        let mut link = Self::new(fd);
        link.hello(version)?;
        link.expect_hello(version)?;
        Ok(link)
    }

    /// Begins a link on the accepting side. Blocks for the peer's hello: poll before, or set a
    /// receive timeout, where the peer is not trusted to speak.
    ///
    /// # Errors
    /// The peer closed, or speaks another version or protocol.
    pub fn accept(fd: OwnedFd, version: u16) -> Result<Self, LinkError> {
        let mut link = Self::new(fd);
        // Ours goes out whatever comes, so that the other side can say what is wrong, too.
        link.hello(version)?;
        link.expect_hello(version)?;
        Ok(link)
    }

    /// Sends one message; blocks while the peer's queue is full.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub fn send<T: Serialize>(&self, message: &T) -> Result<(), LinkError> {
        self.send_with(message, &[], MsgFlags::empty())
    }

    /// Sends one message with descriptors and flags (`MSG_DONTWAIT`).
    ///
    /// # Errors
    /// See [`LinkError`].
    pub fn send_with<T: Serialize>(
        &self,
        message: &T,
        fds: &[BorrowedFd<'_>],
        flags: MsgFlags,
    ) -> Result<(), LinkError> {
        let packet = encode(message).map_err(|_| LinkError::Malformed)?;
        Ok(send_packet(self.fd.as_fd(), &packet, fds, flags)?)
    }

    /// Receives one message that must come without descriptors; blocks.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub fn recv<T: DeserializeOwned>(&mut self) -> Result<T, LinkError> {
        match self.recv_with(MsgFlags::empty())? {
            (message, fds) if fds.is_empty() => Ok(message),
            _ => Err(LinkError::Malformed),
        }
    }

    /// Receives one message with its descriptors, with flags (`MSG_DONTWAIT`).
    ///
    /// # Errors
    /// See [`LinkError`].
    pub fn recv_with<T: DeserializeOwned>(
        &mut self,
        flags: MsgFlags,
    ) -> Result<(T, Vec<OwnedFd>), LinkError> {
        self.buffer.resize(MAX_MESSAGE, 0);
        let (len, fds) = recv_packet(self.fd.as_fd(), &mut self.buffer, flags)?;
        match self.buffer.get(..len) {
            None => Err(LinkError::Malformed),
            Some([]) => Err(LinkError::Closed),
            Some(bytes) => Ok((decode(bytes).map_err(|_| LinkError::Malformed)?, fds)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

    use super::*;

    fn pair() -> (OwnedFd, OwnedFd) {
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap()
    }

    #[test]
    fn both_sides_agree_on_the_version() {
        let (a, b) = pair();
        let other = thread::spawn(move || Link::accept(b, 1).map(drop));
        Link::connect(a, 1).unwrap();
        other.join().unwrap().unwrap();

        let (a, b) = pair();
        let other = thread::spawn(move || Link::accept(b, 2).map(drop));
        assert!(matches!(Link::connect(a, 1), Err(LinkError::Version { ours: 1, theirs: 2 })));
        assert!(matches!(other.join().unwrap(), Err(LinkError::Version { ours: 2, theirs: 1 })));
    }

    #[test]
    fn descriptors_travel_with_their_message() {
        let (a, b) = pair();
        let (one, two) = pair();
        let mut receiver = Link::new(b);
        Link::new(a).send_with(&7u32, &[one.as_fd(), two.as_fd()], MsgFlags::empty()).unwrap();
        let (number, fds) = receiver.recv_with::<u32>(MsgFlags::empty()).unwrap();
        assert_eq!((number, fds.len()), (7, 2));
        assert!(matches!(receiver.recv::<u32>(), Err(LinkError::Closed)));
    }

    #[test]
    fn unexpected_descriptors_and_garbage_are_malformed() {
        let (a, b) = pair();
        let mut receiver = Link::new(b);
        let sender = Link::new(a);
        sender.send_with(&7u32, &[sender.as_fd()], MsgFlags::empty()).unwrap();
        assert!(matches!(receiver.recv::<u32>(), Err(LinkError::Malformed)));
        send_packet(sender.as_fd(), &[0xff; 9], &[], MsgFlags::empty()).unwrap();
        assert!(matches!(receiver.recv::<u32>(), Err(LinkError::Malformed)));
        send_packet(sender.as_fd(), &vec![0; MAX_MESSAGE + 1], &[], MsgFlags::empty()).unwrap();
        assert!(matches!(receiver.recv::<u32>(), Err(LinkError::Malformed)));
        assert!(matches!(receiver.recv_with::<u32>(MsgFlags::MSG_DONTWAIT), Err(LinkError::WouldBlock)));
    }
}
