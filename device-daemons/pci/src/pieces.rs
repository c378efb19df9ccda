//! Pieces of guest memory that memory devices make come and go (`docs/decisions/0007-memory.md`).
//!
//! ```text
//!           every back end has it          core has mapped it
//!   Telling --------------------> Placing --------------------> There
//!      ^                                                          | the device does not want it any more
//!      |        every back end is without it     core is          v
//!    (none) <------------------------ Forgetting <--------- Taking
//! ```
//! There are no links in here: the machine does what [`Pieces`] says is to be and reports what is.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;
use std::rc::Rc;

use bulkhead_bus_api::pci::{self, MAX_WINDOWS, Window};
use bulkhead_control_api::config::DeviceMemory;
use bulkhead_control_api::side::Piece;
use nix::sys::stat::{SFlag, fstat};

use crate::bus::MAX_SHARED;
use crate::memory::{Memory, Region};
use crate::place::MAX_FUNCTIONS;

/// Number of the window of the first piece; behind those of functions and of what they share.
#[expect(clippy::cast_possible_truncation, reason = "a few hundred")]
pub const FIRST_WINDOW: u16 = (MAX_FUNCTIONS + MAX_SHARED) as u16;
/// Pieces of a VM.
pub const MAX_PIECES: u16 = MAX_WINDOWS - FIRST_WINDOW;
const PAGE: u64 = 4096;

/// What a memory device asks.
#[derive(Clone, Debug)]
pub enum Ask {
    /// There is a new link to its daemon, which says all of its pieces.
    Begin,
    /// A piece is to be there.
    Piece(u16, Piece, Rc<OwnedFd>),
    /// A piece is to be nowhere.
    NoPiece(u16),
    /// All pieces have been said.
    All,
}

/// What it is answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// To [`Ask::Piece`] and [`Ask::NoPiece`].
    Settled(u16, Result<(), String>),
    /// To [`Ask::All`]: it has its pieces and no others.
    All,
}

/// How far a piece is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Telling,
    Placing,
    There,
    Taking,
    Forgetting,
}

/// A file by device and inode: the daemon passes another descriptor of it each time.
type File = (u64, u64);

#[derive(Clone, Debug)]
struct Entry {
    owner: u16,
    /// The device's own number.
    number: u16,
    piece: Piece,
    region: Region,
    file: File,
    stage: Stage,
    wanted: bool,
    /// The daemon waits for an answer.
    asked: bool,
    /// It has named the piece since its link began.
    said: bool,
    /// What went wrong.
    refused: Option<String>,
}

/// All pieces of the machine.
#[derive(Debug)]
pub struct Pieces {
    ram: Vec<Region>,
    /// By number in the machine.
    entries: BTreeMap<u16, Entry>,
    /// Guest memory is another one than back ends were told.
    changed: bool,
    /// Devices that have said all and wait for the answer.
    said_all: BTreeSet<u16>,
    /// Devices whose pieces are not known yet.
    unknown: BTreeSet<u16>,
    /// Numbers at which a predecessor may have left something.
    absent: Vec<u16>,
    replies: Vec<(u16, Reply)>,
}

/// The file behind a descriptor, if it is a memfd or another regular file of at least `end` bytes.
fn file(fd: &OwnedFd, end: u64) -> Option<File> {
    let stat = fstat(fd).ok()?;
    let regular = SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT == SFlag::S_IFREG;
    let large = i64::try_from(end).is_ok_and(|end| end <= stat.st_size);
    (regular && large).then_some((stat.st_dev, stat.st_ino))
}

/// The piece's number in the machine, if the device has such a one.
fn number_of(memory: &DeviceMemory, number: u16) -> Option<u16> {
    let all = memory.first.checked_add(number).filter(|all| number < memory.pieces && *all < MAX_PIECES)?;
    FIRST_WINDOW.checked_add(all)
}

fn is_inside(memory: &DeviceMemory, piece: &Piece) -> bool {
    let pages = [piece.addr, piece.len, piece.offset].iter().all(|value| value.is_multiple_of(PAGE));
    let ends = (piece.addr.checked_add(piece.len), memory.addr.checked_add(memory.len));
    let (Some(end), Some(last)) = ends else { return false };
    pages && piece.len > 0 && piece.addr >= memory.addr && end <= last
}

