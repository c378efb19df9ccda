//! Starts a VM's compartments, watches them, and ends the VM as a whole.
//!
//! The launcher is the supervisor; no guest or QMP input reaches it. It waits for signals, the end of a
//! compartment, what a compartment says to its starter, core's request for a loader, and log lines.

mod doors;
mod jobs;
mod kept;
pub mod parts;
mod plug;

pub use doors::Asker;
pub use parts::{JOBS, Part};

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use bulkhead_control_api::config;
use bulkhead_control_api::config::ChardevKind;
use bulkhead_control_api::opener::ToOpener;
use bulkhead_jail::footprint;
use bulkhead_jail::pace::Pace;
use bulkhead_jail::topology::{self, Boots, Restart};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::sys::wait::WaitStatus;

use crate::config_blob;
use crate::guard::Guard;
use crate::machine::Bus;
use crate::opener;
use crate::relay::{Pumped, Relay, say};
use crate::rendezvous::{Place, Rendezvous};
use crate::spawn::{self, Host, Order, Started};
use crate::terminal::Terminal;
use doors::Doors;
use jobs::Trigger;
use kept::Kept;
use parts::Key;

/// Reads (of 4 KiB) of an ended compartment's log.
const LAST_READS: u32 = 16;
/// When a compartment that could not be started anew is tried again, and one that ended well, most often with core, is
/// started again if core lives on.
const RETRY_TIME: Duration = Duration::from_secs(1);
/// What the launcher calls itself in messages.
const NAME: &str = "bulkhead";
/// How long core may take to shut down after a signal.
const SHUTDOWN_TIME: Duration = Duration::from_secs(5);
/// How long the others may take to flush once core has ended.
const FLUSH_TIME: Duration = Duration::from_secs(3);
/// A compartment that ends well before it was ready has seen core's end; core's own exit, with the VM to be taken down by
/// KVM, is visible within this, also on a loaded host and under nested virtualization.
const CORE_EXIT_TIME: Duration = Duration::from_secs(5);

/// A VM that is ready to be started: what each compartment is told, and everything it may touch.
pub struct Vm {
    /// `-name`, for `ps`.
    pub name: Option<String>,
    /// Configuration of core.
    pub core: config::Core,
    /// Configuration of the loader.
    pub loader: config::Loader,
    /// Configuration of the console.
    pub console: config::Console,
    /// Configuration of the broker.
    pub broker: config::Broker,
    /// The PCI bus.
    pub bus: Bus,
    /// Opened descriptors by name: `kvm`, `kernel`, `initrd`, `stdio.in`, `stdio.out`, `chardev.*`.
    pub fds: BTreeMap<String, OwnedFd>,
    /// How to set the terminal, if a character device has it.
    pub terminal: Option<Terminal>,
}

struct Running {
    part: Part,
    label: String,
    started: Started,
    relay: Relay,
    log_open: bool,
    /// What it says to its starter comes here, until it closes its end.
    notify: Option<OwnedFd>,
    /// The opener's end of its link to it.
    opener: Option<Asker>,
    ready: bool,
    /// Nothing uses it any more, and it is ended: that it is gone is no news.
    leaving: bool,
}

/// A compartment that is started again when it dies.
#[derive(Default)]
struct Again {
    /// It has been ready once.
    proven: bool,
    /// It is to be started.
    due: bool,
    /// Not before this.
    after: Option<Instant>,
    pace: Pace,
}

impl Again {
    /// When it is to be started, if it is; not before `now`.
    fn when(&self, now: Instant) -> Option<Instant> {
        self.due.then(|| self.after.max(self.pace.next()).map_or(now, |at| at.max(now)))
    }
}

/// The end of a compartment.
struct End {
    part: Part,
    label: String,
    status: WaitStatus,
    /// How long it lived.
    after: Duration,
    /// The step of its start that failed.
    failed: Option<String>,
    /// It was ready.
    ready: bool,
    /// It was ended.
    leaving: bool,
}

