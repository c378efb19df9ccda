//! What the front end says to a back end, and how it takes the back end's own requests.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test that cannot go on fails"
)]

mod common;

use std::rc::Rc;
use std::time::{Duration, Instant};

use bulkhead_bus_api::pci;
use bulkhead_pci::frontend::wire::{BIAS, CONFIG_CHANGE, HEADER, PROTOCOL_FEATURES, Request, protocol};
use bulkhead_pci::frontend::{Event, Frontend, StartError};
use bulkhead_pci::memory::{Memory, Region};
use common::peer::{CONFIG_LEN, Peer, STOPPED_AT, memory, send, spec, take};
use common::{BASE, LEN, Ram, VERSION_1};

fn ready(protocol: u64) -> (Frontend, Peer) {
    let mut front = Frontend::new(spec());
    let mut peer = Peer::with(&mut front, protocol);
    let events = peer.serve(&mut front);
    assert!(matches!(&events[..], [Event::Ready { .. }]), "{events:?}");
    peer.log.clear();
    (front, peer)
}

fn config(front: &mut Frontend, peer: &mut Peer) -> Vec<Event> {
    peer.config[0] += 1;
    send(peer.channel.as_ref().unwrap(), &[CONFIG_CHANGE, 1, 0].map(u32::to_ne_bytes).concat(), &[]).unwrap();
    peer.serve(front)
}

#[test]
fn the_handshake_says_what_the_back_end_is() {
    let mut front = Frontend::new(spec());
    let mut peer = Peer::new(&mut front);
    peer.queues = 70_000;
    let ready = Event::Ready { features: VERSION_1 | 0xff, queues: u16::MAX, config: peer.config.clone() };
    assert_eq!(peer.serve(&mut front), [ready]);
    use Request::{
        GET_CONFIG, GET_FEATURES, GET_MAX_MEM_SLOTS, GET_PROTOCOL_FEATURES, GET_QUEUE_NUM,
        SET_BACKEND_REQ_FD, SET_OWNER, SET_PROTOCOL_FEATURES,
    };
    let order = [
        GET_FEATURES,
        GET_PROTOCOL_FEATURES,
        SET_PROTOCOL_FEATURES,
        GET_QUEUE_NUM,
        GET_MAX_MEM_SLOTS,
        SET_BACKEND_REQ_FD,
        SET_OWNER,
        GET_CONFIG,
    ];
    assert_eq!(peer.log, order.map(|request| request as u32));
}

#[test]
fn a_back_end_without_protocol_features_has_rings_that_are_enabled() {
    let mut front = Frontend::new(spec());
    let mut peer = Peer::with(&mut front, 0);
    peer.features &= !PROTOCOL_FEATURES;
    let ready = Event::Ready { features: VERSION_1 | 0xff, queues: 2, config: Vec::new() };
    assert_eq!(peer.serve(&mut front), [ready]);
    let ram = Ram::new();
    front.start(VERSION_1, &ram.memory, vec![ram.ring(0, 0)]).unwrap();
    assert_eq!(peer.serve(&mut front), [Event::Started { ring: None }]);
    assert!(peer.log.contains(&(Request::SET_MEM_TABLE as u32)));
    assert!(!peer.log.contains(&(Request::SET_VRING_ENABLE as u32)));
    front.stop();
    let bases = vec![(0, u16::try_from(STOPPED_AT).unwrap())];
    assert_eq!(peer.serve(&mut front), [Event::Stopped { ring: None, bases }]);
}

