//! The device: configuration space, requests and what they come to (virtio 1.2, 5.15).

use std::ops::Range;

use bulkhead_control_api::config;
use bulkhead_control_api::side::chunk_len;

use crate::blocks::Blocks;

/// Feature bits of the device type (5.15.3).
const VIRTIO_MEM_F_ACPI_PXM: u64 = 1;
const VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;

/// Length of the configuration space in bytes (5.15.4).
pub const CONFIG_LEN: usize = 56;
/// Length of a request in bytes (5.15.6).
pub const REQUEST_LEN: usize = 24;
/// Length of a response in bytes.
pub const RESPONSE_LEN: usize = 10;
/// So much more than what is requested is usable, in bytes: a driver plugs from what it has addresses for.
const USABLE_EXTRA: u64 = 512 << 20;

/// A request of the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Plug so many blocks from this guest physical address on.
    Plug(u64, u16),
    /// Unplug them.
    Unplug(u64, u16),
    /// Unplug all.
    UnplugAll,
    /// Tell whether they are plugged.
    State(u64, u16),
}

impl Request {
    /// Reads a request; none for a type that there is not.
    #[must_use]
    pub fn decode(bytes: &[u8; REQUEST_LEN]) -> Option<Self> {
        let u16_at =
            |at: usize| bytes.get(at..).and_then(|rest| rest.first_chunk()).map(|b| u16::from_le_bytes(*b));
        let addr = bytes.get(8..).and_then(|rest| rest.first_chunk()).map(|b| u64::from_le_bytes(*b))?;
        let count = u16_at(16)?;
        Some(match u16_at(0)? {
            0 => Self::Plug(addr, count),
            1 => Self::Unplug(addr, count),
            2 => Self::UnplugAll,
            3 => Self::State(addr, count),
            _ => return None,
        })
    }
}

/// The answer to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Response {
    /// Done; the state that was asked for: 0 plugged, 1 unplugged, 2 mixed.
    Ack(u16),
    /// More than was requested of the guest.
    Nack,
    /// Not now; the driver tries again.
    Busy,
    /// The request is wrong.
    Error,
}

impl Response {
    /// The response as bytes.
    #[must_use]
    pub fn encode(self) -> [u8; RESPONSE_LEN] {
        let (kind, state) = match self {
            Self::Ack(state) => (0, state),
            Self::Nack => (1, 0),
            Self::Busy => (2, 0),
            Self::Error => (3u16, 0u16),
        };
        let mut bytes = [0; RESPONSE_LEN];
        let fields = kind.to_le_bytes().into_iter().chain([0; 6]).chain(state.to_le_bytes());
        for (slot, byte) in bytes.iter_mut().zip(fields) {
            *slot = byte;
        }
        bytes
    }
}

/// What a good request wants done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Plan {
    /// Make these blocks memory of the guest.
    Plug(Range<u64>),
    /// Take them away.
    Unplug(Range<u64>),
    /// Take all away.
    UnplugAll,
}

/// What outlives the process, and what `requested` and `blocks` come to.
#[derive(Debug)]
pub struct Mem {
    /// Guest physical address of the region.
    addr: u64,
    /// Length of a block in bytes.
    block: u64,
    /// NUMA node.
    node: u16,
    offered: u64,
    /// Bytes that the guest is to plug, a multiple of the block.
    requested: u64,
    /// Bytes from the start of the region that it may plug.
    usable: u64,
    blocks: Blocks,
}

impl Mem {
    /// The device at power-on. Sizes and address are multiples of the block: the starter has seen to that.
    #[must_use]
    pub fn new(config: &config::Mem) -> Self {
        let block = config.block_size.max(1);
        let per_chunk = chunk_len(config.size, block) / block;
        let offered = VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE
            | if config.node.is_some() { VIRTIO_MEM_F_ACPI_PXM } else { 0 };
        let mut this = Self {
            addr: config.addr,
            block,
            node: config.node.unwrap_or(0),
            offered,
            requested: 0,
            usable: 0,
            blocks: Blocks::new(config.size / block, per_chunk),
        };
        this.request(config.requested_size);
        this
    }