struct Supervisor {
    host: Host,
    guard: Guard,
    vm: Vm,
    residents: Vec<Part>,
    meetings: BTreeMap<&'static str, Rendezvous>,
    doors: Doors,
    configs: BTreeMap<Key, OwnedFd>,
    triggers: Vec<Trigger>,
    running: Vec<Running>,
    kept: BTreeMap<Key, Kept>,
    again: BTreeMap<Key, Again>,
    /// All have been ready once.
    ready: bool,
    status: u8,
    deadline: Option<Instant>,
    core_exit: Option<Instant>,
    /// Everything has been killed: further ends explain nothing.
    killed: bool,
}

/// Runs the VM to its end; returns the exit status of `bulkhead run`.
pub fn run(vm: Vm, guard: Guard) -> u8 {
    let terminal = vm.terminal;
    spawn::expect_children();
    let mut supervisor = match Supervisor::new(vm, guard) {
        Ok(supervisor) => supervisor,
        Err(error) => {
            say("<3>", NAME, &error);
            return 1;
        }
    };
    if let Some(terminal) = terminal {
        terminal.set();
    }
    if let Err(error) = supervisor.start_all().and_then(|()| supervisor.watch()) {
        say("<3>", NAME, &error);
        supervisor.status = 1;
    }
    supervisor.kill_all();
    supervisor.guard.finish();
    supervisor.status
}

/// A pair for one-word messages. Not datagrams: those can be sent to any address from either end.
fn packets() -> Result<(OwnedFd, OwnedFd), String> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).map_err(|e| format!("socketpair: {e}"))
}

impl Running {
    /// Takes what the compartment has said to its starter.
    fn listen(&mut self, kept: &mut BTreeMap<Key, Kept>, again: &mut BTreeMap<Key, Again>) {
        let process = self.part.process;
        let Some(notify) = &self.notify else { return };
        let heard = kept.entry(self.part.key()).or_default().listen(process, notify.as_fd());
        if heard.unkept > 0 {
            say("<4>", NAME, &format!("{}: {} descriptors are not kept", self.label, heard.unkept));
        }
        self.ready |= heard.ready;
        if heard.ready && process.restart == Restart::Always {
            again.entry(self.part.key()).or_default().proven = true;
        }
        if heard.closed {
            self.notify = None;
        }
    }
}

/// Names of a character device's descriptors.
fn names_of(kind: &ChardevKind) -> Vec<String> {
    match kind {
        ChardevKind::Null => Vec::new(),
        ChardevKind::Stdio => vec!["stdio.in".to_owned(), "stdio.out".to_owned()],
        ChardevKind::File { fd } | ChardevKind::Socket { fd, .. } => vec![fd.clone()],
    }
}

impl Supervisor {
    fn new(vm: Vm, guard: Guard) -> Result<Self, String> {
        let residents = parts::residents(&vm.bus);
        let all = parts::all(&vm.bus);
        let place = Place::new(|path| guard.directory(path))?;
        let mut meetings = BTreeMap::new();
        for link in parts::links(&all) {
            meetings.insert(link.name, place.listen(SockType::SeqPacket)?);
        }
        let mut triggers = Vec::new();
        for part in JOBS {
            triggers.extend(Trigger::new(part)?);
        }
        let doors = Doors::new(&vm.bus, &place)?;
        let mut configs = BTreeMap::new();
        configs.insert(("core", None), config_blob::seal(&vm.core)?);
        configs.insert(("loader", None), config_blob::seal(&vm.loader)?);
        configs.insert(("console", None), config_blob::seal(&vm.console)?);
        configs.insert(("broker", None), config_blob::seal(&vm.broker)?);
        configs.insert(("pci", None), config_blob::seal(&vm.bus.config)?);
        for (device, daemon) in vm.bus.daemons.iter().enumerate() {
            configs.insert((daemon.process().name, Some(device)), daemon.seal()?);
        }
        Ok(Self {
            host: Host::look(&all)?,
            residents,
            doors,
            guard,
            vm,
            meetings,
            configs,
            triggers,
            running: Vec::new(),
            kept: BTreeMap::new(),
            again: BTreeMap::new(),
            ready: false,
            status: 0,
            deadline: None,
            core_exit: None,
            killed: false,
        })
    }