#[test]
fn rings_are_told_by_biased_addresses_and_kicked_last() {
    let (mut front, mut peer) = ready(protocol::WANTED & !protocol::INFLIGHT_SHMFD);
    let ram = Ram::new();
    let ring = ram.ring(1, 5);
    front.start(VERSION_1 | 1 << 40, &ram.memory, vec![ring.clone()]).unwrap();
    let mut seen = Vec::new();
    let mut count = [0; 8];
    loop {
        assert!(front.advance().is_empty());
        let Some((asked, answer)) = peer.turn() else { break };
        assert_eq!(nix::unistd::read(&ring.kick, &mut count), Err(nix::errno::Errno::EAGAIN));
        peer.send(&answer.unwrap());
        seen.push((asked.request, asked.payload, asked.fds.len()));
        if asked.request == Request::GET_FEATURES as u32 {
            break;
        }
    }
    assert_eq!(front.advance(), [Event::Started { ring: None }]);
    assert_eq!(nix::unistd::read(&ring.kick, &mut count), Ok(8));
    assert_eq!(u64::from_ne_bytes(count), 1);
    let n32 = |numbers: &[u32]| numbers.iter().flat_map(|n| n.to_ne_bytes()).collect::<Vec<u8>>();
    let n64 = |numbers: &[u64]| numbers.iter().flat_map(|n| n.to_ne_bytes()).collect::<Vec<u8>>();
    let addresses = n64(&[ring.desc + BIAS, ring.used + BIAS, ring.avail + BIAS, 0]);
    let expected = [
        (Request::SET_FEATURES, n64(&[VERSION_1 | PROTOCOL_FEATURES]), 0),
        (Request::ADD_MEM_REG, n64(&[0, BASE, LEN, BASE + BIAS, 0]), 1),
        (Request::SET_VRING_NUM, n32(&[1, common::QUEUE.into()]), 0),
        (Request::SET_VRING_BASE, n32(&[1, 5]), 0),
        (Request::SET_VRING_ADDR, [n32(&[1, 0]), addresses].concat(), 0),
        (Request::SET_VRING_CALL, n64(&[1]), 1),
        (Request::SET_VRING_KICK, n64(&[1]), 1),
        (Request::SET_VRING_ENABLE, n32(&[1, 1]), 0),
        (Request::GET_FEATURES, Vec::new(), 0),
    ];
    assert_eq!(seen, expected.map(|(request, payload, fds)| (request as u32, payload, fds)));
}

#[test]
fn memory_changes_piece_by_piece_or_as_a_whole() {
    let piece =
        |base: u64| Region { place: pci::Memory { base, len: 4096 }, fd: Rc::new(memory(4096)), offset: 0 };
    let (low, high) = (piece(0x1000), piece(0x10_0000));
    let both = Rc::new(Memory { regions: vec![low.clone(), high.clone()] });
    let one = Rc::new(Memory { regions: vec![high] });
    for (features, requests) in [
        (protocol::WANTED, vec![Request::REM_MEM_REG]),
        (protocol::WANTED & !protocol::CONFIGURE_MEM_SLOTS, vec![Request::SET_MEM_TABLE]),
        (0, vec![Request::SET_MEM_TABLE, Request::GET_FEATURES]),
    ] {
        let (mut front, mut peer) = ready(features);
        front.set_memory(&both);
        assert_eq!(peer.serve(&mut front), [Event::Memory]);
        peer.log.clear();
        front.set_memory(&one);
        assert_eq!(peer.serve(&mut front), [Event::Memory]);
        assert_eq!(peer.log, requests.into_iter().map(|request| request as u32).collect::<Vec<_>>());
    }
    for (features, room, count) in [(protocol::WANTED, 4, 5), (0, 8, 9)] {
        let (mut front, mut peer) = ready(features);
        front.set_memory(&Memory { regions: (0..count).map(|i| piece(i * 4096)).collect() }.into());
        let lost = Event::Lost(format!("has room for {room} pieces of memory only"));
        assert_eq!(peer.serve(&mut front), [lost]);
    }
}

#[test]
fn what_is_in_flight_goes_to_the_next_life_and_ends_with_a_reset() {
    let (mut front, mut peer) = ready(protocol::WANTED);
    assert!(front.tracks_inflight());
    let ram = Ram::new();
    let get = Request::GET_INFLIGHT_FD as u32;
    let set = Request::SET_INFLIGHT_FD as u32;
    let start = |front: &mut Frontend, peer: &mut Peer| {
        front.start(VERSION_1, &ram.memory, vec![ram.ring(0, 0)]).unwrap();
        assert_eq!(peer.serve(front), [Event::Started { ring: None }]);
        let asked = |request| peer.log.contains(&request);
        (asked(get), asked(set))
    };
    assert!(front.inflight().is_none());
    assert_eq!(start(&mut front, &mut peer), (true, true));
    let kept = front.inflight().unwrap().clone();
    // A queue that is reset by itself may come back larger.
    assert_eq!((kept.size, kept.offset, kept.queues, kept.queue_size), (4096, 0, 2, 2 * common::QUEUE));

    // Another connection, then another front end.
    let mut peer = Peer::new(&mut front);
    peer.serve(&mut front);
    assert_eq!(start(&mut front, &mut peer), (false, true));
    let mut front = Frontend::new(spec());
    front.set_inflight(Some(kept));
    let mut peer = Peer::new(&mut front);
    peer.serve(&mut front);
    assert_eq!(start(&mut front, &mut peer), (false, true));

    front.stop();
    front.reset();
    peer.serve(&mut front);
    assert!(peer.log.contains(&(Request::RESET_DEVICE as u32)));
    assert!(front.inflight().is_none());
    peer.log.clear();
    assert_eq!(start(&mut front, &mut peer), (true, true));
}

