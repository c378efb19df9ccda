//! Control links to core, console, pci and balloon.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::time::Duration;

use bulkhead_control_api::{Hello, MAGIC, MAX_MESSAGE, VERSION, decode, encode};
use bulkhead_jail::link::{LinkError, recv_packet, send_packet};
use nix::errno::Errno;
use nix::sys::socket::MsgFlags;
use serde::{Serialize, de::DeserializeOwned};
use tokio::io::unix::AsyncFd;
use tokio::sync::{Mutex, Notify, oneshot};
use tokio::task::coop::consume_budget;
use tokio::time::timeout;

use crate::fd::watch;

/// One end of a control link.
#[derive(Debug)]
pub struct Link {
    fd: AsyncFd<OwnedFd>,
    buffer: RefCell<Vec<u8>>,
}

impl Link {
    /// Begins a link: a [`Hello`] each way.
    ///
    /// # Errors
    /// The peer closed, or speaks another version or protocol.
    pub async fn begin(fd: OwnedFd) -> Result<Self, LinkError> {
        let fd = watch(fd).map_err(|(_, error)| LinkError::Io(errno(&error)))?;
        let link = Self { fd, buffer: RefCell::new(vec![0; MAX_MESSAGE]) };
        link.send(&Hello { magic: MAGIC, version: VERSION }).await?;
        match link.receive().await? {
            Hello { magic: MAGIC, version: VERSION } => Ok(link),
            Hello { magic: MAGIC, version } => Err(LinkError::Version { ours: VERSION, theirs: version }),
            Hello { .. } => Err(LinkError::Malformed),
        }
    }

    /// Receives a message; a message with descriptors is malformed.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub async fn receive<T: DeserializeOwned>(&self) -> Result<T, LinkError> {
        match self.receive_with().await? {
            (message, None) => Ok(message),
            (_, Some(_)) => Err(LinkError::Malformed),
        }
    }

    /// Receives a message and the one descriptor that may come with it.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub async fn receive_with<T: DeserializeOwned>(&self) -> Result<(T, Option<OwnedFd>), LinkError> {
        loop {
            // A peer that never stops sending must not keep everybody else from their turn.
            consume_budget().await;
            let mut guard = self.fd.readable().await.map_err(|error| LinkError::Io(errno(&error)))?;
            let mut buffer = self.buffer.borrow_mut();
            let (length, fds) = match recv_packet(self.fd.as_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
                Err(LinkError::WouldBlock) => {
                    guard.clear_ready();
                    continue;
                }
                received => received?,
            };
            return match buffer.get(..length) {
                Some([]) => Err(LinkError::Closed),
                Some(bytes) if fds.len() <= 1 => {
                    let message = decode(bytes).map_err(|_| LinkError::Malformed)?;
                    Ok((message, fds.into_iter().next()))
                }
                _ => Err(LinkError::Malformed),
            };
        }
    }

    async fn send<T: Serialize>(&self, message: &T) -> Result<(), LinkError> {
        self.send_with(message, &[]).await
    }

    /// Sends a message with descriptors.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub async fn send_with<T: Serialize>(
        &self,
        message: &T,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), LinkError> {
        let packet = encode(message).map_err(|_| LinkError::Malformed)?;
        loop {
            match send_packet(self.fd.as_fd(), &packet, fds, MsgFlags::MSG_DONTWAIT) {
                Err(Errno::EAGAIN) => {
                    let mut guard = self.fd.writable().await.map_err(|error| LinkError::Io(errno(&error)))?;
                    guard.clear_ready();
                }
                result => return Ok(result?),
            }
        }
    }
}

fn errno(error: &std::io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}

/// Why a peer gave no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoAnswer {
    /// It is not connected, or its link ended meanwhile.
    #[error("not connected")]
    Away,
    /// It took too long.
    #[error("no answer within {} seconds", .0.as_secs())]
    Late(Duration),
}

/// A peer that answers requests with `A`. It may be away for a time.
#[derive(Debug)]
pub struct Peer<A> {
    link: RefCell<Option<Rc<Link>>>,
    /// There is such a process in this machine.
    exists: Cell<bool>,
    attached: Notify,
    waiting: RefCell<BTreeMap<u32, oneshot::Sender<A>>>,
    next: Cell<u32>,
    /// Held while a client's command is with the peer: one at a time across all clients.
    turn: Mutex<()>,
    /// How long a client waits for its turn and the answer.
    patience: Duration,
}

impl<A> Peer<A> {
    /// A peer that is not there yet. Clients wait so long before they are told that it does not answer.
    #[must_use]
    pub fn new(patience: Duration) -> Self {
        Self {
            link: RefCell::default(),
            exists: Cell::default(),
            attached: Notify::new(),
            waiting: RefCell::default(),
            next: Cell::default(),
            turn: Mutex::default(),
            patience,
        }
    }

    /// There is such a peer, sooner or later.
    pub fn set_exists(&self) {
        self.exists.set(true);
    }

    /// Whether the machine has such a peer at all.
    #[must_use]
    pub fn exists(&self) -> bool {
        self.exists.get()
    }

    /// The peer is there.
    pub fn attach(&self, link: Rc<Link>) {
        self.detach();
        *self.link.borrow_mut() = Some(link);
        self.attached.notify_waiters();
    }

    /// The peer is gone: whoever waits is told.
    pub fn detach(&self) {
        *self.link.borrow_mut() = None;
        self.waiting.borrow_mut().clear();
    }

    /// Hands over the answer to request `id`; one that nobody waits for any more is dropped.
    pub fn answer(&self, id: u32, answer: A) {
        if let Some(waiting) = self.waiting.borrow_mut().remove(&id) {
            // The client may be gone.
            let _ = waiting.send(answer);
        }
    }

