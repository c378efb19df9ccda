//! Starts a VM's compartments, watches them, and ends the VM as a whole.
//!
//! The launcher is the supervisor; no guest or QMP input reaches it. It waits for four things:
//! signals, the end of a compartment, core's request for a loader, and log lines.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use bulkhead_control_api::config;
use bulkhead_control_api::config::ChardevKind;
use bulkhead_jail::topology::{self, Process};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::socket::{self, AddressFamily, MsgFlags, SockFlag, SockType, socketpair};
use nix::sys::wait::WaitStatus;

use crate::config_blob;
use crate::guard::Guard;
use crate::relay::{Relay, say};
use crate::rendezvous::Rendezvous;
use crate::spawn::{Host, Order, Started};
use crate::terminal::Terminal;

/// What the launcher calls itself in messages.
const NAME: &str = "bulkhead";
/// How long core may take to shut down after a signal.
const SHUTDOWN_TIME: Duration = Duration::from_secs(5);
/// How long the others may take to flush once core has ended.
const FLUSH_TIME: Duration = Duration::from_secs(3);
/// A compartment that ends well has seen core's end; core's own exit is visible within this.
const CORE_EXIT_TIME: Duration = Duration::from_millis(500);

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
    /// Opened descriptors by name: `kvm`, `kernel`, `initrd`, `stdio.in`, `stdio.out`, `chardev.*`.
    pub fds: BTreeMap<String, OwnedFd>,
    /// How to set the terminal, if a character device has it.
    pub terminal: Option<Terminal>,
}

struct Running {
    started: Started,
    relay: Relay,
    log_open: bool,
}

struct Supervisor {
    host: Host,
    guard: Guard,
    vm: Vm,
    meetings: BTreeMap<&'static str, Rendezvous>,
    configs: BTreeMap<&'static str, OwnedFd>,
    boot: (OwnedFd, OwnedFd),
    notify: (OwnedFd, OwnedFd),
    running: Vec<Running>,
    ready: usize,
    boots: u32,
    status: u8,
    deadline: Option<Instant>,
    core_exit: Option<Instant>,
    /// Everything has been killed: further ends explain nothing.
    killed: bool,
}

/// Runs the VM to its end; returns the exit status of `bulkhead run`.
pub fn run(vm: Vm, guard: Guard) -> u8 {
    let terminal = vm.terminal;
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

fn datagrams() -> Result<(OwnedFd, OwnedFd), String> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    socketpair(AddressFamily::Unix, SockType::Datagram, None, flags).map_err(|e| format!("socketpair: {e}"))
}

impl Supervisor {
    fn new(vm: Vm, guard: Guard) -> Result<Self, String> {
        let mut meetings = BTreeMap::new();
        for link in topology::LINKS {
            meetings.insert(link.name, Rendezvous::new()?);
        }
        let mut configs = BTreeMap::new();
        configs.insert("core", config_blob::seal(&vm.core)?);
        configs.insert("loader", config_blob::seal(&vm.loader)?);
        configs.insert("console", config_blob::seal(&vm.console)?);
        configs.insert("broker", config_blob::seal(&vm.broker)?);
        Ok(Self {
            host: Host::look()?,
            guard,
            vm,
            meetings,
            configs,
            boot: datagrams()?,
            notify: datagrams()?,
            running: Vec::new(),
            ready: 0,
            boots: 0,
            status: 0,
            deadline: None,
            core_exit: None,
            killed: false,
        })
    }

    fn start_all(&mut self) -> Result<(), String> {
        for process in topology::PROCESSES.iter().filter(|p| p.boots == topology::Boots::Vm) {
            self.start(process)?;
        }
        Ok(())
    }

