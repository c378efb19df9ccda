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
use bulkhead_jail::{notice, warn};
use nix::errno::Errno;
use nix::sys::uio::{pread, pwrite};
use serde::{Deserialize, Serialize};
use tokio::io::unix::AsyncFd;
use tokio::sync::{Mutex, Notify};
use tokio::time::{Instant, sleep, timeout_at};

use crate::descriptors::Descriptors;
use crate::fd::watch;
use crate::held::Held;
use crate::index::{Index, MAX_KEY};
use crate::registry::Registry;

/// First bytes of each slot.
const MAGIC: [u8; 8] = *b"BLKHBRKR";
/// Version of the content.
const VERSION: u32 = 3;
/// Bytes of a slot. More than 1,024 names of 1,024 bytes and 64 KiB of `opaque` take.
const SLOT: usize = 4 << 20;
/// Bytes of a header.
const HEADER: usize = 64;
/// How long the starter may take to read before the broker goes on without having kept something.
const PATIENCE: Duration = Duration::from_secs(2);
/// How often it is tried then to make up for that.
const RETRY: Duration = Duration::from_secs(1);
/// The highest generation that is believed.
const MAX_GENERATION: u64 = u64::MAX / 2;

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
    /// Character devices and objects that came while the machine ran.
    pub registry: Registry,
}

/// Where it is kept. By default nowhere.
#[derive(Debug, Default)]
pub struct Store {
    starter: Starter,
    /// The starter's socket, to wait for room.
    room: Option<AsyncFd<OwnedFd>>,
    memfd: Option<OwnedFd>,
    configured: Cell<bool>,
    /// Character devices and objects that came while the machine ran; counts from the next commit on.
    pub(crate) registry: RefCell<Registry>,
    life: u64,
    generation: Cell<u64>,
    /// Names of what the starter keeps that mean nothing here.
    strangers: RefCell<BTreeSet<String>>,
    /// Keys of what could not be kept for another reason than that the starter has much to read.
    refused: RefCell<BTreeSet<u64>>,
    /// The starter does not read: nobody waits for it.
    is_late: Cell<bool>,
    /// The log says so.
    is_told: Cell<bool>,
    /// There is something to make up for.
    behind: Notify,
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
        let ours = header.magic == MAGIC && header.version == VERSION && header.life == life;
        (ours && header.generation <= MAX_GENERATION).then_some((header, at, len))
    };
    let (header, at, len) = (0..2).filter_map(slot).max_by_key(|(header, ..)| header.generation)?;
    let mut content = vec![0; len];
    let read = pread(memfd, &mut content, at + i64::try_from(HEADER).ok()?);
    if read != Ok(len) {
        return None;
    }
    let state: State = decode(&content).ok()?;
    (state.index.is_plausible() && state.registry.is_plausible()).then_some((state, header.generation))
}

impl Store {
    /// Goes on with a memfd.
    fn new(memfd: OwnedFd, life: u64, generation: u64) -> Self {
        Self { memfd: Some(memfd), life, generation: Cell::new(generation), ..Self::default() }
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
        let now = Instant::now();
        self.bring(descriptors, if self.is_late.get() { now } else { now + PATIENCE }).await;
    }

    /// Makes up for what the starter could not be told, for ever.
    pub async fn catch_up(&self, descriptors: &RefCell<Descriptors>) {
        loop {
            self.behind.notified().await;
            while self.is_behind() {
                sleep(RETRY).await;
                let _turn = self.turn.lock().await;
                self.is_late.set(false);
                self.refused.borrow_mut().clear();
                self.bring(descriptors, Instant::now()).await;
            }
            self.is_told.set(false);
            notice!("what clients have passed is kept again");
        }
    }

    fn is_behind(&self) -> bool {
        self.is_late.get() || !self.refused.borrow().is_empty()
    }

