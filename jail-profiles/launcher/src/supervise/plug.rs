//! Daemons that are started for a device that is plugged in while the machine runs, and ended when it is gone.
//!
//! The broker asks. It names a daemon that was declared at the start, and gives what its device says of it: neither a path nor
//! a binary. Each daemon runs at most once, so a broker that asks for ever has no more processes than were declared, started
//! no more often than those that die.

use std::os::fd::OwnedFd;

use bulkhead_control_api::opener::ToOpener;
use nix::errno::Errno;
use nix::sys::signal::Signal;

use super::Supervisor;
use super::parts::Part;
use crate::machine::{Bus, DaemonConfig};

/// What is to become of a daemon.
pub(super) struct Plug {
    part: Part,
    /// Its configuration, also as the descriptor that it gets, if it is to run.
    config: Option<(DaemonConfig, OwnedFd)>,
}

impl Plug {
    /// What the broker asks for.
    ///
    /// # Errors
    /// EPERM: nothing of that name was declared; EINVAL: it cannot have these settings; ENOMEM: there is no room for its
    /// configuration.
    pub(super) fn of(bus: &Bus, request: &ToOpener) -> Result<Self, Errno> {
        let (name, settings) = match request {
            ToOpener::Begin { name, settings } => (name, Some(settings)),
            ToOpener::End { name } => (name, None),
            ToOpener::Connect { .. }
            | ToOpener::Define { .. }
            | ToOpener::Forget { .. }
            | ToOpener::Output { .. } => {
                return Err(Errno::EPERM);
            }
        };
        let mut daemons = bus.daemons.iter().enumerate();
        let (device, daemon) = daemons.find(|(_, daemon)| daemon.key == *name).ok_or(Errno::EPERM)?;
        let config = match settings {
            None => None,
            Some(settings) => {
                let config = daemon.configured(settings).ok_or(Errno::EINVAL)?;
                let sealed = config.seal().map_err(|_| Errno::ENOMEM)?;
                Some((config, sealed))
            }
        };
        Ok(Self { part: Part { process: daemon.process(), device: Some(device) }, config })
    }
}

impl Supervisor {
    /// Ends a daemon if it runs, and starts it anew if it is to run.
    pub(super) fn plug(&mut self, plug: Plug) {
        let Plug { part, config } = plug;
        let key = part.key();
        for running in self.running.iter_mut().filter(|running| running.part.key() == key) {
            // No device has it: what the guest has asked for is done, and its memory is not the daemon's any more.
            running.leaving = true;
            // What it still wants kept is not for its successor.
            running.notify = None;
            running.started.signal(Signal::SIGKILL);
        }
        self.residents.retain(|resident| resident.key() != key);
        self.configs.remove(&key);
        self.kept.remove(&key);
        let again = self.again.entry(key).or_default();
        (again.due, again.after) = (false, None);
        let Some((config, sealed)) = config else { return };
        if self.killed || self.deadline.is_some() {
            return;
        }
        // One that dies before it was ready is a device that does not answer, not the VM's end.
        (again.proven, again.due) = (true, true);
        self.residents.push(part);
        self.configs.insert(key, sealed);
        // It says which descriptors are the daemon's.
        if let Some(daemon) = part.device.and_then(|device| self.vm.bus.daemons.get_mut(device)) {
            daemon.config = config;
        }
    }
}

#[cfg(test)]
mod tests {
    use bulkhead_control_api::config::IoThread;
    use bulkhead_control_api::plug::Settings;

    use super::*;
    use crate::machine::tests::planned;

    #[test]
    fn a_broker_has_no_more_than_was_declared() {
        let bus = planned(
            "-drive if=none,id=d,file=/a -device pcie-root-port,id=p -device virtio-balloon-pci,id=b",
        )
        .bus;
        let block = |queues| Settings::Block {
            serial: String::new(),
            queues,
            discard: true,
            iothread: IoThread::default(),
        };
        let begin = |name: &str, settings| ToOpener::Begin { name: name.to_owned(), settings };
        let end = |name: &str| ToOpener::End { name: name.to_owned() };
        let path = ToOpener::Define { name: "d".to_owned(), path: "/a".to_owned(), must_exist: false };
        for (request, errno) in [
            (begin("/a", block(1)), Errno::EPERM),
            (begin("bulkhead-core", block(1)), Errno::EPERM),
            (begin("p", block(1)), Errno::EPERM),
            (begin("d", block(0)), Errno::EINVAL),
            (begin("b", block(1)), Errno::EINVAL),
            (end("vhost.d"), Errno::EPERM),
            (path, Errno::EPERM),
        ] {
            assert_eq!(Plug::of(&bus, &request).err(), Some(errno), "{request:?}");
        }
        let plug = Plug::of(&bus, &begin("d", block(2))).unwrap();
        assert_eq!((plug.part.process.name, plug.config.is_some()), ("block", true));
        let plug = Plug::of(&bus, &end("b")).unwrap();
        assert_eq!((plug.part.process.name, plug.config.is_some()), ("balloon", false));
    }
}
