//! What outlives the process, in a memfd that its starter keeps.
//!
//! ```text
//! page 0    the head: magic, version, life of core, length; then replies, and for each function which copy counts
//! then      for each function two copies of its record: length, checksum, content
//! ```
//! A record is written into the copy that does not count; then the head, in one `pwrite` within a page, which a killed
//! process has done or not, makes it count, together with the reply to the access that changed it. The commit comes
//! before everything that follows from it outside: a successor does all that again. An access that changes nothing may
//! as well be done again, so it is not committed.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt as _;

use bulkhead_bus_api::REPLY_LEN;
use bulkhead_bus_api::lasts::{Last, Lasts};
use bulkhead_control_api::{decode, encode};
use bulkhead_jail::warn;
use nix::errno::Errno;
use serde::{Deserialize, Serialize};

use crate::function::Saved;
use crate::place::MAX_FUNCTIONS;

const MAGIC: [u8; 8] = *b"BLKHPCI\0";
/// Version of everything in here, the devices' own states included.
const VERSION: u32 = 3;
/// Magic, version, length of the content, life.
const HEADER: usize = 24;
const LIFE: usize = 16;
const PAGE: usize = 4096;
/// Bytes of one copy of a record.
const COPY: usize = 16384;
/// Length and checksum of a record.
const RECORD_HEADER: usize = 8;
/// The longest record.
pub const MAX_RECORD: usize = COPY - RECORD_HEADER;
const SIZE: usize = PAGE + MAX_FUNCTIONS * 2 * COPY;

/// Which copy of a record counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
enum Copy {
    /// There is no such function.
    #[default]
    None,
    First,
    Second,
}

/// What is committed in one go.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Head {
    /// Resets of the machine since power-on.
    resets: u64,
    /// The next number for a descriptor that is kept.
    next: u32,
    /// By access link.
    lasts: Lasts,
    /// By index of the function.
    copies: Vec<Copy>,
}

/// The state.
#[derive(Debug)]
pub struct State {
    file: File,
    life: u64,
    head: Head,
    /// The head has changes beside replies.
    dirty: bool,
    /// Records as they are in the file.
    records: Vec<Option<Vec<u8>>>,
}

/// What a predecessor has left, by index.
pub type Left = Vec<(u16, Saved)>;

fn write_at(file: &File, bytes: &[u8], at: usize) -> Result<(), Errno> {
    let at = u64::try_from(at).map_err(|_| Errno::EFBIG)?;
    file.write_all_at(bytes, at).map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(0)))
}

fn read_at(file: &File, len: usize, at: usize) -> Option<Vec<u8>> {
    let mut bytes = vec![0; len];
    file.read_exact_at(&mut bytes, u64::try_from(at).ok()?).ok()?;
    Some(bytes)
}

/// FNV-1a.
fn checksum(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0x811c_9dc5, |sum, byte| (sum ^ u32::from(*byte)).wrapping_mul(0x0100_0193))
}

/// Where a copy of a record is; none if there is none.
fn place(index: usize, copy: Copy) -> Option<usize> {
    let second = match copy {
        Copy::None => return None,
        Copy::First => 0,
        Copy::Second => 1,
    };
    (index < MAX_FUNCTIONS).then(|| PAGE + (2 * index + second) * COPY)
}

