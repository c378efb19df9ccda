//! A daemon that storage holds in a request ends, rather than holding up a stop: with its connection's end nothing of it
//! writes memory any more.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::env;
use std::os::fd::AsFd as _;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use bulkhead_control_api::config::IoThread;
use bulkhead_frontend::{FrontEnd, Life, Memory, Queue, Sockets};
use bulkhead_jail::starter::Starter;
use bulkhead_jail::topology::BLOCK;
use bulkhead_kit::device::{Device, Listeners, Notices, Progress};
use bulkhead_kit::ring::Rings;
use bulkhead_kit::serve::Daemon;

/// In the process that is the daemon.
const CHILD: &str = "BULKHEAD_TEST_HANGING";

/// Never comes back from its first request, which it answers with what shows that it is at it: a used index of 1.
struct Hanging;

impl Device for Hanging {
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
        if let Some(chain) = ring.pop() {
            ring.done(chain, 0);
            loop {
                thread::park();
            }
        }
        Progress::Idle
    }
}

fn main() {
    if env::var_os(CHILD).is_some() {
        return be_daemon();
    }
    a_stop_that_takes_too_long_ends_the_process();
    println!("a_stop_that_takes_too_long_ends_the_process ... ok");
    println!("test result: ok. 1 passed; 0 failed");
}

/// Serves on standard input (vhost) and standard output (side).
fn be_daemon() {
    let listeners = Listeners {
        vhost: std::io::stdin().as_fd().try_clone_to_owned().unwrap(),
        side: std::io::stdout().as_fd().try_clone_to_owned().unwrap(),
    };
    let notices = Notices::new().unwrap();
    let mut daemon = Daemon::new(Box::new(Hanging), &IoThread::default(), notices, listeners).unwrap();
    seccompiler::apply_filter_all_threads(BLOCK.filter).unwrap();
    daemon.serve(&Starter::default()).unwrap();
}

// #[test], run by `main`
fn a_stop_that_takes_too_long_ends_the_process() {
    let sockets = Sockets::new();
    let _child = Life::begin(&sockets, (CHILD, Path::new("1")));
    let memory = Memory::new(1 << 20);
    let mut front_end = FrontEnd::new(sockets.connect(), &memory, 0);
    let area = front_end.get_inflight(1, 64);
    front_end.set_inflight(&area);
    let mut queue = Queue::new(&memory.map, 0, 64, 0x1_0000, false);
    queue.add(&[(0x8_0000, 16, false)]).unwrap();
    front_end.start(&queue, 0);
    while queue.used_index() == 0 {
        thread::sleep(Duration::from_millis(1));
    }
    let begun = Instant::now();
    // No answer, but the end of the connection.
    assert_eq!(front_end.try_stop(0), None);
    let waited = begun.elapsed();
    assert!(waited >= Duration::from_millis(2900), "{waited:?}");
    // The next one serves.
    let _child = Life::begin(&sockets, (CHILD, Path::new("1")));
    let mut front_end = FrontEnd::new(sockets.connect(), &memory, 0);
    front_end.set_inflight(&area);
    front_end.start(&queue, 1);
    assert_eq!(front_end.stop(0), 1);
}
