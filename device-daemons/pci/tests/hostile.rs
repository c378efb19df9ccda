//! Back ends that break the protocol in every way at every step: the connection ends with a reason, never the process.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test that cannot go on fails"
)]

mod common;

use std::fs;
use std::os::fd::OwnedFd;
use std::time::Duration;

use bulkhead_pci::frontend::wire::{HEADER, Request, protocol};
use bulkhead_pci::frontend::{Event, Frontend, MAX_REASON};
use common::peer::{Answer, Peer, memory, send, spec};
use common::{Ram, VERSION_1, eventfd};

/// What is made of a right answer; false if the misdeed does not apply to it.
type Misdeed = fn(&mut Answer, &mut Option<OwnedFd>) -> bool;

fn word(answer: &mut Answer, at: usize, value: u32) -> bool {
    answer.bytes[at..at + 4].copy_from_slice(&value.to_ne_bytes());
    true
}

fn flags(answer: &mut Answer, value: u32) -> bool {
    word(answer, 4, value)
}

fn payload(answer: &mut Answer, change: impl Fn(&mut Vec<u8>)) -> bool {
    let mut payload = answer.bytes.split_off(HEADER);
    change(&mut payload);
    answer.payload(&payload);
    true
}

fn of(answer: &Answer, request: Request) -> bool {
    answer.request() == request as u32
}

fn inflight(answer: &mut Answer, fds: Vec<OwnedFd>) -> bool {
    if of(answer, Request::GET_INFLIGHT_FD) {
        answer.fds = fds;
        return true;
    }
    false
}

fn inflight_place(answer: &mut Answer, size: u64, offset: u64) -> bool {
    let place = [size, offset].map(u64::to_ne_bytes).concat();
    of(answer, Request::GET_INFLIGHT_FD) && payload(answer, |payload| payload[..16].copy_from_slice(&place))
}

fn ring_state(answer: &mut Answer, at: usize, value: u32) -> bool {
    of(answer, Request::GET_VRING_BASE) && word(answer, HEADER + at, value)
}

fn owned(fd: std::rc::Rc<OwnedFd>) -> OwnedFd {
    std::rc::Rc::into_inner(fd).unwrap()
}

