//! What outlives the process, in a memfd that its starter keeps: one record, one `pwrite`.
//!
//! ```text
//! magic [8] | version u32 | 0 [4] | life u64 | target u32 | actual u32 | poison u32 | interval u32
//! ```

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt as _;

use bulkhead_jail::warn;

use crate::device::Kept;

const MAGIC: [u8; 8] = *b"BLKHBALN";
const VERSION: u32 = 1;
const LEN: usize = 40;

/// The state's file.
#[derive(Debug)]
pub struct State {
    file: File,
    life: u64,
    last: Option<Kept>,
}

fn encode(life: u64, kept: &Kept) -> [u8; LEN] {
    let mut record = [0; LEN];
    let parts = [MAGIC, u64::from(VERSION).to_le_bytes(), life.to_le_bytes()];
    let fields = [kept.target, kept.actual, kept.poison, kept.interval];
    let bytes = parts.into_iter().flatten().chain(fields.into_iter().flat_map(u32::to_le_bytes));
    for (slot, byte) in record.iter_mut().zip(bytes) {
        *slot = byte;
    }
    record
}

fn decode(life: u64, record: &[u8; LEN]) -> Option<Kept> {
    let field = |at: usize| Some(u32::from_le_bytes(*record.get(at..)?.first_chunk()?));
    let kept = Kept { target: field(24)?, actual: field(28)?, poison: field(32)?, interval: field(36)? };
    (encode(life, &kept) == *record).then_some(kept)
}

impl State {
    /// Opens the state; what a predecessor left in it, if it was for this life of the machine.
    #[must_use]
    pub fn open(fd: OwnedFd, life: u64) -> (Self, Kept) {
        let file = File::from(fd);
        let mut record = [0; LEN];
        let left = file.read_exact_at(&mut record, 0).ok().and_then(|()| decode(life, &record));
        (Self { file, life, last: left }, left.unwrap_or_default())
    }

    /// Writes the record, if it is another one.
    pub fn commit(&mut self, kept: &Kept) {
        if self.last != Some(*kept) {
            match self.file.write_all_at(&encode(self.life, kept), 0) {
                Ok(()) => self.last = Some(*kept),
                // Only a successor will miss it.
                Err(error) => warn!("state: {error}"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use nix::sys::memfd::{MFdFlags, memfd_create};

    use super::*;

    #[test]
    fn a_successor_goes_on_and_another_machine_begins_anew() {
        let fd = memfd_create("state", MFdFlags::MFD_CLOEXEC).unwrap();
        let (mut state, kept) = State::open(fd.try_clone().unwrap(), 7);
        assert_eq!(kept, Kept::default());
        let kept = Kept { target: 1, actual: 2, poison: 3, interval: 4 };
        state.commit(&kept);
        assert_eq!(State::open(fd.try_clone().unwrap(), 7).1, kept);
        assert_eq!(State::open(fd.try_clone().unwrap(), 8).1, Kept::default());
        File::from(fd.try_clone().unwrap()).write_all_at(&[9], 8).unwrap();
        assert_eq!(State::open(fd, 7).1, Kept::default(), "another version");
    }
}
