//! Consoles that die, and others that come in their place.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use bulkhead_bus_api::main_link::{Command, FromCore, ToCore};
use bulkhead_bus_api::{Action, MAX_REQUEST_LEN, Op as BusOp, Reply, Request};
use bulkhead_control_api::core::{Answer, Cause, Event, Op, RunState};
use bulkhead_jail::link::Link;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, UnixAddr, recv, send};

use super::program::{Program, RESULTS};
use super::rig::{Rig, config, connect_to, load};

/// What outlives each console.
#[derive(Default)]
struct Kept {
    /// Last number and reply of each link.
    last: Vec<Option<(u32, Vec<u8>)>>,
    /// Bytes written to the serial port.
    output: Vec<u8>,
    commands: Vec<Command>,
    /// Requests that were answered anew.
    answered: usize,
}

/// A console that keeps the promises of a real one over its deaths.
struct Mortal {
    kept: Arc<Mutex<Kept>>,
    /// It dies after so many points at which it may.
    fuse: Arc<AtomicUsize>,
    stop: Arc<AtomicBool>,
}

impl Mortal {
    fn new(fuse: usize) -> Self {
        Self { kept: Arc::default(), fuse: Arc::new(AtomicUsize::new(fuse)), stop: Arc::default() }
    }

    fn is_dead(&self) -> bool {
        self.fuse.fetch_sub(1, Ordering::SeqCst) == 1 || self.stop.load(Ordering::SeqCst)
    }

    /// One life.
    fn live(&self, console: &UnixAddr) {
        let mut main = Link::connect(connect_to(console), bulkhead_bus_api::VERSION).unwrap();
        let (FromCore::Welcome { vcpus, .. }, fds) = main.recv_with(MsgFlags::empty()).unwrap() else {
            panic!("no welcome");
        };
        let links: Vec<OwnedFd> = fds.into_iter().take(usize::from(vcpus) + 1).collect();
        self.kept.lock().unwrap().last.resize(links.len(), None);
        while !self.stop.load(Ordering::SeqCst) {
            let mut polled: Vec<_> =
                links.iter().map(|fd| PollFd::new(fd.as_fd(), PollFlags::POLLIN)).collect();
            polled.push(PollFd::new(main.as_fd(), PollFlags::POLLIN));
            poll(&mut polled, PollTimeout::from(20u8)).unwrap();
            let ready: Vec<bool> = polled.iter().map(|p| !p.revents().unwrap().is_empty()).collect();
            for (number, (link, _)) in links.iter().zip(&ready).enumerate().filter(|(_, (_, ready))| **ready)
            {
                if !self.serve(number, link) {
                    return;
                }
            }
            if ready[links.len()] {
                match main.recv() {
                    Ok(FromCore::Command { id, what }) => {
                        self.kept.lock().unwrap().commands.push(what);
                        if self.is_dead() || main.send(&ToCore::Done { id }).is_err() {
                            return;
                        }
                    }
                    _ => return,
                }
            }
        }
    }

    /// Serves one request; false at its death.
    fn serve(&self, number: usize, link: &OwnedFd) -> bool {
        let mut packet = [0; MAX_REQUEST_LEN];
        let Ok(len) = recv(link.as_raw_fd(), &mut packet, MsgFlags::MSG_DONTWAIT) else { return true };
        let request = Request::decode(&packet[..len]).unwrap();
        if self.is_dead() {
            return false;
        }
        let reply = {
            let mut kept = self.kept.lock().unwrap();
            match kept.last[number].clone() {
                Some((seq, reply)) if seq == request.seq => reply,
                _ => {
                    let collected: Vec<u8> =
                        request.writes().map(|write| write.unwrap().data.to_le_bytes()[0]).collect();
                    kept.output.extend(collected);
                    if let (0x3f8, BusOp::Write(data)) = (request.access.addr, request.access.op) {
                        kept.output.push(data.to_le_bytes()[0]);
                    }
                    kept.answered += 1;
                    let data = kept.answered as u64;
                    let reply = Reply { seq: request.seq, action: Action::None, data }.encode().to_vec();
                    kept.last[number] = Some((request.seq, reply.clone()));
                    reply
                }
            }
        };
        if self.is_dead() {
            return false;
        }
        let sent = send(link.as_raw_fd(), &reply, MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT);
        sent.is_ok() && !self.is_dead()
    }

    /// Lives again and again until told to stop, at most until the returned thread is joined.
    fn lives(
        self: &Arc<Self>,
        console: UnixAddr,
        fuses: impl Fn(usize) -> usize + Send + 'static,
    ) -> JoinHandle<usize> {
        let this = Arc::clone(self);
        thread::spawn(move || {
            let mut lives = 0;
            while !this.stop.load(Ordering::SeqCst) {
                this.fuse.store(fuses(lives), Ordering::SeqCst);
                this.live(&console);
                lives += 1;
            }
            lives
        })
    }