    fn start_all(&mut self) -> Result<(), String> {
        for part in self.residents.clone() {
            self.start(part)?;
        }
        // What a compartment has is its own: /dev/kvm is core's alone, and a client sees the end of a
        // connection when its compartment closes it. What a compartment that is started again needs stays.
        let given = self.residents.iter().flat_map(|part| self.opened_for(*part));
        let given: Vec<String> = given.map(|(opened, _)| opened).collect();
        let lasting = self.lasting();
        self.vm.fds.retain(|name, _| !given.contains(name) || lasting.contains(name));
        Ok(())
    }

    /// What the launcher calls a compartment.
    fn label(&self, part: Part) -> String {
        match self.vm.bus.daemon(part) {
            Some(daemon) => format!("{} {}", part.process.binary, daemon.key),
            None => part.process.binary.to_owned(),
        }
    }

    /// Starts one compartment with the descriptors that the topology and its configuration name.
    fn start(&mut self, part: Part) -> Result<(), String> {
        let process = part.process;
        let mut connections: Vec<(String, OwnedFd)> = Vec::new();
        for link in topology::LINKS.iter().filter(|l| l.connector == process.name) {
            if let Some(meeting) = self.meetings.get(link.name) {
                connections.push((link.as_name.to_owned(), meeting.connect()?));
            }
        }
        let (notify, theirs) = packets()?;
        let asker = if parts::keeps_opener(process) { Some(Asker::pair()?) } else { None };
        let daemon = self.vm.bus.daemon(part);
        daemon.into_iter().for_each(|daemon| opener::leave_unused(daemon, &self.vm.fds));
        let mut fds: Vec<(String, BorrowedFd<'_>)> = Vec::new();
        fds.extend(self.configs.get(&part.key()).map(|fd| ("config".to_owned(), fd.as_fd())));
        for (name, meeting) in &self.meetings {
            if process.may_have(name) {
                fds.push(((*name).to_owned(), meeting.listener()));
            }
        }
        for name in ["vhost", "side"] {
            let listener = daemon.and_then(|daemon| self.doors.listener(name, &daemon.key));
            fds.extend(listener.map(|listener| (name.to_owned(), listener)));
        }
        fds.extend(connections.iter().map(|(name, fd)| (name.clone(), fd.as_fd())));
        if process.boots == Boots::Vm {
            let asks = self.triggers.iter().filter(|trigger| process.may_have(trigger.name));
            fds.extend(asks.map(|trigger| (trigger.name.to_owned(), trigger.theirs())));
            fds.push(("notify".into(), theirs.as_fd()));
        }
        fds.extend(asker.iter().map(|(_, fd)| ("opener".to_owned(), fd.as_fd())));
        for (opened, name) in self.opened_for(part) {
            fds.extend(self.vm.fds.get(&opened).map(|fd| (name, fd.as_fd())));
        }
        let kept = self.kept.entry(part.key()).or_default();
        fds.extend(kept.iter().map(|(name, fd)| (name.clone(), fd)));
        let device = daemon.map(|daemon| daemon.key.as_str());
        let names = self.vm.name.as_deref().into_iter().chain(device).collect();
        let order = Order { process, device: part.device, names, fds, ram: self.vm.core.ram };
        let started = self.host.start(order, |pidfd| self.guard.process(pidfd))?;
        let label = self.label(part);
        let (opener, relay) = (asker.map(|(link, _)| link), Relay::new(process.binary, label.clone()));
        let notify = Some(notify);
        let (log_open, ready, leaving) = (true, false, false);
        let running = Running { part, label, started, relay, log_open, notify, opener, ready, leaving };
        self.running.push(running);
        Ok(())
    }

    /// Whether no process of a compartment is left: of a daemon that is ended for another device the next one waits for that,
    /// which takes as long as storage holds it.
    fn is_gone(&self, key: Key) -> bool {
        !self.running.iter().any(|running| running.part.key() == key)
    }

    /// Starts compartments anew that have died. Whatever hinders that is said, and it is tried again.
    fn start_again(&mut self) {
        let now = Instant::now();
        let is_due = |again: &Again| again.when(now) == Some(now);
        let due: Vec<Key> =
            self.again.iter().filter(|(_, again)| is_due(again)).map(|(key, _)| *key).collect();
        let is_due = |part: &Part| due.contains(&part.key()) && self.is_gone(part.key());
        let parts: Vec<Part> = self.residents.iter().copied().filter(is_due).collect();
        for part in parts {
            let label = self.label(part);
            if let Some(again) = self.again.get_mut(&part.key()) {
                again.due = false;
                again.pace.take();
                if again.after.take().is_some() {
                    say("<4>", NAME, &format!("{label} is not there and is started again"));
                }
            }
            if let Err(error) = self.start_and_connect(part) {
                say("<4>", NAME, &format!("{error}: it is tried again in a second"));
                self.may_start_again(part, Some(now + RETRY_TIME));
            }
        }
    }

    /// Starts a compartment anew, and gives the peers that connect to it new connections.
    fn start_and_connect(&mut self, part: Part) -> Result<(), String> {
        let mut connections = Vec::new();
        for link in topology::LINKS.iter().filter(|l| l.listener == part.process.name) {
            if let Some(meeting) = self.meetings.get(link.name) {
                connections.push((link, meeting.connect()?));
            }
        }
        self.start(part)?;
        for (link, connection) in connections {
            if let Some(opener) = self.find(link.connector).and_then(|peer| peer.opener.as_ref()) {
                // A peer that is dying gets its connection when it is started anew.
                let _ = opener.give(link.as_name, connection.as_fd());
            }
        }
        Ok(())
    }

    /// Names of the opened descriptors that a compartment needs again when it is started anew: all but
    /// connections, whose end its clients must see.
    fn lasting(&self) -> Vec<String> {
        let console = self.vm.console.chardevs.iter();
        let chardevs = console.chain(self.vm.broker.monitors.iter().map(|monitor| &monitor.chardev));
        let lasts = |kind: &ChardevKind| !matches!(kind, ChardevKind::Socket { server: false, .. });
        let devices =
            self.vm.bus.daemons.iter().flat_map(|daemon| &daemon.fds).map(|(opened, _)| opened.clone());
        let listeners = self.vm.bus.listeners().map(str::to_owned);
        let chardevs = chardevs.filter(|c| lasts(&c.kind)).flat_map(|c| names_of(&c.kind));
        chardevs.chain(devices).chain(listeners).collect()
    }

    /// Names of the opened descriptors that a process gets, each with its own name for it: those of the topology that are
    /// not per object, and those that its character devices or its device name.
    fn opened_for(&self, part: Part) -> Vec<(String, String)> {
        let same = |name: String| (name.clone(), name);
        if let Some(daemon) = self.vm.bus.daemon(part) {
            return daemon.given();
        }
        match part.process.name {
            "console" => self.vm.console.chardevs.iter().flat_map(|c| names_of(&c.kind)).map(same).collect(),
            "broker" => {
                let monitors = self.vm.broker.monitors.iter().flat_map(|m| names_of(&m.chardev.kind));
                let members = self.vm.broker.fdsets.iter().map(|member| member.fd.clone());
                monitors.chain(members).map(same).collect()
            }
            "loader" => {
                let tables = self.vm.loader.tables.iter().flat_map(|table| table.files.clone());
                let files = ["kernel", "initrd"].map(str::to_owned);
                files.into_iter().chain(tables).map(same).collect()
            }
            "pci" => self.vm.bus.listeners().map(|name| same(name.to_owned())).collect(),
            _ => part.process.fds.iter().map(|f| same(f.trim_end_matches('?').to_owned())).collect(),
        }
    }

    /// Waits and acts until nothing runs any more.
    fn watch(&mut self) -> Result<(), String> {
        let mut mask = SigSet::empty();
        for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGCONT] {
            mask.add(signal);
        }
        mask.thread_block().map_err(|e| format!("sigprocmask: {e}"))?;
        let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
            .map_err(|e| format!("signalfd: {e}"))?;
        while !self.running.is_empty() || self.again.values().any(|again| again.due) {
            let ready = self.wait(&signals)?;
            let ready = |at: usize| ready.get(at) == Some(&true);
            if ready(0) {
                self.take_signals(&signals);
            }
            if ready(1) {
                self.replace_guard()?;
            }
            self.listen();
            self.connect_back_ends();
            self.take_logs_and_ends();
            self.triggers.iter_mut().for_each(Trigger::listen);
            self.start_asked()?;
            self.start_again();
            self.check_deadlines();
        }
        Ok(())
    }

