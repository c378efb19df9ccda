//! One client's input: the reader, the requests that wait, and how far negotiation is. No I/O.

use std::cell::Cell;
use std::collections::VecDeque;
use std::rc::Rc;

use bulkhead_qapi::json::{Item, Reader};
use bulkhead_qapi::request::{self, Mode};

/// Requests that may wait for execution once out-of-band execution is enabled (QEMU's
/// `QMP_REQ_QUEUE_LEN_MAX`); before that it is one at a time.
pub const MAX_QUEUE: usize = 8;
/// Bytes that the requests and unread replies of all clients may hold together. A reply echoes the
/// request's id, which takes up to six times its size there, and the process may hold 512 MiB.
pub const MAX_HELD: usize = 16 << 20;
/// Bytes that a client may hold even when others have used up [`MAX_HELD`].
pub const MIN_HELD: usize = 64 << 10;
/// A parsed value is counted as so many times its text, which small values exceed a little.
const PARSED: usize = 16;

/// Input side of a client.
#[derive(Debug)]
pub struct Session {
    reader: Reader,
    /// Requests that wait, with what each is counted as.
    queue: VecDeque<(Item, usize)>,
    /// What the request that is being executed is counted as.
    executing: usize,
    /// Bytes of output that wait.
    output: usize,
    /// Input bytes since the last request.
    since: usize,
    /// What this session has added to `total`.
    held: usize,
    /// Bytes held by all sessions.
    total: Rc<Cell<usize>>,
    /// A request is being executed.
    busy: bool,
    /// What requests may do.
    pub mode: Mode,
}

impl Session {
    /// A session before negotiation. `total` is shared by all sessions.
    #[must_use]
    pub fn new(total: Rc<Cell<usize>>) -> Self {
        Self {
            reader: Reader::default(),
            queue: VecDeque::new(),
            executing: 0,
            output: 0,
            since: 0,
            held: 0,
            total,
            busy: false,
            mode: Mode::default(),
        }
    }

    /// Whether the client may be read from: QEMU stops reading at one request, or at eight with
    /// out-of-band execution.
    #[must_use]
    pub fn has_room(&self) -> bool {
        if self.mode.oob { self.queue.len() < MAX_QUEUE } else { self.is_idle() }
    }

    /// Whether no request waits or is being executed.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.queue.is_empty() && !self.busy
    }

    /// Reads up to the end of one request, which is queued, or returned if it is to be executed out
    /// of band. Returns the number of bytes used.
    pub fn feed(&mut self, input: &[u8]) -> (usize, Option<Item>) {
        let free = MAX_HELD.saturating_sub(self.total.get());
        self.reader.set_budget((self.reader.held() + free).max(MIN_HELD));
        let (used, item) = self.reader.feed(input);
        self.since += used;
        let mut out_of_band = None;
        if let Some(item) = item {
            let size = std::mem::take(&mut self.since).saturating_mul(PARSED);
            if request::is_out_of_band(&item) {
                out_of_band = Some(item);
            } else {
                self.queue.push_back((item, size));
            }
        }
        self.account();
        (used, out_of_band)
    }

    /// The next request to execute. It counts until [`Self::finish`].
    pub fn pop(&mut self) -> Option<Item> {
        let (item, size) = self.queue.pop_front()?;
        self.executing = size;
        self.busy = true;
        Some(item)
    }

    /// The request that was popped last has been executed.
    pub fn finish(&mut self) {
        self.executing = 0;
        self.busy = false;
        self.account();
    }

    /// So many bytes of output wait.
    pub fn set_output(&mut self, bytes: usize) {
        self.output = bytes;
        self.account();
    }

    fn account(&mut self) {
        let queued: usize = self.queue.iter().map(|(_, size)| size).sum();
        let now = self.reader.held() + queued + self.executing + self.output;
        self.total.set((self.total.get() + now).saturating_sub(self.held));
        self.held = now;
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.total.set(self.total.get().saturating_sub(self.held));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn session(oob: bool) -> Session {
        let mut session = Session::new(Rc::default());
        session.mode = Mode { negotiated: true, oob };
        session
    }

    #[test]
    fn one_request_at_a_time_without_out_of_band() {
        let mut session = session(false);
        let input = b"{}{}";
        assert_eq!(session.feed(input), (2, None));
        assert!(!session.has_room());
        assert!(session.pop().is_some());
        assert!(!session.has_room());
        session.finish();
        assert!(session.has_room());
    }

    #[test]
    fn eight_requests_wait_with_out_of_band() {
        let mut session = session(true);
        for waiting in 0..MAX_QUEUE {
            assert!(session.has_room(), "{waiting}");
            session.feed(b"{}");
        }
        assert!(!session.has_room());
        let (_, item) = session.feed(b"{'exec-oob': 'x'}");
        assert!(item.is_some(), "overtakes");
    }

    #[test]
    fn requests_count_until_they_are_executed_and_replies_until_they_are_read() {
        let total = Rc::new(Cell::new(0));
        let mut session = Session::new(Rc::clone(&total));
        session.feed(b"{'id': 'aaaaaaaa'}");
        let queued = total.get();
        assert!(queued >= 18);
        assert!(session.pop().is_some());
        assert_eq!(total.get(), queued);
        session.set_output(1000);
        session.finish();
        assert_eq!(total.get(), 1000);
        session.set_output(0);
        assert_eq!(total.get(), 0);
    }

    #[test]
    fn memory_is_shared_and_given_back() {
        let total = Rc::new(Cell::new(0));
        let mut hog = Session::new(Rc::clone(&total));
        hog.feed(b"[\"aaaa");
        assert!(total.get() >= 6);
        total.set(MAX_HELD);
        let mut late = Session::new(Rc::clone(&total));
        late.feed(b"[\"");
        assert_eq!(late.feed(&vec![b'x'; MIN_HELD / 2]), (MIN_HELD / 2, None));
        late.feed(&vec![b'x'; MIN_HELD]);
        assert_eq!(late.pop(), Some(Item::Error("JSON token size limit exceeded".to_owned())));
        drop(late);
        drop(hog);
        assert!(total.get() <= MAX_HELD);
    }
}
