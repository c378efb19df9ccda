//! The front end with a back end of the `vhost-user-backend` crate, as ours and many others' are.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test that cannot go on fails"
)]

mod common;

use std::io::{Error, Result};
use std::os::unix::net::UnixListener;
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use bulkhead_bus_api::pci;
use bulkhead_framework::Scratch;
use bulkhead_pci::frontend::{Event, Frontend, Spec};
use bulkhead_pci::memory::{Memory, Region};
use common::{BASE, LEN, Ram, VERSION_1, eventually, next};
use nix::sys::memfd::{MFdFlags, memfd_create};
use vhost::vhost_user::message::{
    VhostUserMMap, VhostUserMMapFlags, VhostUserProtocolFeatures, VhostUserShMemConfig,
};
use vhost::vhost_user::{Backend, Listener, VhostUserFrontendReqHandler as _};
use vhost_user_backend::{VhostUserBackendMut, VhostUserDaemon, VringMutex, VringT};
use virtio_queue::QueueT;
use vm_memory::{
    Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryMmap,
};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};

type Mapped = GuestMemoryAtomic<GuestMemoryMmap>;
type Vring = VringMutex<Mapped>;
const FILL: u8 = 0xa5;
/// Length of its shared memory region, number 2.
const REGION: u64 = 0x20_0000;

/// A device that fills what it is offered.
struct Filler {
    memory: Option<Mapped>,
    config: Vec<u8>,
    resets: usize,
    pieces: usize,
    /// The way for requests of its own.
    requests: Option<Backend>,
    exit: (EventConsumer, EventNotifier),
}

impl VhostUserBackendMut for Filler {
    type Bitmap = ();
    type Vring = Vring;

    fn num_queues(&self) -> usize {
        1
    }

    fn max_queue_size(&self) -> usize {
        64
    }

    fn features(&self) -> u64 {
        VERSION_1 | 1 << 30
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::all()
            - VhostUserProtocolFeatures::INFLIGHT_SHMFD
            - VhostUserProtocolFeatures::PAGEFAULT
    }

    fn reset_device(&mut self) {
        self.resets += 1;
    }

    fn set_event_idx(&mut self, _enabled: bool) {}

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let offset = offset as usize;
        self.config.get(offset..offset + size as usize).unwrap_or_default().to_vec()
    }

    fn set_config(&mut self, offset: u32, bytes: &[u8]) -> Result<()> {
        let offset = offset as usize;
        let to = self.config.get_mut(offset..offset + bytes.len()).ok_or(Error::other("outside"))?;
        to.copy_from_slice(bytes);
        Ok(())
    }

    fn set_backend_req_fd(&mut self, backend: Backend) {
        backend.set_shmem_flag(true);
        self.requests = Some(backend);
    }

    fn get_shmem_config(&self) -> Result<VhostUserShMemConfig> {
        Ok(VhostUserShMemConfig::new(1, &[0, 0, REGION]))
    }

    fn update_memory(&mut self, memory: Mapped) -> Result<()> {
        self.pieces = memory.memory().num_regions();
        self.memory = Some(memory);
        Ok(())
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        Some((self.exit.0.try_clone().unwrap(), self.exit.1.try_clone().unwrap()))
    }

    fn handle_event(&mut self, _device: u16, _set: EventSet, vrings: &[Vring], _thread: usize) -> Result<()> {
        let memory = self.memory.as_ref().unwrap().memory();
        let mut vring = vrings[0].get_mut();
        loop {
            let chain = vring.get_queue_mut().pop_descriptor_chain(memory.clone());
            let Some(chain) = chain else { return Ok(()) };
            let head = chain.head_index();
            let mut written = 0;
            for part in chain.writable() {
                let bytes = vec![FILL; part.len() as usize];
                memory.write_slice(&bytes, GuestAddress(part.addr().0)).unwrap();
                written += part.len();
            }
            vring.add_used(head, written).unwrap();
            vring.signal_used_queue().unwrap();
        }
    }
}

struct Rig {
    _scratch: Scratch,
    filler: Arc<Mutex<Filler>>,
    front: Frontend,
    thread: JoinHandle<()>,
}

fn rig() -> Rig {
    let scratch = Scratch::new().unwrap();
    let path = scratch.path().join("vhost");
    let mut listener = Listener::from(UnixListener::bind(&path).unwrap());
    let exit = new_event_consumer_and_notifier(EventFlag::empty()).unwrap();
    let config = (0..12).collect();
    let filler =
        Arc::new(Mutex::new(Filler { memory: None, config, resets: 0, pieces: 0, requests: None, exit }));
    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
    let mut daemon = VhostUserDaemon::new("filler".into(), Arc::clone(&filler), memory).unwrap();
    let thread = thread::spawn(move || {
        daemon.start(&mut listener).unwrap();
        let _closed = daemon.wait();
    });
    let mut front = Frontend::new(Spec { id: "rng0".into(), queues: 1, queue_size: 256, config_len: 16 });
    front.connect(common::connect(&path));
    let events = next(&mut front);
    let [Event::Ready { features: VERSION_1, queues: 1, config }] = &events[..] else { panic!("{events:?}") };
    assert_eq!(config[..], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 0, 0, 0, 0]);
    Rig { _scratch: scratch, filler, front, thread }
}

