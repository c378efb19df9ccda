//! One client: reads requests, executes them, writes replies and events.

use std::cell::{Cell, RefCell};
use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Duration;

use bulkhead_jail::warn;
use bulkhead_qapi::json::Item;
use bulkhead_qapi::request::Mode;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep, timeout};

use crate::hub::{Hub, greeting_line};
use crate::monitor::Monitor;
use crate::output::Output;
use crate::passed::Passed;
use crate::policy::Credentials;
use crate::session::Session;
use crate::stream::Stream;

/// Bytes read at once.
const CHUNK: usize = 4096;
/// How long a client may take to read what waits for it when its connection or the VM ends.
pub const FLUSH: Duration = Duration::from_secs(1);

/// How often a client that has a long request is looked at.
const GLANCE: Duration = Duration::from_millis(100);

/// One connected client.
#[derive(Debug)]
pub struct Client {
    /// Where it connected.
    pub monitor: Rc<Monitor>,
    /// Who it was when it connected.
    pub peer: Option<Credentials>,
    stream: Stream,
    session: RefCell<Session>,
    /// The descriptor that waits for a command to take it.
    passed: RefCell<Option<OwnedFd>>,
    output: RefCell<Output>,
    since: Instant,
    /// Requests wait, or no more will come.
    work: Notify,
    /// The session or the output may have room again.
    room: Notify,
    /// Output waits.
    written: Notify,
    /// The client is to be dropped.
    dropped: Notify,
    is_dropped: Cell<bool>,
    /// The client sends no more.
    finished: Cell<bool>,
}

impl Client {
    /// A client that has just connected.
    #[must_use]
    pub fn new(monitor: Rc<Monitor>, stream: Stream, held: Rc<Cell<usize>>) -> Self {
        Self {
            monitor,
            peer: stream.credentials(),
            stream,
            session: RefCell::new(Session::new(held)),
            passed: RefCell::default(),
            output: RefCell::default(),
            since: Instant::now(),
            work: Notify::new(),
            room: Notify::new(),
            written: Notify::new(),
            dropped: Notify::new(),
            is_dropped: Cell::new(false),
            finished: Cell::new(false),
        }
    }

    /// What its requests may do.
    #[must_use]
    pub fn mode(&self) -> Mode {
        self.session.borrow().mode
    }

    /// Changes what its requests may do.
    pub fn set_mode(&self, mode: Mode) {
        self.session.borrow_mut().mode = mode;
    }

    /// Whether negotiation is complete.
    #[must_use]
    pub fn is_negotiated(&self) -> bool {
        self.mode().negotiated
    }

    /// How long it has been connected.
    #[must_use]
    pub fn age(&self) -> Duration {
        self.since.elapsed()
    }

    /// Takes the descriptor that it passed last, if none has taken that yet.
    #[must_use]
    pub fn take_passed(&self) -> Option<OwnedFd> {
        self.passed.take()
    }

    /// Keeps what came with input. Whatever waited before is closed.
    fn keep(&self, passed: Passed) {
        match passed {
            Passed::Nothing => {}
            Passed::First(fd) => drop(self.passed.replace(Some(fd))),
            Passed::Cut => {
                warn!("descriptors that a QMP client passed are closed: there is no room for them");
                self.passed.replace(None);
            }
        }
    }

    /// Whether everything queued has been sent.
    #[must_use]
    pub fn is_flushed(&self) -> bool {
        self.is_dropped.get() || self.output.borrow().pending().is_empty()
    }

    /// Whether the connection is about to end.
    #[must_use]
    pub fn is_dropped(&self) -> bool {
        self.is_dropped.get()
    }

    /// Ends the connection.
    pub fn drop_it(&self) {
        self.is_dropped.set(true);
        self.dropped.notify_one();
    }

    /// Queues a line and sends what can be sent at once.
    pub fn push(&self, line: &str) {
        self.output.borrow_mut().push(line);
        self.send();
    }

    /// Queues an event; a client that has too much waiting is dropped.
    pub fn push_event(&self, line: &str) {
        if !self.is_negotiated() || self.is_dropped.get() {
            return;
        }
        if self.output.borrow_mut().push_event(line) {
            self.send();
        } else {
            warn!("a QMP client that reads nothing is disconnected: 1 MiB waits for it");
            self.drop_it();
        }
    }