    /// Waits for the starter until `end` at most, which may be now.
    async fn bring(&self, descriptors: &RefCell<Descriptors>, end: Instant) {
        let unkept = descriptors.borrow().unkept();
        self.refused.borrow_mut().retain(|key| unkept.contains_key(key));
        for (key, held) in unkept {
            if self.is_late.get() || self.refused.borrow().contains(&key) {
                continue;
            }
            match self.say(end, || self.starter.keep(&name(key), held.as_fd())).await {
                Ok(()) => descriptors.borrow_mut().set_kept(held),
                Err(error) => self.fall_behind(Some(key), error),
            }
        }
        let index = descriptors.borrow().index();
        let registry = self.registry.borrow().clone();
        if let Err(error) = self.write(&State { index, configured: self.configured(), registry }) {
            warn!("what clients passed would be lost with this process: {error}");
        }
        let leaving = descriptors.borrow().leaving();
        for key in leaving {
            // Somebody may have passed it again while the starter was waited for.
            let forget = || {
                if descriptors.borrow().is_leaving(key) { self.starter.forget(&name(key)) } else { Ok(()) }
            };
            match self.say(end, forget).await {
                Ok(()) if descriptors.borrow().is_leaving(key) => descriptors.borrow_mut().set_forgotten(key),
                Ok(()) => {}
                Err(error) => {
                    self.fall_behind(None, error);
                    break;
                }
            }
        }
        self.forget_strangers();
    }

    /// Something could not be told: one line, until everything has been.
    fn fall_behind(&self, key: Option<u64>, error: Errno) {
        if !self.is_told.replace(true) {
            warn!(
                "the starter cannot keep what clients pass, which would be lost with this process: {error}"
            );
        }
        match key {
            Some(key) if error != Errno::EAGAIN => drop(self.refused.borrow_mut().insert(key)),
            _ => self.is_late.set(true),
        }
        self.behind.notify_one();
    }

    fn forget_strangers(&self) {
        let forget = |name: &String| self.starter.forget(name) == Err(Errno::EAGAIN);
        self.strangers.borrow_mut().retain(forget);
    }

    /// Says something to the starter, which is waited for while it has much to read.
    async fn say(&self, end: Instant, say: impl Fn() -> Result<(), Errno>) -> Result<(), Errno> {
        loop {
            match (say(), &self.room) {
                (Err(Errno::EAGAIN), Some(room)) if !self.is_late.get() => {
                    let mut guard = match timeout_at(end, room.writable()).await {
                        Ok(guard) => guard.map_err(|_| Errno::EIO)?,
                        Err(_) => return Err(Errno::EAGAIN),
                    };
                    guard.clear_ready();
                    if Instant::now() >= end {
                        return say();
                    }
                }
                (result, _) => return result,
            }
        }
    }