impl Pieces {
    /// None so far beside RAM.
    #[must_use]
    pub fn new(ram: Vec<Region>) -> Self {
        Self {
            ram,
            entries: BTreeMap::new(),
            changed: false,
            said_all: BTreeSet::new(),
            unknown: BTreeSet::new(),
            absent: Vec::new(),
            replies: Vec::new(),
        }
    }

    /// There is a memory device, whose pieces are not known yet.
    pub fn expect(&mut self, owner: u16) {
        self.unknown.insert(owner);
    }

    /// Whether nobody's pieces are unknown: only then may back ends touch guest memory.
    #[must_use]
    pub fn are_known(&self) -> bool {
        self.unknown.is_empty()
    }

    /// A device asks; `room` says whether every back end takes so many regions.
    pub fn ask(
        &mut self,
        owner: u16,
        memory: &DeviceMemory,
        ask: Ask,
        room: &dyn Fn(usize) -> Result<(), String>,
    ) {
        match ask {
            Ask::Begin => {
                self.said_all.remove(&owner);
                for entry in self.entries.values_mut().filter(|entry| entry.owner == owner) {
                    (entry.said, entry.asked) = (false, false);
                }
            }
            Ask::All => {
                for entry in self.entries.values_mut().filter(|entry| entry.owner == owner && !entry.said) {
                    entry.wanted = false;
                }
                let numbers = (0..memory.pieces).filter_map(|number| number_of(memory, number));
                self.absent.extend(numbers.filter(|number| !self.entries.contains_key(number)));
                self.said_all.insert(owner);
            }
            Ask::NoPiece(number) => {
                match number_of(memory, number).and_then(|all| self.entries.get_mut(&all)) {
                    Some(entry) => (entry.wanted, entry.asked, entry.said) = (false, true, true),
                    None => self.replies.push((owner, Reply::Settled(number, Ok(())))),
                }
            }
            Ask::Piece(number, piece, fd) => {
                if let Err(text) = self.come(owner, memory, (number, piece, fd), room) {
                    self.replies.push((owner, Reply::Settled(number, Err(text))));
                }
            }
        }
        self.advance();
    }

    fn come(
        &mut self,
        owner: u16,
        memory: &DeviceMemory,
        (number, piece, fd): (u16, Piece, Rc<OwnedFd>),
        room: &dyn Fn(usize) -> Result<(), String>,
    ) -> Result<(), String> {
        let all = number_of(memory, number).ok_or("the device has no such piece")?;
        if !is_inside(memory, &piece) {
            return Err("the piece is not inside the device's memory".to_owned());
        }
        let end = piece.offset.checked_add(piece.len).ok_or("the piece has no end")?;
        let file = file(&fd, end).ok_or("the piece is not inside a regular file")?;
        if let Some(entry) = self.entries.get_mut(&all) {
            if entry.piece != piece || entry.file != file {
                return Err("there is another piece of that number".to_owned());
            }
            (entry.wanted, entry.asked, entry.said) = (true, true, true);
            return Ok(());
        }
        let apart =
            |other: &Piece| piece.addr + piece.len <= other.addr || other.addr + other.len <= piece.addr;
        if !self.entries.values().all(|entry| apart(&entry.piece)) {
            return Err("the piece is over another one".to_owned());
        }
        if !self.unknown.contains(&owner) {
            // What was there before is not refused: a back end that has no room for it is lost instead.
            room(self.ram.len() + self.entries.len() + 1)?;
        }
        let place = pci::Memory { base: piece.addr, len: piece.len };
        let region = Region { place, fd, offset: piece.offset };
        let stage = Stage::Telling;
        let (wanted, asked, said, refused) = (true, true, true, None);
        let entry = Entry { owner, number, piece, region, file, stage, wanted, asked, said, refused };
        self.entries.insert(all, entry);
        self.changed = true;
        Ok(())
    }

    /// The device is gone from the bus.
    pub fn remove(&mut self, owner: u16) {
        for entry in self.entries.values_mut().filter(|entry| entry.owner == owner) {
            (entry.wanted, entry.asked) = (false, false);
        }
        self.unknown.remove(&owner);
        self.said_all.remove(&owner);
        self.advance();
    }