#[test]
fn a_back_end_that_sends_a_file_in_place_of_memory_is_not_asked_for_any_again() {
    let (mut front, mut peer) = ready(protocol::WANTED);
    let ram = Ram::new();
    front.start(VERSION_1, &ram.memory, vec![ram.ring(0, 0)]).unwrap();
    let file = std::fs::File::open(std::env::current_exe().unwrap()).unwrap();
    let mut events = Vec::new();
    while front.is_connected() {
        if let Some((asked, Some(mut answer))) = peer.turn() {
            if asked.request == Request::GET_INFLIGHT_FD as u32 {
                answer.fds = vec![file.try_clone().unwrap().into()];
            }
            peer.send(&answer);
        }
        events = front.advance();
    }
    assert!(matches!(&events[..], [Event::Lost(why)] if why.contains("no memory")), "{events:?}");
    let mut peer = Peer::new(&mut front);
    peer.serve(&mut front);
    front.start(VERSION_1, &ram.memory, vec![ram.ring(0, 0)]).unwrap();
    let events = peer.serve(&mut front);
    assert!(events.contains(&Event::Started { ring: None }), "{events:?}");
    assert!(!peer.log.contains(&(Request::GET_INFLIGHT_FD as u32)));
}

/// The specification's structure ends where that of C is padded.
#[test]
fn in_flight_memory_is_told_with_and_without_padding() {
    for len in [16, 19, 20, 21, 24] {
        let (mut front, mut peer) = ready(protocol::WANTED);
        let ram = Ram::new();
        front.start(VERSION_1, &ram.memory, vec![ram.ring(0, 0)]).unwrap();
        let mut events = front.advance();
        while let Some((asked, answer)) = peer.turn() {
            if let Some(mut answer) = answer {
                if asked.request == Request::GET_INFLIGHT_FD as u32 {
                    let payload = answer.bytes.split_off(HEADER);
                    answer.payload(&payload[..len]);
                }
                peer.send(&answer);
            }
            events.extend(front.advance());
        }
        let right = matches!(len, 20 | 24);
        let lost = Event::Lost("sent a wrong answer to GET_INFLIGHT_FD".into());
        assert_eq!(events, [if right { Event::Started { ring: None } } else { lost }]);
        assert_eq!(front.inflight().is_some(), right);
    }
}

#[test]
fn configuration_space_is_read_as_far_as_the_back_end_has_it() {
    let mut front = Frontend::new(spec());
    let mut peer = Peer::new(&mut front);
    peer.config.truncate(8);
    let events = peer.serve(&mut front);
    let [Event::Ready { config, .. }] = &events[..] else { panic!("{events:?}") };
    assert_eq!(config[..], [1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0]);
    // Writes go where the back end has something.
    peer.log.clear();
    front.write_config(4, &[1, 2, 3, 4]);
    front.write_config(5, &[1, 2, 3, 4]);
    front.write_config(u32::MAX, &[1]);
    front.write_config(0, &[]);
    assert!(peer.serve(&mut front).is_empty());
    assert_eq!(peer.log, [Request::SET_CONFIG as u32]);
    front.read_config();
    let events = peer.serve(&mut front);
    assert!(matches!(&events[..], [Event::Config { changed: false, config }] if config.len() == CONFIG_LEN));
}