    fn write(&self, state: &State) -> Result<(), Errno> {
        let Some(memfd) = &self.memfd else { return Ok(()) };
        let content = postcard::to_allocvec(state).map_err(|_| Errno::EINVAL)?;
        if content.len() > SLOT - HEADER {
            return Err(Errno::EFBIG);
        }
        let generation = self.generation.get().saturating_add(1);
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

/// What a predecessor has left: the store to go on with, the index unless it is of another life, and what came back by
/// its keys.
///
/// What the index does not name, or what means nothing, is forgotten with the first commit.
#[must_use]
pub fn restore(
    memfd: OwnedFd,
    life: u64,
    kept: BTreeMap<String, OwnedFd>,
) -> (Store, Option<Index>, BTreeMap<u64, Held>) {
    let mut held = BTreeMap::new();
    let mut strangers = BTreeSet::new();
    for (text, fd) in kept {
        let key = text.strip_prefix("kept.").and_then(|key| key.parse::<u64>().ok());
        match key.filter(|key| *key <= MAX_KEY && name(*key) == text) {
            Some(key) => drop(held.insert(key, Held::new(key, fd))),
            None => drop(strangers.insert(text)),
        }
    }
    let former = read(&memfd, life);
    let generation = former.as_ref().map_or(0, |(_, generation)| *generation);
    let store = Store { strangers: RefCell::new(strangers), ..Store::new(memfd, life, generation) };
    let index = former.map(|(state, _)| {
        store.configured.set(state.configured);
        store.registry.replace(state.registry);
        state.index
    });
    (store, index, held)
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

    use bulkhead_jail::link::recv_packet;
    use bulkhead_qapi::types::misc::{ClosefdArg, GetfdArg};
    use nix::sys::memfd::{MFdFlags, memfd_create};
    use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, socketpair};

    use super::*;
    use crate::descriptors::Op;
    use crate::registry::{Chardev, Kind};

    fn memfd() -> OwnedFd {
        memfd_create("test", MFdFlags::MFD_CLOEXEC).unwrap()
    }

    fn null() -> OwnedFd {
        File::open("/dev/null").unwrap().into()
    }

    fn block_on<T>(work: impl Future<Output = T>) -> T {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(work)
    }

    fn commit(store: &Store, all: &RefCell<Descriptors>) {
        block_on(store.commit(all));
    }

    fn state(configured: bool) -> State {
        State { configured, ..State::default() }
    }

    #[test]
    fn what_came_while_the_machine_ran_outlives_the_broker() {
        let fd = memfd();
        let (store, ..) = restore(fd.try_clone().unwrap(), 7, BTreeMap::new());
        let chardev = Chardev { id: "c".to_owned(), kind: Kind::Socket("/c".to_owned()) };
        store.registry.borrow_mut().chardevs.push(chardev.clone());
        commit(&store, &RefCell::new(Descriptors::default()));
        let (store, ..) = restore(fd.try_clone().unwrap(), 7, BTreeMap::new());
        assert_eq!(store.registry.borrow().chardevs, [chardev]);
        let (store, ..) = restore(fd, 8, BTreeMap::new());
        assert_eq!(*store.registry.borrow(), Registry::default(), "another life");
    }

    #[test]
    fn the_newest_whole_slot_counts() {
        let fd = memfd();
        assert_eq!(read(&fd, 7), None, "empty");
        let store = Store::new(fd.try_clone().unwrap(), 7, 0);
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
        let store = Store::new(fd.try_clone().unwrap(), 7, 0);
        store.write(&state(true)).unwrap();
        let mut slot = [0; 2 * HEADER];
        pread(&fd, &mut slot, SLOT as i64).unwrap();
        for at in 0..slot.len() {
            let mut bad = slot;
            bad[at] ^= 0xff;
            pwrite(&fd, &bad, SLOT as i64).unwrap();
            // Whatever it reads, it ends and allocates no more than a slot, and one can go on from there.
            let _ = read(&fd, 7);
            let other = memfd();
            pwrite(&other, &bad, SLOT as i64).unwrap();
            let (store, index, held) = restore(other.try_clone().unwrap(), 7, BTreeMap::new());
            let (all, _) = Descriptors::restored(index.unwrap_or_default(), held, []);
            commit(&store, &RefCell::new(all));
            assert!(read(&other, 7).is_some(), "{at}");
        }
        pwrite(&fd, &[0xff; 2 * HEADER], SLOT as i64).unwrap();
        assert_eq!(read(&fd, 7), None);
    }

    #[test]
    fn counters_that_nobody_reaches_are_no_state() {
        let indexes = [
            Index { next_key: u64::MAX, ..Index::default() },
            Index { count: i64::MAX, ..Index::default() },
            Index { count: -1, ..Index::default() },
        ];
        for index in indexes {
            let fd = memfd();
            Store::new(fd.try_clone().unwrap(), 7, 0)
                .write(&State { index, configured: true, ..State::default() })
                .unwrap();
            assert_eq!(read(&fd, 7), None);
        }
        let fd = memfd();
        Store::new(fd.try_clone().unwrap(), 7, u64::MAX - 1).write(&state(true)).unwrap();
        assert_eq!(read(&fd, 7), None);
    }

    /// A store whose starter is the other end, which keeps so little in its queue that it is soon full.
    fn with_starter(runtime: &tokio::runtime::Runtime) -> (Store, OwnedFd) {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).unwrap();
        let starter = Starter::new(Some(ours));
        let _context = runtime.enter();
        let room = watch_starter(&starter).unwrap();
        let mut store = Store::new(memfd(), 7, 0);
        store.set_starter(starter, room);
        (store, theirs)
    }

    /// What the starter is told, in order.
    fn heard(starter: &OwnedFd) -> Vec<String> {
        let mut words = [0; 512];
        let mut all = Vec::new();
        while let Ok((len, _)) = recv_packet(starter.as_fd(), &mut words, MsgFlags::MSG_DONTWAIT) {
            all.push(String::from_utf8(words[..len].to_vec()).unwrap());
        }
        all
    }

    fn getfd(all: &RefCell<Descriptors>, name: &str, fd: OwnedFd) {
        let op = Op::Getfd(GetfdArg { fdname: name.to_owned() });
        all.borrow_mut().execute(op, "m", || Some(fd)).unwrap();
    }

    fn closefd(all: &RefCell<Descriptors>, name: &str) {
        let op = Op::Closefd(ClosefdArg { fdname: name.to_owned() });
        all.borrow_mut().execute(op, "m", || None).unwrap();
    }

