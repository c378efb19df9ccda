//! The main thread: one loop over signals, vCPU messages, bus daemons, broker and loader.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bulkhead_control_api::core::{
    Answer, Cause, Counters, Cpu, Event, FromCore, Op, Refusal, Request, RunState,
};
use bulkhead_control_api::dump::{Memory, Translate, Translated};
use bulkhead_jail::door::{Arrival, Door};
use bulkhead_jail::{error, info};
use kvm_bindings::kvm_clock_data;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use nix::sys::signalfd::SignalFd;

use crate::boot::{Boot, Phase};
use crate::bus::{AccessLink, Flushed};
use crate::coalesce::{IDLE_PERIODS, PERIOD_MS};
use crate::control::permitted;
use crate::error::{Error, Result, kvm, system};
use crate::gate::lock;
use crate::notice::{Notice, What};
use crate::peer::{self, Fault, Peer};
use crate::presence::Daemon;
use crate::registers;
use crate::snapshot::{Chips, VcpuState};
use crate::state::{Effect, State};
use crate::vcpu::{Shared, Vcpu};
use crate::vm::Vm;

/// How long vCPUs may take to come out before a daemon is given up for holding one.
const STOP_PATIENCE: Duration = Duration::from_secs(6);
/// The same before an exit.
const EXIT_PATIENCE: Duration = Duration::from_secs(1);
/// How long they may take after that.
const LAST_PATIENCE: Duration = Duration::from_secs(10);
/// How long the broker has to tell its clients before core exits.
const FAREWELL: Duration = Duration::from_secs(1);
/// How often the daemons' doors are looked at while vCPUs come out.
const HALT_STEP: Duration = Duration::from_millis(20);
/// How often deadlines are looked at while there are any, in milliseconds.
const DEADLINE_STEP_MS: u16 = 250;

/// State to which a reset returns.
#[derive(Debug)]
pub struct PowerOn {
    /// Interrupt controllers and timer.
    pub chips: Chips,
    /// The vCPUs by index.
    pub vcpus: Vec<VcpuState>,
}

/// What core knows of its surroundings.
#[derive(Debug)]
pub struct Host {
    /// SIGTERM, SIGINT, SIGHUP and SIGPWR.
    pub signals: SignalFd,
    /// Host thread ids of the vCPUs by index.
    pub threads: Vec<u32>,
    /// Process id inside the pid namespace.
    pub process: i32,
}

/// The machine.
#[derive(Debug)]
pub struct Machine {
    pub host: Host,
    pub vm: Vm,
    pub vcpus: Vec<Arc<Vcpu>>,
    pub shared: Arc<Shared>,
    pub power_on: PowerOn,
    pub boot: Boot,
    /// The bus daemons that the machine has, the console first.
    pub peers: Vec<Peer>,
    pub broker: Door,
    pub dump: Door,
    pub state: State,
    pub drainer: AccessLink,
    pub now: Now,
}

/// Where the machine is beside its run state.
#[derive(Debug, Default)]
pub struct Now {
    /// kvmclock as of the last halt.
    clock: Option<kvm_clock_data>,
    /// The gate is open.
    released: bool,
    /// A loader has succeeded: the failure of a later one is not the end.
    booted: bool,
    exiting: bool,
    /// A `start` that waits for loader and daemons.
    held_start: Option<u32>,
    resets: u64,
    idle_looks: u32,
}

impl Machine {
    /// Runs until the machine is shut down.
    ///
    /// # Errors
    /// The first boot failed, or KVM cannot do what it did before.
    pub fn run(mut self) -> Result<()> {
        let result = self.serve();
        self.farewell();
        let Counters { forwarded, collected, unclaimed, resets } = self.counters();
        info!(
            "accesses: {forwarded} forwarded, {collected} collected, {unclaimed} unclaimed; {resets} resets"
        );
        result
    }

    fn serve(&mut self) -> Result<()> {
        while !self.now.exiting {
            let [signals, notices, loader, dump, console, pci, broker] = self.wait()?;
            if signals {
                self.on_signal()?;
            }
            if notices {
                self.on_notices()?;
            }
            if self.shared.bus.coalescer.is_active() {
                self.drain_output()?;
            }
            if loader {
                let ended = self.boot.advance(&self.vm.ram);
                self.after_loader(ended)?;
            }
            if dump {
                self.on_dump();
            }
            if console {
                self.on_peer(Daemon::Console);
            }
            if pci {
                self.on_peer(Daemon::Pci);
            }
            if broker && !self.now.exiting {
                if let Some(request) = self.broker.receive(|_| {}) {
                    self.on_request(request)?;
                }
            }
            self.look_at_deadlines()?;
            self.try_start()?;
            self.release()?;
        }
        Ok(())
    }