#[test]
fn a_refused_write_to_configuration_space_is_the_guests_affair() {
    let (mut front, mut peer) = ready(protocol::WANTED);
    front.write_config(0, &[9]);
    assert!(front.advance().is_empty());
    let (_, answer) = peer.turn().unwrap();
    let mut answer = answer.unwrap();
    answer.payload(&1u64.to_ne_bytes());
    peer.send(&answer);
    assert!(front.advance().is_empty());
    assert!(front.is_connected());
}

#[test]
fn the_back_end_says_that_its_configuration_has_changed() {
    let (mut front, mut peer) = ready(protocol::WANTED);
    for _ in 0..3 {
        let events = config(&mut front, &mut peer);
        assert_eq!(events, [Event::Config { config: peer.config.clone(), changed: true }]);
    }
    // A hundred at once are one change.
    let change = [CONFIG_CHANGE, 1 | 8, 0].map(u32::to_ne_bytes).concat();
    let channel = peer.channel.take().unwrap();
    for _ in 0..100 {
        send(&channel, &change, &[]).unwrap();
    }
    // It is answered only as far as it reads.
    let mut answers = 0;
    assert!(front.advance().is_empty());
    while let Some(answer) = take(&channel) {
        assert_eq!((answer.request, answer.payload), (CONFIG_CHANGE, 0u64.to_ne_bytes().to_vec()));
        answers += 1;
        front.advance();
    }
    assert_eq!(answers, 100);
    let changes = peer.serve(&mut front).len();
    assert!(changes <= 2, "{changes}");
    // The channel may go.
    drop(channel);
    assert!(peer.serve(&mut front).is_empty());
    assert!(front.is_connected());
    let mut list = Vec::new();
    front.watch(&mut list);
    assert_eq!(list.len(), 1);
}

#[test]
fn other_requests_are_refused_and_too_many_end_the_connection() {
    let (mut front, peer) = ready(protocol::WANTED);
    let channel = peer.channel.as_ref().unwrap();
    for request in (0..12).chain([u32::MAX]).filter(|request| *request != CONFIG_CHANGE) {
        send(channel, &[request, 1, 0].map(u32::to_ne_bytes).concat(), &[]).unwrap();
        assert!(front.advance().is_empty());
        assert!(take(channel).is_none());
        send(channel, &[request, 1 | 8, 8, 0, 0].map(u32::to_ne_bytes).concat(), &[]).unwrap();
        assert!(front.advance().is_empty());
        let answer = take(channel).unwrap();
        assert_eq!((answer.request, answer.payload), (request, 1u64.to_ne_bytes().to_vec()));
    }
    let begun = Instant::now();
    let lost = loop {
        assert!(begun.elapsed() < Duration::from_secs(10));
        let _full = send(channel, &[4, 1, 0].map(u32::to_ne_bytes).concat(), &[]);
        if let Some(event) = front.advance().pop() {
            break event;
        }
    };
    assert_eq!(lost, Event::Lost("sent more than 256 requests in a second".into()));
    assert!(!front.is_connected());
}

#[test]
fn a_malformed_request_ends_the_connection() {
    let words = |words: &[u32]| words.iter().flat_map(|word| word.to_ne_bytes()).collect::<Vec<u8>>();
    let cases = [
        (words(&[2, 2, 0]), 0),
        (words(&[2, 0x11, 0]), 0),
        (words(&[2, 1, 0x1000]), 0),
        (words(&[2, 5, 8, 0, 0]), 0),
        (words(&[9, 9, 0]), 1),
        (vec![0xff; 64], 0),
    ];
    for (bytes, fds) in cases {
        let (mut front, peer) = ready(protocol::WANTED);
        let fds: Vec<_> = (0..fds).map(memory).collect();
        send(peer.channel.as_ref().unwrap(), &bytes, &fds).unwrap();
        let events = front.advance();
        assert!(matches!(&events[..], [Event::Lost(_)]), "{bytes:?}: {events:?}");
    }
}