    #[test]
    fn a_starter_that_does_not_read_is_told_later() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let (store, starter) = with_starter(&runtime);
        while store.starter.alive().is_ok() {}
        let all = RefCell::new(Descriptors::default());
        runtime.block_on(async {
            let began = Instant::now();
            for name in ["a", "b", "c", "d"] {
                getfd(&all, name, null());
                store.commit(&all).await;
            }
            assert!(began.elapsed() < 2 * PATIENCE, "once: {:?}", began.elapsed());
            closefd(&all, "b");
            store.commit(&all).await;
            assert_eq!(all.borrow().unkept().len(), 3);
            heard(&starter);
            let caught_up = async {
                while !all.borrow().unkept().is_empty() {
                    sleep(Duration::from_millis(10)).await;
                }
            };
            tokio::select! {
                () = store.catch_up(&all) => {}
                () = caught_up => {}
            }
            assert_eq!(heard(&starter).len(), 3);
            // It does not read again: what is forgotten is not lost from sight.
            while store.starter.alive().is_ok() {}
            closefd(&all, "a");
            store.commit(&all).await;
            assert_eq!(all.borrow().leaving(), [0]);
            heard(&starter);
            store.is_late.set(false);
            store.commit(&all).await;
            assert!(all.borrow().leaving().is_empty());
            assert_eq!(heard(&starter), ["FDSTOREREMOVE=1\nFDNAME=kept.0"]);
        });
    }

    /// What leaves, and is passed again before the starter was told, stays.
    #[test]
    fn what_is_passed_again_in_time_is_not_forgotten() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let (store, starter) = with_starter(&runtime);
        let all = RefCell::new(Descriptors::default());
        let fd = null();
        runtime.block_on(async {
            getfd(&all, "a", fd.try_clone().unwrap());
            store.commit(&all).await;
            assert_eq!(heard(&starter).len(), 1);
            while store.starter.alive().is_ok() {}
            closefd(&all, "a");
            let again = async {
                sleep(Duration::from_millis(50)).await;
                getfd(&all, "b", fd);
                heard(&starter);
                store.commit(&all).await;
            };
            tokio::join!(store.commit(&all), again);
        });
        assert_eq!(heard(&starter), [""; 0]);
        assert!(all.borrow().unkept().is_empty() && all.borrow().leaving().is_empty());
    }

    /// One that the kernel does not pass on delays nobody, and is tried again.
    #[test]
    fn what_cannot_be_kept_is_tried_later() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let (mut store, starter) = with_starter(&runtime);
        let all = RefCell::new(Descriptors::default());
        getfd(&all, "a", null());
        let gone =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap().0;
        let good = std::mem::replace(&mut store.starter, Starter::new(Some(gone)));
        runtime.block_on(store.commit(&all));
        assert!(store.is_behind() && !store.is_late.get());
        store.starter = good;
        getfd(&all, "b", null());
        runtime.block_on(store.commit(&all));
        assert_eq!(all.borrow().unkept().keys().collect::<Vec<_>>(), [&0]);
        assert_eq!(heard(&starter).len(), 1);
        store.refused.borrow_mut().clear();
        runtime.block_on(store.commit(&all));
        assert!(all.borrow().unkept().is_empty() && !store.is_behind());
    }

    #[test]
    fn what_came_back_is_found_by_its_number() {
        let fd = memfd();
        Store::new(fd.try_clone().unwrap(), 7, 0).write(&state(true)).unwrap();
        let names = ["kept.3", "kept.x", "kept.007", "kept.18446744073709551615"];
        let kept = || names.iter().map(|name| ((*name).to_owned(), null())).collect();
        let (store, index, held) = restore(fd.try_clone().unwrap(), 7, kept());
        assert_eq!(held.keys().collect::<Vec<_>>(), [&3]);
        assert!(store.is_restored() && store.configured() && index.is_some());
        assert_eq!(store.strangers.borrow().len(), 3);
        // Of another life: nothing is believed, everything leaves, and no key is used again.
        let (store, index, held) = restore(fd, 8, kept());
        assert!(index.is_none() && !store.is_restored() && !store.configured());
        let all = RefCell::new(Descriptors::of_command_line([], held, []).unwrap());
        assert_eq!((all.borrow().leaving(), all.borrow().index().next_key), (vec![3], 4));
        commit(&store, &all);
        assert!(all.borrow().leaving().is_empty() && store.strangers.borrow().is_empty());
        let (store, index, _) = restore(memfd(), 7, BTreeMap::new());
        assert!(index.is_none() && !store.is_restored());
    }
}
