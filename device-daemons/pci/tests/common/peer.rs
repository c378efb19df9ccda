//! A back end that does as it is told, step by step, in the thread of the test.
#![allow(dead_code, reason = "each test binary uses a part of it")]
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test that cannot go on fails"
)]

use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};

use bulkhead_jail::link::receive;
use bulkhead_pci::frontend::wire::{HEADER, LOG_ALL, PROTOCOL_FEATURES, Request, protocol};
use bulkhead_pci::frontend::{Event, Frontend, Spec};
use nix::errno::Errno;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, sendmsg, socketpair};

use super::{QUEUE, VERSION_1};

pub const CONFIG_LEN: usize = 16;
/// Where each ring of the peer says that it has stopped.
pub const STOPPED_AT: u32 = 7;

/// A message as the peer gets it.
#[derive(Debug)]
pub struct Asked {
    pub request: u32,
    pub need_reply: bool,
    pub payload: Vec<u8>,
    pub fds: Vec<OwnedFd>,
}

/// A reply that is ready to go.
pub struct Answer {
    pub bytes: Vec<u8>,
    pub fds: Vec<OwnedFd>,
}

impl Answer {
    pub fn new(request: u32, payload: &[u8]) -> Self {
        let size = u32::try_from(payload.len()).unwrap();
        let mut bytes = [request, 5, size].map(u32::to_ne_bytes).concat();
        bytes.extend(payload);
        Self { bytes, fds: Vec::new() }
    }

    /// With another payload; the header follows.
    pub fn payload(&mut self, payload: &[u8]) {
        self.bytes.truncate(HEADER);
        self.bytes.extend(payload);
        self.bytes[8..12].copy_from_slice(&u32::try_from(payload.len()).unwrap().to_ne_bytes());
    }

    pub fn request(&self) -> u32 {
        u32::from_ne_bytes(self.bytes[..4].try_into().unwrap())
    }
}

pub fn send(to: &OwnedFd, bytes: &[u8], fds: &[OwnedFd]) -> nix::Result<usize> {
    let fds: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&fds)];
    let control: &[ControlMessage<'_>] = if fds.is_empty() { &[] } else { &rights };
    let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
    sendmsg::<()>(to.as_raw_fd(), &[IoSlice::new(bytes)], control, flags, None)
}

/// Takes what has come on a stream, if it is one whole message.
pub fn take(from: &OwnedFd) -> Option<Asked> {
    let mut header = [0; HEADER];
    let got = match receive(from.as_fd(), &mut header, MsgFlags::MSG_DONTWAIT) {
        Err(Errno::EAGAIN | Errno::ECONNRESET) => return None,
        got => got.unwrap(),
    };
    if got.len == 0 {
        return None;
    }
    assert_eq!(got.len, HEADER);
    let word = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap());
    assert_eq!(word(4) & !8, if word(4) & 4 == 0 { 1 } else { 5 });
    let mut payload = vec![0; word(8) as usize];
    if !payload.is_empty() {
        assert_eq!(receive(from.as_fd(), &mut payload, MsgFlags::MSG_DONTWAIT).unwrap().len, payload.len());
    }
    Some(Asked { request: word(0), need_reply: word(4) & 8 != 0, payload, fds: got.fds })
}

pub struct Peer {
    pub stream: OwnedFd,
    pub features: u64,
    pub protocol: u64,
    pub config: Vec<u8>,
    pub queues: u64,
    pub slots: u64,
    /// Its shared memory regions: id and length.
    pub shmem: Vec<(u8, u64)>,
    /// The back end's side of the channel for its requests.
    pub channel: Option<OwnedFd>,
    /// Requests that it got, in order.
    pub log: Vec<u32>,
    /// Requests whose payloads are of interest ...
    pub asks: Vec<u32>,
    /// ... and those.
    pub asked: Vec<Vec<u8>>,
}

pub fn spec() -> Spec {
    Spec { id: "d0".into(), queues: 2, queue_size: 2 * QUEUE, config_len: CONFIG_LEN.try_into().unwrap() }
}

impl Peer {
    /// Connects a front end to a back end with all that the protocol has.
    pub fn new(front: &mut Frontend) -> Self {
        Self::with(front, protocol::WANTED)
    }

    pub fn with(front: &mut Frontend, protocol: u64) -> Self {
        let (peer, stream) = Self::pair(protocol);
        front.connect(stream);
        peer
    }