    /// Starts one compartment with the descriptors that the topology and its configuration name.
    fn start(&mut self, process: &'static Process) -> Result<(), String> {
        let mut connections: Vec<(String, OwnedFd)> = Vec::new();
        for link in topology::LINKS.iter().filter(|l| l.connector == process.name) {
            if let Some(meeting) = self.meetings.get(link.name) {
                connections.push((link.as_name.to_owned(), meeting.connect()?));
            }
        }
        let mut fds: Vec<(String, BorrowedFd<'_>)> = Vec::new();
        fds.extend(self.configs.get(process.name).map(|fd| ("config".to_owned(), fd.as_fd())));
        for (name, meeting) in &self.meetings {
            if process.may_have(name) {
                fds.push(((*name).to_owned(), meeting.listener()));
            }
        }
        fds.extend(connections.iter().map(|(name, fd)| (name.clone(), fd.as_fd())));
        if process.may_have("boot") {
            fds.push(("boot".into(), self.boot.1.as_fd()));
        }
        if process.boots == topology::Boots::Vm {
            fds.push(("notify".into(), self.notify.1.as_fd()));
        }
        let wanted = self.opened_for(process);
        fds.extend(
            self.vm.fds.iter().filter(|(n, _)| wanted.contains(n)).map(|(n, fd)| (n.clone(), fd.as_fd())),
        );
        let order = Order { process, vm: self.vm.name.as_deref(), fds, ram: self.vm.core.ram };
        let started = self.host.start(order)?;
        self.guard.process(started.pidfd.as_fd())?;
        self.running.push(Running { started, relay: Relay::new(process.binary), log_open: true });
        Ok(())
    }

    /// Names of the opened descriptors that a process gets: those of the topology that are not per
    /// object, and those that its character devices name.
    fn opened_for(&self, process: &Process) -> Vec<String> {
        let of = |kind: &ChardevKind| match kind {
            ChardevKind::Null => Vec::new(),
            ChardevKind::Stdio => vec!["stdio.in".to_owned(), "stdio.out".to_owned()],
            ChardevKind::File { fd } | ChardevKind::Socket { fd, .. } => vec![fd.clone()],
        };
        match process.name {
            "console" => self.vm.console.chardevs.iter().flat_map(|c| of(&c.kind)).collect(),
            "broker" => self.vm.broker.monitors.iter().flat_map(|m| of(&m.chardev.kind)).collect(),
            _ => process.fds.iter().map(|f| f.trim_end_matches('?').to_owned()).collect(),
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
        while !self.running.is_empty() {
            let ready = self.wait(&signals)?;
            if ready.first() == Some(&true) {
                self.take_signals(&signals);
            }
            if ready.get(1) == Some(&true) {
                self.take_ready();
            }
            self.take_logs_and_ends(ready.get(3..).unwrap_or(&[]));
            if ready.get(2) == Some(&true) {
                self.take_boot()?;
            }
            self.check_deadlines();
        }
        Ok(())
    }

    /// Which of [signals, notify, boot, (end, log) of each compartment] have something.
    fn wait(&self, signals: &SignalFd) -> Result<Vec<bool>, String> {
        let on = |fd| PollFd::new(fd, PollFlags::POLLIN);
        let mut fds = vec![on(signals.as_fd()), on(self.notify.0.as_fd()), on(self.boot.0.as_fd())];
        for running in &self.running {
            fds.push(on(running.started.pidfd.as_fd()));
            // A log at its end would be ready for ever: wait for the process instead.
            let log =
                if running.log_open { running.started.log.as_fd() } else { running.started.pidfd.as_fd() };
            fds.push(on(log));
        }
        let next = [self.deadline, self.core_exit].into_iter().flatten().min();
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

    fn take_ready(&mut self) {
        let mut word = [0; 32];
        while let Ok(len) = socket::recv(self.notify.0.as_raw_fd(), &mut word, MsgFlags::MSG_DONTWAIT) {
            if word.get(..len) == Some(b"READY=1") {
                self.ready += 1;
            }
        }
        let all = topology::PROCESSES.iter().filter(|p| p.boots == topology::Boots::Vm).count();
        if self.ready == all {
            self.ready += 1;
            // Without a service manager this does nothing.
            let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
        }
    }

    fn take_boot(&mut self) -> Result<(), String> {
        let mut word = [0; 8];
        let asked = socket::recv(self.boot.0.as_raw_fd(), &mut word, MsgFlags::MSG_DONTWAIT).is_ok();
        if asked && self.deadline.is_none() && self.find("loader").is_none() {
            self.boots += 1;
            self.start(&topology::LOADER)?;
        }
        Ok(())
    }

    fn find(&self, name: &str) -> Option<&Running> {
        self.running.iter().find(|r| r.started.process.name == name)
    }

    fn take_logs_and_ends(&mut self, ready: &[bool]) {
        for (running, ready) in self.running.iter_mut().zip(ready.chunks(2)) {
            if running.log_open && ready.get(1) == Some(&true) {
                running.log_open = running.relay.pump(&mut running.started.log);
            }
        }
        let mut ended = Vec::new();
        self.running.retain_mut(|running| {
            let Some(status) = running.started.reap() else { return true };
            while running.log_open {
                running.log_open = running.relay.pump(&mut running.started.log);
            }
            let failed = running.started.failed_step().ok().flatten();
            ended.push((running.started.process, status, running.started.since.elapsed(), failed));
            false
        });
        // Core first: its end explains the others'.
        ended.sort_by_key(|(process, ..)| process.name != "core");
        for (process, status, after, failed) in ended {
            if let Some(step) = failed {
                say("<3>", NAME, &format!("cannot start {}: {step} (see `bulkhead doctor`)", process.binary));
            }
            self.ended(process, status, after);
        }
    }

    fn ended(&mut self, process: &'static Process, status: WaitStatus, after: Duration) {
        let how = match status {
            WaitStatus::Exited(_, code) => format!("exited with status {code}"),
            WaitStatus::Signaled(_, signal, _) => format!("was killed by {signal}"),
            other => format!("ended: {other:?}"),
        };
        let code = if let WaitStatus::Exited(_, code) = status { Some(code) } else { None };
        say("<6>", NAME, &format!("{} {how} after {:.1} ms", process.binary, after.as_secs_f64() * 1e3));
        if self.killed {
            return;
        }
        match (process.name, code) {
            ("core", _) => {
                self.core_exit = None;
                self.deadline = Some(Instant::now() + FLUSH_TIME);
                if code != Some(0) {
                    self.status = 1;
                }
                // Status 1 comes with core's own words.
                if !matches!(code, Some(0 | 1)) {
                    say("<3>", NAME, &format!("{} {how}: the VM ends", process.binary));
                }
            }
            // Core hears of a loader's failure through its link and decides.
            ("loader", _) => {}
            (_, Some(0)) if self.find("core").is_some() => {
                self.core_exit = Some(Instant::now() + CORE_EXIT_TIME);
            }
            (_, Some(0)) => {}
            _ => self.lost(process, &how),
        }
    }

    /// A compartment that is not restarted has died while the VM runs.
    fn lost(&mut self, process: &Process, how: &str) {
        self.status = 1;
        say(
            "<3>",
            NAME,
            &format!("{} {how}: the VM ends (this compartment is not restarted)", process.binary),
        );
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
                say("<4>", NAME, &format!("{} does not end and is killed", running.started.process.binary));
            }
            self.kill_all();
        }
    }

    fn kill_all(&mut self) {
        self.killed = true;
        for running in &self.running {
            running.started.signal(Signal::SIGKILL);
        }
    }
}