    /// Which of [signals, guard] have something; returns also for ends, logs, words to the starter and requests.
    fn wait(&self, signals: &SignalFd) -> Result<Vec<bool>, String> {
        let on = |fd| PollFd::new(fd, PollFlags::POLLIN);
        let mut fds = vec![on(signals.as_fd()), on(self.guard.life())];
        fds.extend(self.triggers.iter().map(Trigger::poll_fd));
        for running in &self.running {
            fds.push(on(running.started.pidfd.as_fd()));
            // A log at its end would be ready for ever: wait for the process instead.
            let log =
                if running.log_open { running.started.log.as_fd() } else { running.started.pidfd.as_fd() };
            fds.push(on(log));
            fds.extend(running.notify.as_ref().map(|notify| on(notify.as_fd())));
            fds.extend(running.opener.as_ref().map(Asker::poll_fd));
        }
        let again = self.again.iter().filter(|(key, _)| self.is_gone(**key));
        let again = again.filter_map(|(_, again)| again.when(Instant::now())).min();
        let asked = self.triggers.iter().filter(|trigger| self.is_gone(trigger.part.key()));
        let asked = asked.filter_map(Trigger::next).min();
        let next = [self.deadline, self.core_exit, asked, again].into_iter().flatten().min();
        let timeout = next.map_or(PollTimeout::NONE, |at| {
            let left = at.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
            PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
        });
        match poll(&mut fds, timeout) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {
                Ok(fds.iter().map(|fd| fd.any().unwrap_or(false)).collect())
            }
            Err(e) => Err(format!("poll: {e}")),
        }
    }

    fn take_signals(&mut self, signals: &SignalFd) {
        while let Ok(Some(info)) = signals.read_signal() {
            if i32::try_from(info.ssi_signo) == Ok(Signal::SIGCONT as i32) {
                if let Some(terminal) = self.vm.terminal {
                    terminal.set();
                }
                continue;
            }
            say("<5>", NAME, &format!("terminating on signal {} from pid {}", info.ssi_signo, info.ssi_pid));
            match (self.deadline, self.find("core")) {
                (None, Some(core)) => {
                    core.started.signal(Signal::SIGTERM);
                    self.deadline = Some(Instant::now() + SHUTDOWN_TIME);
                }
                // A second signal means now.
                _ => self.kill_all(),
            }
        }
    }

    /// Takes what compartments say to their starter.
    fn listen(&mut self) {
        for running in &mut self.running {
            running.listen(&mut self.kept, &mut self.again);
        }
        let is_ready = |part: &Part| self.running.iter().any(|r| r.part.key() == part.key() && r.ready);
        if !self.ready && self.residents.iter().all(is_ready) {
            self.ready = true;
            footprint::shrink();
            // Without a service manager this does nothing.
            let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
        }
    }

    /// Answers pci, which may ask for connections, and the broker, which may say where back ends listen.
    fn connect_back_ends(&mut self) {
        let Self { running, doors, vm, .. } = self;
        let mut plugs = Vec::new();
        for running in running {
            let process = running.part.process.name;
            let mut act = |request: &ToOpener| match (process, request) {
                ("pci", ToOpener::Connect { name }) => doors.connect(name, &vm.fds).map(Some),
                ("broker", ToOpener::Define { name, path, must_exist }) => {
                    doors.define((name, path, *must_exist), &vm.fds).map(|()| None)
                }
                ("broker", ToOpener::Output { path, .. }) => {
                    let in_use: Vec<BorrowedFd<'_>> = vm.fds.values().map(AsFd::as_fd).collect();
                    opener::output_now(path, &in_use).map(Some)
                }
                ("broker", ToOpener::Forget { name }) => doors.forget(name).map(|()| None),
                ("broker", ToOpener::Begin { .. } | ToOpener::End { .. }) => {
                    plugs.push(plug::Plug::of(&vm.bus, request)?);
                    Ok(None)
                }
                _ => Err(nix::errno::Errno::EPERM),
            };
            if running.opener.as_mut().is_some_and(|opener| !opener.serve(&mut act)) {
                running.opener = None;
            }
        }
        for plug in plugs {
            self.plug(plug);
        }
    }

    /// Starts what was asked for, once the last one of its kind is gone and the budget allows it.
    fn start_asked(&mut self) -> Result<(), String> {
        let ending = self.killed || self.deadline.is_some();
        let free: Vec<bool> = self.triggers.iter().map(|trigger| self.is_gone(trigger.part.key())).collect();
        let mut parts = Vec::new();
        for (trigger, free) in self.triggers.iter_mut().zip(free) {
            if free && !ending && trigger.take() {
                parts.push(trigger.part);
            }
        }
        for part in parts {
            match self.start(part) {
                // Who asked misses it: core fails the boot, the broker the command.
                Err(error) if self.ready || part.process.boots == Boots::Job => say("<3>", NAME, &error),
                started => started?,
            }
        }
        Ok(())
    }

    /// The guard was killed: another one takes over.
    fn replace_guard(&mut self) -> Result<(), String> {
        say("<4>", NAME, "the guard has died and is replaced");
        self.guard.replace()?;
        for running in &self.running {
            self.guard.process(running.started.pidfd.as_fd())?;
        }
        Ok(())
    }

    fn find(&self, name: &str) -> Option<&Running> {
        self.running.iter().find(|r| r.part.process.name == name)
    }

    fn take_logs_and_ends(&mut self) {
        let mut ended = Vec::new();
        let Self { running, kept, again, .. } = self;
        running.retain_mut(|running| {
            if running.log_open && running.relay.pump(&mut running.started.log) == Pumped::End {
                running.log_open = false;
            }
            let Some(status) = running.started.reap() else { return true };
            // What it has asked to be kept before it died is kept.
            running.listen(kept, again);
            // What it still said, within bounds: another process may hold the log open.
            for _ in 0..LAST_READS {
                if !running.log_open || running.relay.pump(&mut running.started.log) != Pumped::Some {
                    break;
                }
            }
            let failed = running.started.failed_step().ok().flatten();
            let after = running.started.since.elapsed();
            let (part, label) = (running.part, running.label.clone());
            let (ready, leaving) = (running.ready, running.leaving);
            ended.push(End { part, label, status, after, failed, ready, leaving });
            false
        });
        // Core first: its end explains the others'.
        ended.sort_by_key(|end| end.part.process.name != "core");
        for end in ended {
            self.ended(&end);
        }
    }

    fn ended(&mut self, end: &End) {
        let label = &end.label;
        let how = match (&end.failed, end.status) {
            (Some(step), _) => format!("could not be started: {step}"),
            (None, WaitStatus::Exited(_, code)) => format!("exited with status {code}"),
            (None, WaitStatus::Signaled(_, signal, _)) => format!("was killed by {signal}"),
            (None, other) => format!("ended: {other:?}"),
        };
        let code = if let WaitStatus::Exited(_, code) = end.status { Some(code) } else { None };
        say("<6>", NAME, &format!("{label} {how} after {:.1} ms", end.after.as_secs_f64() * 1e3));
        if self.killed || end.leaving {
            return;
        }
        // Who asked for it hears of its end through its link and decides.
        if end.part.process.boots != Boots::Vm {
            if let Some(step) = &end.failed {
                say("<3>", NAME, &format!("cannot start {label}: {step} (see `bulkhead doctor`)"));
            }
            return;
        }
        if end.part.process.name == "core" && end.failed.is_none() {
            self.core_ended(&how, code);
            return;
        }
        if end.part.device.is_some() && end.failed.is_none() && self.find("core").is_none() {
            return;
        }
        let well = end.failed.is_none() && code == Some(0);
        let again = self.may_start_again(end.part, well.then(|| Instant::now() + RETRY_TIME));
        match (again, self.find("core").is_some()) {
            // Most often core's end comes next: nothing to say yet.
            (true, _) if well => {}
            (true, _) => {
                let now = Instant::now();
                let at = self.again.get(&end.part.key()).and_then(|again| again.when(now));
                let pause = if at > Some(now) { " in a second" } else { "" };
                say("<4>", NAME, &format!("{label} {how}: it is started again{pause}"));
            }
            (false, true) if well => self.core_exit = Some(Instant::now() + CORE_EXIT_TIME),
            (false, false) if well => {}
            // It was started again while core ended.
            (false, false) if !end.ready && self.has_been_ready(end.part) => {}
            (false, _) => self.lost(end, &how),
        }
    }

    fn core_ended(&mut self, how: &str, code: Option<i32>) {
        self.core_exit = None;
        self.deadline = Some(Instant::now() + FLUSH_TIME);
        // A peer that core had not let in yet sees the end now.
        self.meetings.clear();
        // A device daemon knows of no core: nothing asks it any more, and what it was told to write is written.
        for running in self.running.iter().filter(|running| running.part.device.is_some()) {
            running.started.signal(Signal::SIGKILL);
        }
        for again in self.again.values_mut() {
            again.due = false;
        }
        if code != Some(0) {
            self.status = 1;
        }
        // Status 1 comes with core's own words.
        if !matches!(code, Some(0 | 1)) {
            say("<3>", NAME, &format!("bulkhead-core {how}: the VM ends"));
        }
    }

    fn has_been_ready(&self, part: Part) -> bool {
        self.again.get(&part.key()).is_some_and(|again| again.proven)
    }

    /// Whether a compartment that has died is to be started again, which is noted then.
    fn may_start_again(&mut self, part: Part, after: Option<Instant>) -> bool {
        let lives = self.deadline.is_none() && self.find("core").is_some();
        match self.again.get_mut(&part.key()) {
            Some(again) if again.proven && lives => {
                (again.due, again.after) = (true, after);
                true
            }
            _ => false,
        }
    }

    /// A compartment that is not restarted has died while the VM runs.
    fn lost(&mut self, end: &End, how: &str) {
        self.status = 1;
        let line = match &end.failed {
            Some(step) => format!("cannot start {}: {step} (see `bulkhead doctor`)", end.label),
            None => format!("{} {how}: the VM ends", end.label),
        };
        say("<3>", NAME, &line);
        self.kill_all();
    }

    fn check_deadlines(&mut self) {
        let passed = |at: Option<Instant>| at.is_some_and(|at| Instant::now() >= at);
        if passed(self.core_exit) {
            self.core_exit = None;
            self.status = 1;
            say("<3>", NAME, "a compartment has ended while core runs on: the VM ends");
            self.kill_all();
        }
        if passed(self.deadline) {
            self.deadline = None;
            for running in &self.running {
                say("<4>", NAME, &format!("{} does not end and is killed", running.label));
            }
            self.kill_all();
        }
    }

    fn kill_all(&mut self) {
        self.killed = true;
        self.again.clear();
        for running in &self.running {
            running.started.signal(Signal::SIGKILL);
        }
    }
}