    /// Waits; which sources have become readable.
    fn wait(&self) -> Result<[bool; 7]> {
        let collects = self.shared.bus.coalescer.is_active() && self.shared.bus.console.there().is_some();
        let timeout = if collects {
            PollTimeout::from(PERIOD_MS)
        } else if self.has_deadlines() {
            PollTimeout::from(DEADLINE_STEP_MS)
        } else {
            PollTimeout::NONE
        };
        let sources = [
            Some(self.host.signals.as_fd()),
            Some(self.shared.notices.as_fd()),
            self.boot.door.poll_fd(),
            self.dump.poll_fd(),
            self.peers.first().and_then(|console| console.door.poll_fd()),
            self.peers.get(1).and_then(|pci| pci.door.poll_fd()),
            self.broker.poll_fd(),
        ];
        let mut fds: Vec<_> =
            sources.iter().flatten().map(|fd| PollFd::new(*fd, PollFlags::POLLIN)).collect();
        match poll(&mut fds, timeout) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(errno) => return Err(system("poll")(errno)),
        }
        let mut polled = fds.iter();
        // A door that is shut was not polled; any event counts, also the end of a link.
        Ok(sources.map(|source| {
            source.is_some() && polled.next().is_some_and(|p| p.revents().is_some_and(|e| !e.is_empty()))
        }))
    }

    fn has_deadlines(&self) -> bool {
        let others = [&self.boot.door, &self.broker, &self.dump];
        let mut doors = self.peers.iter().map(|peer| &peer.door).chain(others);
        matches!(self.boot.phase, Phase::Loading(_)) || doors.any(|door| door.is_greeting())
    }

    fn look_at_deadlines(&mut self) -> Result<()> {
        if self.has_deadlines() {
            self.peers.iter_mut().for_each(|peer| peer.door.expire());
            self.broker.expire();
            self.dump.expire();
            let expired = self.boot.expire(self.are_there());
            self.after_loader(expired)?;
        }
        Ok(())
    }

    /// Carries out what the state machine decided.
    fn apply(&mut self, change: impl FnOnce(&mut State, &mut Vec<Effect>)) -> Result<()> {
        let mut effects = Vec::new();
        change(&mut self.state, &mut effects);
        let last = effects.contains(&Effect::Exit);
        // What a reset or the end makes meaningless need not be finished.
        self.shared.bus.discard_waiting(last || effects.contains(&Effect::Reset));
        for effect in effects {
            match effect {
                Effect::Halt => self.halt(last)?,
                Effect::Release => self.release()?,
                Effect::Reset => self.reset()?,
                Effect::Tell(event, state) => self.tell_broker(event, state),
                Effect::Exit => self.now.exiting = true,
            }
        }
        Ok(())
    }

    /// Stops all vCPUs, delivers what they wrote, then stops the devices and kvmclock.
    fn halt(&mut self, last: bool) -> Result<()> {
        if !std::mem::take(&mut self.now.released) {
            return Ok(());
        }
        self.shared.gate.close();
        self.kick_all();
        let patience = if last { EXIT_PATIENCE } else { STOP_PATIENCE };
        if !self.wait_idle(patience) {
            // Who is there answers in time or is given up by whom it lets wait.
            let all = self.are_there();
            for peer in self.peers.iter().filter(|peer| all || peer.seat.there().is_none()) {
                peer.seat.fail("it held up a stop");
            }
            self.shared.bus.abandon(&mut self.drainer);
            if !self.shared.gate.wait_idle(LAST_PATIENCE) {
                return Err(Error::Stuck);
            }
        }
        // More than once, because one request may not hold all of a full ring; nobody fills it now.
        while self.flush() == Flushed::Delivered {}
        if !last {
            self.tell_peers(Peer::pause);
        }
        self.now.clock = Some(self.vm.fd.get_clock().map_err(kvm("KVM_GET_CLOCK"))?);
        Ok(())
    }

    /// Waits until no vCPU is inside the gate. A vCPU may wait for a daemon that is away, so one that comes
    /// is let in meanwhile; or for pci, which waits for an answer of this thread.
    fn wait_idle(&mut self, patience: Duration) -> bool {
        let start = Instant::now();
        while !self.shared.gate.wait_idle(HALT_STEP) {
            if start.elapsed() > patience {
                return false;
            }
            self.shared.bus.abandon(&mut self.drainer);
            for daemon in [Daemon::Console, Daemon::Pci] {
                self.look_at_breach(daemon);
                if self.peer(daemon).is_some_and(|peer| peer.door.is_readable()) {
                    self.on_peer(daemon);
                }
            }
            if self.drainer.is_pending() {
                self.flush();
            }
        }
        true
    }

    fn peer(&mut self, daemon: Daemon) -> Option<&mut Peer> {
        self.peers.iter_mut().find(|peer| peer.seat.daemon == daemon)
    }

    /// Whether accesses would be answered.
    fn are_there(&self) -> bool {
        self.peers.iter().all(|peer| peer.seat.there().is_some())
    }

    /// Tells each daemon; whether all have done it.
    fn tell_peers(&mut self, tell: impl Fn(&mut Peer, &Vm) -> peer::Result) -> bool {
        let console = self.tell(Daemon::Console, &tell);
        self.tell(Daemon::Pci, &tell) && console
    }

    /// Has a daemon do something, unless it is given up, and judges it by that.
    fn tell(&mut self, daemon: Daemon, tell: impl Fn(&mut Peer, &Vm) -> peer::Result) -> bool {
        let peer = self.peers.iter_mut().find(|peer| peer.seat.daemon == daemon);
        let Some(peer) = peer.filter(|peer| !peer.seat.is_given_up()) else { return true };
        let Err(fault) = tell(peer, &self.vm) else { return true };
        if peer.judge(fault) {
            self.shared.bus.coalescer.wake();
            self.kick_all();
        }
        false
    }

    /// Delivers collected output, as far as the console is there.
    fn flush(&mut self) -> Flushed {
        let main = self.peers.first().and_then(|console| console.door.poll_fd());
        self.shared.bus.flush(&mut self.drainer, main)
    }

    /// Lets the vCPUs run if the state says so and guest and daemons are there.
    fn release(&mut self) -> Result<()> {
        if self.now.released || self.now.exiting || self.state.run() != RunState::Running {
            return Ok(());
        }
        if self.peers.iter().any(|peer| peer.seat.is_given_up()) {
            return self.apply(State::internal_error);
        }
        if !self.are_there() {
            return Ok(());
        }
        match self.boot.phase {
            Phase::Ready(start) => {
                let Some(first) = self.vcpus.first() else { return Ok(()) };
                let applied = registers::apply(&lock(&first.fd), &start);
                if let Err(error) = applied {
                    self.boot.phase = Phase::Failed;
                    return self.after_loader(Err(format!("its start is impossible: {error}")));
                }
                self.boot.phase = Phase::Started;
            }
            Phase::Started => {}
            Phase::Loading(_) | Phase::Failed => return Ok(()),
        }
        if !self.tell_peers(Peer::resume) {
            return Ok(());
        }
        if let Some(clock) = self.now.clock.take() {
            let clock = kvm_clock_data { clock: clock.clock, ..Default::default() };
            self.vm.fd.set_clock(&clock).map_err(kvm("KVM_SET_CLOCK"))?;
            for vcpu in &self.vcpus {
                // EINVAL: the guest does not use kvmclock on this vCPU.
                let _ = lock(&vcpu.fd).kvmclock_ctrl();
            }
        }
        self.shared.bus.discard_waiting(false);
        self.shared.gate.open();
        self.now.released = true;
        Ok(())
    }

    /// Returns to power-on. The vCPUs are halted.
    fn reset(&mut self) -> Result<()> {
        self.now.resets += 1;
        self.shared.gate.next_epoch();
        self.tell_peers(Peer::reset);
        self.vcpus.iter().for_each(|vcpu| vcpu.forget_nmi());
        if matches!(self.boot.phase, Phase::Started | Phase::Failed) {
            self.power_on.chips.restore(&self.vm.fd)?;
            for (vcpu, state) in self.vcpus.iter().zip(&self.power_on.vcpus) {
                state.restore(&lock(&vcpu.fd))?;
            }
            // Without pci's word a back end may still write what the last guest asked for.
            let asked = self.boot.begin(self.are_there());
            self.after_loader(asked)?;
        }
        Ok(())
    }

    fn after_loader(&mut self, ended: std::result::Result<(), String>) -> Result<()> {
        match ended {
            Ok(()) => {
                self.now.booted |= matches!(self.boot.phase, Phase::Ready(_));
                Ok(())
            }
            Err(text) if !self.now.booted => Err(Error::Loader(text)),
            Err(text) => {
                error!("loader: {text}");
                self.apply(State::internal_error)
            }
        }
    }

    fn kick_all(&self) {
        self.vcpus.iter().for_each(|vcpu| vcpu.kick(self.host.process));
    }

    fn look_at_breach(&mut self, daemon: Daemon) {
        if let Some(why) = self.peer(daemon).and_then(|peer| peer.seat.take_breach()) {
            self.tell(daemon, |_, _| Err(Fault::Broke(why)));
        }
    }

    fn on_peer(&mut self, daemon: Daemon) {
        // Whoever waits repeats what it asked the last one.
        self.tell(daemon, |peer, vm| match peer.door.advance() {
            Arrival::Nothing => Ok(()),
            Arrival::Connected => peer.welcome(vm),
            Arrival::Message => peer.unasked(vm),
        });
    }

    fn on_signal(&mut self) -> Result<()> {
        match self.host.signals.read_signal() {
            Ok(Some(info)) if i32::try_from(info.ssi_signo) == Ok(Signal::SIGPWR as i32) => {
                // What is off has no use for its power button, as with QMP's system_powerdown.
                let on =
                    matches!(self.state.run(), RunState::Prelaunch | RunState::Running | RunState::Paused);
                if on {
                    self.tell(Daemon::Console, Peer::press_power_button);
                }
                self.tell_broker(Event::PowerButton, self.state.run());
                Ok(())
            }
            Ok(Some(_)) => self.apply(|state, out| state.shutdown(Cause::HostSignal, out)),
            _ => Ok(()),
        }
    }

    fn on_notices(&mut self) -> Result<()> {
        for notice in self.shared.notices.take() {
            if self.now.exiting {
                break;
            }
            match notice {
                // What happened before a reset is no longer of interest.
                Notice::Vcpu(epoch, what) if epoch == self.shared.gate.epoch() => self.on_vcpu(what)?,
                Notice::Vcpu(..) => {}
                Notice::Breach(daemon) => self.look_at_breach(daemon),
                Notice::PeerFailed(daemon, why) => {
                    let name = daemon.name();
                    error!("{name} is given up: {why}; the machine cannot go on without it");
                    self.peer(daemon).into_iter().for_each(|peer| peer.door.shut());
                    self.shared.bus.abandon(&mut self.drainer);
                    self.apply(State::internal_error)?;
                }
                Notice::Translated(answer) => self.dump.send(&answer, &[]),
                Notice::Output => self.shared.bus.coalescer.start(&self.vm.fd)?,
            }
        }
        Ok(())
    }

    fn on_vcpu(&mut self, what: What) -> Result<()> {
        match what {
            What::Reset => self.apply(|state, out| state.reset(Cause::GuestReset, out)),
            What::PowerOff => self.apply(|state, out| state.shutdown(Cause::GuestShutdown, out)),
            What::Panicked => self.apply(State::panicked),
            What::KvmError(text) => {
                error!("{text}");
                self.apply(State::internal_error)
            }
        }
    }

    /// Delivers collected output; ends collecting when there has been none for a while.
    fn drain_output(&mut self) -> Result<()> {
        match self.flush() {
            Flushed::Delivered => self.now.idle_looks = 0,
            Flushed::Nothing => self.now.idle_looks += 1,
            Flushed::Waiting => {}
        }
        if self.now.idle_looks >= IDLE_PERIODS {
            self.now.idle_looks = 0;
            let Self { shared, drainer, vm, peers, .. } = self;
            let main = peers.first().and_then(|console| console.door.poll_fd());
            let last = || loop {
                match shared.bus.flush(drainer, main) {
                    Flushed::Delivered => {}
                    flushed => break flushed == Flushed::Nothing,
                }
            };
            shared.bus.coalescer.stop(&vm.fd, last)?;
        }
        Ok(())
    }

    fn try_start(&mut self) -> Result<()> {
        if !self.broker.is_linked() {
            // The next broker asks again.
            self.now.held_start = None;
        }
        let ready = matches!(self.boot.phase, Phase::Ready(_)) && self.are_there();
        if let Some(id) = self.now.held_start.take_if(|_| ready || !self.state.to_start() || self.now.exiting)
        {
            self.apply(State::start)?;
            self.reply(id, Ok(Answer::Done));
        }
        Ok(())
    }

    fn reply(&mut self, id: u32, result: std::result::Result<Answer, Refusal>) {
        self.broker.send(&FromCore::Reply { id, result }, &[]);
    }

    /// Tells what happened.
    fn tell_broker(&mut self, event: Event, state: RunState) {
        self.broker.send(&FromCore::Event { event, state }, &[]);
    }

    /// A dump process gets guest memory, and asks where pages are.
    fn on_dump(&mut self) {
        let Self { dump, vm, .. } = self;
        let welcome = |dump: &mut Door| {
            let regions = vm.ram.iter().map(|ram| ram.region).collect();
            let fds: Vec<_> = vm.ram.iter().map(|ram| ram.fd.as_fd()).collect();
            dump.send(&Memory { regions }, &fds);
        };
        let Some::<Translate>(what) = dump.receive(welcome) else { return };
        match self.vcpus.get(what.cpu as usize) {
            Some(vcpu) => vcpu.translate(what, &self.shared.notices, self.host.process),
            None => dump.send(&Translated { what, pages: Vec::new() }, &[]),
        }
    }

    fn on_request(&mut self, Request { id, op }: Request) -> Result<()> {
        let result = match permitted(op, self.state.run()) {
            Ok(()) => self.carry_out(id, op)?,
            Err(refusal) => Some(Err(refusal)),
        };
        if let Some(result) = result {
            self.reply(id, result);
        }
        Ok(())
    }

    /// The result of a request; none if it is held.
    fn carry_out(&mut self, id: u32, op: Op) -> Result<Option<std::result::Result<Answer, Refusal>>> {
        match op {
            Op::Status => return Ok(Some(Ok(Answer::Status(self.state.run())))),
            Op::Cpus => return Ok(Some(Ok(Answer::Cpus(self.cpus())))),
            Op::Counters => return Ok(Some(Ok(Answer::Counters(self.counters())))),
            Op::Start => {
                // A broker that asks again gets its first answer now.
                if let Some(earlier) = self.now.held_start.replace(id) {
                    self.reply(earlier, Ok(Answer::Done));
                }
                return Ok(None);
            }
            Op::Stop => self.apply(State::stop)?,
            Op::Cont => {
                let mut answer = Ok(());
                self.apply(|state, out| answer = state.cont(out))?;
                return Ok(Some(answer.map(|()| Answer::Done)));
            }
            Op::Reset => self.apply(|state, out| state.reset(Cause::HostQmpSystemReset, out))?,
            Op::Quit => self.apply(|state, out| state.shutdown(Cause::HostQmpQuit, out))?,
            Op::LogDirty(on) => {
                let Self { vm, peers, .. } = self;
                let logged =
                    vm.log_dirty(on).and_then(|()| peers.iter_mut().try_for_each(|p| p.log_dirty(vm, on)));
                let logged = logged.map_err(|error| Refusal::Kvm(error.errno()));
                return Ok(Some(logged.map(|()| Answer::Done)));
            }
            Op::InjectNmi => {
                self.vcpus.iter().for_each(|vcpu| vcpu.request_nmi());
                self.kick_all();
            }
        }
        Ok(Some(Ok(Answer::Done)))
    }

    fn cpus(&self) -> Vec<Cpu> {
        let cpu = |(vcpu, thread_id): (&Arc<Vcpu>, &u32)| Cpu {
            thread_id: *thread_id,
            socket: vcpu.place.socket,
            core: vcpu.place.core,
            thread: vcpu.place.thread,
        };
        self.vcpus.iter().zip(&self.host.threads).map(cpu).collect()
    }

    fn counters(&self) -> Counters {
        Counters { resets: self.now.resets, ..self.shared.bus.counters() }
    }

    /// Says good-bye and lets the broker pass on what is queued.
    fn farewell(&mut self) {
        self.tell_broker(Event::Exiting, self.state.run());
        let start = Instant::now();
        while let Some(left) = FAREWELL.checked_sub(start.elapsed()) {
            if !self.broker.is_linked() {
                return;
            }
            let Some(fd) = self.broker.poll_fd() else { return };
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO);
            if poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], timeout) == Ok(0) {
                return;
            }
            // Requests that come now are no longer answered; only the end counts.
            let _ = self.broker.receive::<Request>(|_| {});
        }
    }
}
