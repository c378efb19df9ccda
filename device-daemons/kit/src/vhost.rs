//! The vhost-user back end's side of the protocol: what the front end says, kept and turned into commands for the
//! queue thread.
//!
//! ```text
//! ring: described --kick descriptor, enabled--> runs --GET_VRING_BASE, disabled, front end gone--> described
//! ```
//! Why not `vhost-user-backend`: see docs/decisions/0006-pci.md.

use std::fs::File;

use bulkhead_jail::warn;
use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVirtioFeatures, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};
use virtio_bindings::virtio_config::{VIRTIO_F_RING_RESET, VIRTIO_F_VERSION_1};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use crate::inflight::{Area, Fresh};
use crate::memory::{Map, Range};
use crate::ring::{MAX_QUEUE_SIZE, Setup};
use crate::worker::{Answer, Command, Handle};

/// The most memory regions; as of the vhost of Linux.
const MAX_REGIONS: u64 = 509;

/// Features of every device here, whatever its type.
const COMMON: u64 = 1 << VIRTIO_F_VERSION_1
    | 1 << VIRTIO_F_RING_RESET
    | 1 << VIRTIO_RING_F_EVENT_IDX
    | 1 << VIRTIO_RING_F_INDIRECT_DESC
    | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

/// What never changes of a device.
#[derive(Debug)]
pub(crate) struct Fixed {
    /// Features of its type.
    pub features: u64,
    /// Virtqueues.
    pub queues: u16,
    /// Length of its configuration space.
    pub config_len: usize,
    /// A new area for requests in flight, if it tracks them.
    pub fresh: Option<Fresh>,
}

/// What the front end has said of a ring.
#[derive(Debug, Default)]
struct Vring {
    size: u16,
    /// Descriptor table, available ring, used ring: guest physical addresses.
    addresses: Option<(u64, u64, u64)>,
    base: u16,
    kick: Option<File>,
    call: Option<File>,
    enabled: bool,
    runs: bool,
}

/// The state of one connection.
pub(crate) struct BackEnd<'a> {
    fixed: &'a Fixed,
    worker: &'a Handle,
    features: u64,
    map: Map,
    vrings: Vec<Vring>,
    area: Option<Area>,
}

fn refused<T>(what: &'static str) -> Result<T> {
    Err(Error::InvalidOperation(what))
}

fn copy(file: &File) -> Result<File> {
    file.try_clone().map_err(Error::ReqHandlerError)
}

impl<'a> BackEnd<'a> {
    /// A front end has connected.
    pub(crate) fn new(fixed: &'a Fixed, worker: &'a Handle) -> Self {
        let vrings = (0..fixed.queues).map(|_| Vring::default()).collect();
        Self { fixed, worker, features: 0, map: Map::default(), vrings, area: None }
    }

    /// It is gone: nothing of it stays.
    pub(crate) fn end(&mut self) {
        for index in 0..self.fixed.queues {
            let _ = self.stop(index.into());
        }
        self.worker.ask(Command::Memory(Map::default().memory()));
    }

    fn vring(&mut self, index: u32) -> Result<&mut Vring> {
        let index = usize::try_from(index).map_err(|_| Error::InvalidParam)?;
        self.vrings.get_mut(index).ok_or(Error::InvalidParam)
    }

    /// Stops a ring that runs.
    fn stop(&mut self, index: u32) -> Result<()> {
        if std::mem::take(&mut self.vring(index)?.runs) {
            let queue = u16::try_from(index).map_err(|_| Error::InvalidParam)?;
            if let Answer::Base(Some(base)) = self.worker.ask(Command::Stop(queue)) {
                self.vring(index)?.base = base;
            }
        }
        Ok(())
    }

    /// Starts a ring that may run.
    fn start(&mut self, index: u32) -> Result<()> {
        let queue = u16::try_from(index).map_err(|_| Error::InvalidParam)?;
        let event_idx = self.features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        let always = self.features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0;
        let area = self.area.clone();
        let vring = self.vring(index)?;
        let (Some((desc, avail, used)), Some(kick)) = (vring.addresses, &vring.kick) else { return Ok(()) };
        if vring.runs || !(vring.enabled || always) {
            return Ok(());
        }
        let tracker = area.and_then(|area| area.tracker(queue, vring.size));
        let call = vring.call.as_ref().map(copy).transpose()?.map(Into::into);
        let (size, base) = (vring.size, vring.base);
        let setup = Setup { index: queue, size, desc, avail, used, base, event_idx, call, tracker };
        let kick = copy(kick)?.into();
        vring.runs = true;
        self.worker.ask(Command::Start { setup, kick });
        Ok(())
    }

    /// Changes what is known of a ring; one that runs pauses meanwhile.
    fn change(&mut self, index: u32, change: impl FnOnce(&mut Vring)) -> Result<()> {
        self.stop(index)?;
        change(self.vring(index)?);
        self.start(index)
    }

    fn set_map(&mut self, map: Map) {
        self.worker.ask(Command::Memory(map.memory()));
        self.map = map;
    }

    fn config(&self, offset: u32, len: usize) -> Result<(usize, usize)> {
        let start = usize::try_from(offset).map_err(|_| Error::InvalidParam)?;
        let end = start.checked_add(len).filter(|end| *end <= self.fixed.config_len);
        Ok((start, end.ok_or(Error::InvalidParam)?))
    }
}

