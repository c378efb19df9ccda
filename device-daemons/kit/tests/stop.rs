//! A slow device comes to rest with the request that it is at.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::thread;
use std::time::{Duration, Instant};

use bulkhead_control_api::config::IoThread;
use bulkhead_frontend::{FrontEnd, Memory, Queue, Sockets, pair_of_packets};
use bulkhead_jail::starter::Starter;
use bulkhead_kit::device::{Device, Listeners, Notices, Progress};
use bulkhead_kit::ring::Rings;
use bulkhead_kit::serve::Daemon;

const LIMIT: Duration = Duration::from_secs(20);
const REQUESTS: u16 = 32;
/// A request takes so long.
const SLOW: Duration = Duration::from_millis(50);

/// Does all that it finds in one turn.
struct Slow;

impl Device for Slow {
    fn features(&self) -> u64 {
        0
    }

    fn queues(&self) -> u16 {
        1
    }

    fn config(&self) -> &[u8] {
        &[]
    }

    fn tracks(&self) -> bool {
        true
    }

    fn process(&mut self, rings: &mut Rings, queue: u16) -> Progress {
        let Some(ring) = rings.get(queue) else { return Progress::Idle };
        while let Some(chain) = ring.pop() {
            thread::sleep(SLOW);
            ring.done(chain, 0);
            ring.signal();
        }
        Progress::Idle
    }
}

#[test]
fn a_stop_does_not_wait_for_requests_that_were_not_begun() {
    let sockets = Sockets::new();
    let listeners = Listeners {
        vhost: sockets.vhost.try_clone().unwrap().into(),
        side: sockets.side.try_clone().unwrap(),
    };
    let notices = Notices::new().unwrap();
    let mut daemon = Daemon::new(Box::new(Slow), &IoThread::default(), notices, listeners).unwrap();
    let (starter, theirs) = pair_of_packets();
    let served = thread::spawn(move || daemon.serve(&Starter::new(Some(theirs))).unwrap());

    let memory = Memory::new(1 << 20);
    let mut front_end = FrontEnd::new(sockets.connect(), &memory, 0);
    let area = front_end.get_inflight(1, 64);
    front_end.set_inflight(&area);
    let mut queue = Queue::new(&memory.map, 0, 64, 0x1_0000, false);
    for request in 0..u64::from(REQUESTS) {
        queue.add(&[(0x8_0000 + 16 * request, 16, false)]).unwrap();
    }
    front_end.start(&queue, 0);
    assert!(queue.wait(LIMIT));
    let begun = Instant::now();
    let base = front_end.stop(0);
    let waited = begun.elapsed();
    assert!(waited < 10 * SLOW, "{waited:?}");
    assert!(base < REQUESTS && base == queue.used_index(), "{base}");
    // All the others are done when it goes on.
    front_end.start(&queue, base);
    for _ in 0..REQUESTS {
        assert!(queue.wait(LIMIT));
        queue.take().unwrap();
    }
    drop((front_end, starter));
    served.join().unwrap();
}
