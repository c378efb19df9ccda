//! Stand-ins for pci, the balloon and the opener that speak their links.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bulkhead_control_api::opener::{FromOpener, ToOpener};
use bulkhead_control_api::pci::{
    Answer, BackEnd, Bridge, Event, FromPci, Function, MAX_FUNCTIONS, Op, Refusal, Region, Request,
};
use bulkhead_control_api::plug::Settings;
use bulkhead_control_api::{MAX_MESSAGE, VERSION, balloon, config, decode, encode};
use bulkhead_jail::link::{Link, recv_packet, send_packet};
use bulkhead_jail::owner::name_this_thread;
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::socket::MsgFlags;
use serde::Serialize;

/// Guest memory of a machine with a fake balloon, in bytes.
pub const RAM: u64 = 64 << 20;

/// What the test and the fake peers share.
#[derive(Clone, Default)]
pub struct Bus(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    functions: Vec<Function>,
    /// Ids of devices that the guest is asked for.
    pending: Vec<String>,
    /// Devices that were added, in order.
    added: Vec<config::PciDevice>,
    /// The device that goes once the first part of a long list has been given.
    leaving: Option<String>,
    target: Option<u64>,
    stats: balloon::Stats,
    /// What the opener was told of names.
    defined: BTreeMap<String, String>,
    /// The daemons that it was to start, and not yet to end.
    begun: BTreeMap<String, Settings>,
    /// The daemon whose next end the opener does not hear of.
    missed: Option<String>,
    /// How often it was told of an end.
    ends: usize,
    pci: Option<OwnedFd>,
    balloon: Option<OwnedFd>,
}

fn function(slot: u8, id: &str, driver: &str, class: u16) -> Function {
    Function {
        bus: Some(0),
        parent: None,
        slot,
        function: 0,
        qdev_id: id.to_owned(),
        driver: driver.to_owned(),
        class,
        vendor: 0x1af4,
        device: 0x1045,
        subsystem: Some((0x1af4, 0x1100)),
        regions: Vec::new(),
        bridge: None,
        back_end: None,
    }
}

/// A port that the guest has not set up.
fn port(slot: u8, id: &str) -> Function {
    let bridge = Bridge {
        primary: 0,
        secondary: 0,
        subordinate: 0,
        io: (0xf000, 0xfff),
        memory: (0xfff0_0000, 0xf_ffff),
        prefetchable: (0xfff0_0000, 0xf_ffff),
    };
    let (subsystem, bridge) = (None, Some(bridge));
    Function { subsystem, bridge, ..function(slot, id, "pcie-root-port", 0x0604) }
}

fn virtio(slot: u8, id: &str, driver: &str, class: u16) -> Function {
    let region = |bar, size, wide, prefetch| Region { bar, address: None, size, wide, prefetch };
    let back_end = BackEnd { socket: format!("vhost.{id}"), connected: true, memory: None };
    Function {
        regions: vec![region(1, 4096, false, false), region(4, 16384, true, true)],
        back_end: Some(back_end),
        ..function(slot, id, driver, class)
    }
}

