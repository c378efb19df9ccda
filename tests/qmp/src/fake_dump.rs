//! A starter whose dump process is a thread of the test, and a core for it. The process's code is the real one.

use std::fs::File;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bulkhead_control_api::VERSION;
use bulkhead_control_api::dump::{Memory, PAGE, Translate, Translated};
use bulkhead_control_api::loader::Region;
use bulkhead_dump::job::Links;
use bulkhead_jail::link::Link;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, connect, recv, socket, socketpair,
};

/// Guest memory, in bytes; its first page is full of `0xa5`.
pub const RAM: u64 = 16 << 20;

/// How its processes are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Process {
    /// They do their job.
    #[default]
    Works,
    /// They end before they say hello.
    Dies,
    /// They end when they have their job.
    DiesLater,
}

/// What the test and the starter share.
#[derive(Clone, Default)]
pub struct Starter {
    process: Arc<Mutex<Process>>,
    started: Arc<AtomicUsize>,
    ended: Arc<AtomicUsize>,
}

impl Starter {
    /// Starts a process for each word on `job`; they connect to the listener at `address`.
    pub fn start(job: OwnedFd, address: PathBuf) -> Self {
        let starter = Self::default();
        let shared = starter.clone();
        std::thread::spawn(move || {
            while recv(job.as_raw_fd(), &mut [0; 8], MsgFlags::empty()).is_ok_and(|count| count > 0) {
                shared.started.fetch_add(1, Ordering::SeqCst);
                let (one, address) = (shared.clone(), address.clone());
                std::thread::spawn(move || {
                    let _ = one.run(&address);
                    one.ended.fetch_add(1, Ordering::SeqCst);
                });
            }
        });
        starter
    }

    /// How its processes are from now on.
    pub fn set(&self, process: Process) {
        *self.process.lock().unwrap_or_else(PoisonError::into_inner) = process;
    }

    /// How many were started, and how many of those have ended.
    #[must_use]
    pub fn count(&self) -> (usize, usize) {
        (self.started.load(Ordering::SeqCst), self.ended.load(Ordering::SeqCst))
    }

    fn run(&self, address: &std::path::Path) -> bulkhead_framework::Result<()> {
        let fd = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None);
        let fd = fd.map_err(std::io::Error::from)?;
        let address = UnixAddr::new(address).map_err(std::io::Error::from)?;
        connect(fd.as_raw_fd(), &address).map_err(std::io::Error::from)?;
        let process = *self.process.lock().unwrap_or_else(PoisonError::into_inner);
        if process == Process::Dies {
            return Ok(());
        }
        let pair = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC);
        let (core, ours) = pair.map_err(std::io::Error::from)?;
        let core = std::thread::spawn(move || serve_core(core, process == Process::DiesLater));
        let served = Links::new(ours, fd).and_then(Links::serve);
        // Its end of the link is closed, so that core ends.
        let _ = core.join();
        Ok(served.map_err(|error| error.to_string())?)
    }
}

/// Core's end: memory, and pages that are where they say.
fn serve_core(fd: OwnedFd, dies: bool) -> bulkhead_framework::Result<()> {
    let text = |error: bulkhead_jail::link::LinkError| error.to_string();
    let mut link = Link::accept(fd, VERSION).map_err(text)?;
    if dies {
        return Ok(());
    }
    let ram = File::from(memfd_create("ram", MFdFlags::MFD_CLOEXEC).map_err(std::io::Error::from)?);
    ram.set_len(RAM)?;
    ram.write_all_at(&[0xa5; 4096], 0)?;
    let memory = Memory { regions: vec![Region { gpa: 0, len: RAM }] };
    link.send_with(&memory, &[ram.as_fd()], MsgFlags::empty()).map_err(text)?;
    loop {
        let what = link.recv::<Translate>().map_err(text)?;
        let pages = (0..u64::from(what.pages)).map(|page| what.addr.wrapping_add(page * PAGE)).collect();
        link.send(&Translated { what, pages }).map_err(text)?;
    }
}
