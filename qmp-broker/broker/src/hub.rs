//! What all clients share: the peers, the run state, the events, the end.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bulkhead_control_api::{balloon, config, console, core, pci};
use bulkhead_jail::topology;
use bulkhead_jail::warn;
use bulkhead_qapi::request::{self, Call, Mode, Refusal};
use bulkhead_qapi::table::Role;
use bulkhead_qapi::types::run_state::{
    GuestPanicAction, GuestPanickedData, ResetData, ShutdownCause, ShutdownData,
};
use bulkhead_qapi::{Error, json, table};
use serde_json::{Value, json};
use tokio::sync::{Mutex, Notify};
use tokio::time::{Instant, sleep_until, timeout, timeout_at};

use crate::audit::Audit;
use crate::client::Client;
use crate::commands::{self, Known, Reply, Step, reply};
use crate::descriptors::Descriptors;
use crate::dump::Dumps;
use crate::monitor::Monitor;
use crate::opener::Opener;
use crate::peer::{NoAnswer, Peer};
use crate::policy::{Credentials, Denied, Policy, Subject};
use crate::store::Store;
use crate::throttle::Throttle;

/// How long a client waits for core: a stop or reset may take two waits for vCPUs (6 s and 10 s) and
/// three for a console (5 s each), of which no case has all.
const CORE: Duration = Duration::from_secs(30);
/// How long a client waits for the console.
const CONSOLE: Duration = Duration::from_secs(5);
/// How long a client waits for pci, which may have to wait for a back end.
const PCI: Duration = Duration::from_secs(10);
/// How long a client waits for the balloon.
const BALLOON: Duration = Duration::from_secs(5);
/// How long a client waits for the machine's start.
const START: Duration = Duration::from_secs(5);
/// How long core may take to end the VM after `quit`.
const QUIT: Duration = Duration::from_secs(5);

/// What all clients share.
#[derive(Debug)]
pub struct Hub {
    pub(crate) config: config::Broker,
    /// Who may connect and do what.
    policy: RefCell<Policy>,
    pub(crate) audit: Audit,
    /// The monitors, in the order of the configuration.
    pub monitors: Vec<Rc<Monitor>>,
    /// Link to core.
    pub core: Peer<Result<core::Answer, core::Refusal>>,
    /// Link to the console.
    pub console: Peer<console::Answer>,
    /// Link to pci.
    pub pci: Peer<(Result<pci::Answer, pci::Refusal>, Option<OwnedFd>)>,
    /// Link to the balloon.
    pub balloon: Peer<balloon::Answer>,
    /// `BALLOON_CHANGE` is not sent more often than QEMU does.
    pub(crate) balloon_change: Rc<Throttle>,
    /// Nor `MEMORY_DEVICE_SIZE_CHANGE`, of each device.
    pub(crate) size_changes: RefCell<BTreeMap<String, Rc<Throttle>>>,
    /// Held while a command adds or removes something by what is there.
    pub(crate) device_turn: Mutex<()>,
    /// A daemon may have lost its device.
    pub(crate) to_sweep: Notify,
    /// Link to the opener.
    pub opener: Opener,
    /// Dump processes.
    pub dumps: Dumps,
    /// Bytes held by all clients' requests.
    pub held: Rc<Cell<usize>>,
    /// Descriptors that clients passed.
    pub(crate) descriptors: RefCell<Descriptors>,
    /// What outlives this process.
    pub store: Store,
    /// The VM ends: clients are flushed and the broker exits.
    pub ended: Notify,
    state: Cell<core::RunState>,
    /// Core has told it, or it is that of a machine that has just been made.
    state_known: Cell<bool>,
    /// It has been told.
    state_told: Notify,
    /// The machine waits for `x-exit-preconfig`.
    preconfig: Cell<bool>,
    /// It waits no longer.
    preconfig_over: Notify,
    /// Core was asked to start the machine, unless it is not to start by itself.
    begun: Notify,
    shutdown_sent: Cell<bool>,
    clients: RefCell<BTreeMap<u64, Rc<Client>>>,
    next_client: Cell<u64>,
}

