//! Stand-ins for core and console that speak the control links.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use bulkhead_control_api::core::{Answer, Cause, Cpu, Event, FromCore, Op, Refusal, Request, RunState};
use bulkhead_control_api::{VERSION, console, encode};
use bulkhead_jail::link::{Link, send_packet};
use nix::sys::socket::MsgFlags;

/// How long the broker may take to begin the link.
const HELLO: Duration = Duration::from_secs(5);

/// What the test and the fake core share.
#[derive(Clone)]
pub struct Core {
    state: Arc<Mutex<RunState>>,
    started: Arc<AtomicBool>,
    silent: Arc<AtomicBool>,
    /// How long a request takes.
    slow: Arc<Mutex<Duration>>,
    out: Arc<(Mutex<Option<OwnedFd>>, Condvar)>,
}

impl Core {
    /// Serves the control link over `fd` from a thread; `out` is a second descriptor of it.
    pub fn start(fd: OwnedFd, out: OwnedFd) -> Self {
        let core = Self {
            state: Arc::new(Mutex::new(RunState::Prelaunch)),
            started: Arc::default(),
            silent: Arc::default(),
            slow: Arc::default(),
            out: Arc::default(),
        };
        let served = core.clone();
        std::thread::spawn(move || {
            let Ok(mut link) = Link::accept(fd, VERSION) else { return };
            served.listen(&mut link, out);
        });
        core
    }

    fn listen(&self, link: &mut Link, out: OwnedFd) {
        let (slot, ready) = &*self.out;
        *slot.lock().unwrap_or_else(PoisonError::into_inner) = Some(out);
        ready.notify_all();
        while let Ok(Request { id, op }) = link.recv::<Request>() {
            if self.silent.load(Ordering::SeqCst) {
                continue;
            }
            let slow = *self.slow.lock().unwrap_or_else(PoisonError::into_inner);
            std::thread::sleep(slow);
            let result = self.act(op);
            self.send(&FromCore::Reply { id, result });
            if op == Op::Quit {
                self.event(Event::Shutdown(Cause::HostQmpQuit), self.state());
                self.event(Event::Exiting, self.state());
                return;
            }
        }
    }

    fn act(&self, op: Op) -> Result<Answer, Refusal> {
        match (op, self.state()) {
            (Op::Status, state) => return Ok(Answer::Status(state)),
            (Op::Start, RunState::Prelaunch) => {
                self.started.store(true, Ordering::SeqCst);
                self.event(Event::Resume, RunState::Running);
            }
            (Op::Stop, RunState::Running) => self.event(Event::Stop, RunState::Paused),
            (Op::Cont, RunState::Shutdown | RunState::InternalError) => return Err(Refusal::ResetRequired),
            (Op::Cont, RunState::Prelaunch | RunState::Paused) => {
                self.event(Event::Resume, RunState::Running);
            }
            (Op::Reset, RunState::Running) => {
                self.event(Event::Reset(Cause::HostQmpSystemReset), RunState::Running);
            }
            (Op::Reset, _) => self.event(Event::Reset(Cause::HostQmpSystemReset), RunState::Prelaunch),
            (Op::Cpus, _) => {
                let cpu = |core| Cpu { thread_id: 1000 + core, socket: 0, core, thread: 0 };
                return Ok(Answer::Cpus(vec![cpu(0), cpu(1)]));
            }
            _ => {}
        }
        Ok(Answer::Done)
    }

    fn send(&self, message: &FromCore) {
        // The link begins with a hello each way, which may still be under way.
        let (slot, ready) = &*self.out;
        let slot = slot.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = ready.wait_timeout_while(slot, HELLO, |out| out.is_none());
        let (out, _) = waited.unwrap_or_else(PoisonError::into_inner);
        if let (Some(out), Ok(packet)) = (&*out, encode(message)) {
            // A broker that has gone is noticed by the receiving side.
            let _ = send_packet(out.as_fd(), &packet, &[], MsgFlags::empty());
        }
    }

    /// The machine's run state.
    pub fn state(&self) -> RunState {
        *self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets something happen.
    pub fn event(&self, event: Event, state: RunState) {
        *self.state.lock().unwrap_or_else(PoisonError::into_inner) = state;
        self.send(&FromCore::Event { event, state });
    }

    /// Whether the machine was told to start.
    pub fn is_started(&self) -> bool {
        self.started.load(Ordering::SeqCst)
    }

    /// Sends what is no message.
    pub fn send_garbage(&self) {
        let (slot, _) = &*self.out;
        if let Some(out) = &*slot.lock().unwrap_or_else(PoisonError::into_inner) {
            let _ = send_packet(out.as_fd(), &[0xff; 7], &[], MsgFlags::empty());
        }
    }

    /// The machine runs, and each request takes so long.
    pub fn set_running(&self, slow: Duration) {
        *self.state.lock().unwrap_or_else(PoisonError::into_inner) = RunState::Running;
        self.set_slow(slow);
    }

    /// From now on each request takes so long.
    pub fn set_slow(&self, slow: Duration) {
        *self.slow.lock().unwrap_or_else(PoisonError::into_inner) = slow;
    }

    /// From now on requests are read and not answered, or answered again.
    pub fn set_silent(&self, silent: bool) {
        self.silent.store(silent, Ordering::SeqCst);
    }
}

/// Serves the console's side of its control link from a thread. Its one character device takes no clients.
pub fn console(fd: OwnedFd) {
    std::thread::spawn(move || {
        let Ok(mut link) = Link::connect(fd, VERSION) else { return };
        while let Ok((console::Request { id, op }, _)) = link.recv_with(MsgFlags::empty()) {
            let answer = match op {
                console::Op::PowerButton => console::Answer::Done,
                console::Op::Chardevs => console::Answer::Chardevs(vec![console::Chardev {
                    label: "serial0".to_owned(),
                    filename: "null".to_owned(),
                    frontend_open: true,
                }]),
                console::Op::AddClient { chardev } if chardev == "serial0" => {
                    console::Answer::Client(console::Client::Refused)
                }
                console::Op::AddClient { .. } => console::Answer::Client(console::Client::NoChardev),
            };
            if link.send(&console::Reply { id, answer }).is_err() {
                return;
            }
        }
    });
}