    /// A back end and the front end's side of the connection.
    pub fn pair(protocol: u64) -> (Self, OwnedFd) {
        let (a, b) = socketpair(AddressFamily::Unix, SockType::Stream, None, SockFlag::SOCK_CLOEXEC).unwrap();
        let peer = Self {
            stream: b,
            features: VERSION_1 | PROTOCOL_FEATURES | LOG_ALL | 0xff,
            protocol,
            config: (1..=u8::try_from(CONFIG_LEN).unwrap()).collect(),
            queues: 2,
            slots: 4,
            shmem: vec![(0, 0x10_0000)],
            channel: None,
            log: Vec::new(),
            asks: Vec::new(),
            asked: Vec::new(),
        };
        (peer, a)
    }

    /// The next request and the right answer to it, if it wants one.
    pub fn turn(&mut self) -> Option<(Asked, Option<Answer>)> {
        let mut asked = take(&self.stream)?;
        self.log.push(asked.request);
        if self.asks.contains(&asked.request) {
            self.asked.push(asked.payload.clone());
        }
        let is = |request: Request| asked.request == request as u32;
        let number = |n: u64| Some(n.to_ne_bytes().to_vec());
        let payload = if is(Request::GET_FEATURES) {
            number(self.features)
        } else if is(Request::GET_PROTOCOL_FEATURES) {
            number(self.protocol | 1 << 16)
        } else if is(Request::GET_QUEUE_NUM) {
            number(self.queues)
        } else if is(Request::GET_MAX_MEM_SLOTS) {
            number(self.slots)
        } else if is(Request::GET_VRING_BASE) {
            Some([asked.payload[..4].to_vec(), STOPPED_AT.to_ne_bytes().to_vec()].concat())
        } else if is(Request::GET_SHMEM_CONFIG) {
            Some(shmem_config(&self.shmem))
        } else if is(Request::GET_CONFIG) {
            let asked_len = asked.payload.len() - 12;
            let known = self.config.get(..asked_len);
            Some(known.map_or_else(Vec::new, |config| [&asked.payload[..12], config].concat()))
        } else if is(Request::GET_INFLIGHT_FD) {
            let mut payload = [4096u64, 0].map(u64::to_ne_bytes).concat();
            payload.extend(&asked.payload[16..]);
            Some(payload)
        } else if asked.need_reply {
            number(0)
        } else {
            None
        };
        let mut answer = payload.map(|payload| Answer::new(asked.request, &payload));
        if is(Request::GET_INFLIGHT_FD) {
            answer.as_mut().unwrap().fds.push(memory(4096));
        }
        if is(Request::SET_BACKEND_REQ_FD) {
            self.channel = asked.fds.pop();
        }
        Some((asked, answer))
    }

    pub fn send(&self, answer: &Answer) {
        send(&self.stream, &answer.bytes, &answer.fds).unwrap();
    }

    /// Serves until the front end has nothing more to ask; returns its events.
    pub fn serve(&mut self, front: &mut Frontend) -> Vec<Event> {
        let mut events = front.advance();
        while let Some((_, answer)) = self.turn() {
            if let Some(answer) = answer {
                self.send(&answer);
            }
            events.extend(front.advance());
        }
        events.extend(front.advance());
        events
    }
}

/// The payload of a reply to GET_SHMEM_CONFIG.
pub fn shmem_config(regions: &[(u8, u64)]) -> Vec<u8> {
    let mut sizes = [0u64; 256];
    regions.iter().for_each(|(id, len)| sizes[usize::from(*id)] = *len);
    let count = u64::try_from(regions.len()).unwrap();
    [&[count], &sizes[..]].concat().into_iter().flat_map(u64::to_ne_bytes).collect()
}

/// A request of the back end on a shared memory region: what is in the message after its header.
pub fn piece(region: u8, file_offset: u64, offset: u64, len: u64, flags: u64) -> Vec<u8> {
    [region.into(), file_offset, offset, len, flags].into_iter().flat_map(u64::to_ne_bytes).collect()
}

/// The whole message; an answer is wanted.
pub fn shmem_request(request: u32, payload: &[u8]) -> Vec<u8> {
    let size = u32::try_from(payload.len()).unwrap();
    [[request, 9, size].map(u32::to_ne_bytes).concat(), payload.to_vec()].concat()
}

pub fn memory(len: i64) -> OwnedFd {
    let fd = memfd_create("inflight", MFdFlags::MFD_CLOEXEC).unwrap();
    nix::unistd::ftruncate(&fd, len).unwrap();
    fd
}
