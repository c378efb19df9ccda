//! Memory devices: their addresses, what is behind them, and their daemons.
//!
//! All are in one range behind the PCI window. It has the room that `maxmem` says and 1 GiB more for each device, so that
//! each can begin at a whole GiB: no guest has a block of memory that lies across such a border.

use bulkhead_bus_api::platform::{self, Range};
use bulkhead_control_api::config::{self, DeviceMemory, MemoryBackEnd, MemoryDeviceInfo, Virtio};
use bulkhead_control_api::plug;
use bulkhead_control_api::side::chunk_len;

use super::{Daemon, DaemonConfig, Placed, Planner};
use crate::cli::{Error, Problem};
use crate::machine::What;
use crate::options::{Backing, MemoryDevice, Model, Options};

/// A device begins at a multiple of this, if the user does not say where; in bytes.
const BORDER: u64 = 1 << 30;
/// Address and length of a device are multiples of this, in bytes: a page table maps it by one entry.
const ALIGN: u64 = 2 << 20;
/// Pieces of all devices.
const MAX_PIECES: u16 = 512;
/// Descriptors of a queue of a memory device.
const QUEUE_SIZE: u16 = 128;

/// The range for memory devices.
pub fn device_memory(options: &Options) -> Range {
    let is_memory = |device: &Model| matches!(device, Model::Memory(_));
    let count = options.devices.iter().filter(|device| is_memory(&device.value.model)).count() as u64;
    let room = options.memory.room.next_multiple_of(BORDER);
    let len = if room == 0 || count == 0 { 0 } else { room.saturating_add(count.saturating_mul(BORDER)) };
    platform::device_memory(platform::ram_end(options.memory.ram), len)
}

/// Memory back ends as the broker shows them.
pub fn back_ends(options: &Options) -> Vec<MemoryBackEnd> {
    let back_end = |option: &crate::options::At<crate::options::MemoryBackEnd>| {
        let own = option.value.clone();
        let (huge_pages, path) = match own.backing {
            Backing::Memfd => (None, None),
            Backing::HugePages(len) => (Some(len), None),
            Backing::File(path) => (None, Some(path)),
        };
        MemoryBackEnd {
            qom_type: own.qom_type.to_owned(),
            id: own.id,
            size: own.size,
            share: own.share,
            prealloc: own.prealloc,
            huge_pages,
            path,
        }
    };
    options.memory_back_ends.iter().map(back_end).collect()
}

/// Objects have ids of their own whatever their type.
///
/// # Errors
/// A memory back end has that of an I/O thread.
pub fn check_ids(options: &Options) -> Result<(), Error> {
    for option in &options.memory_back_ends {
        let id = &option.value.id;
        if options.iothreads.iter().any(|thread| thread.value.id == *id) {
            return Err(option.error(Problem::DuplicateId("object", id.clone())));
        }
    }
    Ok(())
}

/// A device that has its place.
struct Taken {
    range: Range,
    id: String,
}

/// The range, and who has what of it.
pub struct Room {
    range: Range,
    /// What all devices may have together, in bytes.
    room: u64,
    taken: Vec<Taken>,
    /// Pieces of all of them.
    pieces: u16,
    /// Memory back ends in use.
    busy: Vec<String>,
}

fn overlap(one: &Range, other: &Range) -> bool {
    one.base < other.base.saturating_add(other.len) && other.base < one.base.saturating_add(one.len)
}

impl Room {
    /// Nobody has anything.
    pub fn of(options: &Options) -> Self {
        let (range, room) = (device_memory(options), options.memory.room);
        Self { range, room, taken: Vec::new(), pieces: 0, busy: Vec::new() }
    }

    /// Finds the place of a device, as QEMU checks it.
    fn place(&mut self, id: &str, size: u64, align: u64, addr: Option<u64>) -> Result<u64, Problem> {
        if self.room == 0 {
            return Err(Problem::NoMemoryDevices);
        }
        let used: u64 = self.taken.iter().map(|taken| taken.range.len).sum();
        if used.checked_add(size).is_none_or(|sum| sum > self.room) {
            return Err(Problem::NoMemoryRoom { used, room: self.room });
        }
        if addr.is_some_and(|addr| !addr.is_multiple_of(align)) {
            return Err(Problem::AddressAlignment(align));
        }
        if !size.is_multiple_of(align) {
            return Err(Problem::MemdevAlignment(align));
        }
        let base = match addr {
            Some(addr) => self.check(addr, size)?,
            None => self.free(size, align.max(BORDER))?,
        };
        self.taken.push(Taken { range: Range { base, len: size }, id: id.to_owned() });
        Ok(base)
    }