impl Bus {
    /// A bus with nothing but its host bridge, or with the devices of [`crate::qemu`]'s machine.
    pub fn start(with_devices: bool, pci: Option<OwnedFd>, balloon: Option<OwnedFd>) -> Self {
        let bus = Self::default();
        let mut functions = vec![function(0, "", "bulkhead-host", 0x0600)];
        if with_devices {
            functions.extend([port(1, "rp0"), port(2, "rp1")]);
            functions.push(virtio(3, "b0", "virtio-balloon-pci", 0x00ff));
            let mut disk = virtio(4, "", "virtio-blk-pci", 0x0100);
            disk.back_end = Some(BackEnd { socket: "vhost.disk".to_owned(), connected: true, memory: None });
            functions.push(disk);
        }
        {
            let mut state = bus.state();
            state.functions = functions;
            state.pci = pci.as_ref().and_then(|fd| fd.try_clone().ok());
            state.balloon = balloon.as_ref().and_then(|fd| fd.try_clone().ok());
        }
        let (served, inflated) = (bus.clone(), bus.clone());
        if let Some(fd) = pci {
            std::thread::spawn(move || served.serve_pci(fd));
        }
        if let Some(fd) = balloon {
            std::thread::spawn(move || inflated.serve_balloon(fd));
        }
        bus
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn serve_pci(&self, fd: OwnedFd) {
        let Ok(mut link) = Link::connect(fd, VERSION) else { return };
        while let Ok(Request { id, op }) = link.recv::<Request>() {
            let thread = matches!(&op, Op::Thread { socket } if socket == "vhost.disk");
            let result = self.state().act(op);
            let reply = FromPci::Reply { id, result };
            // This thread stands for the daemon's.
            let named = fd_of_this_thread().filter(|_| thread);
            let fds: Vec<_> = named.iter().map(AsFd::as_fd).collect();
            if link.send_with(&reply, &fds, MsgFlags::empty()).is_err() {
                return;
            }
        }
    }

    /// Serves the opener's side of its link, which has begun, from a thread. There is nothing below /nope.
    pub fn serve_opener(&self, fd: OwnedFd) {
        let bus = self.clone();
        std::thread::spawn(move || {
            let mut buffer = vec![0; MAX_MESSAGE];
            while let Ok((length, _)) = recv_packet(fd.as_fd(), &mut buffer, MsgFlags::empty()) {
                let request = decode::<ToOpener>(buffer.get(..length).unwrap_or_default());
                let answer = match request {
                    Ok(ToOpener::Output { name, path }) => {
                        open(&fd, name, &path);
                        continue;
                    }
                    Ok(ToOpener::Define { name, path, must_exist }) => {
                        bus.state().define(name, path, must_exist)
                    }
                    Ok(ToOpener::Forget { name }) => {
                        bus.state().defined.remove(&name);
                        FromOpener::Defined { name }
                    }
                    Ok(ToOpener::Begin { name, settings }) => {
                        bus.state().begun.insert(name.clone(), settings);
                        FromOpener::Defined { name }
                    }
                    Ok(ToOpener::End { name }) => {
                        bus.state().ends += 1;
                        if bus.state().missed.take_if(|missed| *missed == name).is_some() {
                            continue;
                        }
                        bus.state().begun.remove(&name);
                        FromOpener::Defined { name }
                    }
                    Ok(ToOpener::Connect { .. }) | Err(_) => return,
                };
                send(Some(&fd), &answer);
            }
        });
    }

    /// The path that a name stands for.
    #[must_use]
    pub fn defined(&self, name: &str) -> Option<String> {
        self.state().defined.get(name).cloned()
    }

    /// What the device of a daemon that was started says of it.
    #[must_use]
    pub fn begun(&self, key: &str) -> Option<Settings> {
        self.state().begun.get(key).cloned()
    }

    /// How often the opener was told that a daemon is to end.
    #[must_use]
    pub fn ends(&self) -> usize {
        self.state().ends
    }

    /// The opener does not hear of the next end of a daemon.
    pub fn miss_an_end(&self, key: &str) {
        self.state().missed = Some(key.to_owned());
    }

    fn serve_balloon(&self, fd: OwnedFd) {
        let Ok(mut link) = Link::connect(fd, VERSION) else { return };
        while let Ok(balloon::Request { id, op }) = link.recv::<balloon::Request>() {
            let answer = match op {
                balloon::Op::Query => balloon::Answer::Balloon { actual: RAM },
                balloon::Op::Stats => balloon::Answer::Stats(self.state().stats.clone()),
                balloon::Op::Target { bytes } => {
                    self.state().target = Some(bytes);
                    balloon::Answer::Done
                }
                balloon::Op::PollingInterval { seconds } => {
                    self.state().stats.polling_interval = seconds;
                    balloon::Answer::Done
                }
            };
            if link.send(&balloon::FromBalloon::Reply { id, answer }).is_err() {
                return;
            }
        }
    }

    /// The size that the balloon was told last.
    #[must_use]
    pub fn target(&self) -> Option<u64> {
        self.state().target
    }

    /// The guest has so much memory now.
    pub fn change_balloon(&self, actual: u64) {
        send(self.state().balloon.as_ref(), &balloon::FromBalloon::Changed { actual });
    }

    /// The guest gave these statistics.
    pub fn set_stats(&self, last_update: u64, values: Vec<(u16, u64)>) {
        let stats = &mut self.state().stats;
        (stats.last_update, stats.values) = (last_update, values);
    }

    /// Something happens on the bus; a device that is deleted is gone.
    pub fn event(&self, event: Event) {
        let mut state = self.state();
        if let Event::Deleted { id } = &event {
            state.functions.retain(|function| function.qdev_id != *id);
            state.pending.retain(|pending| pending != id);
        }
        send(state.pci.as_ref(), &FromPci::Event(event));
    }

    /// Makes the list of functions one that takes several requests, by disks in front of what is there; the first of them
    /// goes between the next two requests. Returns how many are left.
    pub fn fill(&self) -> usize {
        let mut state = self.state();
        let disks =
            (0..MAX_FUNCTIONS).map(|number| virtio(8, &format!("x{number}"), "virtio-blk-pci", 0x0100));
        let end = state.functions.len() - 1;
        state.functions.splice(end..end, disks);
        state.leaving = Some("x0".to_owned());
        state.functions.len() - 1
    }

    /// The devices that were added.
    #[must_use]
    pub fn added(&self) -> Vec<config::PciDevice> {
        self.state().added.clone()
    }
}

impl State {
    fn define(&mut self, name: String, path: String, must_exist: bool) -> FromOpener {
        if must_exist && path.starts_with("/nope") {
            return FromOpener::NotGiven { name, errno: Errno::ENOENT as i32 };
        }
        if self.defined.get(&name).is_some_and(|other| *other != path) {
            return FromOpener::NotGiven { name, errno: Errno::EEXIST as i32 };
        }
        self.defined.insert(name.clone(), path);
        FromOpener::Defined { name }
    }

