//! The control thread: the life of a daemon.

use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::ExitCode;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bulkhead_control_api::config::IoThread;
use bulkhead_jail::start::{Start, StartError};
use bulkhead_jail::starter::Starter;
use bulkhead_jail::topology::Process;
use bulkhead_jail::{error, warn};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::socket::{MsgFlags, recv, setsockopt, sockopt};
use nix::sys::time::{TimeVal, TimeValLike as _};
use serde::de::DeserializeOwned;
use vhost::vhost_user::{BackendReqHandler, Error as VhostError};

use crate::device::{Device, Listeners, MAX_QUEUES, Notices};
use crate::inflight::Fresh;
use crate::ring::MAX_QUEUE_SIZE;
use crate::side::Side;
use crate::vhost::{BackEnd, Fixed};
use crate::worker::{self, Command, Handle};

/// How long the rest of a message may take.
const PATIENCE: Duration = Duration::from_secs(5);
/// Length of a vhost-user message's header.
const HEADER: usize = 12;

/// Why a daemon fails.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The start.
    #[error("{0}")]
    Start(#[from] StartError),
    /// The host has no thread or descriptor left.
    #[error("{0}: {1}")]
    Host(&'static str, Errno),
}

const fn host(what: &'static str) -> impl Fn(Errno) -> ServeError {
    move |errno| ServeError::Host(what, errno)
}

/// Why a daemon's device cannot be made; a line for the log.
pub type Failure = Box<dyn std::error::Error>;

/// A daemon's process from its start to its end: `make` makes the device of the configuration, with what else the
/// process was given, and names the thread of its queues.
pub fn main<C: DeserializeOwned>(
    process: &'static Process,
    make: impl FnOnce(&mut Start, &C, &Notices) -> Result<(Box<dyn Device>, IoThread), Failure>,
) -> ExitCode {
    let run = || -> Result<(), Failure> {
        let mut start = Start::begin(process)?;
        let config = start.config()?;
        let listeners = Listeners { vhost: start.take("vhost")?, side: start.take("side")? };
        let notices = Notices::new().map_err(host("eventfd"))?;
        let (device, iothread) = make(&mut start, &config, &notices)?;
        Ok(Daemon::new(device, &iothread, notices, listeners)?.run(start)?)
    };
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            error!("{failure}");
            ExitCode::FAILURE
        }
    }
}

/// A daemon that is about to be one.
#[derive(Debug)]
pub struct Daemon {
    fixed: Fixed,
    worker: Handle,
    listener: UnixListener,
    around: Around,
}

/// What there is beside the front end.
#[derive(Debug)]
struct Around {
    signals: SignalFd,
    side: Side,
    notices: Notices,
}

/// What the wait was for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ready {
    /// The front end, or its listener, has something.
    Vhost,
    /// The daemon is to end.
    End,
}