    fn check(&self, addr: u64, size: u64) -> Result<u64, Problem> {
        let Range { base, len } = self.range;
        if !self.range.contains(addr, size) {
            return Err(Problem::OutsideDeviceMemory { addr, size, base, len });
        }
        let new = Range { base: addr, len: size };
        match self.taken.iter().find(|taken| overlap(&taken.range, &new)) {
            Some(taken) => Err(Problem::MemoryConflict(taken.id.clone())),
            None => Ok(addr),
        }
    }

    /// The first free place.
    fn free(&self, size: u64, align: u64) -> Result<u64, Problem> {
        let ends = self.taken.iter().map(|taken| taken.range.base.saturating_add(taken.range.len));
        let mut starts: Vec<u64> = std::iter::once(self.range.base)
            .chain(ends)
            .filter_map(|start| start.checked_next_multiple_of(align))
            .collect();
        starts.sort_unstable();
        let found = starts.into_iter().find(|start| self.check(*start, size).is_ok());
        found.ok_or(Problem::MemoryFragmented)
    }

    /// Takes so many pieces; the number of the first one.
    fn pieces(&mut self, count: u16) -> Result<u16, Problem> {
        let first = self.pieces;
        let all = first.checked_add(count).filter(|all| *all <= MAX_PIECES);
        self.pieces = all.ok_or(Problem::TooManyPieces(MAX_PIECES))?;
        Ok(first)
    }
}

/// Length of a page of the memory, in bytes.
const fn page(backing: &Backing) -> u64 {
    match backing {
        Backing::HugePages(len) => *len,
        Backing::Memfd | Backing::File(_) => 4096,
    }
}

impl Planner<'_> {
    /// A memory device, with its daemon.
    pub(super) fn memory(&mut self, placed: &Placed<'_>, device: &MemoryDevice) -> Result<Virtio, Problem> {
        let id = &device.memdev;
        let back_end = self.options.memory_back_ends.iter().find(|back_end| back_end.value.id == *id);
        let back_end = back_end.ok_or_else(|| Problem::IoThreadNotFound(id.clone()))?;
        let (at, back_end) = (back_end.at.clone(), back_end.value.clone());
        let size = back_end.size;
        let page = page(&back_end.backing).max(ALIGN);
        let block = device.blocks.map(|blocks| blocks.size.unwrap_or(page));
        if block.is_some_and(|block| block < page) {
            return Err(Problem::BelowPage("block-size", page));
        }
        let addr = self.room.place(&placed.key, size, block.unwrap_or(page), device.addr)?;
        if self.room.busy.contains(id) {
            return Err(match block {
                Some(_) => Problem::BusyMemdev(id.clone()),
                None => Problem::AlreadyBusyMemdev(id.clone()),
            });
        }
        self.room.busy.push(id.clone());
        let opened = format!("memory.{}", placed.key);
        let (backing, prealloc) = (back_end.backing, back_end.prealloc);
        self.open(&opened, &at, What::Memory { backing, size, prealloc });
        let (life, iothread) = (self.bus.config.life, self.iothread(device.iothread.as_ref())?);
        let (key, own) = (placed.key.clone(), placed.key.clone());
        let requested_size = device.blocks.map_or(0, |blocks| blocks.requested);
        let (config, count) = match block {
            Some(block) => {
                if !requested_size.is_multiple_of(block) {
                    return Err(Problem::NotMultiple("requested-size", "block-size", block));
                }
                if requested_size > size {
                    return Err(Problem::AboveMemdev("requested-size", size));
                }
                let config = config::Mem {
                    life,
                    id: own,
                    addr,
                    size,
                    block_size: block,
                    requested_size,
                    node: None,
                    iothread,
                };
                (DaemonConfig::Mem(config), size.div_ceil(chunk_len(size, block)))
            }
            None => (DaemonConfig::Pmem(config::Pmem { life, id: own, addr, size, iothread }), 1),
        };
        let pieces = u16::try_from(count).map_err(|_| Problem::TooManyPieces(MAX_PIECES))?;
        let first = self.room.pieces(pieces)?;
        let what = plug::What::Memory { id: id.clone() };
        let fds = vec![(opened, "memory".to_owned())];
        self.bus.daemons.push(Daemon { key: key.clone(), config, fds, what, used: placed.used });
        let socket = format!("vhost.{key}");
        self.bus.memory.push(MemoryDeviceInfo {
            socket: socket.clone(),
            addr,
            size,
            memdev: id.clone(),
            block_size: block,
            node: 0,
        });
        // Configuration spaces: virtio 1.2, 5.15.4; virtio 1.3, 5.19.4.
        let (device_type, len) = if block.is_some() { (24, 56) } else { (27, 16) };
        Ok(Virtio {
            device_type,
            queues: 1,
            queue_size: QUEUE_SIZE,
            config: vec![0; len],
            without: 0,
            socket,
            listens: false,
            side: Some(format!("side.{key}")),
            resumes: true,
            memory: Some(DeviceMemory { addr, len: size, pieces, first }),
        })
    }
}
