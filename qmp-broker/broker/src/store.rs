//! What outlives the broker: the descriptors that clients passed, kept by the starter, and their index in the
//! state memfd (`docs/decisions/0005-restarts-and-units.md`).
//!
//! ```text
//! 0        slot 0: header, content ...        SLOT     slot 1: header, content ...
//! ```
//! A commit writes the content of the older slot, then its header, which lies within one page: a process that is killed
//! in between leaves the other slot as the newest.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::future::pending;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use bulkhead_control_api::decode;
use bulkhead_jail::starter::Starter;
use bulkhead_jail::warn;
use nix::errno::Errno;
use nix::sys::uio::{pread, pwrite};
use serde::{Deserialize, Serialize};
use tokio::io::unix::AsyncFd;
use tokio::sync::Mutex;
use tokio::time::{sleep, timeout};

use crate::descriptors::{Descriptors, Index};
use crate::fd::watch;
use crate::held::Held;

/// First bytes of each slot.
const MAGIC: [u8; 8] = *b"BLKHBRKR";
/// Version of the content.
const VERSION: u32 = 1;
/// Bytes of a slot. More than 1,024 names of 1,024 bytes and 64 KiB of `opaque` take.
const SLOT: usize = 4 << 20;
/// Bytes of a header.
const HEADER: usize = 64;
/// How long the starter may take to read before the broker goes on without having kept something.
const PATIENCE: Duration = Duration::from_secs(2);

/// The head of a slot.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Header {
    magic: [u8; 8],
    version: u32,
    life: u64,
    generation: u64,
    len: u32,
}

/// What is kept.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// The descriptors by name and set.
    pub index: Index,
    /// The machine has left `preconfig`.
    pub configured: bool,
}

/// Where it is kept. By default nowhere.
#[derive(Debug, Default)]
pub struct Store {
    starter: Starter,
    /// The starter's socket, to wait for room.
    room: Option<AsyncFd<OwnedFd>>,
    memfd: Option<OwnedFd>,
    configured: Cell<bool>,
    life: u64,
    generation: Cell<u64>,
    /// Keys of what the starter keeps.
    kept: RefCell<BTreeSet<u64>>,
    /// One commit at a time.
    turn: Mutex<()>,
}

/// Name of a descriptor in the store.
fn name(key: u64) -> String {
    format!("kept.{key}")
}

/// The newest state in a memfd, with its generation; none if there is none of this life and version.
#[must_use]
pub fn read(memfd: &OwnedFd, life: u64) -> Option<(State, u64)> {
    let slot = |number: usize| {
        let at = i64::try_from(number * SLOT).ok()?;
        let mut header = [0; HEADER];
        if pread(memfd, &mut header, at) != Ok(HEADER) {
            return None;
        }
        let (header, _) = postcard::take_from_bytes::<Header>(&header).ok()?;
        let len = usize::try_from(header.len).ok().filter(|len| *len <= SLOT - HEADER)?;
        (header.magic == MAGIC && header.version == VERSION && header.life == life)
            .then_some((header, at, len))
    };
    let (header, at, len) = (0..2).filter_map(slot).max_by_key(|(header, ..)| header.generation)?;
    let mut content = vec![0; len];
    let read = pread(memfd, &mut content, at + i64::try_from(HEADER).ok()?);
    if read != Ok(len) {
        return None;
    }
    Some((decode(&content).ok()?, header.generation))
}

impl Store {
    /// Goes on with a memfd. `kept` are the keys of what the starter has given back.
    fn new(memfd: OwnedFd, life: u64, generation: u64, kept: BTreeSet<u64>) -> Self {
        let (generation, kept) = (Cell::new(generation), RefCell::new(kept));
        Self { memfd: Some(memfd), life, generation, kept, ..Self::default() }
    }

    /// Whether the machine has left `preconfig`.
    #[must_use]
    pub fn configured(&self) -> bool {
        self.configured.get()
    }

    /// The machine has left `preconfig`; counts from the next commit on.
    pub fn set_configured(&self) {
        self.configured.set(true);
    }