    /// Feature bits of the device type that it offers.
    #[must_use]
    pub const fn offered(&self) -> u64 {
        self.offered
    }

    /// The configuration space.
    #[must_use]
    pub fn config(&self) -> [u8; CONFIG_LEN] {
        let fields = [
            self.block,
            self.node.into(),
            self.addr,
            self.blocks.count().saturating_mul(self.block),
            self.usable,
            self.plugged(),
            self.requested,
        ];
        let mut space = [0; CONFIG_LEN];
        for (slot, field) in space.chunks_exact_mut(8).zip(fields) {
            slot.copy_from_slice(&field.to_le_bytes());
        }
        space
    }

    /// Bytes that are plugged.
    #[must_use]
    pub const fn plugged(&self) -> u64 {
        self.blocks.plugged().saturating_mul(self.block)
    }

    /// Bytes that are requested of the guest.
    #[must_use]
    pub const fn requested(&self) -> u64 {
        self.requested
    }

    /// The plugged blocks.
    #[must_use]
    pub const fn blocks(&self) -> &Blocks {
        &self.blocks
    }

    /// Length of a block in bytes.
    #[must_use]
    pub const fn block(&self) -> u64 {
        self.block
    }

    /// Wants `bytes` plugged, at most all, in whole blocks; false if that changes nothing. What is usable grows with it,
    /// and shrinks when nothing is plugged.
    pub fn request(&mut self, bytes: u64) -> bool {
        let len = self.blocks.count().saturating_mul(self.block);
        let bytes = bytes.min(len) / self.block * self.block;
        let changed = std::mem::replace(&mut self.requested, bytes) != bytes;
        self.resize(false);
        changed
    }

    /// What is usable follows what is requested. It shrinks only if nothing that is plugged can lie beyond it.
    fn resize(&mut self, shrink: bool) {
        let len = self.blocks.count().saturating_mul(self.block);
        let extra = USABLE_EXTRA.next_multiple_of(self.block);
        let usable = if self.requested == 0 { 0 } else { self.requested.saturating_add(extra).min(len) };
        if usable > self.usable || shrink || self.blocks.plugged() == 0 {
            self.usable = usable;
        }
    }

    /// The machine is as after power-on, as far as the guest's part goes. `blocks` are those of a predecessor.
    pub fn restore(&mut self, blocks: Blocks, requested: u64, usable: u64) {
        let len = self.blocks.count().saturating_mul(self.block);
        self.blocks = blocks;
        self.request(requested);
        self.usable = self.usable.max(usable.min(len));
    }

    /// Bytes from the start of the region that are usable.
    #[must_use]
    pub const fn usable(&self) -> u64 {
        self.usable
    }

    /// The blocks of a request, if all are in the usable part of the region (5.15.6.2).
    fn range(&self, addr: u64, count: u16) -> Option<Range<u64>> {
        let offset = addr.checked_sub(self.addr)?;
        let end = offset.checked_add(u64::from(count).checked_mul(self.block)?)?;
        let good = count > 0 && offset.is_multiple_of(self.block) && end <= self.usable;
        good.then_some(offset / self.block..end / self.block)
    }

