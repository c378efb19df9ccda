//! Pieces of guest memory that a device makes come and go: what the queue thread wants, and what pci has done of it.
//!
//! The queue thread says what it wants ([`Pieces::want`]) and goes on when that is so ([`Pieces::outcome`]). The control
//! thread asks pci for what is not so yet. A pci that is new knows nothing, so it is told all again.

use std::collections::BTreeMap;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bulkhead_control_api::side::{MAX_PIECES, MemorySizes, Piece, ToPci};
use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::device::Notices;

/// The most questions that wait for an answer.
const MAX_ASKED: usize = 32;

/// How far what is wanted is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Not all is done yet; the source [`Pieces::source`] tells when that changes.
    Waiting,
    /// All is as wanted.
    Done,
    /// Something cannot be done, and is wanted no more; a text for the log.
    Refused(String),
}

/// A piece, or none.
type Wish = Option<Piece>;

#[derive(Debug, Default)]
struct Table {
    /// What is to be, of each number that was ever named and is not known to be gone.
    wanted: BTreeMap<u16, Wish>,
    /// What pci has said to be so on this link.
    known: BTreeMap<u16, Wish>,
    /// What it was asked for and has not answered.
    asked: BTreeMap<u16, Wish>,
    /// All pieces were said on this link.
    said: bool,
    /// Pci has none but those.
    restated: bool,
    refused: Option<String>,
    sizes: MemorySizes,
    /// The sizes were said on this link.
    sizes_said: bool,
}

#[derive(Debug)]
struct Shared {
    table: Mutex<Table>,
    file: OwnedFd,
    notices: Notices,
    changed: EventFd,
}

/// The pieces of a device; clones share them.
#[derive(Clone, Debug)]
pub struct Pieces(Arc<Shared>);

impl Pieces {
    /// None so far. They are parts of `file`.
    ///
    /// # Errors
    /// The host's.
    pub fn new(file: OwnedFd, notices: Notices) -> Result<Self, Errno> {
        let changed = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        Ok(Self(Arc::new(Shared { table: Mutex::default(), file, notices, changed })))
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.0.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wants piece `number` to be `piece`, or not to be.
    pub fn want(&self, number: u16, piece: Option<Piece>) {
        let mut table = self.table();
        // What was never named is not there.
        if number < MAX_PIECES && (piece.is_some() || table.wanted.contains_key(&number)) {
            table.wanted.insert(number, piece);
            self.0.notices.wake();
        }
    }

    /// Has pci told the sizes.
    pub fn say_sizes(&self, sizes: MemorySizes) {
        let mut table = self.table();
        (table.sizes, table.sizes_said) = (sizes, false);
        self.0.notices.wake();
    }

    /// How far it is. A refusal is told once.
    #[must_use]
    pub fn outcome(&self) -> Outcome {
        let mut table = self.table();
        if let Some(text) = table.refused.take() {
            return Outcome::Refused(text);
        }
        let settled = table.restated && table.wanted.iter().all(|(n, wish)| table.known.get(n) == Some(wish));
        if settled { Outcome::Done } else { Outcome::Waiting }
    }

    /// What the queue thread waits for; [`Pieces::seen`] empties it.
    #[must_use]
    pub fn source(&self) -> BorrowedFd<'_> {
        self.0.changed.as_fd()
    }

    /// The queue thread has heard of the change.
    pub fn seen(&self) {
        let _ = self.0.changed.read();
    }

    /// Has the queue thread look once more.
    pub fn poke(&self) {
        let _ = self.0.changed.write(1);
    }

    pub(crate) fn file(&self) -> BorrowedFd<'_> {
        self.0.file.as_fd()
    }

    /// There is a new link, or none: whoever is there knows nothing.
    pub(crate) fn begin(&self) {
        let mut table = self.table();
        table.known.clear();
        table.asked.clear();
        (table.said, table.restated, table.sizes_said) = (false, false, false);
    }

    /// The next message, which counts as sent.
    pub(crate) fn next(&self) -> Option<ToPci> {
        let table = &mut *self.table();
        if !table.sizes_said {
            table.sizes_said = true;
            return Some(ToPci::Memory(table.sizes));
        }
        if table.asked.len() >= MAX_ASKED {
            return None;
        }
        let Table { wanted, known, asked, said, .. } = table;
        let open = |n: &u16, wish: &Wish| !asked.contains_key(n) && known.get(n) != Some(wish);
        // First what there is; then what is no more, which another pci may think there is.
        let due = wanted.iter().find(|(n, wish)| open(n, wish) && (*said || wish.is_some()));
        let Some((&number, &wish)) = due else {
            return (!std::mem::replace(said, true)).then_some(ToPci::Pieces);
        };
        asked.insert(number, wish);
        Some(wish.map_or(ToPci::NoPiece { number }, |piece| ToPci::Piece { number, piece }))
    }

    /// Pci has no others than were said.
    pub(crate) fn restated(&self) {
        self.table().restated = true;
        self.poke();
    }

    /// Pci has done what it was asked, or not; false if it was not asked.
    pub(crate) fn settled(&self, number: u16, result: Result<(), String>) -> bool {
        let table = &mut *self.table();
        let Some(wish) = table.asked.remove(&number) else { return false };
        match result {
            // What is gone is forgotten, unless it is wanted again by now.
            Ok(()) if wish.is_none() && table.wanted.get(&number) == Some(&None) => {
                table.wanted.remove(&number);
                table.known.remove(&number);
            }
            Ok(()) => {
                table.known.insert(number, wish);
            }
            Err(text) => {
                let before = table.known.get(&number).copied().flatten();
                table.known.insert(number, before);
                table.wanted.insert(number, before);
                table.refused = Some(text);
            }
        }
        self.poke();
        true
    }
}

