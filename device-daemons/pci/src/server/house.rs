//! What the server does between two waits: connections, commands of core, the word that the machine may start.

use std::rc::Rc;
use std::time::{Duration, Instant};

use bulkhead_bus_api::main_link::Command;
use bulkhead_bus_api::pci::ToCore;
use bulkhead_control_api::opener::ToOpener;
use bulkhead_control_api::pci::Event;
use bulkhead_jail::keeper::Keeper;
use bulkhead_jail::link::LinkError;
use bulkhead_jail::{notice, warn};
use nix::errno::Errno;
use nix::poll::PollTimeout;
use nix::sys::socket::MsgFlags;

use super::{Running, Server, ServerError, Stage};
use crate::function::Function;
use crate::machine::Machine;

/// Devices have so long to let their back ends come to rest: a slow disk may have much to finish, and core gives this
/// process up after 5 s.
const REST: Duration = Duration::from_secs(4);
/// After this it is said which back ends the machine waits for.
const PATIENCE: Duration = Duration::from_secs(2);
/// What is to be kept beyond this process must have been there so long.
const LASTS: Duration = Duration::from_secs(1);
/// What the starter had no room for is tried again after this.
const RETRY: Duration = Duration::from_millis(10);
/// The longest wait, in milliseconds.
const LONGEST: u16 = 60_000;

impl Server {
    /// Everything that is not an answer to a descriptor.
    pub(super) fn keep_house(&mut self, now: Instant) -> Result<(), ServerError> {
        self.stay_alive(now);
        self.deaf = self.deaf.filter(|until| now < *until);
        let Stage::Serving(machine) = &mut self.stage else { return Ok(()) };
        self.broker.advance(machine, now)?;
        for removed in machine.bus.take_removed() {
            self.connector.forget(removed.index);
            self.wanted.retain(|_, device| *device != removed.index);
            machine.forget(removed.index);
            removed.kept.into_iter().for_each(|number| self.keeper.forget(number));
        }
        self.keep_connections(now)?;
        self.ask_opener(now);
        self.obey(now)?;
        self.tell_ready(now)
    }

    /// Sees to it that devices get the connections that they lack, and that what is theirs is kept.
    fn keep_connections(&mut self, now: Instant) -> Result<(), ServerError> {
        let Stage::Serving(machine) = &mut self.stage else { return Ok(()) };
        let changed = std::mem::take(&mut machine.changed);
        let any = !changed.is_empty();
        for index in changed {
            let Some(function) = machine.bus.get_mut(index) else { continue };
            let Some(device) = function.as_device() else { continue };
            self.wanted.retain(|_, device| *device != index);
            let mut others = Vec::new();
            for name in device.missing() {
                if let Some(fd) = self.connections.remove(&name) {
                    device.connected(&name, fd);
                } else if self.listeners.contains_key(&name) {
                    self.wanted.insert(name, index);
                } else {
                    others.push(name);
                }
            }
            self.connector.update(index, &others, now);
            let connected = device.is_connected();
            if connected != function.connected.unwrap_or(false) {
                // The first one is no news.
                if function.connected.is_some() {
                    let id = function.config.id.clone();
                    notice!(
                        "device {id:?}: its back end is {}",
                        if connected { "there again" } else { "away" }
                    );
                    self.broker.tell(Event::BackEnd { id, connected });
                }
                function.connected = Some(connected);
            }
            machine.bus.touch(index);
            keep_fd(machine, &mut self.keeper, index, now)?;
        }
        // A back end may have said what it is as soon as it was connected.
        if any { Ok(machine.settle()?) } else { Ok(()) }
    }

    fn ask_opener(&mut self, now: Instant) {
        for name in self.connector.due(now) {
            let Some(opener) = &self.opener else { continue };
            match opener.send_with(&ToOpener::Connect { name }, &[], MsgFlags::MSG_DONTWAIT) {
                Ok(()) | Err(LinkError::WouldBlock) => {}
                Err(error) => {
                    warn!("opener: {error}; what is started anew will not be found");
                    self.opener = None;
                }
            }
        }
    }

    /// Does what core commands, one after the other.
    fn obey(&mut self, now: Instant) -> Result<(), ServerError> {
        let Stage::Serving(machine) = &mut self.stage else { return Ok(()) };
        loop {
            if let Some(running) = self.running {
                let Some(rested) = rests(machine, &running, now) else { return Ok(()) };
                if running.what == Command::Reset {
                    self.held = !rested;
                    if rested {
                        machine.count_reset();
                        machine.bus.reset();
                    } else {
                        machine.core.send(&ToCore::NotReady)?;
                        self.ready = false;
                    }
                }
                machine.settle()?;
                self.broker.tell_events(machine);
                machine.core.send(&ToCore::Done { id: running.id })?;
                self.running = None;
            }
            let Some((id, what)) = machine.core.take_command() else { return Ok(()) };
            match what {
                Command::Reset => machine.bus.rest(),
                Command::Pause | Command::Resume => {
                    machine.paused = what == Command::Pause;
                    let pause = machine.paused;
                    let devices: Vec<u16> = machine.devices().map(|(index, _)| index).collect();
                    for index in devices {
                        if let Some(device) = machine.bus.get_mut(index).and_then(Function::as_device) {
                            if pause { device.pause() } else { device.resume() }
                        }
                        machine.bus.touch(index);
                    }
                }
                Command::PressPowerButton => {}
            }
            machine.settle()?;
            let rest = if self.held { Duration::ZERO } else { REST };
            self.running = Some(Running { id, what, deadline: now + rest });
        }
    }

