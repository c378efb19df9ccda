//! Shared memory regions (virtio 1.2, 2.10 and 4.1.4.7): a BAR of their own, in which the back end has pieces of its memory
//! mapped (vhost-user, SHMEM_MAP and SHMEM_UNMAP).
//!
//! A piece lives as long as the connection on which it was asked for, and no longer than the guest's use of the device: a
//! reset of a device whose queues have run takes all of them away. What the guest reads where none is reads all ones.

use std::os::fd::OwnedFd;
use std::rc::Rc;

use nix::sys::stat::{SFlag, fstat};

use super::VirtioPci;
use super::window::shmem_capability;
use crate::device::{Bar, Capability, Shared};
use crate::frontend::wire::Piece;

/// Number of the BAR; it takes the next number, too.
pub const SHMEM_BAR: u8 = 2;
/// All regions of a device together, at most, in bytes: half of the window for prefetchable BARs.
const MAX_LEN: u64 = 16 << 30;
/// Pieces of a device at a time.
const MAX_PIECES: usize = 64;
const PAGE: u64 = 4096;

/// A region: its id, its offset in the BAR and its length.
type Region = (u8, u64, u64);

/// What a device shares.
#[derive(Debug, Default)]
pub struct Shmem {
    regions: Vec<Region>,
    pieces: Vec<Shared>,
    last_id: u64,
    /// What the back end waits for.
    due: Option<Due>,
    changed: bool,
}

/// What a back end has asked for and not been told of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Due {
    /// That this piece is there.
    Coming(u64),
    /// That a piece is gone.
    Going,
}

/// Regions in a BAR, one after the other, and the length of that; none if it is too long.
fn arrange(offered: &[(u8, u64)]) -> Option<(Vec<Region>, u64)> {
    let (mut regions, mut end) = (Vec::new(), 0u64);
    for (id, len) in offered {
        regions.push((*id, end, *len));
        end = end.checked_add(*len).filter(|end| *end <= MAX_LEN)?;
    }
    Some((regions, end))
}

/// Whether memory (which the front end has seen that it is) has at least this size.
fn holds(file: &OwnedFd, size: u64) -> bool {
    let Ok(stat) = fstat(file) else { return false };
    let regular = SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT == SFlag::S_IFREG;
    regular && i64::try_from(size).is_ok_and(|size| size <= stat.st_size)
}

impl Shmem {
    /// The regions as a back end names them.
    pub fn offered(&self) -> Vec<(u8, u64)> {
        self.regions.iter().map(|(id, _, len)| (*id, *len)).collect()
    }

    /// The guest is shown these regions from now on, if there is room for `most`; false if not.
    pub fn show(&mut self, offered: &[(u8, u64)], most: usize) -> bool {
        let Some((regions, _)) = arrange(offered).filter(|_| offered.len() <= most) else { return false };
        self.changed |= !regions.is_empty();
        self.regions = regions;
        true
    }

    /// The BAR and the capabilities, if there are regions.
    pub fn shape(&self) -> (Vec<Bar>, Vec<Capability>) {
        let Some(len) = self.regions.iter().map(|(_, offset, len)| offset + len).max() else {
            return (Vec::new(), Vec::new());
        };
        let bar = Bar { index: SHMEM_BAR, size: len.next_power_of_two(), wide: true, prefetch: true };
        let capability = |(id, offset, len): &Region| shmem_capability(SHMEM_BAR, *id, *offset, *len);
        (vec![bar], self.regions.iter().map(capability).collect())
    }

    /// Where a piece is to be in the BAR, if it is whole pages of a region.
    fn place(&self, piece: &Piece) -> Option<u64> {
        let (_, start, len) = self.regions.iter().find(|(id, ..)| *id == piece.region)?;
        let pages = [piece.offset, piece.len, piece.file_offset].iter().all(|at| at.is_multiple_of(PAGE));
        let inside = piece.offset.checked_add(piece.len).is_some_and(|end| end <= *len);
        (pages && inside && piece.len > 0).then_some(start + piece.offset)
    }

    /// Takes a piece on, or says why not.
    fn map(&mut self, piece: &Piece, file: &Rc<OwnedFd>) -> Result<(), &'static str> {
        let offset = self.place(piece).ok_or("is not whole pages of one of its regions")?;
        let apart = |other: &Shared| offset + piece.len <= other.offset || other.offset + other.len <= offset;
        if !self.pieces.iter().all(apart) {
            return Err("is over another one");
        }
        if self.pieces.len() >= MAX_PIECES {
            return Err("is one too many");
        }
        let end = piece.file_offset.checked_add(piece.len);
        if !end.is_some_and(|end| holds(file, end)) {
            return Err("is not inside of its memory");
        }
        self.last_id += 1;
        self.pieces.push(Shared {
            id: self.last_id,
            bar: SHMEM_BAR,
            offset,
            len: piece.len,
            file: Rc::clone(file),
            file_offset: piece.file_offset,
            writable: piece.writable,
        });
        (self.due, self.changed) = (Some(Due::Coming(self.last_id)), true);
        Ok(())
    }

    /// Takes a piece away, if there is one that is exactly this.
    fn unmap(&mut self, piece: &Piece) -> Result<(), &'static str> {
        let offset = self.place(&Piece { file_offset: 0, ..*piece }).ok_or("is not in one of its regions")?;
        let is = |other: &Shared| (other.offset, other.len) == (offset, piece.len);
        let at = self.pieces.iter().position(is).ok_or("is not there")?;
        self.pieces.remove(at);
        (self.due, self.changed) = (Some(Due::Going), true);
        Ok(())
    }

    /// Takes all away; says whether there was any.
    pub fn clear(&mut self) -> bool {
        let any = !self.pieces.is_empty();
        self.pieces.clear();
        self.changed |= any;
        any
    }

    /// What the guest is to reach.
    pub fn pieces(&self) -> &[Shared] {
        &self.pieces
    }

    /// Whether shape or pieces have changed since the last call.
    pub const fn take_changed(&mut self) -> bool {
        std::mem::replace(&mut self.changed, false)
    }

    /// Core has done its part, except for what it refused; what to tell the back end, if it waits.
    pub fn carried_out(&mut self, refused: &dyn Fn(u64) -> bool) -> Option<bool> {
        match self.due.take()? {
            Due::Going => Some(true),
            Due::Coming(id) => {
                self.pieces.retain(|piece| piece.id != id || !refused(id));
                let done = self.pieces.iter().any(|piece| piece.id == id);
                self.changed |= !done;
                Some(done)
            }
        }
    }
}

impl VirtioPci {
    /// The back end asks for a piece to come or to go. It is answered when core has done that.
    pub(super) fn on_asked(&mut self) {
        let Some(asked) = self.front.asked() else { return };
        let (piece, file) = (asked.piece, asked.file.clone());
        let (what, done) = match &file {
            Some(file) => ("have mapped", self.shmem.map(&piece, file)),
            None => ("have unmapped", self.shmem.unmap(&piece)),
        };
        if let Err(why) = done {
            self.front.answer(false);
            let Piece { region, offset, len, .. } = piece;
            self.complain(&format!(
                "its back end wants to {what} what {why}: {len:#x} bytes at {offset:#x} of region {region}"
            ));
        }
    }
}
