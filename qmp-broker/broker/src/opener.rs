//! Requests to the opener: which name stands for which path, which daemon is to run, the files of memory dumps.

use std::cell::{Cell, RefCell};
use std::os::fd::{AsFd as _, OwnedFd};
use std::rc::Rc;
use std::time::Duration;

use bulkhead_control_api::encode;
use bulkhead_control_api::opener::{MAX_PATH, ToOpener};
use bulkhead_control_api::plug::Settings;
use bulkhead_jail::link::send_packet;
use nix::errno::Errno;
use nix::sys::socket::MsgFlags;
use tokio::io::unix::AsyncFd;
use tokio::sync::{Mutex, oneshot};
use tokio::time::timeout;

/// How long the opener may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// Why a request was not carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failed {
    /// There is no opener, or it does not answer.
    Away,
    /// The opener says why.
    Refused(Errno),
}

/// What was asked for, if it is a descriptor.
type Answer = Result<Option<OwnedFd>, Errno>;

/// The link to the opener, if there is one.
#[derive(Debug, Default)]
pub struct Opener {
    link: RefCell<Option<Rc<AsyncFd<OwnedFd>>>>,
    /// The name that is asked for, and who waits.
    waiting: RefCell<Option<(String, oneshot::Sender<Answer>)>>,
    /// One request at a time.
    turn: Mutex<()>,
    /// Files there have been.
    outputs: Cell<u64>,
}

impl Opener {
    /// The link that has begun.
    pub fn begin(&self, link: AsyncFd<OwnedFd>) {
        *self.link.borrow_mut() = Some(Rc::new(link));
    }

    /// The link, to receive from.
    #[must_use]
    pub fn link(&self) -> Option<Rc<AsyncFd<OwnedFd>>> {
        self.link.borrow().clone()
    }

    /// The opener is gone.
    pub fn end(&self) {
        *self.link.borrow_mut() = None;
        *self.waiting.borrow_mut() = None;
    }

    /// The opener has answered; an answer that is too late is for nobody.
    pub fn answer(&self, name: &str, answer: Answer) {
        let mut waiting = self.waiting.borrow_mut();
        if waiting.as_ref().is_some_and(|(asked, _)| asked == name)
            && let Some((_, sender)) = waiting.take()
        {
            let _ = sender.send(answer);
        }
    }

    /// From now on pci may ask for a connection by this name.
    ///
    /// # Errors
    /// See [`Failed`].
    pub async fn define(&self, name: &str, path: &str, must_exist: bool) -> Result<(), Failed> {
        let (name, path) = (name.to_owned(), path.to_owned());
        self.ask(&name.clone(), &ToOpener::Define { name, path, must_exist }).await.map(drop)
    }

    /// The name stands for nothing any more.
    ///
    /// # Errors
    /// See [`Failed`].
    pub async fn forget(&self, name: &str) -> Result<(), Failed> {
        self.ask(name, &ToOpener::Forget { name: name.to_owned() }).await.map(drop)
    }

    /// Starts the daemon of something declared, for a device of these settings.
    ///
    /// # Errors
    /// See [`Failed`].
    pub async fn begin_daemon(&self, key: &str, settings: &Settings) -> Result<(), Failed> {
        self.ask(key, &ToOpener::Begin { name: key.to_owned(), settings: settings.clone() }).await.map(drop)
    }

    /// Ends it, if it runs.
    ///
    /// # Errors
    /// See [`Failed`].
    pub async fn end_daemon(&self, key: &str) -> Result<(), Failed> {
        self.ask(key, &ToOpener::End { name: key.to_owned() }).await.map(drop)
    }

    /// A file to write.
    ///
    /// # Errors
    /// See [`Failed`].
    pub async fn output(&self, path: &str) -> Result<OwnedFd, Failed> {
        if path.len() > MAX_PATH {
            return Err(Failed::Refused(Errno::ENAMETOOLONG));
        }
        // Whoever asked before may have gone without the answer: that is not for this one.
        let number = self.outputs.get();
        self.outputs.set(number.wrapping_add(1));
        let name = format!("output.{number}");
        let request = ToOpener::Output { name: name.clone(), path: path.to_owned() };
        self.ask(&name, &request).await?.ok_or(Failed::Away)
    }

    async fn ask(&self, name: &str, request: &ToOpener) -> Result<Option<OwnedFd>, Failed> {
        let _turn = self.turn.lock().await;
        let link = self.link().ok_or(Failed::Away)?;
        let packet = encode(request).map_err(|_| Failed::Refused(Errno::ENAMETOOLONG))?;
        let (sender, receiver) = oneshot::channel();
        *self.waiting.borrow_mut() = Some((name.to_owned(), sender));
        // One short request at a time always has room, unless the opener does not read.
        let sent = send_packet(link.as_fd(), &packet, &[], MsgFlags::MSG_DONTWAIT);
        let answer = match sent {
            Ok(()) => timeout(PATIENCE, receiver).await.ok().and_then(Result::ok),
            Err(_) => None,
        };
        *self.waiting.borrow_mut() = None;
        answer.ok_or(Failed::Away)?.map_err(Failed::Refused)
    }
}