    /// What a request wants done, or its answer.
    ///
    /// # Errors
    /// The answer to a request that wants nothing done.
    pub fn check(&self, request: Request) -> Result<Plan, Response> {
        match request {
            Request::Plug(addr, count) => {
                let range = self.range(addr, count).ok_or(Response::Error)?;
                if self.blocks.state(range.clone()) != Some(false) {
                    return Err(Response::Error);
                }
                let more = (range.end - range.start).saturating_mul(self.block);
                if self.plugged().saturating_add(more) > self.requested {
                    return Err(Response::Nack);
                }
                Ok(Plan::Plug(range))
            }
            Request::Unplug(addr, count) => {
                let range = self.range(addr, count).ok_or(Response::Error)?;
                if self.blocks.state(range.clone()) == Some(true) {
                    Ok(Plan::Unplug(range))
                } else {
                    Err(Response::Error)
                }
            }
            Request::UnplugAll => Ok(Plan::UnplugAll),
            Request::State(addr, count) => {
                let range = self.range(addr, count).ok_or(Response::Error)?;
                Err(Response::Ack(match self.blocks.state(range) {
                    Some(true) => 0,
                    Some(false) => 1,
                    None => 2,
                }))
            }
        }
    }

    /// What a request changes if it may: the blocks, and whether they are plugged then.
    #[must_use]
    pub fn change(&self, request: Request) -> Option<(Range<u64>, bool)> {
        match request {
            Request::Plug(addr, count) => Some((self.range(addr, count)?, true)),
            Request::Unplug(addr, count) => Some((self.range(addr, count)?, false)),
            Request::UnplugAll => Some((0..self.blocks.count(), false)),
            Request::State(..) => None,
        }
    }

