//! Plays a front end and its back end after a script of bytes, and checks what must hold whatever the script.
#![allow(dead_code, reason = "each test binary uses a part of it")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

use std::collections::VecDeque;
use std::rc::Rc;
use std::time::{Duration, Instant};

use bulkhead_pci::frontend::wire::{CONFIG_CHANGE, SHMEM_MAP, SHMEM_UNMAP, protocol};
use bulkhead_pci::frontend::{Event, Frontend, MAX_REASON};

use super::peer::{Peer, memory, piece, send, shmem_request, spec};
use super::{Ram, VERSION_1, eventfd};

/// What a call of `advance` may report at most: it works off a bounded number of steps.
const EVENTS: usize = 64 * 257;
const SHMEM: u64 = protocol::SHMEM | protocol::BACKEND_SEND_FD;
/// Turns that a script has.
const TURNS: usize = 200;

struct Script<'a>(&'a [u8]);

impl<'a> Script<'a> {
    fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    fn bytes(&mut self, len: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        taken
    }
}

struct Play {
    front: Frontend,
    peer: Peer,
    ram: Ram,
    /// Events that are due, in order.
    due: VecDeque<Due>,
    lost: usize,
    done: usize,
}

#[derive(Debug, PartialEq, Eq)]
enum Due {
    Ready,
    Started(Option<u16>),
    Stopped(Option<u16>),
    Memory,
}

/// Returns how many connections were lost, and how many calls came to their end.
pub fn drive(input: &[u8]) -> (usize, usize) {
    let mut script = Script(input);
    let mut front = Frontend::new(spec());
    let peer = Peer::with(&mut front, u64::from(script.byte()) | SHMEM);
    let mut play = Play { front, peer, ram: Ram::new(), due: [Due::Ready].into(), lost: 0, done: 0 };
    for _ in 0..TURNS {
        if script.0.is_empty() {
            break;
        }
        let events = match script.byte() % 16 {
            kind @ 0..6 => play.answer(kind, &mut script),
            6 => play.raw(&mut script),
            7 => play.request(&mut script),
            kind => play.call(kind, &mut script),
        };
        play.check(events);
    }
    (play.lost, play.done)
}

impl Play {
    /// The back end answers, rightly or not quite.
    fn answer(&mut self, kind: u8, script: &mut Script<'_>) -> Vec<Event> {
        let turns = if kind == 0 { 64 } else { 1 };
        let mut events = self.front.advance();
        for _ in 0..turns {
            let Some((_, answer)) = self.peer.turn() else { break };
            let Some(mut answer) = answer else { continue };
            if kind == 1 {
                let at = usize::from(script.byte()) % answer.bytes.len();
                if let Some(byte) = answer.bytes.get_mut(at) {
                    *byte ^= script.byte();
                }
            } else if kind == 2 {
                answer.bytes.truncate(script.byte().into());
            } else if kind == 3 {
                answer.bytes.extend(script.bytes(16));
            }
            let fds = if kind == 4 { &[] } else { &answer.fds[..] };
            // It may be closed by now.
            let _gone = send(&self.peer.stream, &answer.bytes, fds);
            if kind == 5 {
                let _gone = send(&self.peer.stream, &answer.bytes, &[memory(16)]);
            }
            events.extend(self.front.advance());
        }
        events
    }

    /// The back end sends bytes out of the blue.
    fn raw(&mut self, script: &mut Script<'_>) -> Vec<Event> {
        let len = script.byte();
        let fds: Vec<_> = (0..script.byte() % 3).map(|n| memory(n.into())).collect();
        let _gone = send(&self.peer.stream, script.bytes(len.into()), &fds);
        self.front.advance()
    }

    /// The back end has requests of its own.
    fn request(&mut self, script: &mut Script<'_>) -> Vec<Event> {
        if let Some(channel) = &self.peer.channel {
            let right = [CONFIG_CHANGE, 1, 0].map(u32::to_ne_bytes).concat();
            let len = script.byte();
            let mut number = || u64::from(script.byte()) << 8;
            let piece = piece(0, number(), number(), number(), number() >> 8 & 1);
            let (map, unmap) = (shmem_request(SHMEM_MAP, &piece), shmem_request(SHMEM_UNMAP, &piece));
            let _gone = match len {
                0..64 => send(channel, &right, &[]),
                64..96 => send(channel, &map, &[memory(4096)]),
                96..104 => send(channel, &map, &[]),
                104..128 => send(channel, &unmap, &[]),
                _ => send(channel, script.bytes(len.into()), &[]),
            };
        }
        self.front.advance()
    }