    fn act(&mut self, op: Op) -> Result<Answer, Refusal> {
        match op {
            Op::Functions { from } => {
                let mut rest = self.functions.iter().skip(from.into()).cloned();
                let functions: Vec<_> = rest.by_ref().take(MAX_FUNCTIONS).collect();
                let more = rest.next().is_some();
                if let Some(id) = self.leaving.take_if(|_| more) {
                    self.functions.retain(|function| function.qdev_id != id);
                }
                Ok(Answer::Functions { functions, more })
            }
            Op::Thread { .. } => Ok(Answer::Thread),
            Op::RequestMemory { id, bytes } => {
                let device = self.functions.iter_mut().find(|device| device.qdev_id == id);
                let sizes = device.and_then(|device| device.back_end.as_mut()?.memory.as_mut());
                sizes.ok_or(Refusal::NoDevice)?.requested = bytes;
                Ok(Answer::Done)
            }
            Op::Add(device) => {
                let ports = self.functions.iter().position(|port| port.qdev_id == device.place.bus);
                let parent = ports.ok_or(Refusal::NoBus)?;
                let parent = u16::try_from(parent).map_err(|_| Refusal::NoBus)?;
                if let Some(taken) = self.functions.iter().find(|function| function.parent == Some(parent)) {
                    return Err(Refusal::SlotTaken(taken.qdev_id.clone()));
                }
                let mut added = virtio(0, &device.id, &device.driver, 0x0100);
                added.parent = Some(parent);
                if let (config::PciKind::Virtio(virtio), Some(back_end)) = (&device.kind, &mut added.back_end)
                {
                    back_end.socket.clone_from(&virtio.socket);
                }
                self.functions.push(added);
                self.added.push(*device);
                Ok(Answer::Done)
            }
            Op::Remove { id } => {
                if self.pending.contains(&id) {
                    return Err(Refusal::Pending);
                }
                let device = self.functions.iter().find(|device| device.qdev_id == id);
                let device = device.ok_or(Refusal::NoDevice)?;
                if device.parent.is_none() {
                    return Err(Refusal::NoHotplug);
                }
                self.pending.push(id);
                Ok(Answer::Done)
            }
        }
    }
}

/// Opens what there is.
fn open(link: &OwnedFd, name: String, path: &str) {
    let (answer, file) = match File::options().write(true).custom_flags(OFlag::O_NONBLOCK.bits()).open(path) {
        Ok(file) => (FromOpener::Given { name }, Some(file)),
        Err(error) => (FromOpener::NotGiven { name, errno: error.raw_os_error().unwrap_or(0) }, None),
    };
    let fds: Vec<_> = file.iter().map(AsFd::as_fd).collect();
    if let Ok(packet) = encode(&answer) {
        let _ = send_packet(link.as_fd(), &packet, &fds, MsgFlags::empty());
    }
}

fn fd_of_this_thread() -> Option<OwnedFd> {
    let (fd, _) = UnixStream::pair().ok()?;
    name_this_thread(fd.as_fd()).ok()?;
    Some(fd.into())
}

fn send<T: Serialize>(fd: Option<&OwnedFd>, message: &T) {
    if let (Some(fd), Ok(packet)) = (fd, encode(message)) {
        // A broker that has gone is noticed by the receiving side.
        let _ = send_packet(fd.as_fd(), &packet, &[], MsgFlags::empty());
    }
}