impl Hub {
    /// A hub without clients, before core has said anything.
    #[must_use]
    pub fn new(config: config::Broker, descriptors: Descriptors, store: Store) -> Self {
        let monitors = config.monitors.iter().map(|monitor| Rc::new(Monitor::new(monitor))).collect();
        Self {
            policy: RefCell::new(Policy::new(&config.monitors)),
            audit: Audit::default(),
            preconfig: Cell::new(config.preconfig && !store.configured()),
            state_known: Cell::new(!store.is_restored()),
            preconfig_over: Notify::new(),
            begun: Notify::new(),
            config,
            monitors,
            core: Peer::new(CORE),
            console: Peer::new(CONSOLE),
            pci: Peer::new(PCI),
            balloon: Peer::new(BALLOON),
            balloon_change: Rc::default(),
            size_changes: RefCell::default(),
            device_turn: Mutex::default(),
            to_sweep: Notify::new(),
            opener: Opener::default(),
            dumps: Dumps::default(),
            held: Rc::default(),
            descriptors: RefCell::new(descriptors),
            store,
            ended: Notify::new(),
            state: Cell::new(core::RunState::Prelaunch),
            state_told: Notify::new(),
            shutdown_sent: Cell::new(false),
            clients: RefCell::default(),
            next_client: Cell::default(),
        }
    }

    /// Adds a client until the returned number is [removed](Self::remove).
    pub fn add(&self, client: Rc<Client>) -> u64 {
        let number = self.next_client.get();
        self.next_client.set(number + 1);
        self.clients.borrow_mut().insert(number, client);
        number
    }

    /// Forgets a client. With the last one the fd sets go, unless the machine is stopped.
    pub async fn remove(&self, number: u64) {
        self.clients.borrow_mut().remove(&number);
        if self.clients() == 0 && self.state.get() == core::RunState::Running {
            self.descriptors.borrow_mut().clear_sets();
            self.commit().await;
        }
    }

    /// Keeps what is to outlive this process.
    pub async fn commit(&self) {
        self.store.commit(&self.descriptors).await;
    }

    /// Makes up for what could not be kept, for ever.
    pub async fn catch_up(&self) {
        self.store.catch_up(&self.descriptors).await;
    }

    /// Number of clients.
    #[must_use]
    pub fn clients(&self) -> usize {
        self.clients.borrow().len()
    }

    /// Number of clients that are no operators.
    #[must_use]
    pub fn others(&self) -> usize {
        self.clients.borrow().values().filter(|client| !self.is_operator(client)).count()
    }

    fn is_operator(&self, client: &Client) -> bool {
        self.policy.borrow().role(&client.monitor.label) == Role::Operator
    }

    /// The client that has been there longest without negotiating, of all or of those that are no operators.
    #[must_use]
    pub fn oldest_silent(&self, operators_too: bool) -> Option<Rc<Client>> {
        let may_go = |client: &&Rc<Client>| operators_too || !self.is_operator(client);
        let is_silent = |client: &&Rc<Client>| !client.is_negotiated() && !client.is_dropped();
        self.clients.borrow().values().filter(may_go).find(is_silent).cloned()
    }

    /// Replaces the policy: for new clients, and for those that there are from their next command on.
    /// One that may no longer be there is disconnected.
    pub fn set_policy(&self, policy: Policy) {
        self.policy.replace(policy);
        let clients: Vec<_> = self.clients.borrow().values().cloned().collect();
        for client in clients {
            // Those that are denied are logged and dropped.
            let _ = self.role(&client);
        }
    }

    /// The role of a peer that connects to a monitor.
    ///
    /// # Errors
    /// It may not.
    pub fn admit(&self, monitor: &Monitor, peer: Option<Credentials>) -> Result<Role, Denied> {
        let admitted = self.policy.borrow().admit(&monitor.label, peer);
        if let Err(denied) = admitted {
            self.log_refusal(monitor, peer, &denied.to_string());
        }
        admitted
    }

    /// The role of a client, unless it may not be there any more.
    fn role(&self, client: &Client) -> Option<Role> {
        if client.is_dropped() {
            return None;
        }
        let role = self.admit(&client.monitor, client.peer).ok();
        if role.is_none() {
            client.drop_it();
        }
        role
    }

    /// Logs a refused client, or counts it for the next line.
    pub fn log_refusal(&self, monitor: &Monitor, peer: Option<Credentials>, reason: &str) {
        let role = self.policy.borrow().role(&monitor.label);
        self.audit.refused(Subject { monitor: &monitor.label, role, peer }, reason);
    }

    /// Whether no client has output waiting.
    #[must_use]
    pub fn is_flushed(&self) -> bool {
        self.clients.borrow().values().all(|client| client.is_flushed())
    }

    /// Sends an event to every client that has negotiated and whose role gets events.
    pub fn emit(&self, event: &table::Event, data: Option<Value>) {
        let line = event_line(event, data);
        let clients: Vec<_> = self.clients.borrow().values().cloned().collect();
        for client in clients {
            if self.role(&client).is_some_and(Role::gets_events) {
                client.push_event(&line);
            }
        }
    }

    /// Takes over the run state.
    pub fn set_state(&self, state: core::RunState) {
        self.state.set(state);
        self.state_known.set(true);
        self.state_told.notify_waiters();
    }