    /// Tells core that the machine may start, once every back end is known.
    fn tell_ready(&mut self, now: Instant) -> Result<(), ServerError> {
        if self.ready {
            return Ok(());
        }
        let Stage::Serving(machine) = &mut self.stage else { return Ok(()) };
        if self.held {
            if !machine.devices().all(|(_, device)| device.is_quiet()) {
                return Ok(());
            }
            notice!("all back ends are at rest; the reset goes on");
            self.held = false;
            machine.count_reset();
            machine.bus.reset();
            machine.settle()?;
            self.broker.tell_events(machine);
        }
        let unknown =
            |(_, f): &(u16, &Function)| f.plugged && f.device_ref().is_some_and(|device| !device.is_known());
        let awaited: Vec<String> =
            machine.bus.functions().filter(unknown).map(|(_, f)| f.config.id.clone()).collect();
        if awaited.is_empty() {
            // What a back end adds to its device is there before the guest looks.
            machine.bus.touch_all();
            machine.settle()?;
            machine.core.send(&ToCore::Ready)?;
            self.ready = true;
            self.begun = None;
        } else if self.begun.is_some_and(|begun| now >= begun + PATIENCE) {
            self.begun = None;
            notice!("waiting for the back ends of: {}", awaited.join(", "));
        }
        Ok(())
    }

    /// Tells the starter that this process is alive, if it wants to hear it.
    fn stay_alive(&mut self, now: Instant) {
        let Some(period) = self.keeper.starter().watchdog else { return };
        if self.alive.is_none_or(|at| at <= now) {
            // The starter may be gone; that is not for this process to judge.
            let _ = self.keeper.starter().alive();
            self.alive = Some(now + period / 3);
        }
    }

    /// How long to wait at most.
    pub(super) fn timeout(&mut self, now: Instant) -> PollTimeout {
        let Stage::Serving(machine) = &self.stage else {
            return self.alive.map_or(PollTimeout::NONE, |at| until(at, now));
        };
        let retry = !self.keeper.retry() || !machine.changed.is_empty();
        let devices = machine.deadlines().map(|(_, at)| at);
        let adding = self.broker.adding.iter().map(|adding| adding.deadline);
        let adding = adding.chain(self.broker.sizing.iter().map(|sizing| sizing.deadline));
        let others = [
            self.alive,
            self.deaf,
            self.connector.deadline().filter(|_| self.opener.is_some()),
            self.running.map(|running| running.deadline),
            self.begun.map(|begun| begun + PATIENCE),
            retry.then_some(now + RETRY),
        ];
        let first = devices.chain(adding).chain(others.into_iter().flatten()).min();
        first.map_or(PollTimeout::NONE, |at| until(at, now))
    }
}

/// Has the starter keep what a device wants kept. How often there is another one is up to the guest, so the starter
/// hears only of one that lasts.
fn keep_fd(machine: &mut Machine, keeper: &mut Keeper, index: u16, now: Instant) -> Result<(), ServerError> {
    let Some(function) = machine.bus.get_mut(index).filter(|function| function.plugged) else {
        return Ok(());
    };
    let wanted = function.device_ref().and_then(|device| device.kept());
    let former = function.kept;
    let same = match (&wanted, &function.kept_fd) {
        (Some(wanted), Some(kept)) => Rc::ptr_eq(wanted, kept),
        (None, None) => former.is_none(),
        _ => false,
    };
    let since = function.to_keep.take().filter(|(fd, _)| wanted.as_ref().is_some_and(|w| Rc::ptr_eq(w, fd)));
    let since = since.map_or(now, |(_, since)| since);
    function.to_keep = wanted.clone().map(|fd| (fd, since));
    if same {
        return Ok(());
    }
    let young = wanted.is_some() && now < since + LASTS;
    if young {
        machine.changed.insert(index);
        if former.is_none() {
            return Ok(());
        }
    }
    let wanted = wanted.filter(|_| !young);
    let number = match &wanted {
        None => None,
        Some(fd) => {
            let number = machine.next_name();
            match keeper.keep(number, &**fd) {
                Err(Errno::EAGAIN) => {
                    machine.changed.insert(index);
                    return Ok(());
                }
                result => result.ok().map(|()| number),
            }
        }
    };
    if let Some(function) = machine.bus.get_mut(index) {
        (function.kept, function.kept_fd) = (number, wanted);
    }
    machine.bus.touch(index);
    machine.settle()?;
    former.into_iter().for_each(|number| keeper.forget(number));
    Ok(())
}

/// The wait until a moment; rounded up, so that it is over then.
fn until(at: Instant, now: Instant) -> PollTimeout {
    let wait = at.saturating_duration_since(now).as_nanos().div_ceil(1_000_000);
    PollTimeout::from(u16::try_from(wait).map_or(LONGEST, |wait| wait.min(LONGEST)))
}

/// Whether all devices that must be for a command are at rest; `None` while it is to be waited for.
fn rests(machine: &mut Machine, running: &Running, now: Instant) -> Option<bool> {
    if !matches!(running.what, Command::Reset | Command::Pause) {
        return Some(true);
    }
    let restless: Vec<u16> =
        machine.devices().filter(|(_, device)| !device.is_quiet()).map(|(index, _)| index).collect();
    if restless.is_empty() {
        return Some(true);
    }
    if now < running.deadline {
        return None;
    }
    let mut rested = true;
    for index in restless {
        let Some(function) = machine.bus.get_mut(index) else { continue };
        let id = function.config.id.clone();
        let Some(device) = function.as_device() else { continue };
        device.abandon();
        let quiet = device.is_quiet();
        let waits =
            if running.what == Command::Reset && !quiet { ", and the reset waits for it" } else { "" };
        warn!("device {id:?}: its back end does not stop; the connection is ended{waits}");
        rested &= quiet;
        machine.bus.touch(index);
    }
    Some(rested)
}