    /// Guest memory, if it is another one than at the last call.
    pub fn take_changed(&mut self) -> Option<Memory> {
        std::mem::replace(&mut self.changed, false).then(|| self.memory())
    }

    /// Guest memory.
    #[must_use]
    pub fn memory(&self) -> Memory {
        let pieces = self.entries.values().filter(|entry| entry.stage != Stage::Forgetting);
        Memory { regions: self.ram.iter().chain(pieces.map(|entry| &entry.region)).cloned().collect() }
    }

    /// Every back end has guest memory as it was last taken.
    pub fn told(&mut self) {
        if self.changed {
            return;
        }
        for entry in self.entries.values_mut().filter(|entry| entry.stage == Stage::Telling) {
            entry.stage = Stage::Placing;
        }
        let gone: Vec<u16> = self
            .entries
            .iter()
            .filter(|(_, entry)| entry.stage == Stage::Forgetting)
            .map(|(all, _)| *all)
            .collect();
        for all in gone {
            let Some(mut entry) = self.entries.remove(&all) else { continue };
            if entry.wanted && entry.refused.is_none() {
                // Wanted again while it went.
                entry.stage = Stage::Telling;
                self.entries.insert(all, entry);
                self.changed = true;
            } else if entry.asked {
                let result = entry.refused.map_or(Ok(()), Err);
                self.replies.push((entry.owner, Reply::Settled(entry.number, result)));
            }
        }
        self.advance();
    }

    /// What the guest is to reach, by number of the window.
    pub fn windows(&self) -> impl Iterator<Item = (u16, Window, Rc<OwnedFd>)> + '_ {
        let placed = |entry: &&Entry| matches!(entry.stage, Stage::Placing | Stage::There);
        self.entries.iter().filter(move |(_, entry)| placed(entry)).map(|(all, entry)| {
            let Piece { addr: gpa, len, offset } = entry.piece;
            (*all, Window { gpa, len, offset, writable: true }, Rc::clone(&entry.region.fd))
        })
    }

    /// Numbers of windows at which there is to be nothing, whatever a predecessor has left there.
    pub fn take_absent(&mut self) -> Vec<u16> {
        std::mem::take(&mut self.absent)
    }

    /// Core has done what [`Pieces::windows`] says, except for these.
    pub fn placed(&mut self, refused: &[u16]) {
        for (all, entry) in &mut self.entries {
            match entry.stage {
                Stage::Placing if refused.contains(all) => {
                    entry.refused = Some("core does not map it".to_owned());
                    (entry.wanted, entry.stage, self.changed) = (false, Stage::Forgetting, true);
                }
                Stage::Placing => entry.stage = Stage::There,
                Stage::Taking => (entry.stage, self.changed) = (Stage::Forgetting, true),
                _ => {}
            }
        }
        self.advance();
    }

    /// Goes on with what waits for nothing.
    fn advance(&mut self) {
        for entry in self.entries.values_mut().filter(|entry| entry.stage == Stage::There) {
            if !entry.wanted {
                entry.stage = Stage::Taking;
            } else if std::mem::take(&mut entry.asked) {
                self.replies.push((entry.owner, Reply::Settled(entry.number, Ok(()))));
            }
        }
        let entries = &self.entries;
        let done = |owner: u16| {
            let mut own = entries.values().filter(|entry| entry.owner == owner);
            own.all(|entry| entry.wanted && entry.stage == Stage::There)
        };
        let ready: Vec<u16> = self.said_all.iter().copied().filter(|owner| done(*owner)).collect();
        for owner in ready {
            self.said_all.remove(&owner);
            self.unknown.remove(&owner);
            self.replies.push((owner, Reply::All));
        }
    }

    /// Whether something waits for the next turn of the machine.
    #[must_use]
    pub fn is_pending(&self) -> bool {
        self.changed
            || !self.absent.is_empty()
            || self.entries.values().any(|entry| matches!(entry.stage, Stage::Placing | Stage::Taking))
    }

    /// Whether a back end's word on guest memory is waited for.
    #[must_use]
    pub fn waits(&self) -> bool {
        self.entries.values().any(|entry| matches!(entry.stage, Stage::Telling | Stage::Forgetting))
    }

    /// What devices are to be answered, by index.
    pub fn take_replies(&mut self) -> Vec<(u16, Reply)> {
        std::mem::take(&mut self.replies)
    }
}

