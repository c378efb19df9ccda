//! What is on the PCI bus, as pci tells it and as QEMU shows it.

use std::os::fd::{AsFd as _, OwnedFd};
use std::time::Duration;

use bulkhead_control_api::pci::{Answer, Bridge, Function, MAX_FUNCTIONS, Op, Refusal, Region, Request};
use bulkhead_jail::owner::thread_named_by;
use bulkhead_qapi::Error;
use bulkhead_qapi::types::pci::{
    PciBridgeInfo, PciBusInfo, PciDeviceClass, PciDeviceId, PciDeviceInfo, PciDevices, PciInfo,
    PciMemoryRange, PciMemoryRegion,
};
use bulkhead_qapi::types::qom::IOThreadInfo;
use tokio::time::{Instant, sleep};

use crate::commands::{Reply, reply};
use crate::hub::{Hub, away};
use crate::peer::NoAnswer;

/// How long a client waits for a daemon that is started anew, and how often pci is asked meanwhile.
pub(crate) const DAEMON: Duration = Duration::from_secs(5);
pub(crate) const GLANCE: Duration = Duration::from_millis(20);
/// The most functions that are believed: 255 of devices, 32 of ports, the host bridge and room to spare.
const MAX_TOTAL: usize = 512;
/// How often a list that changes is read: each change is a device that comes or goes.
const READINGS: usize = 16;
/// The most buses below each other that are shown.
pub(crate) const MAX_DEPTH: u32 = 8;

/// QEMU's words for the classes that devices here have; for the others it has none.
const CLASSES: [(u16, &str); 24] = [
    (0x0001, "VGA controller"),
    (0x0100, "SCSI controller"),
    (0x0101, "IDE controller"),
    (0x0106, "SATA controller"),
    (0x0180, "Storage controller"),
    (0x0200, "Ethernet controller"),
    (0x0280, "Network controller"),
    (0x0300, "VGA controller"),
    (0x0380, "Display controller"),
    (0x0400, "Video controller"),
    (0x0401, "Audio controller"),
    (0x0403, "Audio controller"),
    (0x0480, "Multimedia controller"),
    (0x0500, "RAM controller"),
    (0x0580, "Memory controller"),
    (0x0600, "Host bridge"),
    (0x0601, "ISA bridge"),
    (0x0604, "PCI bridge"),
    (0x0680, "Bridge"),
    (0x0700, "Serial port"),
    (0x0900, "Keyboard"),
    (0x0902, "Mouse"),
    (0x0c03, "USB controller"),
    (0x0c05, "SMBus"),
];

pub(crate) fn unexpected() -> Error {
    Error::generic("pci answered something else")
}

/// Whether two functions are the same one, whatever the guest has set in it.
fn is_same(one: &Function, other: &Function) -> bool {
    let of = |function: &Function| {
        let socket = function.back_end.as_ref().map(|end| end.socket.clone());
        (function.parent, function.slot, function.function, function.qdev_id.clone(), socket)
    };
    of(one) == of(other)
}

fn int(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

fn range((base, limit): (u64, u64)) -> PciMemoryRange {
    PciMemoryRange { base: int(base), limit: int(limit) }
}

fn region(region: &Region) -> PciMemoryRegion {
    PciMemoryRegion {
        bar: region.bar.into(),
        kind: "memory".to_owned(),
        address: region.address.map_or(-1, int),
        size: int(region.size),
        prefetch: Some(region.prefetch),
        mem_type_64: Some(region.wide),
    }
}

fn bus(bridge: &Bridge) -> PciBusInfo {
    PciBusInfo {
        number: bridge.primary.into(),
        secondary: bridge.secondary.into(),
        subordinate: bridge.subordinate.into(),
        io_range: range(bridge.io),
        memory_range: range(bridge.memory),
        prefetchable_range: range(bridge.prefetchable),
    }
}

/// All functions with their places in the tree.
struct Tree<'a>(&'a [Function]);

impl Tree<'_> {
    /// The devices on the bus behind a function, or on the root bus. Each is in at most one place.
    fn on(&self, parent: Option<u16>, number: u8, depth: u32) -> Vec<PciDeviceInfo> {
        let mut here: Vec<(u16, &Function)> =
            (0..).zip(self.0).filter(|(_, function)| function.parent == parent).collect();
        here.sort_by_key(|(_, function)| (function.slot, function.function));
        here.into_iter().map(|(index, function)| self.device(index, function, number, depth)).collect()
    }

    fn device(&self, index: u16, function: &Function, number: u8, depth: u32) -> PciDeviceInfo {
        let bridge = function.bridge.as_ref().map(|bridge| PciBridgeInfo {
            bus: bus(bridge),
            // A bus without a number cannot be reached.
            devices: (bridge.secondary != 0 && depth < MAX_DEPTH)
                .then(|| PciDevices(self.on(Some(index), bridge.secondary, depth + 1))),
        });
        let desc = CLASSES.iter().find(|(class, _)| *class == function.class);
        PciDeviceInfo {
            bus: number.into(),
            slot: function.slot.into(),
            function: function.function.into(),
            class_info: PciDeviceClass {
                desc: desc.map(|(_, desc)| (*desc).to_owned()),
                class: function.class.into(),
            },
            id: PciDeviceId {
                device: function.device.into(),
                vendor: function.vendor.into(),
                subsystem: function.subsystem.map(|(_, id)| id.into()),
                subsystem_vendor: function.subsystem.map(|(vendor, _)| vendor.into()),
            },
            // Interrupts are messages here: no function has a pin.
            irq: None,
            irq_pin: 0,
            qdev_id: function.qdev_id.clone(),
            pci_bridge: bridge,
            regions: function.regions.iter().map(region).collect(),
        }
    }
}

