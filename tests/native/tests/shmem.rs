//! A back end of the `vhost-user-backend` crate that maps its memory for the guest.
#![allow(clippy::unwrap_used, reason = "a back end that cannot go on ends, and the test fails")]

use std::fs::File;
use std::io::Error;
use std::os::unix::fs::FileExt as _;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread;

use bulkhead_framework::Result;
use bulkhead_native_tests::{Guest, Setup, kill_pid};
use nix::sys::memfd::{MFdFlags, memfd_create};
use vhost::vhost_user::message::{
    VhostUserMMap, VhostUserMMapFlags, VhostUserProtocolFeatures, VhostUserShMemConfig,
};
use vhost::vhost_user::{Backend, Listener, VhostUserFrontendReqHandler as _};
use vhost_user_backend::{VhostUserBackendMut, VhostUserDaemon, VringMutex, VringT};
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};

type Mapped = GuestMemoryAtomic<GuestMemoryMmap>;
type Vring = VringMutex<Mapped>;

/// What the guest finds at the start of the memory.
const WORD: u64 = 0x6d65_6d73;
/// Its shared memory region.
const REGION: u64 = 0x20_0000;
/// Reads and writes of the guest while memory is mapped.
const READS: u32 = 100_000;

/// Maps its memory when the guest offers one byte, unmaps it when it offers two; the byte says whether that was done.
struct Mapper {
    file: File,
    requests: Option<Backend>,
    memory: Option<Mapped>,
    exit: (EventConsumer, EventNotifier),
}

impl VhostUserBackendMut for Mapper {
    type Bitmap = ();
    type Vring = Vring;

    fn num_queues(&self) -> usize {
        1
    }

    fn max_queue_size(&self) -> usize {
        64
    }

    fn features(&self) -> u64 {
        1 << 32 | 1 << 30
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        use VhostUserProtocolFeatures as Feature;
        Feature::REPLY_ACK | Feature::BACKEND_REQ | Feature::BACKEND_SEND_FD | Feature::SHMEM
    }

    fn set_event_idx(&mut self, _enabled: bool) {}

    fn get_shmem_config(&self) -> std::io::Result<VhostUserShMemConfig> {
        Ok(VhostUserShMemConfig::new(1, &[0, REGION]))
    }

    fn set_backend_req_fd(&mut self, backend: Backend) {
        backend.set_shmem_flag(true);
        self.requests = Some(backend);
    }

    fn update_memory(&mut self, memory: Mapped) -> std::io::Result<()> {
        self.memory = Some(memory);
        Ok(())
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        Some((self.exit.0.try_clone().unwrap(), self.exit.1.try_clone().unwrap()))
    }

    fn handle_event(
        &mut self,
        _device: u16,
        _set: EventSet,
        vrings: &[Vring],
        _thread: usize,
    ) -> std::io::Result<()> {
        let memory = self.memory.as_ref().unwrap().memory();
        let requests = self.requests.clone().unwrap();
        let mut vring = vrings.first().ok_or(Error::other("no ring"))?.get_mut();
        loop {
            let chain = vring.get_queue_mut().pop_descriptor_chain(memory.clone());
            let Some(chain) = chain else { return Ok(()) };
            let (head, part) = (chain.head_index(), chain.writable().next().unwrap());
            let mut piece = VhostUserMMap { shmid: 1, fd_offset: 0x1000, ..VhostUserMMap::default() };
            (piece.len, piece.flags) = (0x1000, VhostUserMMapFlags::WRITABLE.bits());
            let done = match part.len() {
                1 => requests.shmem_map(&piece, &self.file),
                _ => requests.shmem_unmap(&piece),
            };
            memory.write_obj(u8::from(done.is_err()), GuestAddress(part.addr().0)).unwrap();
            vring.add_used(head, 1).unwrap();
            vring.signal_used_queue().unwrap();
        }
    }
}

/// Serves one connection after the other at `rng.sock` of this directory.
fn serve(dir: &Path, file: File) -> Result<()> {
    let mut listener = Listener::from(UnixListener::bind(dir.join("rng.sock"))?);
    thread::spawn(move || {
        loop {
            let exit = new_event_consumer_and_notifier(EventFlag::empty()).unwrap();
            let file = file.try_clone().unwrap();
            let mapper = Arc::new(Mutex::new(Mapper { file, requests: None, memory: None, exit }));
            let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
            let mut daemon = VhostUserDaemon::new("mapper".into(), mapper, memory).unwrap();
            if daemon.start(&mut listener).is_err() {
                return;
            }
            let _over = daemon.wait();
        }
    });
    Ok(())
}

/// How many accesses have left the machine, as core says at its end.
fn forwarded(said: &str) -> Option<u32> {
    let rest = said.split_once("accesses: ")?.1;
    rest.split_once(' ')?.0.parse().ok()
}

#[test]
fn a_guest_reads_and_writes_what_its_back_end_maps() -> Result<()> {
    let file = File::from(memfd_create("mapped", MFdFlags::MFD_CLOEXEC).map_err(Error::from)?);
    file.set_len(0x2000)?;
    file.write_all_at(&WORD.to_le_bytes(), 0x1000)?;
    let args =
        ["-chardev", "socket,id=c,path=rng.sock,reconnect=1", "-device", "vhost-user-rng-pci,chardev=c,id=r"];
    let theirs = file.try_clone()?;
    let setup = Setup::new("test=shmem", &args).log("info").leaves("rng.sock");
    let guest: Guest = setup.start_in(|dir| serve(dir, theirs))?;
    guest.expect(&format!("region 1: {REGION:#x} bytes, absent 0xffffffffffffffff"))?;
    guest.expect(&format!("mapped {WORD:#x}, beside it 0xffffffffffffffff"))?;
    guest.expect("unmapped 0xffffffffffffffff")?;
    guest.expect(&format!("again {READS} of {READS}"))?;
    let mut word = [0; 4];
    file.read_exact_at(&mut word, 0x1008)?;
    guest.check(u32::from_le_bytes(word) == READS - 1, "the memory is not what the guest has written")?;
    kill_pid(guest.process("pci")?.pid)?;
    guest.expect("gone, needs a reset: true")?;
    guest.expect(&format!("back {READS}"))?;
    guest.expect("done: shmem")?;
    guest.quit()?;
    let exits = forwarded(&guest.stderr()).unwrap_or(u32::MAX);
    guest.check(exits < READS / 2, &format!("{exits} accesses have left the machine"))
}