#[test]
fn a_guest_that_writes_faster_than_the_back_end_reads_fills_no_memory() {
    // With acknowledgements one write waits for the other; without, the socket fills.
    for (features, why) in [
        (protocol::WANTED, "does not keep up with what the guest wants"),
        (protocol::CONFIG, "does not keep up with what the guest wants"),
    ] {
        let (mut front, _peer) = ready(features);
        let mut writes = 0;
        let events = loop {
            front.write_config(0, &[1; CONFIG_LEN]);
            writes += 1;
            assert!(writes < 100_000);
            let events = front.advance();
            if !events.is_empty() {
                break events;
            }
        };
        assert_eq!(events, [Event::Lost(why.into())]);
    }
    // A start for which there is no room any more ends all, too.
    let (mut front, _peer) = ready(protocol::WANTED);
    for _ in 0..4090 {
        front.write_config(0, &[1; CONFIG_LEN]);
    }
    let ram = Ram::new();
    front.start(VERSION_1, &ram.memory, vec![ram.ring(0, 0)]).unwrap();
    assert_eq!(front.advance(), [Event::Lost("does not keep up with what the guest wants".into())]);
    assert!(front.advance().is_empty() && front.deadline().is_none());

    let (mut front, _peer) = ready(protocol::CONFIG);
    for _ in 0..4000 {
        front.write_config(0, &[1; CONFIG_LEN]);
        assert!(front.advance().is_empty());
    }
    let due = front.deadline().unwrap();
    let events = front.expire_at(due + Duration::from_secs(6));
    assert_eq!(events, [Event::Lost("does not read its requests within 5 seconds".into())]);
}

#[test]
fn only_what_is_ready_can_be_started() {
    let mut front = Frontend::new(spec());
    let ram = Ram::new();
    let rings = || vec![ram.ring(0, 0)];
    assert_eq!(front.start(VERSION_1, &ram.memory, rings()), Err(StartError::NotReady));
    let mut peer = Peer::new(&mut front);
    assert_eq!(front.start(VERSION_1, &ram.memory, rings()), Err(StartError::NotReady));
    peer.serve(&mut front);
    front.start(VERSION_1, &ram.memory, rings()).unwrap();
    assert_eq!(front.start(VERSION_1, &ram.memory, rings()), Err(StartError::NotReady));
    // Calls are done in their order, and each has its event.
    front.stop_ring(0);
    front.stop_ring(1);
    front.stop();
    let base = u16::try_from(STOPPED_AT).unwrap();
    let stopped = |ring, bases| Event::Stopped { ring, bases };
    let expected = [
        Event::Started { ring: None },
        stopped(Some(0), vec![(0, base)]),
        stopped(Some(1), vec![]),
        stopped(None, vec![]),
    ];
    assert_eq!(peer.serve(&mut front), expected);
    // Nothing is said of a connection that the caller ended.
    front.stop();
    front.disconnect();
    assert!(front.advance().is_empty());
    assert_eq!(front.deadline(), None);
}

#[test]
fn a_back_end_that_was_given_up_may_still_run() {
    let started = || {
        let (mut front, mut peer) = ready(protocol::WANTED);
        let ram = Ram::new();
        assert!(!front.may_run());
        front.start(VERSION_1, &ram.memory, vec![ram.ring(0, 0), ram.ring(1, 0)]).unwrap();
        peer.serve(&mut front);
        assert!(front.may_run());
        (front, peer)
    };
    // It has stopped.
    let (mut front, mut peer) = started();
    front.stop_ring(0);
    peer.serve(&mut front);
    assert!(front.may_run());
    front.stop();
    assert!(front.may_run());
    peer.serve(&mut front);
    assert!(!front.may_run());
    front.disconnect();
    assert!(!front.may_run());
    // It is gone.
    let (mut front, peer) = started();
    drop(peer);
    assert_eq!(front.advance(), [Event::Lost("has closed the connection".into())]);
    assert!(!front.may_run());
    // It does not say where its rings have stopped.
    let (mut front, _peer) = started();
    front.stop();
    assert!(front.advance().is_empty());
    let due = front.deadline().unwrap();
    let events = front.expire_at(due);
    assert_eq!(events, [Event::Lost("does not answer GET_VRING_BASE within 5 seconds".into())]);
    assert!(front.may_run());
    // Until there is another connection.
    let mut peer = Peer::new(&mut front);
    assert!(!front.may_run());
    peer.serve(&mut front);
    // The caller has lost its patience.
    let (mut front, _peer) = started();
    front.disconnect();
    assert!(front.may_run());
}