    fn end(&self, lives: JoinHandle<usize>) -> usize {
        self.stop.store(true, Ordering::SeqCst);
        lives.join().unwrap()
    }
}

/// A guest that counts and writes the count's low byte, and reads now and then.
fn counting() -> Program {
    let mut program = Program::default();
    for _ in 0..7 {
        program = program.count(0).load(RESULTS, 4).out_al(0x3f8);
    }
    program.in8(0x3fd, 8).again()
}

fn assert_counts(output: &[u8]) {
    for (at, byte) in output.iter().enumerate() {
        assert_eq!(usize::from(*byte), (at + 1) % 256, "byte {at} of {}", output.len());
    }
}

fn started(
    cpus: u32,
    program: Program,
    mortal: &Arc<Mortal>,
    fuses: impl Fn(usize) -> usize + Send + 'static,
) -> (Rig, JoinHandle<usize>) {
    let mut rig = Rig::bare(config(cpus), true, load(program));
    let lives = mortal.lives(rig.console, fuses);
    rig.connect_broker();
    assert_eq!(rig.ask(Op::Start).0, Ok(Answer::Done));
    (rig, lives)
}

#[test]
fn a_guest_goes_on_over_hundreds_of_dead_consoles() {
    let mortal = Arc::new(Mortal::new(0));
    let (mut rig, lives) = started(1, counting(), &mortal, |life| 1 + life * 7 % 61);
    let count = rig.wait_result(0, |count| count > 12_000);
    assert_eq!(rig.status(), RunState::Running);
    // Nothing is lost over a stop either: it would be a gap.
    assert_eq!(rig.ask(Op::Stop).1, [(Event::Stop, RunState::Paused)]);
    assert_eq!(rig.ask(Op::Cont).1, [(Event::Resume, RunState::Running)]);
    let count = rig.wait_result(0, |further| further > count + 1000);
    assert_eq!(rig.ask(Op::Stop).1, [(Event::Stop, RunState::Paused)]);
    let written = rig.result(0) as usize;
    let end = Instant::now() + Duration::from_secs(5);
    while mortal.kept.lock().unwrap().output.len() < written && Instant::now() < end {
        thread::sleep(Duration::from_millis(5));
    }
    let lives = mortal.end(lives);
    let kept = mortal.kept.lock().unwrap();
    assert_counts(&kept.output);
    // A stop may come between the count and its byte.
    let got = kept.output.len();
    assert!((got == written || got + 1 == written) && written >= count as usize, "{got} of {written}");
    assert!(lives > 100, "{lives}");
    drop(kept);
    rig.quit();
}

#[test]
fn two_vcpus_repeat_what_each_asked() {
    let mortal = Arc::new(Mortal::new(0));
    // The second processor stays in its wait for a start; stops and goes make the first one come and go.
    let (mut rig, lives) = started(2, counting(), &mortal, |life| 1 + life * 13 % 97);
    for _ in 0..50 {
        assert_eq!(rig.ask(Op::Stop).1, [(Event::Stop, RunState::Paused)]);
        assert_eq!(rig.ask(Op::Cont).1, [(Event::Resume, RunState::Running)]);
    }
    let count = rig.result(0);
    rig.wait_result(0, |now| now > count + 1000);
    mortal.end(lives);
    assert_counts(&mortal.kept.lock().unwrap().output);
    rig.quit();
}

/// Waits until a vCPU waits for a console that is away.
fn wait_away(mortal: &Mortal, lives: JoinHandle<usize>) {
    mortal.end(lives);
    thread::sleep(Duration::from_millis(100));
}

#[test]
fn a_vcpu_waits_for_the_next_console_as_long_as_it_takes() {
    let mortal = Arc::new(Mortal::new(0));
    let (mut rig, lives) = started(1, counting(), &mortal, |_| usize::MAX);
    rig.wait_result(0, |count| count > 100);
    wait_away(&mortal, lives);
    let count = rig.result(0);
    // Longer than a console that is there may take.
    thread::sleep(Duration::from_millis(5500));
    assert!(rig.result(0) <= count + 200, "what fits into a ring is collected");
    assert_eq!(rig.status(), RunState::Running);
    let count = rig.result(0);
    mortal.stop.store(false, Ordering::SeqCst);
    let began = Instant::now();
    let lives = mortal.lives(rig.console, |_| usize::MAX);
    rig.wait_result(0, |now| now > count + 10);
    assert!(
        began.elapsed() < Duration::from_millis(90),
        "{:?}: at once, not at the next look",
        began.elapsed()
    );
    mortal.end(lives);
    assert_counts(&mortal.kept.lock().unwrap().output);
    rig.quit();
}