const MISDEEDS: &[(&str, Misdeed)] = &[
    ("closes", |answer, stream| {
        answer.bytes.clear();
        stream.take().is_some()
    }),
    ("closes within a header", |answer, stream| {
        answer.bytes.truncate(5);
        send(&stream.take().unwrap(), &answer.bytes, &[]).unwrap();
        answer.bytes.clear();
        true
    }),
    ("closes within a payload", |answer, stream| {
        send(&stream.take().unwrap(), &answer.bytes[..HEADER + 1], &[]).unwrap();
        answer.bytes.clear();
        true
    }),
    ("version 0", |answer, _| flags(answer, 4)),
    ("version 2", |answer, _| flags(answer, 6)),
    ("reserved flags", |answer, _| flags(answer, 0x8000_0005)),
    ("no reply", |answer, _| flags(answer, 1)),
    ("another request", |answer, _| {
        let request = answer.request() + 1;
        word(answer, 0, request)
    }),
    ("request 0", |answer, _| word(answer, 0, 0)),
    ("a byte less", |answer, _| payload(answer, |payload| payload.truncate(payload.len() - 1))),
    ("a byte more", |answer, _| payload(answer, |payload| payload.push(0))),
    ("8 bytes more", |answer, _| payload(answer, |payload| payload.extend([0; 8]))),
    ("no payload", |answer, _| payload(answer, Vec::clear)),
    ("longest payload", |answer, _| payload(answer, |payload| payload.resize(12 + 256, 0))),
    ("too long a payload", |answer, _| payload(answer, |payload| payload.resize(12 + 257, 0))),
    ("endless", |answer, _| word(answer, 8, u32::MAX)),
    ("a descriptor more", |answer, _| {
        answer.fds.push(memory(4096));
        true
    }),
    ("many descriptors", |answer, _| {
        answer.fds.extend((0..200).map(|_| owned(eventfd())));
        true
    }),
    ("a descriptor with the payload", |answer, stream| {
        send(stream.as_ref().unwrap(), &answer.bytes[..HEADER], &[]).unwrap();
        answer.bytes.drain(..HEADER);
        answer.fds.push(memory(4096));
        answer.request() != Request::GET_INFLIGHT_FD as u32
    }),
    ("twice", |answer, _| {
        answer.bytes.extend(answer.bytes.clone());
        true
    }),
    ("noise", |answer, _| {
        answer.bytes = (0..100_000u32).map(|n| n.wrapping_mul(2_654_435_761).to_be_bytes()[0]).collect();
        true
    }),
    ("refuses", |answer, _| {
        let own = [
            Request::GET_FEATURES,
            Request::GET_PROTOCOL_FEATURES,
            Request::GET_QUEUE_NUM,
            Request::GET_MAX_MEM_SLOTS,
        ];
        let ack = answer.bytes.len() == HEADER + 8 && !own.iter().any(|request| of(answer, *request));
        ack && !of(answer, Request::GET_VRING_BASE) && word(answer, HEADER, 1)
    }),
    ("no queues", |answer, _| of(answer, Request::GET_QUEUE_NUM) && word(answer, HEADER, 0)),
    ("no room for memory", |answer, _| of(answer, Request::GET_MAX_MEM_SLOTS) && word(answer, HEADER, 0)),
    ("another ring", |answer, _| ring_state(answer, 0, 1)),
    ("a ring far away", |answer, _| ring_state(answer, 0, u32::MAX)),
    ("an index of 17 bits", |answer, _| ring_state(answer, 4, 0x1_0000)),
    ("configuration from elsewhere", |answer, _| of(answer, Request::GET_CONFIG) && word(answer, HEADER, 4)),
    ("configuration of another length", |answer, _| {
        of(answer, Request::GET_CONFIG) && word(answer, HEADER + 4, 15)
    }),
    ("no memory for what is in flight", |answer, _| inflight(answer, vec![])),
    ("an eventfd for what is in flight", |answer, _| inflight(answer, vec![owned(eventfd())])),
    ("a directory for what is in flight", |answer, _| {
        inflight(answer, vec![fs::File::open("/").unwrap().into()])
    }),
    ("a file for what is in flight", |answer, _| {
        // Of enough length, and on a file system: what a look at it asks of whom is not known.
        inflight(answer, vec![fs::File::open(std::env::current_exe().unwrap()).unwrap().into()])
    }),
    ("memory and a file for what is in flight", |answer, _| {
        inflight(answer, vec![memory(4096), fs::File::open("/").unwrap().into()])
    }),
    ("less memory for what is in flight", |answer, _| inflight(answer, vec![memory(4095)])),
    ("two for what is in flight", |answer, _| inflight(answer, vec![memory(4096), memory(4096)])),
    ("nothing to keep", |answer, _| inflight_place(answer, 0, 0)),
    ("an end beyond all", |answer, _| inflight_place(answer, 4096, u64::MAX - 4095)),
    ("a place beyond all", |answer, _| inflight_place(answer, u64::MAX, 1)),
    ("a place outside", |answer, _| inflight_place(answer, 1, 1 << 63)),
];

/// A whole life in which the answer number `at` is a misdeed; returns the last event, and whether there is an answer
/// of this number for it.
fn life(at: usize, misdeed: Misdeed, features: u64) -> (Option<Event>, bool) {
    let mut front = Frontend::new(spec());
    let ram = Ram::new();
    let mut peer = Peer::with(&mut front, features);
    let (mut answers, mut done) = (0, false);
    for phase in 0..3 {
        let mut events = front.advance();
        while front.is_connected() {
            let Some((_, answer)) = peer.turn() else { break };
            if let Some(mut answer) = answer {
                let mut stream = Some(peer.stream.try_clone().unwrap());
                if answers >= at {
                    let applies = misdeed(&mut answer, &mut stream);
                    assert!(applies || answers > at || !done);
                    done |= applies && answers >= at;
                    if !applies && answers == at {
                        return (None, false);
                    }
                }
                answers += 1;
                if stream.is_none() {
                    peer.stream = memory(0);
                    events.extend(front.advance());
                    break;
                }
                // The front end may have gone while noise was on its way.
                let _gone = send(&peer.stream, &answer.bytes, &answer.fds);
            }
            events.extend(front.advance());
        }
        match events.last() {
            Some(lost @ Event::Lost(_)) => {
                let lost = lost.clone();
                assert!(!front.is_connected() && front.advance().is_empty() && front.deadline().is_none());
                return (Some(lost), done);
            }
            Some(Event::Ready { .. }) if phase == 0 => {
                front.start(VERSION_1, &ram.memory, vec![ram.ring(0, 0)]).unwrap();
            }
            Some(Event::Started { .. }) if phase == 1 => front.stop(),
            Some(Event::Stopped { .. }) if phase == 2 => {}
            other => panic!("{other:?} in phase {phase}"),
        }
    }
    (None, done)
}

