//! A vhost-user front end and a driver in one: what a guest and its VMM do, without either.
//!
//! Guest memory is one memfd at guest physical address 0; ring addresses are named with the bias that the pci
//! daemon uses. Everything fails by panic: this is for tests.
#![expect(clippy::unwrap_used, clippy::missing_panics_doc, reason = "a test that cannot go on fails")]

mod daemon;
mod queue;

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::net::UnixStream;

use bulkhead_control_api::side::ToPci;
use bulkhead_jail::link::Link;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::MsgFlags;
use vhost::VhostBackend as _;
use vhost::vhost_user::message::{VhostUserHeaderFlag, VhostUserInflight, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend as _};
use vhost::{VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};

pub use daemon::{Life, Sockets, pair_of_packets};
pub use queue::{Part, Queue};

/// What is added to a guest physical address when memory is named.
pub const BIAS: u64 = 1 << 46;
/// `VIRTIO_F_EVENT_IDX`.
pub const EVENT_IDX: u64 = 1 << 29;
/// `VHOST_USER_F_PROTOCOL_FEATURES`.
pub const PROTOCOL_FEATURES: u64 = 1 << 30;
/// `VIRTIO_F_VERSION_1`.
pub const VERSION_1: u64 = 1 << 32;

/// Guest memory, from address 0.
pub struct Memory {
    file: File,
    size: u64,
    /// The mapping.
    pub map: GuestMemoryMmap,
}

impl Memory {
    /// So many bytes.
    #[must_use]
    pub fn new(size: u64) -> Self {
        let file: File = memfd_create("ram", MFdFlags::MFD_CLOEXEC).unwrap().into();
        file.set_len(size).unwrap();
        let mapped = FileOffset::new(file.try_clone().unwrap(), 0);
        let ranges = [(GuestAddress(0), usize::try_from(size).unwrap(), Some(mapped))];
        Self { file, size, map: GuestMemoryMmap::from_ranges_with_files(ranges).unwrap() }
    }

    /// Its memfd.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }
}

/// A connection to a back end.
pub struct FrontEnd {
    /// The requests.
    pub raw: Frontend,
    /// Features that are negotiated.
    pub features: u64,
    protocol: VhostUserProtocolFeatures,
    socket: UnixStream,
}

impl FrontEnd {
    /// Negotiates `wanted` of the features that the back end has and hands it the memory.
    #[must_use]
    pub fn new(stream: UnixStream, memory: &Memory, wanted: u64) -> Self {
        let socket = stream.try_clone().unwrap();
        let mut raw = Frontend::from_stream(stream, 64);
        raw.set_owner().unwrap();
        let offered = raw.get_features().unwrap();
        assert_ne!(offered & PROTOCOL_FEATURES, 0);
        let protocol = raw.get_protocol_features().unwrap()
            & (VhostUserProtocolFeatures::MQ
                | VhostUserProtocolFeatures::REPLY_ACK
                | VhostUserProtocolFeatures::CONFIG
                | VhostUserProtocolFeatures::INFLIGHT_SHMFD
                | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS);
        raw.set_protocol_features(protocol).unwrap();
        raw.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        let features = offered & (wanted | PROTOCOL_FEATURES | VERSION_1);
        raw.set_features(features).unwrap();
        let region = VhostUserMemoryRegionInfo {
            guest_phys_addr: 0,
            memory_size: memory.size,
            userspace_addr: BIAS,
            mmap_offset: 0,
            mmap_handle: memory.file.as_raw_fd(),
        };
        raw.set_mem_table(&[region]).unwrap();
        Self { raw, features, protocol, socket }
    }

    /// Bytes of the configuration space; none if the back end refuses. By hand: the crate's front end waits for ever for
    /// what a refusal does not have.
    pub fn config(&mut self, offset: u32, len: u32) -> Option<Vec<u8>> {
        /// Number of the request; version of the protocol; length of what comes before the content.
        const GET_CONFIG: [u32; 3] = [24, 1, 12];
        let [code, version, fixed] = GET_CONFIG;
        let words = [code, version, fixed + len, offset, len, 0].map(u32::to_le_bytes).concat();
        self.socket.write_all(&[words, vec![0; usize::try_from(len).unwrap()]].concat()).unwrap();
        let mut header = [0; 12];
        self.socket.read_exact(&mut header).unwrap();
        let [.., a, b, c, d] = header;
        let mut body = vec![0; usize::try_from(u32::from_le_bytes([a, b, c, d])).unwrap()];
        self.socket.read_exact(&mut body).unwrap();
        let config = body.split_off(usize::try_from(fixed).unwrap());
        (config.len() == usize::try_from(len).unwrap()).then_some(config)
    }

    /// Whether the back end tracks requests in flight.
    #[must_use]
    pub fn tracks(&self) -> bool {
        self.protocol.contains(VhostUserProtocolFeatures::INFLIGHT_SHMFD)
    }

    /// A new area for requests in flight.
    pub fn get_inflight(&mut self, queues: u16, size: u16) -> (VhostUserInflight, File) {
        self.raw.get_inflight_fd(&VhostUserInflight::new(0, 0, queues, size)).unwrap()
    }

    /// Hands one over that a back end has left.
    pub fn set_inflight(&mut self, (area, file): &(VhostUserInflight, File)) {
        self.raw.set_inflight_fd(area, file.as_raw_fd()).unwrap();
    }

    /// Starts a queue at `base` and kicks it.
    pub fn start(&mut self, queue: &Queue, base: u16) {
        let index = usize::from(queue.index);
        self.raw.set_vring_num(index, queue.size).unwrap();
        let addresses = VringConfigData {
            queue_max_size: queue.size,
            queue_size: queue.size,
            flags: 0,
            desc_table_addr: queue.desc + BIAS,
            used_ring_addr: queue.used + BIAS,
            avail_ring_addr: queue.avail + BIAS,
            log_addr: None,
        };
        self.raw.set_vring_addr(index, &addresses).unwrap();
        self.raw.set_vring_base(index, base).unwrap();
        self.raw.set_vring_call(index, &queue.call).unwrap();
        self.raw.set_vring_kick(index, &queue.kick).unwrap();
        self.raw.set_vring_enable(index, true).unwrap();
        queue.kick.write(1).unwrap();
    }

    /// Stops a queue; returns its available index.
    pub fn stop(&mut self, queue: u16) -> u16 {
        self.try_stop(queue).unwrap()
    }

    /// The same; `None` if the daemon ends the connection instead.
    pub fn try_stop(&mut self, queue: u16) -> Option<u16> {
        self.raw.get_vring_base(queue.into()).ok().map(|base| u16::try_from(base).unwrap())
    }
}

/// What a daemon says next on its side link, beside who its queue thread is.
#[must_use]
pub fn next_word(side: &mut Link) -> ToPci {
    loop {
        let (word, _) = side.recv_with(MsgFlags::empty()).unwrap();
        if word != ToPci::Thread {
            return word;
        }
    }
}