#[test]
fn a_stop_gives_an_absent_console_up_after_its_usual_patience() {
    let mortal = Arc::new(Mortal::new(0));
    let (mut rig, lives) = started(1, Program::default().in8(0x3fd, 0).again(), &mortal, |_| usize::MAX);
    rig.wait_result(0, |data| data > 10);
    wait_away(&mortal, lives);
    let began = Instant::now();
    assert_eq!(rig.ask(Op::Stop).0, Ok(Answer::Done));
    let took = began.elapsed();
    assert!((Duration::from_secs(5)..Duration::from_secs(9)).contains(&took), "{took:?}");
    assert_eq!(rig.status(), RunState::InternalError);
    rig.quit();
}

#[test]
fn a_stop_goes_through_when_the_next_console_comes() {
    let mortal = Arc::new(Mortal::new(0));
    let (mut rig, lives) = started(1, Program::default().in8(0x3fd, 0).again(), &mortal, |_| usize::MAX);
    rig.wait_result(0, |data| data > 10);
    wait_away(&mortal, lives);
    let (console, next) = (rig.console, Arc::clone(&mortal));
    let comes = thread::spawn(move || {
        thread::sleep(Duration::from_millis(500));
        next.stop.store(false, Ordering::SeqCst);
        next.lives(console, |_| usize::MAX)
    });
    assert_eq!(rig.ask(Op::Stop), (Ok(Answer::Done), vec![(Event::Stop, RunState::Paused)]));
    assert_eq!(rig.status(), RunState::Paused);
    assert_eq!(rig.ask(Op::Cont).1, [(Event::Resume, RunState::Running)]);
    let lives = comes.join().unwrap();
    wait_away(&mortal, lives);
    let ends = Instant::now();
    rig.quit();
    assert!(ends.elapsed() < Duration::from_secs(1), "an access that waits holds up no end");
    let commands = mortal.kept.lock().unwrap().commands.clone();
    assert_eq!(commands, [Command::Resume, Command::Pause, Command::Resume]);
}

#[test]
fn a_halted_guest_stops_and_resets_without_a_console() {
    let mortal = Arc::new(Mortal::new(0));
    let (mut rig, lives) = started(1, Program::default().count(0).halt(), &mortal, |_| usize::MAX);
    rig.wait_result(0, |count| count == 1);
    wait_away(&mortal, lives);
    assert_eq!(rig.ask(Op::Stop).1, [(Event::Stop, RunState::Paused)]);
    assert_eq!(rig.ask(Op::Reset).1, [(Event::Reset(Cause::HostQmpSystemReset), RunState::Prelaunch)]);
    assert_eq!(rig.ask(Op::Cont).1, [(Event::Resume, RunState::Running)]);
    mortal.stop.store(false, Ordering::SeqCst);
    let lives = mortal.lives(rig.console, |_| usize::MAX);
    rig.wait_result(0, |count| count == 2);
    mortal.end(lives);
    let commands = mortal.kept.lock().unwrap().commands.clone();
    assert_eq!(commands, [Command::Reset, Command::Pause, Command::Resume]);
    rig.quit();
}

#[test]
fn a_reset_lets_go_of_an_access_that_waits() {
    let mortal = Arc::new(Mortal::new(0));
    let program = Program::default().count(0).in8(0x3fd, 8).count(4).in8(0x3fd, 8).again();
    let (mut rig, lives) = started(1, program, &mortal, |_| usize::MAX);
    rig.wait_result(4, |count| count > 10);
    wait_away(&mortal, lives);
    let answered = mortal.kept.lock().unwrap().answered;
    let began = Instant::now();
    assert_eq!(rig.ask(Op::Reset).1, [(Event::Reset(Cause::HostQmpSystemReset), RunState::Running)]);
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    let (first, second) = (rig.result(0), rig.result(4));
    mortal.stop.store(false, Ordering::SeqCst);
    let lives = mortal.lives(rig.console, |_| usize::MAX);
    rig.wait_result(4, |count| count > second + 10);
    assert!(rig.result(0) > first && mortal.kept.lock().unwrap().answered > answered);
    mortal.end(lives);
    assert_eq!(mortal.kept.lock().unwrap().commands.first(), Some(&Command::Reset));
    rig.quit();
}

#[test]
fn deaths_in_resets_are_made_up_for() {
    let mortal = Arc::new(Mortal::new(0));
    let (mut rig, lives) = started(1, counting(), &mortal, |life| 1 + life * 5 % 37);
    for _ in 0..20 {
        assert_eq!(rig.ask(Op::Reset).1, [(Event::Reset(Cause::HostQmpSystemReset), RunState::Running)]);
        let count = rig.result(0);
        rig.wait_result(0, |now| now > count + 20);
    }
    assert_eq!(rig.status(), RunState::Running);
    mortal.end(lives);
    assert!(mortal.kept.lock().unwrap().commands.iter().filter(|c| **c == Command::Reset).count() >= 20);
    rig.quit();
}