fn descriptors() -> usize {
    fs::read_dir("/proc/self/fd").unwrap().count()
}

/// The only test of this program that opens descriptors: it counts them.
#[test]
fn a_misdeed_at_any_step_ends_the_connection_with_a_reason() {
    let before = descriptors();
    for features in [protocol::WANTED, protocol::CONFIG | protocol::INFLIGHT_SHMFD, 0] {
        let mut seen = vec![0; MISDEEDS.len()];
        for at in 0..40 {
            for (number, (name, misdeed)) in MISDEEDS.iter().enumerate() {
                let (event, done) = life(at, *misdeed, features);
                if !done {
                    continue;
                }
                seen[number] += 1;
                let Some(Event::Lost(why)) = event else { panic!("{name} as answer {at}: {event:?}") };
                assert!(!why.is_empty() && why.len() <= MAX_REASON && !why.contains('\n'), "{name}: {why}");
            }
        }
        if features == protocol::WANTED {
            let unseen: Vec<&str> =
                MISDEEDS.iter().zip(&seen).filter(|(_, n)| **n == 0).map(|(m, _)| m.0).collect();
            assert!(unseen.is_empty(), "{unseen:?}");
            assert!(seen[0] > 15, "{seen:?}");
        }
    }
    silence();
    bytes_one_by_one();
    unasked();
    assert_eq!(descriptors(), before);
}

/// No answer to each request in turn.
fn silence() {
    let mut steps = 0;
    for at in 0..40 {
        let mut front = Frontend::new(spec());
        let ram = Ram::new();
        let mut peer = Peer::new(&mut front);
        let mut answers = 0;
        let mut begun = 0;
        let over = loop {
            let events = front.advance();
            match events.last() {
                Some(Event::Ready { .. }) => {
                    front.start(VERSION_1, &ram.memory, vec![ram.ring(0, 0)]).unwrap();
                    begun = 1;
                }
                Some(Event::Started { .. }) => {
                    front.stop();
                    begun = 2;
                }
                Some(Event::Stopped { .. }) => break true,
                Some(event) => panic!("{event:?}"),
                None => {}
            }
            if let Some((_, Some(answer))) = peer.turn() {
                if answers == at {
                    break false;
                }
                answers += 1;
                peer.send(&answer);
            }
        };
        if over {
            assert!(begun == 2 && at > 15);
            break;
        }
        steps += 1;
        let due = front.deadline().unwrap();
        assert!(front.expire_at(due - Duration::from_millis(1)).is_empty());
        assert!(front.is_connected());
        let events = front.expire_at(due);
        let [Event::Lost(why)] = &events[..] else { panic!("{events:?}") };
        assert!(why.starts_with("does not answer ") && why.ends_with(" within 5 seconds"), "{why}");
    }
    assert!(steps > 15);
}

/// Slow but right.
fn bytes_one_by_one() {
    let mut front = Frontend::new(spec());
    let ram = Ram::new();
    let mut peer = Peer::new(&mut front);
    let mut all = Vec::new();
    while all.len() < 3 {
        let mut events = front.advance();
        while let Some((_, answer)) = peer.turn() {
            let Some(answer) = answer else {
                events.extend(front.advance());
                continue;
            };
            for (i, byte) in answer.bytes.iter().enumerate() {
                assert!(events.is_empty());
                send(&peer.stream, &[*byte], if i == 0 { &answer.fds } else { &[] }).unwrap();
                events = front.advance();
            }
        }
        match &events[..] {
            [Event::Ready { .. }] => front.start(VERSION_1, &ram.memory, vec![ram.ring(0, 0)]).unwrap(),
            [Event::Started { .. }] => front.stop(),
            [Event::Stopped { .. }] => {}
            _ => panic!("{events:?}"),
        }
        all.extend(events);
    }
}

/// Messages when nothing was asked: before the first request is read, and when all is done.
fn unasked() {
    for ready in [false, true] {
        let mut front = Frontend::new(spec());
        let mut peer = Peer::new(&mut front);
        if ready {
            peer.serve(&mut front);
        }
        peer.send(&Answer::new(Request::GET_QUEUE_NUM as u32, &1u64.to_ne_bytes()));
        let events = front.advance();
        assert!(matches!(&events[..], [Event::Lost(_)]), "{events:?}");
    }
}