impl Daemon {
    /// Makes the threads and all that is made before the jail is entered.
    ///
    /// # Errors
    /// [`ServeError::Host`].
    pub fn new(
        device: Box<dyn Device>,
        iothread: &IoThread,
        notices: Notices,
        listeners: Listeners,
    ) -> Result<Self, ServeError> {
        let mut mask = SigSet::empty();
        mask.add(Signal::SIGTERM);
        // Before the queue thread begins, which inherits it.
        mask.thread_block().map_err(host("signal mask"))?;
        let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK);
        let signals = signals.map_err(host("signalfd"))?;
        let queues = device.queues().min(MAX_QUEUES);
        let fresh = device.tracks().then(|| Fresh::new(queues, MAX_QUEUE_SIZE)).transpose();
        let fixed = Fixed {
            features: device.features(),
            queues,
            config_len: device.config().len(),
            fresh: fresh.map_err(host("in-flight memfd"))?,
        };
        let errno = |error: std::io::Error| Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO));
        let pieces = device.pieces();
        let worker = worker::spawn(device, iothread, notices.clone());
        let worker = worker.map_err(errno).map_err(host("queue thread"))?;
        let side = Side::new(listeners.side, Arc::clone(&worker.named), pieces);
        Ok(Self {
            fixed,
            worker,
            listener: UnixListener::from(listeners.vhost),
            around: Around { signals, side, notices },
        })
    }

    /// Enters the jail and serves front ends, one after the other, until the starter wants an end.
    ///
    /// # Errors
    /// The jail is incomplete; the host failed.
    pub fn run(mut self, start: Start) -> Result<(), ServeError> {
        let starter = start.enter()?;
        self.serve(&starter)
    }

    /// Serves without a jail.
    ///
    /// # Errors
    /// The host failed.
    pub fn serve(&mut self, starter: &Starter) -> Result<(), ServeError> {
        while self.around.wait(starter, &self.worker, self.listener.as_fd())? == Ready::Vhost {
            match self.listener.accept() {
                Ok((stream, _)) => {
                    if self.session(starter, stream)? == Ready::End {
                        return Ok(());
                    }
                }
                // The starter has taken the connection back.
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                // Waiting would find the listener readable at once, for ever; the next process comes at a pace.
                Err(error) => {
                    let errno = error.raw_os_error().map_or(Errno::UnknownErrno, Errno::from_raw);
                    return Err(host("accept")(errno));
                }
            }
        }
        Ok(())
    }

    /// Serves one front end until it goes, or the daemon is to end.
    fn session(&mut self, starter: &Starter, stream: UnixStream) -> Result<Ready, ServeError> {
        setsockopt(&stream, sockopt::ReceiveTimeout, &TimeVal::seconds(PATIENCE.as_secs().cast_signed()))
            .map_err(host("setsockopt"))?;
        let watched = stream.as_fd().try_clone_to_owned().map_err(|_| host("dup")(Errno::EMFILE))?;
        self.around.notices.forget();
        #[expect(
            clippy::arc_with_non_send_sync,
            reason = "the vhost crate wants it; it stays on this thread"
        )]
        let back_end = Arc::new(Mutex::new(BackEnd::new(&self.fixed, &self.worker)));
        let mut handler = BackendReqHandler::from_stream(stream, Arc::clone(&back_end));
        let ready = loop {
            let ready = self.around.wait(starter, &self.worker, watched.as_fd())?;
            if ready == Ready::End {
                break ready;
            }
            if !begins(watched.as_fd()) {
                warn!("vhost-user: a message that does not go on; the connection is closed");
                break ready;
            }
            match handler.handle_request() {
                Ok(()) => {}
                Err(VhostError::Disconnected) => break ready,
                Err(error) => {
                    warn!("vhost-user: {error}; the connection is closed");
                    break ready;
                }
            }
        };
        if let Ok(mut back_end) = back_end.lock() {
            back_end.end();
        }
        Ok(ready)
    }
}

/// Whether a whole header is there, or the end: the vhost crate would wait for the rest of one for ever.
fn begins(socket: BorrowedFd<'_>) -> bool {
    let mut header = [0; HEADER];
    let end = Instant::now() + PATIENCE;
    loop {
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        match recv(socket.as_raw_fd(), &mut header, flags) {
            Ok(len) if (1..HEADER).contains(&len) && Instant::now() < end => {}
            Ok(len) => return len == 0 || len == HEADER,
            // What is wrong with the socket shows itself again.
            Err(_) => return true,
        }
        // A short sleep.
        let _ = poll(&mut [], 10u8);
    }
}

impl Around {
    /// Waits for the front end; meanwhile serves everything else.
    fn wait(
        &mut self,
        starter: &Starter,
        worker: &Handle,
        vhost: BorrowedFd<'_>,
    ) -> Result<Ready, ServeError> {
        loop {
            let socket = starter.socket();
            let mut fds = vec![
                PollFd::new(vhost, PollFlags::POLLIN),
                PollFd::new(self.signals.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.notices.as_fd(), PollFlags::POLLIN),
            ];
            // Its door is never shut.
            fds.extend(self.side.poll_fd().map(|fd| PollFd::new(fd, PollFlags::POLLIN)));
            // Nothing is read from the starter; its end shows itself.
            fds.extend(socket.map(|fd| PollFd::new(fd, PollFlags::empty())));
            // Half of what the starter allows (`WatchdogSec=`).
            let alive = starter.watchdog.map(|time| time / 2);
            let timeout = alive
                .map_or(PollTimeout::NONE, |time| PollTimeout::try_from(time).unwrap_or(PollTimeout::MAX));
            match poll(&mut fds, timeout) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(host("poll")(errno)),
            }
            let came: Vec<bool> = fds.iter().map(|fd| fd.any().unwrap_or(false)).collect();
            let came = |index: usize| came.get(index).copied().unwrap_or(false);
            if alive.is_some() {
                let _ = starter.alive();
            }
            if came(1) || came(4) {
                return Ok(Ready::End);
            }
            if came(3) {
                self.side.advance(&self.notices, |what| drop(worker.ask(Command::Told(what))));
            }
            if came(2) {
                self.side.speak(&self.notices);
            }
            if came(0) {
                return Ok(Ready::Vhost);
            }
        }
    }
}