    /// The device wants something.
    fn call(&mut self, kind: u8, script: &mut Script<'_>) -> Vec<Event> {
        let front = &mut self.front;
        let number = u16::from(script.byte() % 3);
        let connected = front.is_connected();
        let mut due = None;
        match kind {
            8 => {
                let rings = (0..number).map(|index| self.ram.ring(index, index)).collect();
                let started = front.start(VERSION_1, &self.ram.memory, rings);
                due = started.is_ok().then_some(Due::Started(None));
            }
            9 => {
                front.stop();
                due = Some(Due::Stopped(None));
            }
            10 => {
                front.stop_ring(number);
                due = Some(Due::Stopped(Some(number)));
            }
            11 => {
                let started = front.start_ring(&Rc::clone(&self.ram.memory), self.ram.ring(number, 0));
                due = started.is_ok().then_some(Due::Started(Some(number)));
            }
            12 => {
                front.set_memory(&self.ram.memory);
                due = Some(Due::Memory);
            }
            13 => {
                front.write_config(number.into(), script.bytes(4));
                front.set_call(number, &eventfd());
                front.read_config();
            }
            14 => front.reset(),
            _ if number == 0 => {
                let events = front.expire_at(Instant::now() + Duration::from_secs(60));
                let late = front.is_connected() || events.last().is_some_and(is_lost) || !connected;
                assert!(late, "{events:?}");
                return events;
            }
            _ => {
                let features = u64::from(script.byte()) << 8 | u64::from(script.byte()) | SHMEM;
                self.peer = Peer::with(front, features | protocol::CONFIG);
                self.due = [Due::Ready].into();
            }
        }
        match due {
            // Over at once.
            Some(due @ (Due::Stopped(_) | Due::Memory))
                if self.due.front() == Some(&Due::Ready) || !connected =>
            {
                self.due.push_front(due);
            }
            due => self.due.extend(due),
        }
        self.front.advance()
    }

    fn check(&mut self, events: Vec<Event>) {
        assert!(events.len() <= EVENTS);
        let count = events.iter().filter(|event| **event != Event::Ended).count();
        for (i, event) in events.into_iter().enumerate() {
            let done = match event {
                Event::Lost(why) => {
                    assert!(i + 1 == count && !self.front.is_connected(), "{why}");
                    assert!(!why.is_empty() && why.len() <= MAX_REASON && !why.contains('\n'), "{why}");
                    assert_eq!(self.front.deadline(), None);
                    self.due.clear();
                    self.lost += 1;
                    continue;
                }
                // Rings had been started, on a connection that this side has ended.
                Event::Ended => continue,
                Event::Config { config, .. } => {
                    assert_eq!(config.len(), usize::from(spec().config_len));
                    continue;
                }
                Event::Ready { config, queues, .. } => {
                    assert!(config.is_empty() || config.len() == usize::from(spec().config_len));
                    assert_ne!(queues, 0);
                    Due::Ready
                }
                Event::Started { ring } => Due::Started(ring),
                Event::Stopped { ring, bases } => {
                    assert!(bases.len() <= 2 && bases.iter().all(|(index, _)| *index < 2));
                    Due::Stopped(ring)
                }
                Event::Memory => Due::Memory,
                Event::Asked => {
                    let asks = self.front.asked().is_some();
                    assert!(asks || i + 2 == count, "nothing is asked");
                    self.front.answer(count.is_multiple_of(2));
                    assert!(self.front.asked().is_none());
                    continue;
                }
            };
            assert_eq!(self.due.pop_front(), Some(done));
            self.done += 1;
        }
    }
}

fn is_lost(event: &Event) -> bool {
    matches!(event, Event::Lost(_))
}