fn fill(ram: &mut Ram, offset: u64) {
    let used = ram.used();
    ram.offer(&[(offset, 64, true)]);
    nix::unistd::write(&ram.kick, &1u64.to_ne_bytes()).unwrap();
    eventually(|| ram.used() == used + 1);
    assert_eq!(ram.read(offset, 65), [vec![FILL; 64], vec![0]].concat());
}

#[test]
fn a_ring_runs_stops_and_goes_on() {
    let Rig { _scratch, filler, mut front, thread } = rig();
    let mut ram = Ram::new();
    front.start(VERSION_1, &ram.memory, vec![ram.ring(0, 0)]).unwrap();
    assert_eq!(next(&mut front), [Event::Started { ring: None }]);
    fill(&mut ram, 0x8000);
    fill(&mut ram, 0x9000);
    let mut count = [0; 8];
    assert_eq!(nix::unistd::read(&ram.call, &mut count), Ok(8));

    front.stop_ring(0);
    assert_eq!(next(&mut front), [Event::Stopped { ring: Some(0), bases: vec![(0, 2)] }]);
    let memory = Rc::clone(&ram.memory);
    front.start_ring(&memory, ram.ring(0, 2)).unwrap();
    assert_eq!(next(&mut front), [Event::Started { ring: Some(0) }]);
    fill(&mut ram, 0xa000);

    front.stop();
    assert_eq!(next(&mut front), [Event::Stopped { ring: None, bases: vec![(0, 3)] }]);
    front.reset();
    front.start(VERSION_1, &ram.memory, vec![ram.ring(0, 3)]).unwrap();
    assert_eq!(next(&mut front), [Event::Started { ring: None }]);
    fill(&mut ram, 0xb000);
    assert_eq!(filler.lock().unwrap().resets, 1);

    front.disconnect();
    thread.join().unwrap();
}

#[test]
fn another_interrupt_is_given_to_a_running_ring() {
    let Rig { _scratch, mut front, thread, .. } = rig();
    let mut ram = Ram::new();
    front.start(VERSION_1, &ram.memory, vec![ram.ring(0, 0)]).unwrap();
    assert_eq!(next(&mut front), [Event::Started { ring: None }]);
    let other = common::eventfd();
    front.set_call(0, &other);
    front.read_config();
    assert!(matches!(next(&mut front)[..], [Event::Config { .. }]));
    fill(&mut ram, 0x8000);
    let mut count = [0; 8];
    eventually(|| nix::unistd::read(&other, &mut [0; 8]) == Ok(8));
    assert!(nix::unistd::read(&ram.call, &mut count).is_err());
    drop(front);
    thread.join().unwrap();
}

#[test]
fn memory_comes_and_goes() {
    let Rig { _scratch, filler, mut front, thread } = rig();
    let ram = Ram::new();
    front.start(VERSION_1, &ram.memory, vec![ram.ring(0, 0)]).unwrap();
    assert_eq!(next(&mut front), [Event::Started { ring: None }]);
    let low = ram.memory.regions[0].clone();
    let place = pci::Memory { base: BASE + LEN, len: LEN };
    let high = Region { place, fd: Rc::clone(&Ram::new().memory.regions[0].fd), offset: 0 };
    let both = Rc::new(Memory { regions: vec![low, high] });
    for (memory, pieces) in [(&both, 2), (&ram.memory, 1), (&both, 2)] {
        front.set_memory(memory);
        assert_eq!(next(&mut front), [Event::Memory]);
        assert_eq!(filler.lock().unwrap().pieces, pieces);
    }
    drop(front);
    thread.join().unwrap();
}

#[test]
fn configuration_space_is_written() {
    let Rig { _scratch, filler, mut front, thread } = rig();
    front.write_config(2, &[9, 8]);
    front.read_config();
    let config = vec![0, 1, 9, 8, 4, 5, 6, 7, 8, 9, 10, 11, 0, 0, 0, 0];
    assert_eq!(next(&mut front), [Event::Config { config, changed: false }]);
    assert_eq!(filler.lock().unwrap().config[..4], [0, 1, 9, 8]);
    drop(front);
    thread.join().unwrap();
}

#[test]
fn files_are_mapped_and_unmapped() {
    let Rig { _scratch, filler, mut front, thread } = rig();
    assert_eq!(front.shmem(), [(2, REGION)]);
    let requests = filler.lock().unwrap().requests.clone().unwrap();
    let asks = |map: bool| {
        let requests = requests.clone();
        thread::spawn(move || {
            let mut piece =
                VhostUserMMap { shmid: 2, fd_offset: 0x1000, shm_offset: 0x8000, ..<_>::default() };
            (piece.len, piece.flags) = (0x2000, VhostUserMMapFlags::WRITABLE.bits());
            let file = memfd_create("shared", MFdFlags::MFD_CLOEXEC).unwrap();
            if map { requests.shmem_map(&piece, &file) } else { requests.shmem_unmap(&piece) }.is_ok()
        })
    };
    for (map, done) in [(true, true), (true, false), (false, true), (false, false)] {
        let asking = asks(map);
        assert_eq!(next(&mut front), [Event::Asked]);
        let asked = front.asked().unwrap();
        let piece = asked.piece;
        assert_eq!((piece.region, piece.file_offset, piece.offset, piece.len), (2, 0x1000, 0x8000, 0x2000));
        assert_eq!((piece.writable, asked.file.is_some()), (true, map));
        front.answer(done);
        assert_eq!(front.advance(), []);
        assert_eq!(asking.join().unwrap(), done);
    }
    drop(front);
    thread.join().unwrap();
}
