//! Feeds bytes to a session without sockets, and the mutator that makes such bytes.

use std::cell::Cell;
use std::rc::Rc;

use bulkhead_broker::commands::{self, Known, Step};
use bulkhead_broker::descriptors::Descriptors;
use bulkhead_broker::hmp::{self, Line};
use bulkhead_broker::hub::reply_line;
use bulkhead_broker::session::Session;
use bulkhead_control_api::{config, core};
use bulkhead_qapi::json::{Item, Reader};
use bulkhead_qapi::request;
use bulkhead_qapi::table::Role;
use serde_json::{Value, json};

use crate::cases;

/// What a session must hold to. Returns the number of replies.
///
/// # Panics
/// An invariant is broken.
pub fn drive(input: &[u8]) -> usize {
    let config = config::Broker::default();
    let total = Rc::new(Cell::new(0));
    let mut session = Session::new(Rc::clone(&total));
    let mut replies = 0;
    let mut rest = input;
    while !rest.is_empty() {
        let (used, out_of_band) = session.feed(rest);
        assert!(used > 0 || out_of_band.is_some() || !session.has_room(), "no progress");
        rest = rest.get(used..).unwrap_or_default();
        assert!(total.get() <= 32 * input.len() + 64, "{} bytes held for {}", total.get(), input.len());
        if let Some(item) = out_of_band {
            answer(&mut session, &config, item);
            replies += 1;
        }
        while let Some(item) = session.pop() {
            answer(&mut session, &config, item);
            replies += 1;
        }
    }
    // A byte that no value may hold ends what is unfinished; the session goes on.
    session.feed(b"\n");
    session.pop();
    session.feed(b"\xff");
    assert!(matches!(session.pop(), Some(Item::Error(_))), "0xFF is an error");
    drop(session);
    assert_eq!(total.get(), 0, "memory is given back");
    replies
}

fn answer(session: &mut Session, config: &config::Broker, item: Item) {
    let (id, call) = request::resolve(item, session.mode, Role::Operator, false);
    let reply = match call {
        Err(refusal) => Err(refusal.into()),
        Ok(call) => {
            let known =
                Known { config, state: core::RunState::Running, preconfig: false, role: Role::Operator };
            match commands::begin(call, &known, &mut session.mode) {
                Step::Reply(reply) => reply,
                Step::Descriptors(op) => Descriptors::default().execute(op, "", || None),
                Step::Human(args) => match hmp::parse(&args.command_line) {
                    Line::Text(text) => Ok(text.into()),
                    Line::Call { .. } => Ok(json!("")),
                },
                Step::Core(_)
                | Step::PowerButton
                | Step::Chardevs
                | Step::AddClient(_)
                | Step::Devices(_)
                | Step::ExitPreconfig
                | Step::Memsave(_)
                | Step::Pmemsave(_)
                | Step::Quit => Ok(json!({})),
            }
        }
    };
    let line = reply_line(id.as_ref(), &reply);
    assert!(line.is_ascii(), "not ASCII: {line}");
    let nesting = line.bytes().filter(|byte| matches!(byte, b'[' | b'{')).count();
    // serde_json reads at most 128 levels.
    assert!(nesting > 120 || serde_json::from_str::<Value>(&line).is_ok(), "not JSON: {line}");
    // Our own reader reads what we write.
    let (_, item) = Reader::default().feed(line.as_bytes());
    assert!(matches!(item, Some(Item::Value(_))) || nesting > 1023, "not readable: {line}");
}

/// Makes inputs from the cases of the table: always the same for the same seed.
#[derive(Debug)]
pub struct Mutator {
    state: u64,
    corpus: Vec<Vec<u8>>,
}

/// Pieces that are worth inserting anywhere.
const PIECES: [&[u8]; 16] = [
    b"{",
    b"}",
    b"[",
    b"]",
    b":",
    b",",
    b"\"",
    b"'",
    b"\\u",
    b"\\",
    b"\xff",
    b"\x00",
    b"1e999",
    b"exec-oob",
    b"{\"execute\":\"qmp_capabilities\"}",
    b"\xf0\x9f\x98\x80",
];

impl Mutator {
    /// A mutator over all cases of at most 512 bytes.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        let mut corpus: Vec<Vec<u8>> = cases::all().iter().map(|case| case.send.concat()).collect();
        corpus.retain(|input| input.len() <= 512);
        Self { state: seed | 1, corpus }
    }

    /// xorshift64*: small, and good enough to choose with.
    fn random(&mut self, below: usize) -> usize {
        self.state ^= self.state >> 12;
        self.state ^= self.state << 25;
        self.state ^= self.state >> 27;
        let high = self.state.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 32;
        usize::try_from(high).unwrap_or(0) % below.max(1)
    }

    fn sample(&mut self) -> Vec<u8> {
        let index = self.random(self.corpus.len());
        self.corpus.get(index).cloned().unwrap_or_default()
    }

    /// The next input.
    pub fn next_input(&mut self) -> Vec<u8> {
        let mut input = self.sample();
        if self.random(4) == 0 {
            input.extend(self.sample());
        }
        for _ in 0..=self.random(4) {
            let at = self.random(input.len() + 1);
            match self.random(5) {
                0 => input.truncate(at),
                1 => {
                    let bit = 1 << self.random(8);
                    if let Some(byte) = input.get_mut(at) {
                        *byte ^= bit;
                    }
                }
                2 => {
                    let piece = self.random(PIECES.len());
                    input.splice(at..at, PIECES.get(piece).copied().unwrap_or_default().iter().copied());
                }
                3 => {
                    let end = at + self.random(8).min(input.len() - at);
                    input.drain(at..end);
                }
                _ => {
                    let end = at + self.random(16).min(input.len() - at);
                    let copy = input.get(at..end).unwrap_or_default().to_vec();
                    input.splice(at..at, copy);
                }
            }
        }
        input
    }
}