    /// Begins a call. One that depends on the run state waits until core has told it: to a process that was
    /// started anew it is news.
    pub(crate) async fn begin(&self, call: Call, role: Role, mode: &mut Mode) -> Result<Step, Error> {
        let told = self.state_told.notified();
        if commands::depends_on_state(call.command.handler)
            && !self.state_known.get()
            && !self.preconfig.get()
        {
            timeout(CORE, told).await.map_err(|_| away("The machine", NoAnswer::Late(CORE)))?;
        }
        Ok(commands::begin(call, &self.known(role), mode))
    }

    /// Something happened to the machine.
    pub fn machine_event(&self, event: core::Event, state: core::RunState) {
        self.set_state(state);
        match event {
            core::Event::Stop => self.emit(&table::STOP, None),
            core::Event::Resume => self.emit(&table::RESUME, None),
            core::Event::Reset(cause) => {
                let (guest, reason) = shutdown_cause(cause);
                self.emit(&table::RESET, serde_json::to_value(ResetData { guest, reason }).ok());
            }
            core::Event::Shutdown(cause) => self.shutdown(cause),
            core::Event::GuestPanicked => {
                let paused = state == core::RunState::GuestPanicked;
                let action = if paused { GuestPanicAction::Pause } else { GuestPanicAction::Poweroff };
                let data = GuestPanickedData { action, info: None };
                self.emit(&table::GUEST_PANICKED, serde_json::to_value(data).ok());
            }
            core::Event::PowerButton => self.emit(&table::POWERDOWN, None),
            core::Event::Exiting => self.ended.notify_one(),
        }
    }

    fn shutdown(&self, cause: core::Cause) {
        self.shutdown_sent.set(true);
        let (guest, reason) = shutdown_cause(cause);
        self.emit(&table::SHUTDOWN, serde_json::to_value(ShutdownData { guest, reason }).ok());
    }

    /// Executes one request of a client and queues the reply.
    pub async fn execute(self: &Rc<Self>, client: &Client, item: json::Item) {
        let Some(role) = self.role(client) else { return };
        let who = Subject { monitor: &client.monitor.label, role, peer: client.peer };
        let mut mode = client.mode();
        let (id, call) = request::resolve(item, mode, role, self.preconfig.get());
        if let Err(Refusal::Forbidden(command)) = call {
            self.audit.forbidden(who, command);
        }
        let changes = call.as_ref().ok().map(|call| call.command).filter(|command| command.changes_state());
        let step = match call {
            Ok(call) => {
                self.begin(call, role, &mut mode).await.unwrap_or_else(|error| Step::Reply(Err(error)))
            }
            Err(refusal) => Step::Reply(Err(refusal.into())),
        };
        client.set_mode(mode);
        let reply = match step {
            Step::Human(args) => self.human(client, who, args).await,
            step => self.carry_out(client, step).await,
        };
        if let Some(command) = changes {
            self.audit.changed(who, command.name, &reply);
        }
        client.push(&reply_line(id.as_ref(), &reply));
    }

