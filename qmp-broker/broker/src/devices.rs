//! Commands about devices: the bus, the balloon, and what the broker itself keeps of them.

use std::rc::Rc;
use std::time::Duration;

use bulkhead_qapi::Error;
use bulkhead_qapi::types::balloon::BalloonArg;
use bulkhead_qapi::types::char::ChardevRemoveArg;
use bulkhead_qapi::types::qdev::DeviceDelArg;
use bulkhead_qapi::types::qom::{ObjectDelArg, QomGetArg, QomListArg, QomSetArg};
use serde_json::{Map, Value};
use tokio::time::timeout;

use crate::commands::Reply;
use crate::hub::{Hub, away};
use crate::peer::NoAnswer;

/// What is to be done: the command of its name.
#[derive(Debug)]
#[expect(missing_docs, reason = "each is the command of its name")]
pub enum Op {
    Pci,
    MemoryDevices,
    MemorySizes,
    QueryBalloon,
    Balloon(BalloonArg),
    IoThreads,
    DeviceAdd(Map<String, Value>),
    DeviceDel(DeviceDelArg),
    QomList(QomListArg),
    QomGet(QomGetArg),
    QomSet(QomSetArg),
    ObjectAdd(Map<String, Value>),
    ObjectDel(ObjectDelArg),
    ChardevAdd(Map<String, Value>),
    ChardevChange(Map<String, Value>),
    ChardevRemove(ChardevRemoveArg),
}

/// How long one waits for another client's command.
const TURN: Duration = Duration::from_secs(10);

fn late() -> Error {
    away("What another client adds", NoAnswer::Late(TURN))
}

impl Op {
    /// Whether it decides by what is there what it adds or removes.
    const fn adds(&self) -> bool {
        match self {
            Self::DeviceAdd(_)
            | Self::ObjectAdd(_)
            | Self::ObjectDel(_)
            | Self::ChardevAdd(_)
            | Self::ChardevChange(_)
            | Self::ChardevRemove(_) => true,
            Self::Pci
            | Self::MemoryDevices
            | Self::MemorySizes
            | Self::QueryBalloon
            | Self::Balloon(_)
            | Self::IoThreads
            | Self::DeviceDel(_)
            | Self::QomList(_)
            | Self::QomGet(_)
            | Self::QomSet(_) => false,
        }
    }
}

impl Hub {
    pub(crate) async fn device_command(self: &Rc<Self>, op: Op) -> Reply {
        // What is found out of devices and ids holds until the command is done.
        let _turn = match op.adds() {
            true => Some(timeout(TURN, self.device_turn.lock()).await.map_err(|_| late())?),
            false => None,
        };
        match op {
            Op::Pci => self.query_pci().await,
            Op::MemoryDevices => self.query_memory_devices().await,
            Op::MemorySizes => self.query_memory_size_summary().await,
            Op::QueryBalloon => self.query_balloon().await,
            Op::Balloon(args) => self.set_balloon(args).await,
            Op::IoThreads => self.query_iothreads().await,
            Op::DeviceAdd(args) => self.device_add(args).await,
            Op::DeviceDel(args) => self.device_del(args).await,
            Op::QomList(args) => self.qom_list(args).await,
            Op::QomGet(args) => self.qom_get(args).await,
            Op::QomSet(args) => self.qom_set(args).await,
            Op::ObjectAdd(args) => self.object_add(args).await,
            Op::ObjectDel(args) => self.object_del(args).await,
            Op::ChardevAdd(args) => self.chardev_add(args).await,
            Op::ChardevChange(args) => self.chardev_change(args).await,
            Op::ChardevRemove(args) => self.chardev_remove(args).await,
        }
    }
}