#[cfg(test)]
mod tests {
    use nix::sys::memfd::{MFdFlags, memfd_create};

    use super::*;

    const MEMORY: DeviceMemory = DeviceMemory { addr: 1 << 40, len: 1 << 30, pieces: 4, first: 10 };
    const OWNER: u16 = 7;
    const LEN: u64 = 1 << 20;

    fn fd() -> Rc<OwnedFd> {
        let fd = memfd_create("piece", MFdFlags::MFD_CLOEXEC).unwrap();
        nix::unistd::ftruncate(&fd, 8 << 20).unwrap();
        Rc::new(fd)
    }

    fn piece(number: u16) -> Piece {
        let offset = u64::from(number) * LEN;
        Piece { addr: MEMORY.addr + offset, len: LEN, offset }
    }

    fn ask(pieces: &mut Pieces, ask: Ask) {
        pieces.ask(OWNER, &MEMORY, ask, &|_| Ok(()));
    }

    fn windows(pieces: &Pieces) -> Vec<u16> {
        pieces.windows().map(|(number, ..)| number - FIRST_WINDOW).collect()
    }

    fn regions(pieces: &mut Pieces) -> Option<usize> {
        pieces.take_changed().map(|memory| memory.regions.len())
    }

    const DONE: Result<(), String> = Ok(());

    /// A device with these pieces.
    fn with(numbers: &[u16], fd: &Rc<OwnedFd>) -> Pieces {
        let mut pieces = Pieces::new(Vec::new());
        pieces.expect(OWNER);
        ask(&mut pieces, Ask::Begin);
        for number in numbers {
            ask(&mut pieces, Ask::Piece(*number, piece(*number), Rc::clone(fd)));
        }
        ask(&mut pieces, Ask::All);
        assert_eq!(pieces.are_known(), numbers.is_empty());
        pieces.take_changed();
        pieces.told();
        pieces.placed(&[]);
        assert!(pieces.are_known());
        let mut want: Vec<_> = numbers.iter().map(|n| (OWNER, Reply::Settled(*n, DONE))).collect();
        want.push((OWNER, Reply::All));
        assert_eq!(pieces.take_replies(), want);
        pieces
    }

    #[test]
    fn back_ends_come_before_the_guest_and_go_after_it() {
        let mut pieces = with(&[], &fd());
        ask(&mut pieces, Ask::Piece(1, piece(1), fd()));
        assert_eq!((windows(&pieces), regions(&mut pieces)), (vec![], Some(1)));
        assert!(pieces.waits() && pieces.take_replies().is_empty());
        pieces.told();
        assert_eq!(windows(&pieces), [11]);
        assert!(pieces.take_replies().is_empty(), "core has not done it yet");
        pieces.placed(&[]);
        assert_eq!(pieces.take_replies(), [(OWNER, Reply::Settled(1, DONE))]);
        ask(&mut pieces, Ask::NoPiece(1));
        assert_eq!((windows(&pieces), regions(&mut pieces)), (vec![], None));
        pieces.placed(&[]);
        assert_eq!(regions(&mut pieces), Some(0));
        assert!(pieces.take_replies().is_empty(), "a back end may have it still");
        pieces.told();
        assert_eq!(pieces.take_replies(), [(OWNER, Reply::Settled(1, DONE))]);
        pieces.take_absent();
        assert!(!pieces.waits() && !pieces.is_pending());
    }