    async fn link(&self) -> Rc<Link> {
        loop {
            let attached = self.attached.notified();
            let link = self.link.borrow().clone();
            match link {
                Some(link) => return link,
                None => attached.await,
            }
        }
    }

    /// Sends the request that `make` makes of an id, as soon as the peer is there, and waits for its
    /// answer as long as it takes.
    ///
    /// # Errors
    /// [`NoAnswer::Away`]: the link ended meanwhile.
    pub async fn ask_patiently<R: Serialize>(&self, make: impl FnOnce(u32) -> R) -> Result<A, NoAnswer> {
        self.hand_over(make, None).await
    }

    /// The same with a descriptor, which is closed here as soon as it is sent.
    async fn hand_over<R: Serialize>(
        &self,
        make: impl FnOnce(u32) -> R,
        fd: Option<OwnedFd>,
    ) -> Result<A, NoAnswer> {
        let link = self.link().await;
        let id = self.next.get();
        self.next.set(id.wrapping_add(1));
        let (sender, receiver) = oneshot::channel();
        self.waiting.borrow_mut().insert(id, sender);
        let _forget = Forget { peer: self, id };
        let fds: Vec<BorrowedFd<'_>> = fd.iter().map(AsFd::as_fd).collect();
        link.send_with(&make(id), &fds).await.map_err(|_| NoAnswer::Away)?;
        drop(fd);
        receiver.await.map_err(|_| NoAnswer::Away)
    }

    /// Like [`Self::ask_patiently`] in the order of all clients' commands, and as long as clients wait.
    ///
    /// # Errors
    /// See [`NoAnswer`].
    pub async fn ask<R: Serialize>(&self, make: impl FnOnce(u32) -> R) -> Result<A, NoAnswer> {
        self.ask_with(make, None).await
    }

    /// The same with a descriptor, which is closed here in any case.
    ///
    /// # Errors
    /// See [`NoAnswer`].
    pub async fn ask_with<R: Serialize>(
        &self,
        make: impl FnOnce(u32) -> R,
        fd: Option<OwnedFd>,
    ) -> Result<A, NoAnswer> {
        let in_turn = async {
            let _turn = self.turn.lock().await;
            self.hand_over(make, fd).await
        };
        let late =
            || if self.link.borrow().is_some() { NoAnswer::Late(self.patience) } else { NoAnswer::Away };
        timeout(self.patience, in_turn).await.unwrap_or_else(|_| Err(late()))
    }
}

/// Removes a request that nobody waits for any more.
struct Forget<'a, A> {
    peer: &'a Peer<A>,
    id: u32,
}

impl<A> Drop for Forget<'_, A> {
    fn drop(&mut self) {
        self.peer.waiting.borrow_mut().remove(&self.id);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
    use tokio::task::{LocalSet, spawn_local};
    use tokio::time::sleep;

    use super::*;

    #[test]
    fn clients_wait_for_their_turn_and_the_answer_together() {
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap();
        let hello = encode(&Hello { magic: MAGIC, version: VERSION }).unwrap();
        send_packet(theirs.as_fd(), &hello, &[], MsgFlags::empty()).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let patience = Duration::from_millis(200);
        let began = std::time::Instant::now();
        runtime.block_on(async {
            let peer = Peer::<()>::new(patience);
            peer.attach(Rc::new(Link::begin(ours).await.unwrap()));
            let ask = || peer.ask(|id| id);
            let answers = tokio::join!(ask(), ask(), ask());
            assert_eq!(
                answers,
                (Err(NoAnswer::Late(patience)), Err(NoAnswer::Late(patience)), Err(NoAnswer::Late(patience)))
            );
        });
        assert!(began.elapsed() < 2 * patience, "{:?}", began.elapsed());
        let late = NoAnswer::Late(Duration::from_secs(30));
        assert_eq!(late.to_string(), "no answer within 30 seconds");
    }

    #[test]
    fn a_peer_that_floods_leaves_others_their_turn() {
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap();
        let hello = encode(&Hello { magic: MAGIC, version: VERSION }).unwrap();
        send_packet(theirs.as_fd(), &hello, &[], MsgFlags::empty()).unwrap();
        // Sent faster than it is decoded.
        let message = vec![(String::new(), String::new(), false); 5000];
        let packet = encode(&message).unwrap();
        while send_packet(theirs.as_fd(), &packet, &[], MsgFlags::MSG_DONTWAIT).is_ok() {}
        let stop = Arc::new(AtomicBool::new(false));
        let senders: Vec<_> = (0..2)
            .map(|_| {
                let (theirs, packet, stop) = (theirs.try_clone().unwrap(), packet.clone(), Arc::clone(&stop));
                std::thread::spawn(move || {
                    while !stop.load(Ordering::Relaxed) {
                        let _ = send_packet(theirs.as_fd(), &packet, &[], MsgFlags::MSG_DONTWAIT);
                    }
                })
            })
            .collect();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let began = std::time::Instant::now();
        LocalSet::new().block_on(&runtime, async {
            let reader = spawn_local(async move {
                let link = Link::begin(ours).await.unwrap();
                // Not for ever, so that the test fails and does not hang.
                let end = std::time::Instant::now() + Duration::from_secs(15);
                while std::time::Instant::now() < end {
                    link.receive::<Vec<(String, String, bool)>>().await.unwrap();
                }
            });
            sleep(Duration::from_millis(10)).await;
            reader.abort();
        });
        stop.store(true, Ordering::Relaxed);
        assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
        senders.into_iter().for_each(|sender| sender.join().unwrap());
    }
}