/// What `query-pci` returns.
fn info(functions: &[Function]) -> Vec<PciInfo> {
    vec![PciInfo { bus: 0, devices: Tree(functions).on(None, 0, 0) }]
}

impl Hub {
    /// Asks pci.
    pub(crate) async fn ask_pci(&self, op: Op) -> Result<Result<Answer, Refusal>, Error> {
        Ok(self.ask_pci_for(op).await?.0)
    }

    /// Asks pci for a descriptor, too.
    async fn ask_pci_for(&self, op: Op) -> Result<(Result<Answer, Refusal>, Option<OwnedFd>), Error> {
        self.pci.ask(|id| Request { id, op }).await.map_err(|error| away("The PCI bus", error))
    }

    /// The host's thread of a daemon, which is waited for if it is started anew; none if its device is gone.
    async fn host_thread(&self, socket: String) -> Result<Option<u32>, Error> {
        let end = Instant::now() + DAEMON;
        loop {
            match self.ask_pci_for(Op::Thread { socket: socket.clone() }).await? {
                (Err(Refusal::NoDevice), _) => return Ok(None),
                (Ok(Answer::Thread), fd) => {
                    if let Some(host) = fd.and_then(|fd| thread_named_by(fd.as_fd())) {
                        return Ok(Some(host));
                    }
                }
                _ => return Err(unexpected()),
            }
            if Instant::now() >= end {
                return Err(away("An I/O thread's daemon", NoAnswer::Late(DAEMON)));
            }
            sleep(GLANCE).await;
        }
    }

    /// `query-iothreads`: the threads that there are, one for each id.
    pub(crate) async fn query_iothreads(&self) -> Reply {
        let mut all = Vec::new();
        let threads = self.threads();
        let functions = if threads.is_empty() { Vec::new() } else { self.functions().await? };
        for thread in threads {
            let Some(daemon) = self.daemon_on(&thread.id, &functions) else { continue };
            let Some(host) = self.host_thread(format!("vhost.{}", daemon.key)).await? else { continue };
            all.push(IOThreadInfo {
                id: thread.id.clone(),
                thread_id: host.into(),
                poll_max_ns: int(thread.poll_max_ns),
                poll_grow: int(thread.poll_grow),
                poll_shrink: int(thread.poll_shrink),
            });
        }
        reply(all)
    }

    /// All functions; none in a machine without a bus. A list that takes several requests is read until two readings have the
    /// same functions: of one that loses something meanwhile a reading leaves out what is still there.
    pub(crate) async fn functions(&self) -> Result<Vec<Function>, Error> {
        let mut former: Option<Vec<Function>> = None;
        for _ in 0..READINGS {
            let all = self.read_functions().await?;
            let same = |former: &Vec<Function>| {
                former.len() == all.len() && former.iter().zip(&all).all(|(one, other)| is_same(one, other))
            };
            if all.len() <= MAX_FUNCTIONS && former.is_none() || former.as_ref().is_some_and(same) {
                return Ok(all);
            }
            former = Some(all);
        }
        Err(Error::generic("the PCI bus changes too often to be looked at"))
    }

    async fn read_functions(&self) -> Result<Vec<Function>, Error> {
        let mut all = Vec::new();
        while self.pci.exists() && all.len() < MAX_TOTAL {
            let from = u16::try_from(all.len()).unwrap_or(u16::MAX);
            let Ok(Answer::Functions { functions, more }) = self.ask_pci(Op::Functions { from }).await?
            else {
                return Err(unexpected());
            };
            if functions.len() > MAX_FUNCTIONS || (functions.is_empty() && more) {
                return Err(unexpected());
            }
            all.extend(functions);
            if !more {
                break;
            }
        }
        Ok(all)
    }

    pub(crate) async fn query_pci(&self) -> Reply {
        match self.functions().await? {
            none if none.is_empty() => reply(Vec::<PciInfo>::new()),
            functions => reply(info(&functions)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn function(parent: Option<u16>, slot: u8, secondary: Option<u8>) -> Function {
        let bridge = |secondary| Bridge {
            primary: 0,
            secondary,
            subordinate: secondary,
            io: (0xf000, 0xfff),
            memory: (0, 0),
            prefetchable: (0, u64::MAX),
        };
        Function {
            bus: None,
            parent,
            slot,
            function: 0,
            qdev_id: String::new(),
            driver: String::new(),
            class: 0x00ff,
            vendor: 1,
            device: 2,
            subsystem: None,
            regions: Vec::new(),
            bridge: secondary.map(bridge),
            back_end: None,
        }
    }

    #[test]
    fn devices_are_behind_their_bridges_in_order() {
        let functions = [
            function(None, 3, Some(7)),
            function(None, 1, None),
            function(Some(0), 0, None),
            function(None, 4, Some(0)),
            function(Some(3), 0, None),
        ];
        let all = info(&functions);
        let root = &all[0].devices;
        assert_eq!(root.iter().map(|device| device.slot).collect::<Vec<_>>(), [1, 3, 4]);
        let bridge = root[1].pci_bridge.as_ref().unwrap();
        assert_eq!(bridge.devices.as_ref().unwrap().0[0].bus, 7);
        assert_eq!(bridge.bus.prefetchable_range.limit, i64::MAX);
        assert_eq!(root[2].pci_bridge.as_ref().unwrap().devices, None, "no bus number, nothing to see");
    }

    #[test]
    fn parents_that_go_round_end() {
        let functions =
            [function(None, 0, Some(1)), function(Some(1), 0, Some(2)), function(Some(1), 1, Some(3))];
        assert_eq!(info(&functions)[0].devices.len(), 1);
    }
}