impl VhostUserBackendReqHandlerMut for BackEnd<'_> {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        refused("RESET_OWNER is of the past")
    }

    fn reset_device(&mut self) -> Result<()> {
        refused("RESET_DEVICE was not offered")
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(self.fixed.features | COMMON)
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        if features & !(self.fixed.features | COMMON) != 0 {
            return Err(Error::InvalidParam);
        }
        self.features = features;
        self.worker.ask(Command::Features(features));
        for index in 0..u32::from(self.fixed.queues) {
            self.start(index)?;
        }
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        table: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> Result<Option<Vec<VhostUserMemoryRegionBase>>> {
        let range = |region: &VhostUserMemoryRegion| Range {
            guest: region.guest_phys_addr,
            len: region.memory_size,
            user: region.user_addr,
            offset: region.mmap_offset,
        };
        let map = Map::new(table.iter().map(range).zip(files).collect()).map_err(memory_error)?;
        self.set_map(map);
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        let size = u16::try_from(num).map_err(|_| Error::InvalidParam)?;
        if !size.is_power_of_two() || size > MAX_QUEUE_SIZE {
            return Err(Error::InvalidParam);
        }
        self.change(index, |vring| vring.size = size)
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        if flags.contains(VhostUserVringAddrFlags::VHOST_VRING_F_LOG) {
            return refused("logging was not offered");
        }
        let guest = |user| self.map.guest(user).ok_or(Error::InvalidParam);
        let addresses = (guest(descriptor)?, guest(available)?, guest(used)?);
        self.change(index, |vring| vring.addresses = Some(addresses))
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let base = u16::try_from(base).map_err(|_| Error::InvalidParam)?;
        self.change(index, |vring| vring.base = base)
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        self.stop(index)?;
        let vring = self.vring(index)?;
        (vring.kick, vring.call) = (None, None);
        Ok(VhostUserVringState::new(index, vring.base.into()))
    }

    fn set_vring_kick(&mut self, index: u8, kick: Option<File>) -> Result<()> {
        self.change(index.into(), |vring| vring.kick = kick)
    }

    fn set_vring_call(&mut self, index: u8, call: Option<File>) -> Result<()> {
        let for_worker = call.as_ref().map(copy).transpose()?.map(Into::into);
        let vring = self.vring(index.into())?;
        vring.call = call;
        if vring.runs {
            self.worker.ask(Command::Call(index.into(), for_worker));
        }
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, _err: Option<File>) -> Result<()> {
        // Errors are told on the side link.
        self.vring(index.into()).map(drop)
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        let mut features = VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS;
        features.set(VhostUserProtocolFeatures::INFLIGHT_SHMFD, self.fixed.fresh.is_some());
        Ok(features)
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        if features & !self.get_protocol_features()?.bits() != 0 {
            return Err(Error::InvalidParam);
        }
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.fixed.queues.into())
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        if enable {
            self.vring(index)?.enabled = true;
            return self.start(index);
        }
        self.stop(index)?;
        self.vring(index)?.enabled = false;
        Ok(())
    }

    fn get_config(&mut self, offset: u32, size: u32, _flags: VhostUserConfigFlags) -> Result<Vec<u8>> {
        let len = usize::try_from(size).map_err(|_| Error::InvalidParam)?;
        let (start, end) = self.config(offset, len)?;
        let Answer::Config(config) = self.worker.ask(Command::ReadConfig) else {
            return Err(Error::BackendInternalError);
        };
        config.get(start..end).map(<[u8]>::to_vec).ok_or(Error::BackendInternalError)
    }

    fn set_config(&mut self, offset: u32, data: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        // The driver's write, passed on: one that is outside is its mistake and ends nothing.
        match self.config(offset, data.len()) {
            Ok((start, _)) => drop(self.worker.ask(Command::WriteConfig(start, data.to_vec()))),
            Err(_) => warn!("a write beyond the configuration space is ignored"),
        }
        Ok(())
    }

    fn set_gpu_socket(&mut self, _gpu: GpuBackend) -> Result<()> {
        refused("no graphics here")
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        refused("shared objects were not offered")
    }

    fn get_inflight_fd(&mut self, asked: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        let Some(fresh) = &self.fixed.fresh else { return refused("in-flight tracking was not offered") };
        let given = fresh.give(asked.num_queues.min(self.fixed.queues), asked.queue_size);
        let (area, file, len) = given.map_err(|_| Error::InvalidParam)?;
        self.area = Some(area);
        let queues = asked.num_queues.min(self.fixed.queues);
        Ok((VhostUserInflight::new(len, 0, queues, asked.queue_size), file))
    }

    fn set_inflight_fd(&mut self, given: &VhostUserInflight, file: File) -> Result<()> {
        if self.fixed.fresh.is_none() {
            return refused("in-flight tracking was not offered");
        }
        let area = Area::map(file, given.mmap_offset, given.num_queues, given.queue_size);
        self.area = Some(area.map_err(|_| Error::InvalidParam)?);
        Ok(())
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(MAX_REGIONS)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        _postcopy: Option<bool>,
    ) -> Result<Option<VhostUserMemoryRegionBase>> {
        let range = Range {
            guest: region.guest_phys_addr,
            len: region.memory_size,
            user: region.user_addr,
            offset: region.mmap_offset,
        };
        let map = self.map.with(range, file).map_err(memory_error)?;
        self.set_map(map);
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        let map = self.map.without(region.guest_phys_addr, region.memory_size).map_err(memory_error)?;
        self.set_map(map);
        Ok(())
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _file: File,
    ) -> Result<Option<File>> {
        refused("device state was not offered")
    }

    fn check_device_state(&mut self) -> Result<()> {
        refused("device state was not offered")
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        refused("shared memory was not offered")
    }

    fn set_log_base(&mut self, _log: &VhostUserLog, _file: File) -> Result<()> {
        refused("logging was not offered")
    }
}

fn memory_error(error: crate::memory::MemoryError) -> Error {
    Error::ReqHandlerError(std::io::Error::other(error))
}