    fn send(&self) {
        // An error shows again, and is handled, in the write loop.
        if !matches!(self.try_send(), Ok(true)) {
            self.written.notify_one();
        }
    }

    /// Sends what can be sent; true when nothing is left.
    fn try_send(&self) -> io::Result<bool> {
        let sent = self.send_pending();
        self.session.borrow_mut().set_output(self.output.borrow().pending().len());
        sent
    }

    fn send_pending(&self) -> io::Result<bool> {
        let mut output = self.output.borrow_mut();
        loop {
            let pending = output.pending();
            if pending.is_empty() {
                return Ok(true);
            }
            match self.stream.try_write(pending) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(sent) => output.consume(sent),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Sends what waits, as the client reads, until an error.
    async fn write_loop(&self) {
        loop {
            self.written.notified().await;
            loop {
                match self.try_send() {
                    Ok(true) => break,
                    Ok(false) => {}
                    Err(_) => return,
                }
                self.room.notify_one();
                if self.stream.writable().await.is_err() {
                    return;
                }
            }
            self.room.notify_one();
        }
    }

    fn has_room(&self) -> bool {
        self.session.borrow().has_room() && self.output.borrow().has_room()
    }

    /// Reads requests until the client sends no more.
    async fn read_loop(&self, hub: &Rc<Hub>) {
        let mut chunk = [0; CHUNK];
        loop {
            self.wait_for_room().await;
            if self.stream.readable().await.is_err() {
                break;
            }
            let (count, passed) = match self.stream.try_read(&mut chunk) {
                Ok((0, _)) => break,
                Ok(received) => received,
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
                    continue;
                }
                Err(_) => break,
            };
            let input = chunk.get(..count).unwrap_or_default();
            if let (Some((last, before)), false) = (input.split_last(), matches!(passed, Passed::Nothing)) {
                self.feed(hub, before).await;
                // What was asked before has no claim to these, but perhaps to those that they replace.
                while !self.session.borrow().is_idle() {
                    self.room.notified().await;
                }
                self.keep(passed);
                self.feed(hub, std::slice::from_ref(last)).await;
            } else {
                self.feed(hub, input).await;
            }
        }
        self.finished.set(true);
        self.work.notify_one();
    }

    async fn feed(&self, hub: &Rc<Hub>, mut input: &[u8]) {
        while !input.is_empty() {
            self.wait_for_room().await;
            let (used, out_of_band) = self.session.borrow_mut().feed(input);
            input = input.get(used..).unwrap_or_default();
            match out_of_band {
                Some(item) => hub.execute(self, item).await,
                None => self.work.notify_one(),
            }
        }
    }

    async fn wait_for_room(&self) {
        while !self.has_room() {
            self.room.notified().await;
        }
    }

    fn next_request(&self) -> Option<Item> {
        self.session.borrow_mut().pop()
    }

    /// Executes requests in order until no more can come.
    async fn work_loop(&self, hub: &Rc<Hub>) {
        loop {
            while let Some(item) = self.next_request() {
                hub.execute(self, item).await;
                self.session.borrow_mut().finish();
                self.room.notify_one();
            }
            if self.finished.get() {
                return;
            }
            self.work.notified().await;
        }
    }

    /// Waits for the client's end, which nobody sees while its request is carried out. One that only sends no more may
    /// wait for its answer.
    pub async fn gone(&self) {
        while !self.stream.is_gone() {
            sleep(GLANCE).await;
        }
    }

    /// Waits until everything queued has been sent.
    async fn flushed(&self) {
        while !self.is_flushed() {
            self.room.notified().await;
        }
    }
}

/// Serves a client until it is gone. Its task holds nothing when this returns.
pub async fn serve(hub: Rc<Hub>, monitor: Rc<Monitor>, stream: Stream) {
    let client = Rc::new(Client::new(monitor, stream, Rc::clone(&hub.held)));
    let number = hub.add(Rc::clone(&client));
    client.push(&greeting_line());
    let requests = async {
        tokio::join!(client.read_loop(&hub), client.work_loop(&hub));
        // What it asked for before it stopped sending is answered, if it reads.
        let _ = timeout(FLUSH, client.flushed()).await;
    };
    tokio::select! {
        () = requests => {}
        () = client.write_loop() => {}
        () = client.dropped.notified() => {}
    }
    hub.remove(number).await;
}