fn number(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

impl State {
    /// The state in a memfd, and what a predecessor has left in it. One that belongs to another life of core or to
    /// another version, or that is damaged, is dropped.
    ///
    /// # Errors
    /// The memfd is none.
    pub fn open(fd: OwnedFd, life: u64) -> std::io::Result<(Self, Option<Left>)> {
        let file = File::from(fd);
        let is_new = file.metadata()?.len() == 0;
        let copies = vec![Copy::None; MAX_FUNCTIONS];
        let head = Head { resets: 0, next: 0, lasts: Lasts::default(), copies };
        let records = vec![None; MAX_FUNCTIONS];
        let mut state = Self { file, life, head, dirty: true, records };
        let left = if is_new { None } else { state.load() };
        if left.is_none() {
            // One of a former life of the VM is as good as none.
            if !is_new && state.is_of_this_life() {
                warn!("the state of a predecessor is of no use: the bus begins anew");
            }
            state.head.copies = vec![Copy::None; MAX_FUNCTIONS];
            state.records = vec![None; MAX_FUNCTIONS];
            state.file.set_len(0)?;
            state.file.set_len(u64::try_from(SIZE).unwrap_or(u64::MAX))?;
        }
        Ok((state, left))
    }

    fn is_of_this_life(&self) -> bool {
        read_at(&self.file, 8, LIFE) == Some(self.life.to_le_bytes().to_vec())
    }

    /// Takes over what is in the file, if all of it makes sense.
    fn load(&mut self) -> Option<Left> {
        let header = read_at(&self.file, HEADER, 0)?;
        let whole = self.file.metadata().is_ok_and(|metadata| metadata.len() == SIZE as u64);
        if header.get(..8) != Some(&MAGIC[..]) || number(&header, 8) != Some(VERSION) || !whole {
            return None;
        }
        if !self.is_of_this_life() {
            return None;
        }
        let len = usize::try_from(number(&header, 12)?).ok().filter(|len| *len <= PAGE - HEADER)?;
        let head: Head = decode(&read_at(&self.file, len, HEADER)?).ok()?;
        if head.copies.len() != MAX_FUNCTIONS {
            return None;
        }
        let mut left = Vec::new();
        for (index, copy) in head.copies.iter().enumerate() {
            let Some(at) = place(index, *copy) else { continue };
            let header = read_at(&self.file, RECORD_HEADER, at)?;
            let len = usize::try_from(number(&header, 0)?).ok().filter(|len| *len <= MAX_RECORD)?;
            let record = read_at(&self.file, len, at + RECORD_HEADER)?;
            if number(&header, 4) != Some(checksum(&record)) {
                return None;
            }
            left.push((u16::try_from(index).ok()?, decode(&record).ok()?));
            *self.records.get_mut(index)? = Some(record);
        }
        self.head = head;
        Some(left)
    }

    /// How often the machine was reset.
    #[must_use]
    pub const fn resets(&self) -> u64 {
        self.head.resets
    }

    /// It is reset once more.
    pub const fn count_reset(&mut self) {
        self.head.resets = self.head.resets.wrapping_add(1);
        self.dirty = true;
    }

    /// The number for the next descriptor that is to be kept: none is given twice.
    pub const fn next_name(&mut self) -> u32 {
        let name = self.head.next;
        self.head.next = name.wrapping_add(1);
        self.dirty = true;
        name
    }

    /// Core has welcomed this process, with so many access links.
    pub fn begin(&mut self, links: usize) {
        self.head.lasts.begin(links);
        self.dirty = true;
    }

    /// The reply to a request that was answered last on its link, if it is this one.
    #[must_use]
    pub fn reply_to(&self, link: usize, number: u32) -> Option<[u8; REPLY_LEN]> {
        self.head.lasts.reply_to(link, number)
    }

    /// Notes a reply; it is committed with what the access has changed.
    pub fn set_reply(&mut self, link: usize, last: Last) {
        self.head.lasts.set(link, last);
    }

    /// Commits functions that may have changed or are gone.
    ///
    /// # Errors
    /// The host has no page left, or a record is too long.
    pub fn commit(&mut self, functions: Vec<(u16, Option<Saved>)>) -> Result<(), Errno> {
        for (index, saved) in functions {
            let index = usize::from(index);
            let content = saved.map(|saved| encode(&saved)).transpose().map_err(|_| Errno::EMSGSIZE)?;
            let (Some(record), Some(copy)) = (self.records.get_mut(index), self.head.copies.get_mut(index))
            else {
                return Err(Errno::EINVAL);
            };
            if *record == content {
                continue;
            }
            *copy = match (&content, *copy) {
                (None, _) => Copy::None,
                (Some(_), Copy::First) => Copy::Second,
                (Some(_), Copy::Second | Copy::None) => Copy::First,
            };
            if let (Some(content), Some(at)) = (&content, place(index, *copy)) {
                if content.len() > MAX_RECORD {
                    return Err(Errno::EMSGSIZE);
                }
                let mut bytes = Vec::with_capacity(RECORD_HEADER + content.len());
                bytes.extend(u32::try_from(content.len()).unwrap_or(u32::MAX).to_le_bytes());
                bytes.extend(checksum(content).to_le_bytes());
                bytes.extend(content);
                write_at(&self.file, &bytes, at)?;
            }
            *record = content;
            self.dirty = true;
        }
        if std::mem::take(&mut self.dirty) { self.write_head() } else { Ok(()) }
    }

    fn write_head(&self) -> Result<(), Errno> {
        let content = encode(&self.head).map_err(|_| Errno::EMSGSIZE)?;
        let mut page = Vec::with_capacity(PAGE);
        page.extend(MAGIC);
        page.extend(VERSION.to_le_bytes());
        page.extend(u32::try_from(content.len()).unwrap_or(u32::MAX).to_le_bytes());
        page.extend(self.life.to_le_bytes());
        page.extend(content);
        if page.len() > PAGE {
            return Err(Errno::EMSGSIZE);
        }
        write_at(&self.file, &page, 0)
    }
}

#[cfg(test)]
mod tests {
    use nix::sys::memfd::{MFdFlags, memfd_create};

    use crate::function::Function;

    use super::*;

    fn state() -> State {
        State::open(memfd_create(c"state", MFdFlags::MFD_CLOEXEC).unwrap(), 7).unwrap().0
    }

    fn reopen(state: State, life: u64) -> (State, Option<Left>) {
        State::open(state.file.into(), life).unwrap()
    }

    fn host(line: u64) -> Saved {
        let mut function = Function::host();
        function.space.write(0x3c, 1, line);
        function.save()
    }

    #[test]
    fn a_commit_is_whole_or_not_at_all() {
        let mut state = state();
        state.begin(2);
        state.commit(vec![(0, Some(host(1))), (9, Some(host(2)))]).unwrap();
        state.set_reply(1, (5, [5; REPLY_LEN]));
        state.commit(vec![(0, Some(host(3))), (9, None)]).unwrap();
        let (mut state, left) = reopen(state, 7);
        assert_eq!((left.unwrap(), state.reply_to(1, 5)), (vec![(0, host(3))], Some([5; REPLY_LEN])));
        assert_eq!((state.reply_to(1, 4), state.reply_to(0, 5)), (None, None));
        // Died after the record, before the head.
        let head = read_at(&state.file, PAGE, 0).unwrap();
        state.commit(vec![(0, Some(host(4)))]).unwrap();
        write_at(&state.file, &head, 0).unwrap();
        let (state, left) = reopen(state, 7);
        assert_eq!(left.unwrap(), [(0, host(3))]);
        assert_eq!(reopen(state, 8).1, None, "of another life");
    }

    #[test]
    fn what_changes_nothing_is_not_written() {
        let mut state = state();
        state.commit(vec![(0, Some(host(1)))]).unwrap();
        let before = read_at(&state.file, SIZE, 0);
        state.commit(vec![(0, Some(host(1)))]).unwrap();
        assert_eq!(read_at(&state.file, SIZE, 0), before);
    }

    #[test]
    fn a_damaged_state_is_dropped() {
        for at in [0, 8, 12, 16, HEADER, PAGE, PAGE + 4, PAGE + RECORD_HEADER + 20] {
            let mut state = state();
            state.commit(vec![(0, Some(host(1)))]).unwrap();
            let byte = read_at(&state.file, 1, at).unwrap();
            write_at(&state.file, &[byte[0] ^ 0xff], at).unwrap();
            let (mut state, left) = reopen(state, 7);
            assert_eq!(left, None, "byte {at}");
            state.commit(vec![(1, Some(host(2)))]).unwrap();
            assert_eq!(reopen(state, 7).1.unwrap(), [(1, host(2))]);
        }
    }

    #[test]
    fn the_largest_head_fits() {
        let mut state = state();
        state.begin(64);
        for link in 0..64 {
            state.set_reply(link, (u32::MAX, [0xff; REPLY_LEN]));
        }
        (state.head.next, state.head.resets) = (u32::MAX, u64::MAX);
        let all = (0..256).map(|index| (index, Some(host(1)))).collect();
        state.commit(all).unwrap();
        assert_eq!(reopen(state, 7).1.unwrap().len(), MAX_FUNCTIONS);
    }
}