    /// It is done.
    pub fn commit(&mut self, plan: &Plan) {
        match plan {
            Plan::Plug(range) => self.blocks.set(range.clone(), true),
            Plan::Unplug(range) => self.blocks.set(range.clone(), false),
            Plan::UnplugAll => {
                self.blocks.set(0..self.blocks.count(), false);
                self.resize(true);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const BLOCK: u64 = 2 * MIB;
    const ADDR: u64 = 1 << 40;

    fn mem(requested: u64) -> Mem {
        let config = config::Mem {
            life: 1,
            id: "vm0".to_owned(),
            addr: ADDR,
            size: 1024 * MIB,
            block_size: BLOCK,
            requested_size: requested,
            node: None,
            iothread: config::IoThread::default(),
        };
        Mem::new(&config)
    }

    fn carry_out(mem: &mut Mem, request: Request) -> Response {
        match mem.check(request) {
            Ok(plan) => {
                mem.commit(&plan);
                Response::Ack(0)
            }
            Err(response) => response,
        }
    }

    fn u64_at(space: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(space[at..at + 8].try_into().unwrap())
    }

    #[test]
    fn requests_are_read_as_the_specification_says() {
        let mut bytes = [0xee; REQUEST_LEN];
        bytes[8..16].copy_from_slice(&ADDR.to_le_bytes());
        bytes[16..18].copy_from_slice(&7u16.to_le_bytes());
        for (kind, want) in [
            (0u16, Some(Request::Plug(ADDR, 7))),
            (1, Some(Request::Unplug(ADDR, 7))),
            (2, Some(Request::UnplugAll)),
            (3, Some(Request::State(ADDR, 7))),
            (4, None),
            (0x100, None),
        ] {
            bytes[..2].copy_from_slice(&kind.to_le_bytes());
            assert_eq!(Request::decode(&bytes), want);
        }
        assert_eq!(Response::Ack(2).encode(), [0, 0, 0, 0, 0, 0, 0, 0, 2, 0]);
        assert_eq!(Response::Error.encode(), [3, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn the_guest_plugs_what_is_requested_and_no_more() {
        let mut mem = mem(4 * BLOCK);
        assert_eq!(carry_out(&mut mem, Request::Plug(ADDR, 3)), Response::Ack(0));
        assert_eq!(carry_out(&mut mem, Request::Plug(ADDR + 3 * BLOCK, 2)), Response::Nack);
        assert_eq!(carry_out(&mut mem, Request::Plug(ADDR + 2 * BLOCK, 1)), Response::Error, "plugged twice");
        assert_eq!(carry_out(&mut mem, Request::Plug(ADDR + 10 * BLOCK, 1)), Response::Ack(0));
        assert_eq!(mem.plugged(), 4 * BLOCK);
        for (addr, count, state) in [(0, 3, 0), (3, 7, 1), (2, 2, 2), (10, 1, 0)] {
            let answer = carry_out(&mut mem, Request::State(ADDR + addr * BLOCK, count));
            assert_eq!(answer, Response::Ack(state), "{addr} {count}");
        }
        assert_eq!(carry_out(&mut mem, Request::Unplug(ADDR + BLOCK, 3)), Response::Error, "not all plugged");
        assert_eq!(carry_out(&mut mem, Request::Unplug(ADDR, 3)), Response::Ack(0));
        assert_eq!(mem.plugged(), BLOCK);
        assert_eq!(carry_out(&mut mem, Request::UnplugAll), Response::Ack(0));
        assert_eq!(mem.plugged(), 0);
        assert_eq!(carry_out(&mut mem, Request::UnplugAll), Response::Ack(0), "nothing is fine, too");
    }

    /// Every wrong range, with every request that has one.
    #[test]
    fn ranges_outside_are_errors() {
        let mem = mem(4 * BLOCK);
        let usable = mem.usable();
        let wrong = [
            (ADDR - BLOCK, 1),
            (ADDR + 1, 1),
            (ADDR + BLOCK / 2, 1),
            (ADDR, 0),
            (ADDR + usable, 1),
            (ADDR + usable - BLOCK, 2),
            (ADDR, u16::MAX),
            (0, 1),
            (u64::MAX, 1),
            (u64::MAX - BLOCK + 1, 2),
        ];
        for (addr, count) in wrong {
            for request in
                [Request::Plug(addr, count), Request::Unplug(addr, count), Request::State(addr, count)]
            {
                assert_eq!(mem.check(request), Err(Response::Error), "{request:x?}");
            }
        }
    }

    #[test]
    fn what_is_usable_follows_the_request_and_never_strands_a_block() {
        let mut mem = mem(0);
        assert_eq!(mem.usable(), 0);
        assert!(mem.request(10 * BLOCK + 1) && !mem.request(10 * BLOCK));
        assert_eq!(mem.usable(), 10 * BLOCK + USABLE_EXTRA);
        let last = ADDR + mem.usable() - BLOCK;
        assert_eq!(carry_out(&mut mem, Request::Plug(last, 1)), Response::Ack(0));
        let before = mem.usable();
        mem.request(0);
        assert_eq!(mem.usable(), before, "a block would lie beyond it");
        assert_eq!(carry_out(&mut mem, Request::UnplugAll), Response::Ack(0));
        assert_eq!(mem.usable(), 0);
        assert!(mem.request(u64::MAX));
        assert_eq!((mem.requested(), mem.usable()), (1024 * MIB, 1024 * MIB));
    }

    #[test]
    fn the_configuration_space_is_live() {
        let mut mem = mem(4 * BLOCK);
        let space = mem.config();
        let want = [BLOCK, 0, ADDR, 1024 * MIB, 4 * BLOCK + USABLE_EXTRA, 0, 4 * BLOCK];
        assert!(want.iter().enumerate().all(|(i, field)| u64_at(&space, i * 8) == *field), "{space:x?}");
        carry_out(&mut mem, Request::Plug(ADDR, 2));
        assert_eq!(u64_at(&mem.config(), 40), 2 * BLOCK);
    }

    #[test]
    fn a_successor_has_what_its_predecessor_had() {
        let mut first = mem(4 * BLOCK);
        carry_out(&mut first, Request::Plug(ADDR + BLOCK, 3));
        let usable = first.usable();
        first.request(BLOCK);
        let mut second = mem(4 * BLOCK);
        second.restore(first.blocks().clone(), first.requested(), first.usable());
        assert_eq!(second.config(), first.config());
        assert_eq!(second.usable(), usable);
    }
}