    #[test]
    fn what_is_not_the_devices_is_refused() {
        let fd = fd();
        let mut pieces = with(&[0], &fd);
        let beyond = Piece { addr: MEMORY.addr + MEMORY.len - LEN / 2, ..piece(1) };
        let wrong = [
            (4, piece(4)),
            (1, Piece { addr: MEMORY.addr - LEN, ..piece(1) }),
            (1, beyond),
            (1, Piece { len: 0, ..piece(1) }),
            (1, Piece { addr: piece(1).addr + 1, ..piece(1) }),
            (1, Piece { offset: u64::MAX - 4095, ..piece(1) }),
            (1, Piece { offset: 8 << 20, ..piece(1) }),
            (1, Piece { addr: u64::MAX - 4095, ..piece(1) }),
            (1, Piece { addr: piece(0).addr, ..piece(1) }),
            (0, piece(1)),
        ];
        for (number, piece) in wrong {
            ask(&mut pieces, Ask::Piece(number, piece, Rc::clone(&fd)));
            let replies = pieces.take_replies();
            assert!(
                matches!(&replies[..], [(OWNER, Reply::Settled(n, Err(_)))] if *n == number),
                "{piece:x?}"
            );
        }
        assert_eq!(regions(&mut pieces), None);
        let (pipe, _end) = nix::unistd::pipe().unwrap();
        ask(&mut pieces, Ask::Piece(1, piece(1), Rc::new(pipe)));
        assert!(matches!(&pieces.take_replies()[..], [(_, Reply::Settled(1, Err(_)))]));
        pieces.ask(OWNER, &MEMORY, Ask::Piece(1, piece(1), fd), &|regions| Err(format!("{regions}")));
        assert_eq!(pieces.take_replies(), [(OWNER, Reply::Settled(1, Err("2".into())))]);
    }

    #[test]
    fn what_core_refuses_goes_again() {
        let mut pieces = with(&[], &fd());
        ask(&mut pieces, Ask::Piece(1, piece(1), fd()));
        pieces.take_changed();
        pieces.told();
        pieces.placed(&[FIRST_WINDOW + 11]);
        assert_eq!((windows(&pieces), regions(&mut pieces)), (vec![], Some(0)));
        pieces.told();
        assert!(matches!(&pieces.take_replies()[..], [(OWNER, Reply::Settled(1, Err(_)))]));
    }

    #[test]
    fn a_daemon_that_is_started_anew_says_what_there_is() {
        let fd = fd();
        let mut pieces = with(&[0, 1, 2], &fd);
        ask(&mut pieces, Ask::Begin);
        // Another descriptor of the same file.
        ask(&mut pieces, Ask::Piece(1, piece(1), Rc::new(fd.try_clone().unwrap())));
        assert_eq!(pieces.take_replies(), [(OWNER, Reply::Settled(1, DONE))], "it has never been away");
        assert_eq!(regions(&mut pieces), None);
        ask(&mut pieces, Ask::All);
        assert_eq!(windows(&pieces), [11]);
        pieces.placed(&[]);
        assert_eq!(regions(&mut pieces), Some(1));
        assert!(pieces.take_replies().is_empty());
        pieces.told();
        assert_eq!(pieces.take_replies(), [(OWNER, Reply::All)]);
    }

    #[test]
    fn a_piece_that_is_wanted_again_while_it_goes_comes_again() {
        let fd = fd();
        let mut pieces = with(&[0], &fd);
        ask(&mut pieces, Ask::NoPiece(0));
        pieces.placed(&[]);
        pieces.take_changed();
        ask(&mut pieces, Ask::Begin);
        ask(&mut pieces, Ask::Piece(0, piece(0), fd));
        pieces.told();
        assert_eq!(regions(&mut pieces), Some(1));
        pieces.told();
        pieces.placed(&[]);
        assert_eq!(pieces.take_replies(), [(OWNER, Reply::Settled(0, DONE))]);
        assert_eq!(windows(&pieces), [10]);
    }

    #[test]
    fn a_device_that_is_gone_leaves_nothing() {
        let mut pieces = with(&[0, 3], &fd());
        pieces.remove(OWNER);
        assert!(windows(&pieces).is_empty());
        pieces.placed(&[]);
        assert_eq!(regions(&mut pieces), Some(0));
        pieces.told();
        assert!(pieces.take_replies().is_empty() && !pieces.waits());
    }

    #[test]
    fn what_a_predecessor_may_have_left_is_taken_away() {
        let mut pieces = with(&[1], &fd());
        let absent: Vec<u16> = pieces.take_absent().iter().map(|number| number - FIRST_WINDOW).collect();
        assert_eq!(absent, [10, 12, 13]);
    }
}
