//! Links of a dump process, which writes guest memory to one file and exits.
//!
//! It connects to both. On `dump` core sends [`Memory`] with one memfd per region attached and answers [`Translate`] with
//! [`Translated`]. On `control-dump` the broker sends one [`Job`] with the output attached; the process says
//! [`FromDump::Progress`] now and then and [`FromDump::Ended`] last. The end of either link is the end of the process.

use serde::{Deserialize, Serialize};

use crate::loader::Region;

/// Size of a page, in bytes.
pub const PAGE: u64 = 4096;
/// The most pages in a [`Translate`]: the vCPU is out of the guest meanwhile.
pub const MAX_PAGES: u32 = 128;

/// Core to dump, with one memfd per region in the same order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memory {
    /// Guest RAM in ascending order.
    pub regions: Vec<Region>,
}

/// Dump to core: where are these pages of a vCPU's address space?
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Translate {
    /// Index of the vCPU.
    pub cpu: u32,
    /// Virtual address of the first page.
    pub addr: u64,
    /// So many pages, at most [`MAX_PAGES`].
    pub pages: u32,
}

/// Core to dump.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Translated {
    /// What was asked. A process drops answers to what its predecessor has asked.
    pub what: Translate,
    /// Guest physical addresses of the pages, up to the first one that the vCPU's page tables do not map.
    pub pages: Vec<u64>,
}

/// In which address space a dump is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Space {
    /// Guest physical addresses.
    Physical,
    /// Virtual addresses of the vCPU of this index, in its present mode and by its present page tables.
    Virtual(u32),
}

/// Broker to dump, with the output attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Job {
    /// The address space.
    pub space: Space,
    /// The first byte.
    pub addr: u64,
    /// Bytes; addresses go on at 0 after the last one.
    pub size: u64,
}

/// Why a dump is not complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Failure {
    /// A page is not mapped by the vCPU's page tables. What comes before it is written.
    Unmapped,
    /// The output failed with this error number (`errno(3)`).
    Output(i32),
    /// Guest memory failed with this error number.
    Memory(i32),
}

/// Dump to broker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromDump {
    /// So many bytes of the output are there; about once a second.
    Progress {
        /// Bytes, holes included.
        done: u64,
    },
    /// The result.
    Ended(Result<(), Failure>),
}
