//! What outlives the process, in a memfd that its starter keeps.
//!
//! ```text
//! magic [8] | version u32 | change u32 | life u64 | count u64 | resets u64 | requested u64 | usable u64 | start u64 | end u64
//! map of plugged blocks, from MAP on: 64 blocks in a word, the lowest bit first
//! ```
//! A commit writes the head, with the change in it, by one `pwrite` inside a page, and then the map. A process that dies in
//! between leaves a map in which the change is missing or half done; its successor makes it again.

use std::fs::File;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt as _;

use bulkhead_jail::warn;

use crate::blocks::Blocks;

const MAGIC: [u8; 8] = *b"BLKHVMEM";
const VERSION: u32 = 1;
const HEAD: usize = 72;
/// Where the map begins.
const MAP: u64 = 4096;
const WORD: u64 = 64;

/// The head.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Kept {
    /// Resets of the machine that the device has seen.
    pub resets: u64,
    /// Bytes that the guest is to plug.
    pub requested: u64,
    /// Bytes that it may plug.
    pub usable: u64,
    /// The last change of the map, and whether it plugged.
    pub change: (Range<u64>, bool),
}

/// The state's file.
#[derive(Debug)]
pub struct State {
    file: File,
    life: u64,
}

fn encode(life: u64, count: u64, kept: &Kept) -> [u8; HEAD] {
    let (change, plugged) = &kept.change;
    let version = u64::from(VERSION) | u64::from(*plugged) << 32;
    let numbers = [version, life, count, kept.resets, kept.requested, kept.usable, change.start, change.end];
    let mut head = [0; HEAD];
    let bytes = MAGIC.into_iter().chain(numbers.into_iter().flat_map(u64::to_le_bytes));
    for (slot, byte) in head.iter_mut().zip(bytes) {
        *slot = byte;
    }
    head
}

fn decode(life: u64, count: u64, head: &[u8; HEAD]) -> Option<Kept> {
    let field = |at: usize| Some(u64::from_le_bytes(*head.get(at..)?.first_chunk()?));
    let plugged = field(8)? >> 32 == 1;
    let change = field(56)?..field(64)?;
    let kept =
        Kept { resets: field(32)?, requested: field(40)?, usable: field(48)?, change: (change, plugged) };
    (encode(life, count, &kept) == *head).then_some(kept)
}

impl State {
    /// Opens the state; what a predecessor left in it, if it was for this life of the machine and a region like `empty`.
    #[must_use]
    pub fn open(fd: OwnedFd, life: u64, empty: &Blocks) -> (Self, Option<(Kept, Blocks)>) {
        let this = Self { file: File::from(fd), life };
        let left = this.read(empty);
        (this, left)
    }

    fn read(&self, empty: &Blocks) -> Option<(Kept, Blocks)> {
        let mut head = [0; HEAD];
        self.file.read_exact_at(&mut head, 0).ok()?;
        let kept = decode(self.life, empty.count(), &head)?;
        let mut bytes = vec![0; empty.words().len() * 8];
        self.file.read_exact_at(&mut bytes, MAP).ok()?;
        let words = bytes
            .chunks_exact(8)
            .filter_map(|word| word.first_chunk())
            .map(|word| u64::from_le_bytes(*word))
            .collect();
        let mut blocks = empty.from_words(words)?;
        let (change, plugged) = kept.change.clone();
        blocks.set(change, plugged);
        Some((kept, blocks))
    }

    /// Writes the head, then the words of the map that its change touches; `blocks` has the change.
    pub fn commit(&self, kept: &Kept, blocks: &Blocks) {
        let Range { start, end } = kept.change.0;
        let words = |at: u64| usize::try_from(at).unwrap_or(usize::MAX);
        let (first, last) = (start / WORD, end.div_ceil(WORD));
        let touched = blocks.words().get(words(first)..words(last)).unwrap_or_default();
        let bytes: Vec<u8> = touched.iter().flat_map(|word| word.to_le_bytes()).collect();
        let head = encode(self.life, blocks.count(), kept);
        let written =
            self.file.write_all_at(&head, 0).and_then(|()| self.file.write_all_at(&bytes, MAP + first * 8));
        // Only a successor will miss it.
        if let Err(error) = written {
            warn!("state: {error}");
        }
    }

    /// Writes the head and all of the map: the first commit of a life.
    pub fn begin(&self, kept: &Kept, blocks: &Blocks) {
        // The file has its length, then the map is whole before a head names it.
        let len = MAP + blocks.words().len() as u64 * 8;
        if let Err(error) = self.file.set_len(0).and_then(|()| self.file.set_len(len)) {
            warn!("state: {error}");
        }
        self.commit(&Kept { change: (0..blocks.count(), false), ..kept.clone() }, blocks);
    }
}

#[cfg(test)]
mod tests {
    use nix::sys::memfd::{MFdFlags, memfd_create};

    use super::*;

    fn file() -> OwnedFd {
        memfd_create("state", MFdFlags::MFD_CLOEXEC).unwrap()
    }

    #[test]
    fn a_successor_goes_on_and_another_machine_begins_anew() {
        let (fd, empty) = (file(), Blocks::new(1000, 64));
        let (state, left) = State::open(fd.try_clone().unwrap(), 7, &empty);
        assert_eq!(left, None);
        let mut kept = Kept { resets: 1, requested: 2, usable: 3, change: (0..0, false) };
        state.begin(&kept, &empty);
        let mut blocks = empty.clone();
        for (range, plugged) in [(0..70, true), (900..1000, true), (10..20, false)] {
            blocks.set(range.clone(), plugged);
            kept.change = (range, plugged);
            state.commit(&kept, &blocks);
            let left = State::open(fd.try_clone().unwrap(), 7, &empty).1;
            assert_eq!(left, Some((kept.clone(), blocks.clone())));
        }
        assert_eq!(State::open(fd.try_clone().unwrap(), 8, &empty).1, None, "another life");
        assert_eq!(State::open(fd.try_clone().unwrap(), 7, &Blocks::new(999, 64)).1, None, "another region");
        File::from(fd.try_clone().unwrap()).write_all_at(&[9], 8).unwrap();
        assert_eq!(State::open(fd, 7, &empty).1, None, "another version");
    }

    /// A death after the head, at every word of the map.
    #[test]
    fn a_change_that_is_half_written_is_made_again() {
        for done in 0..=4 {
            let (fd, empty) = (file(), Blocks::new(256, 64));
            let state = State::open(fd.try_clone().unwrap(), 7, &empty).0;
            state.begin(&Kept::default(), &empty);
            let mut blocks = empty.clone();
            blocks.set(10..250, true);
            let kept = Kept { change: (10..250, true), ..Kept::default() };
            state.file.write_all_at(&encode(7, 256, &kept), 0).unwrap();
            for (at, word) in (0..).zip(blocks.words()).take(done) {
                state.file.write_all_at(&word.to_le_bytes(), MAP + at * 8).unwrap();
            }
            assert_eq!(State::open(fd, 7, &empty).1, Some((kept, blocks)));
        }
    }
}