    /// Whether there is a state of this life: the process was started anew.
    #[must_use]
    pub fn is_restored(&self) -> bool {
        self.generation.get() > 0
    }

    /// Tells the service manager that this process is alive, as often as it wants to hear it.
    pub async fn watchdog(&self) {
        let Some(period) = self.starter.watchdog else { return pending().await };
        loop {
            // The next one comes before the service manager loses its patience.
            let _ = self.starter.alive();
            sleep(period / 3).await;
        }
    }

    /// From now on there is a starter to keep things.
    pub fn set_starter(&mut self, starter: Starter, room: Option<AsyncFd<OwnedFd>>) {
        (self.starter, self.room) = (starter, room);
    }

    /// Brings what is kept up to date: new descriptors first, then the index, then those that are gone.
    pub async fn commit(&self, descriptors: &RefCell<Descriptors>) {
        let _turn = self.turn.lock().await;
        let (index, wanted) = {
            let descriptors = descriptors.borrow();
            (descriptors.index(), descriptors.held())
        };
        for (key, held) in &wanted {
            if !self.kept.borrow().contains(key) && self.keep(*key, held).await {
                self.kept.borrow_mut().insert(*key);
            }
        }
        if let Err(error) = self.write(&State { index, configured: self.configured() }) {
            warn!("what clients passed would be lost with this process: {error}");
        }
        let gone: Vec<u64> =
            self.kept.borrow().iter().copied().filter(|key| !wanted.contains_key(key)).collect();
        for key in gone {
            self.when_there_is_room(|| self.starter.forget(&name(key))).await;
            self.kept.borrow_mut().remove(&key);
        }
    }

    async fn keep(&self, key: u64, held: &Held) -> bool {
        self.when_there_is_room(|| self.starter.keep(&name(key), held.as_fd())).await
    }

    /// Says something to the starter, which is waited for while it has much to read.
    async fn when_there_is_room(&self, say: impl Fn() -> Result<(), Errno>) -> bool {
        let said = async {
            loop {
                match (say(), &self.room) {
                    (Err(Errno::EAGAIN), Some(room)) => {
                        let mut guard = room.writable().await.map_err(|_| Errno::EIO)?;
                        guard.clear_ready();
                    }
                    (result, _) => return result,
                }
            }
        };
        match timeout(PATIENCE, said).await {
            Ok(Ok(())) => true,
            Ok(Err(error)) => {
                warn!("the starter cannot keep a descriptor: {error}");
                false
            }
            Err(_) => {
                warn!("the starter does not read: a descriptor would be lost with this process");
                false
            }
        }
    }

    fn write(&self, state: &State) -> Result<(), Errno> {
        let Some(memfd) = &self.memfd else { return Ok(()) };
        let content = postcard::to_allocvec(state).map_err(|_| Errno::EINVAL)?;
        if content.len() > SLOT - HEADER {
            return Err(Errno::EFBIG);
        }
        let generation = self.generation.get() + 1;
        let len = u32::try_from(content.len()).map_err(|_| Errno::EFBIG)?;
        let header = Header { magic: MAGIC, version: VERSION, life: self.life, generation, len };
        let mut head = [0; HEADER];
        postcard::to_slice(&header, &mut head).map_err(|_| Errno::EINVAL)?;
        let at = if generation.is_multiple_of(2) { 0 } else { SLOT };
        let (at, after) = (i64::try_from(at).unwrap_or(0), i64::try_from(at + HEADER).unwrap_or(0));
        write_all(memfd, &content, after)?;
        write_all(memfd, &head, at)?;
        self.generation.set(generation);
        Ok(())
    }
}