    pub(crate) fn known(&self, role: Role) -> Known<'_> {
        Known { config: &self.config, state: self.state.get(), preconfig: self.preconfig.get(), role }
    }

    pub(crate) async fn carry_out(self: &Rc<Self>, client: &Client, step: Step) -> Reply {
        match step {
            Step::Reply(reply) => reply,
            Step::Descriptors(op) => {
                let changes = op.changes();
                let (monitor, take) = (&client.monitor.label, || client.take_passed());
                let reply = self.descriptors.borrow_mut().execute(op, monitor, take);
                if changes && reply.is_ok() {
                    // What the reply promises outlives this process.
                    self.commit().await;
                }
                reply
            }
            Step::Quit => {
                tokio::task::spawn_local(Rc::clone(self).quit());
                Ok(json!({}))
            }
            Step::AddClient(args) => self.add_client(args, &client.monitor.label).await,
            Step::ExitPreconfig => self.exit_preconfig().await,
            Step::Devices(op) => self.device_command(op).await,
            Step::Memsave(args) => self.memsave(client, args).await,
            Step::Pmemsave(args) => self.pmemsave(client, args).await,
            step => self.through_peer(step).await,
        }
    }

    async fn through_peer(&self, step: Step) -> Reply {
        match step {
            Step::Core(op) => {
                let answer = self.core.ask(|id| core::Request { id, op }).await;
                commands::core_reply(op, answer.map_err(|error| away("The machine", error))?)
            }
            Step::Chardevs => reply(self.chardevs().await?),
            Step::PowerButton => {
                if self.may_press_power_button() {
                    self.ask_console(console::Op::PowerButton).await?;
                }
                self.emit(&table::POWERDOWN, None);
                Ok(json!({}))
            }
            Step::Reply(reply) => reply,
            Step::Descriptors(_)
            | Step::Devices(_)
            | Step::AddClient(_)
            | Step::Memsave(_)
            | Step::Pmemsave(_)
            | Step::ExitPreconfig
            | Step::Human(_)
            | Step::Quit => Ok(json!({})),
        }
    }

    pub(crate) async fn ask_console(&self, op: console::Op) -> Result<console::Answer, Error> {
        self.console.ask(|id| console::Request { id, op }).await.map_err(|error| away("The console", error))
    }

    /// A machine that is off or broken has no use for its power button; QEMU reports success then.
    fn may_press_power_button(&self) -> bool {
        let state = serde_json::to_value(commands::run_state(self.state.get())).unwrap_or_default();
        topology::LINK_CONTROL_CONSOLE.permits("power-button", state.as_str().unwrap_or_default())
    }

    /// Ends the VM: through core, whatever others wait for there, and without it if core does not end.
    async fn quit(self: Rc<Self>) {
        let end = Instant::now() + QUIT;
        let request = |id| core::Request { id, op: core::Op::Quit };
        if let Ok(Err(error)) = timeout_at(end, self.core.ask_patiently(request)).await {
            warn!("quit: core: {error}");
        }
        sleep_until(end).await;
        warn!("quit: core has not ended; the broker ends without it");
        if !self.shutdown_sent.get() {
            self.shutdown(core::Cause::HostQmpQuit);
        }
        self.ended.notify_one();
    }

    /// Leaves run state `preconfig`. A machine that is to start by itself, and waits for no client, has
    /// started when this is answered, if core is there.
    async fn exit_preconfig(&self) -> Reply {
        if !self.preconfig.replace(false) {
            return Err(Error::generic("The command is permitted only in 'preconfig' state"));
        }
        self.store.set_configured();
        self.commit().await;
        self.preconfig_over.notify_one();
        if !self.monitors.iter().any(|monitor| monitor.is_waited_for()) {
            let _ = timeout(START, self.begun.notified()).await;
        }
        Ok(json!({}))
    }

    /// Starts a machine that is to start by itself, once it need not wait any more.
    pub async fn start(&self) {
        while self.preconfig.get() {
            self.preconfig_over.notified().await;
        }
        self.start_now().await;
        self.begun.notify_one();
    }

    async fn start_now(&self) {
        if !self.config.autostart {
            return;
        }
        let request = |id| core::Request { id, op: core::Op::Start };
        if let Ok(Err(refusal)) = self.core.ask_patiently(request).await {
            warn!("core refuses to start the machine: {refusal}");
        }
    }
}

pub(crate) fn away(who: &str, error: NoAnswer) -> Error {
    Error::generic(format!("{who} cannot be reached: {error}"))
}

const fn shutdown_cause(cause: core::Cause) -> (bool, ShutdownCause) {
    match cause {
        core::Cause::HostError => (false, ShutdownCause::HostError),
        core::Cause::HostQmpQuit => (false, ShutdownCause::HostQmpQuit),
        core::Cause::HostQmpSystemReset => (false, ShutdownCause::HostQmpSystemReset),
        core::Cause::HostSignal => (false, ShutdownCause::HostSignal),
        core::Cause::HostUi => (false, ShutdownCause::HostUi),
        core::Cause::GuestShutdown => (true, ShutdownCause::GuestShutdown),
        core::Cause::GuestReset => (true, ShutdownCause::GuestReset),
        core::Cause::GuestPanic => (true, ShutdownCause::GuestPanic),
    }
}

/// A reply as one line without its end, in QEMU's order of members.
#[must_use]
pub fn reply_line(id: Option<&Value>, reply: &Reply) -> String {
    let mut line = String::from("{");
    match reply {
        Ok(value) => {
            line.push_str("\"return\": ");
            json::write(&mut line, value);
        }
        Err(error) => {
            line.push_str("\"error\": ");
            json::write(&mut line, &error.to_value());
        }
    }
    if let Some(id) = id {
        line.push_str(", \"id\": ");
        json::write(&mut line, id);
    }
    line.push('}');
    line
}

fn event_line(event: &table::Event, data: Option<Value>) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let mut line = format!(
        "{{\"timestamp\": {{\"seconds\": {}, \"microseconds\": {}}}, \"event\": \"{}\"",
        now.as_secs(),
        now.subsec_micros(),
        event.name
    );
    if let Some(data) = data {
        line.push_str(", \"data\": ");
        json::write(&mut line, &data);
    }
    line.push('}');
    line
}

/// The greeting as one line without its end.
#[must_use]
pub fn greeting_line() -> String {
    let mut line = String::new();
    json::write(&mut line, &commands::greeting());
    line
}