#[cfg(test)]
mod tests {
    use nix::sys::memfd::{MFdFlags, memfd_create};

    use super::*;

    const fn piece(number: u16) -> Piece {
        Piece { addr: (number as u64 + 1) << 20, len: 1 << 20, offset: 0 }
    }

    fn pieces() -> Pieces {
        let file = memfd_create("pieces", MFdFlags::MFD_CLOEXEC).unwrap();
        let pieces = Pieces::new(file, Notices::new().unwrap()).unwrap();
        pieces.begin();
        pieces
    }

    fn all(pieces: &Pieces) -> Vec<ToPci> {
        std::iter::from_fn(|| pieces.next()).collect()
    }

    fn said(number: u16) -> ToPci {
        ToPci::Piece { number, piece: piece(number) }
    }

    const SIZES: ToPci = ToPci::Memory(MemorySizes { plugged: 0, requested: 0 });

    #[test]
    fn what_is_wanted_is_asked_for_once_and_waited_for() {
        let pieces = pieces();
        pieces.want(3, Some(piece(3)));
        assert_eq!(all(&pieces), [SIZES, said(3), ToPci::Pieces]);
        assert_eq!(pieces.outcome(), Outcome::Waiting);
        assert!(pieces.settled(3, Ok(())) && !pieces.settled(3, Ok(())), "it was asked once");
        assert_eq!(pieces.outcome(), Outcome::Waiting, "nobody knows of a predecessor's others");
        pieces.restated();
        assert_eq!(pieces.outcome(), Outcome::Done);
        pieces.want(3, None);
        assert_eq!(all(&pieces), [ToPci::NoPiece { number: 3 }]);
        assert_eq!(pieces.outcome(), Outcome::Waiting);
        assert!(pieces.settled(3, Ok(())));
        assert_eq!(pieces.outcome(), Outcome::Done);
        assert_eq!(all(&pieces), []);
    }

    #[test]
    fn another_pci_is_told_all_again_and_what_goes_stays_asked_for() {
        let pieces = pieces();
        pieces.want(1, Some(piece(1)));
        pieces.want(2, Some(piece(2)));
        all(&pieces);
        assert!(pieces.settled(1, Ok(())) && pieces.settled(2, Ok(())));
        pieces.restated();
        pieces.want(2, None);
        assert_eq!(all(&pieces), [ToPci::NoPiece { number: 2 }]);
        pieces.begin();
        assert_eq!(all(&pieces), [SIZES, said(1), ToPci::Pieces, ToPci::NoPiece { number: 2 }]);
        assert!(pieces.settled(1, Ok(())) && pieces.settled(2, Ok(())));
        assert_eq!(pieces.outcome(), Outcome::Waiting);
        pieces.restated();
        assert_eq!(pieces.outcome(), Outcome::Done);
    }

    #[test]
    fn what_is_refused_is_wanted_no_more() {
        let pieces = pieces();
        all(&pieces);
        pieces.restated();
        pieces.want(0, Some(piece(0)));
        all(&pieces);
        assert!(pieces.settled(0, Err("no slot".to_owned())));
        assert_eq!(pieces.outcome(), Outcome::Refused("no slot".to_owned()));
        assert_eq!(pieces.outcome(), Outcome::Done);
        assert_eq!(all(&pieces), []);
    }

    #[test]
    fn a_wish_that_changes_meanwhile_is_asked_for_afterwards() {
        let pieces = pieces();
        all(&pieces);
        pieces.restated();
        pieces.want(0, Some(piece(0)));
        all(&pieces);
        pieces.want(0, None);
        assert_eq!(all(&pieces), [], "one question at a time for a number");
        assert!(pieces.settled(0, Ok(())));
        assert_eq!(all(&pieces), [ToPci::NoPiece { number: 0 }]);
        pieces.want(0, Some(piece(0)));
        assert!(pieces.settled(0, Ok(())));
        assert_eq!(all(&pieces), [said(0)]);
    }

    #[test]
    fn questions_are_bounded() {
        let pieces = pieces();
        (0..MAX_PIECES).for_each(|number| pieces.want(number, Some(piece(number))));
        pieces.want(MAX_PIECES, Some(piece(0)));
        assert_eq!(all(&pieces).len(), 1 + MAX_ASKED);
        for number in 0..MAX_PIECES {
            assert!(pieces.settled(number, Ok(())), "{number}");
            all(&pieces);
        }
        pieces.restated();
        assert_eq!(pieces.outcome(), Outcome::Done);
    }
}