fn write_all(fd: &OwnedFd, mut bytes: &[u8], mut at: i64) -> Result<(), Errno> {
    while !bytes.is_empty() {
        match pwrite(fd, bytes, at) {
            Ok(0) => return Err(Errno::EIO),
            Ok(written) => {
                bytes = bytes.get(written..).unwrap_or_default();
                at += i64::try_from(written).unwrap_or(0);
            }
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// The state that a predecessor has left, and the descriptors that came back, by their keys.
pub type Former = (State, BTreeMap<u64, Held>);

/// What a predecessor has left: the state, the keys of what came back, and the store to go on with.
///
/// Descriptors that the state does not name are closed and forgotten with the first commit.
#[must_use]
pub fn restore(memfd: OwnedFd, life: u64, kept: BTreeMap<String, OwnedFd>) -> (Store, Option<Former>) {
    let key = |name: &str| name.strip_prefix("kept.")?.parse::<u64>().ok();
    let held: BTreeMap<u64, Held> =
        kept.into_iter().filter_map(|(name, fd)| key(&name).map(|key| (key, Held::new(key, fd)))).collect();
    let keys = held.keys().copied().collect();
    match read(&memfd, life) {
        Some((state, generation)) => {
            let store = Store::new(memfd, life, generation, keys);
            store.configured.set(state.configured);
            (store, Some((state, held)))
        }
        None => (Store::new(memfd, life, 0, keys), None),
    }
}

/// A copy of the starter's socket that the runtime watches. Needs the runtime's context.
///
/// # Errors
/// The host's.
pub fn watch_starter(starter: &Starter) -> std::io::Result<Option<AsyncFd<OwnedFd>>> {
    let Some(socket) = starter.socket() else { return Ok(None) };
    watch(socket.try_clone_to_owned()?).map(Some).map_err(|(_, error)| error)
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use nix::sys::memfd::{MFdFlags, memfd_create};

    use super::*;

    fn memfd() -> OwnedFd {
        memfd_create("test", MFdFlags::MFD_CLOEXEC).unwrap()
    }

    fn state(configured: bool) -> State {
        State { index: Index::default(), configured }
    }

    #[test]
    fn the_newest_whole_slot_counts() {
        let fd = memfd();
        assert_eq!(read(&fd, 7), None, "empty");
        let store = Store::new(fd.try_clone().unwrap(), 7, 0, BTreeSet::new());
        store.write(&state(true)).unwrap();
        assert_eq!(read(&fd, 7), Some((state(true), 1)));
        store.write(&state(false)).unwrap();
        assert_eq!(read(&fd, 7), Some((state(false), 2)));
        assert_eq!(read(&fd, 8), None, "of another life");
        // Killed before the header of generation 3: its content lies over that of generation 1.
        pwrite(&fd, &[0xff; 64], (SLOT + HEADER) as i64).unwrap();
        assert_eq!(read(&fd, 7), Some((state(false), 2)));
        store.write(&state(true)).unwrap();
        assert_eq!(read(&fd, 7), Some((state(true), 3)));
    }

    #[test]
    fn garbage_is_no_state() {
        let fd = memfd();
        let store = Store::new(fd.try_clone().unwrap(), 7, 0, BTreeSet::new());
        store.write(&state(true)).unwrap();
        let mut slot = [0; 2 * HEADER];
        pread(&fd, &mut slot, SLOT as i64).unwrap();
        for at in 0..slot.len() {
            let mut bad = slot;
            bad[at] ^= 0xff;
            pwrite(&fd, &bad, SLOT as i64).unwrap();
            // Whatever it reads, it ends and allocates no more than a slot.
            let _ = read(&fd, 7);
        }
        pwrite(&fd, &[0xff; 2 * HEADER], SLOT as i64).unwrap();
        assert_eq!(read(&fd, 7), None);
    }

    #[test]
    fn what_came_back_is_found_by_its_number() {
        let null = || OwnedFd::from(File::open("/dev/null").unwrap());
        let fd = memfd();
        Store::new(fd.try_clone().unwrap(), 7, 0, BTreeSet::new()).write(&state(true)).unwrap();
        let kept = [("kept.3", null()), ("kept.x", null())].map(|(name, fd)| (name.to_owned(), fd));
        let (store, restored) = restore(fd, 7, kept.into_iter().collect());
        let (_, held) = restored.unwrap();
        assert_eq!(held.keys().collect::<Vec<_>>(), [&3]);
        assert!(store.is_restored() && store.configured() && store.kept.borrow().contains(&3));
        let (store, restored) = restore(memfd(), 7, BTreeMap::new());
        assert!(restored.is_none() && !store.is_restored());
    }
}
