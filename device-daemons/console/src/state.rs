//! What outlives the process, in a memfd that its starter keeps.
//!
//! ```text
//! page 0       the record: magic, version, life of core, length; then the content
//! page 1       how much output has gone out, how much input has come in: 8 bytes each
//! then         output of the serial port, twice as much as may wait
//! then         input for it, twice as much as may wait
//! ```
//! A record is one `pwrite` within a page, which a killed process has done or not. Bytes are written before
//! the count or record that speaks of them. Whatever a reply to core or an answer to the broker promises
//! is committed before it is sent; an access that changes nothing may as well be done again, so it is not.
//!
//! The two counts lag by one piece of at most [`PIECE`] bytes when the process dies between `send` or `recv`
//! and the count: so much output comes twice, so much input is lost.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt as _;

use bulkhead_bus_api::REPLY_LEN;
use bulkhead_bus_api::lasts::{Last, Lasts};
use bulkhead_control_api::{decode, encode};
use bulkhead_jail::warn;
use nix::errno::Errno;
use serde::{Deserialize, Serialize};

use crate::chardev::INPUT_LIMIT;
use crate::device::serial::{FIFO, OUTPUT_LIMIT};
use crate::machine::{self, Machine};
use crate::queue::Queue;

/// Bytes of output or input that are under way uncounted: no more than the port's FIFO holds.
pub const PIECE: usize = FIFO;
/// No counter of bytes comes this far in the life of a machine: what has one beyond is refused, so that none
/// overflows afterwards.
const MOST: u64 = u64::MAX / 2;
/// The most character devices: their part of the record fits.
pub const MAX_CHARDEVS: usize = 128;

const MAGIC: [u8; 8] = *b"BLKHCONS";
/// Version of everything in here.
const VERSION: u32 = 1;
/// Magic, version, length of the content, life.
const HEADER: usize = 24;
const LIFE: usize = 16;
const PAGE: usize = 4096;
const OUTPUT_COUNT: usize = PAGE;
const INPUT_COUNT: usize = PAGE + 8;
const OUTPUT: Ring = Ring { base: 2 * PAGE, size: 2 * OUTPUT_LIMIT };
const INPUT: Ring = Ring { base: OUTPUT.base + OUTPUT.size, size: 2 * INPUT_LIMIT };
const SIZE: usize = INPUT.base + INPUT.size;

/// Under which numbers a character device's descriptors are kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Names {
    /// Its client's connection, or the near end of a pump's pair.
    pub peer: Option<u32>,
    /// The far end of a pump's pair.
    pub far: Option<u32>,
}

/// What is committed in one go.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Record {
    /// Core has welcomed a console: nobody waits for a first client any more.
    begun: bool,
    /// The next number for a descriptor that is kept.
    next: u32,
    /// By character device.
    names: Vec<Names>,
    /// By access link.
    lasts: Lasts,
    machine: Option<machine::Saved>,
    output_appended: u64,
    output_consumed: u64,
    input_consumed: u64,
}

/// What a predecessor has left of the machine.
#[derive(Debug)]
pub struct Left {
    /// The machine.
    pub machine: Machine,
    /// Input that waits for the serial port.
    pub input: Queue,
    /// Core had welcomed it.
    pub begun: bool,
}

/// A place for the last so many bytes of a stream.
#[derive(Clone, Copy, Debug)]
struct Ring {
    base: usize,
    size: usize,
}

/// The state.
#[derive(Debug)]
pub struct State {
    file: File,
    life: u64,
    record: Record,
    /// The record has changes beside the machine's.
    dirty: bool,
    /// Bytes of input that are in the ring and counted.
    input_appended: u64,
}

fn write_at(file: &File, bytes: &[u8], at: usize) -> Result<(), Errno> {
    let at = u64::try_from(at).map_err(|_| Errno::EFBIG)?;
    file.write_all_at(bytes, at).map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(0)))
}

fn read_at(file: &File, len: usize, at: usize) -> Option<Vec<u8>> {
    let mut bytes = vec![0; len];
    file.read_exact_at(&mut bytes, u64::try_from(at).ok()?).ok()?;
    Some(bytes)
}

fn count_at(file: &File, at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(read_at(file, 8, at)?.try_into().ok()?))
}

impl Ring {
    /// Where the byte of this number is.
    fn place(self, number: u64) -> usize {
        self.base + usize::try_from(number % self.size as u64).unwrap_or(0)
    }

    /// Puts the youngest bytes of a stream of `appended` into place.
    fn put(self, file: &File, appended: u64, bytes: &[u8]) -> Result<(), Errno> {
        let at = self.place(appended.saturating_sub(bytes.len() as u64));
        let (first, second) = bytes.split_at(bytes.len().min(self.base + self.size - at));
        write_at(file, first, at)?;
        if second.is_empty() { Ok(()) } else { write_at(file, second, self.base) }
    }

    /// The bytes between two numbers, if there can be so many.
    fn get(self, file: &File, consumed: u64, appended: u64) -> Option<Vec<u8>> {
        let len = usize::try_from(appended.checked_sub(consumed)?).ok().filter(|len| *len <= self.size)?;
        let mut all = read_at(file, self.size, self.base)?;
        all.rotate_left(self.place(consumed) - self.base);
        all.truncate(len);
        Some(all)
    }
}

impl State {
    /// The state in a memfd, and what a predecessor has left in it. One that belongs to another life of core
    /// or to another version, or that is impossible, is dropped.
    ///
    /// # Errors
    /// The memfd is none.
    pub fn open(
        fd: OwnedFd,
        life: u64,
        chardevs: usize,
        serial: bool,
    ) -> std::io::Result<(Self, Option<Left>)> {
        let file = File::from(fd);
        let is_new = file.metadata()?.len() == 0;
        let names = vec![Names::default(); chardevs];
        let record = Record {
            begun: false,
            next: 0,
            names,
            lasts: Lasts::default(),
            machine: None,
            output_appended: 0,
            output_consumed: 0,
            input_consumed: 0,
        };
        let mut state = Self { file, life, record, dirty: true, input_appended: 0 };
        let left = if is_new { None } else { state.load(serial) };
        if left.is_none() {
            // One of a former life of the VM is as good as none.
            if !is_new && state.is_of_this_life() {
                warn!("the state of a predecessor is of no use: the machine's devices begin anew");
            }
            state.file.set_len(0)?;
            state.file.set_len(u64::try_from(SIZE).unwrap_or(u64::MAX))?;
        }
        Ok((state, left))
    }

    fn is_of_this_life(&self) -> bool {
        read_at(&self.file, 8, LIFE) == Some(self.life.to_le_bytes().to_vec())
    }

    /// Takes over what is in the file, if all of it makes sense.
    fn load(&mut self, serial: bool) -> Option<Left> {
        let header = read_at(&self.file, HEADER, 0)?;
        let number = |at: usize| Some(u32::from_le_bytes(header.get(at..at + 4)?.try_into().ok()?));
        if header.get(..8) != Some(&MAGIC[..]) || number(8) != Some(VERSION) || !self.is_of_this_life() {
            return None;
        }
        let len = usize::try_from(number(12)?).ok().filter(|len| *len <= PAGE - HEADER)?;
        let record: Record = decode(&read_at(&self.file, len, HEADER)?).ok()?;
        let machine = record.machine.clone().filter(|machine| machine.is_possible(serial))?;
        if record.names.len() != self.record.names.len() {
            return None;
        }
        let appended = count_at(&self.file, INPUT_COUNT)?;
        // Of two that belong together the larger one says it all: `get` has the other one below it.
        if record.output_appended > MOST || appended > MOST {
            return None;
        }
        let bytes = OUTPUT.get(&self.file, record.output_consumed, record.output_appended)?;
        // What went out since the record was made. It never goes out before it is in a record.
        let consumed = count_at(&self.file, OUTPUT_COUNT)?.max(record.output_consumed);
        let since = usize::try_from(consumed - record.output_consumed).ok().filter(|n| *n <= bytes.len())?;
        let output = Queue::restored(record.output_appended, bytes);
        let input = Queue::restored(appended, INPUT.get(&self.file, record.input_consumed, appended)?);
        self.input_appended = appended;
        let begun = record.begun;
        self.record = record;
        Some(Left { machine: Machine::restored(machine, output, since), input, begun })
    }

    /// The number for the next descriptor that is to be kept: none is given twice.
    pub fn next_name(&mut self) -> u32 {
        let name = self.record.next;
        self.record.next = name.wrapping_add(1);
        self.dirty = true;
        name
    }

    /// Under which numbers a character device's descriptors are kept.
    #[must_use]
    pub fn names(&self, chardev: usize) -> Names {
        self.record.names.get(chardev).copied().unwrap_or_default()
    }

    /// Changes them.
    pub fn set_names(&mut self, chardev: usize, names: Names) {
        if let Some(slot) = self.record.names.get_mut(chardev) {
            *slot = names;
            self.dirty = true;
        }
    }

    /// Core has welcomed this process, with so many access links.
    pub fn begin(&mut self, links: usize) {
        self.record.begun = true;
        self.record.lasts.begin(links);
        self.dirty = true;
    }

    /// The reply to a request that was answered last on its link, if it is this one.
    #[must_use]
    pub fn reply_to(&self, link: usize, number: u32) -> Option<[u8; REPLY_LEN]> {
        self.record.lasts.reply_to(link, number)
    }

    /// Notes a reply; it is committed with what the access has changed.
    pub fn set_reply(&mut self, link: usize, last: Last) {
        self.record.lasts.set(link, last);
    }

    /// Commits what has changed since the last time, if anything has.
    ///
    /// # Errors
    /// The host has no page left.
    pub fn commit(&mut self, machine: &Machine, input: Option<&Queue>) -> Result<(), Errno> {
        if let Some(queue) = machine.serial().map(|serial| serial.queue()) {
            let new = queue.appended().saturating_sub(self.record.output_appended);
            if new > 0 {
                let bytes: Vec<u8> = queue.youngest(usize::try_from(new).unwrap_or(usize::MAX)).collect();
                OUTPUT.put(&self.file, queue.appended(), &bytes)?;
                self.dirty = true;
            }
            self.record.output_appended = queue.appended();
            self.record.output_consumed = queue.consumed();
        }
        if let Some(consumed) = input.map(Queue::consumed).filter(|n| *n != self.record.input_consumed) {
            self.record.input_consumed = consumed;
            self.dirty = true;
        }
        if !self.record.machine.as_ref().is_some_and(|saved| machine.is_as(saved)) {
            self.record.machine = Some(machine.save());
            self.dirty = true;
        }
        if !std::mem::take(&mut self.dirty) {
            return Ok(());
        }
        let content = encode(&self.record).map_err(|_| Errno::EMSGSIZE)?;
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

    /// Output has gone out. All of it is in the last record.
    ///
    /// # Errors
    /// The host has no page left.
    pub fn count_output(&self, machine: &Machine) -> Result<(), Errno> {
        let Some(serial) = machine.serial() else { return Ok(()) };
        write_at(&self.file, &serial.queue().consumed().to_le_bytes(), OUTPUT_COUNT)
    }

    /// Input has come in.
    ///
    /// # Errors
    /// The host has no page left.
    pub fn count_input(&mut self, input: &Queue) -> Result<(), Errno> {
        let new = input.appended().saturating_sub(self.input_appended);
        let bytes: Vec<u8> = input.youngest(usize::try_from(new).unwrap_or(usize::MAX)).collect();
        INPUT.put(&self.file, input.appended(), &bytes)?;
        self.input_appended = input.appended();
        write_at(&self.file, &input.appended().to_le_bytes(), INPUT_COUNT)
    }
}

#[cfg(test)]
mod tests {
    use nix::sys::memfd::{MFdFlags, memfd_create};

    use super::*;

    /// A machine that has sent so many bytes, the last of which wait.
    fn with_output(appended: u64, waiting: &[u8]) -> Machine {
        Machine::restored(Machine::new(true).save(), Queue::restored(appended, waiting.to_vec()), 0)
    }

    #[test]
    fn counters_that_might_overflow_are_refused() {
        let reopened = |machine: &Machine, input: Queue| {
            let fd = memfd_create(c"state", MFdFlags::MFD_CLOEXEC).unwrap();
            let (mut state, _) = State::open(fd, 1, 1, true).unwrap();
            state.commit(machine, Some(&input)).unwrap();
            state.count_input(&input).unwrap();
            State::open(state.file.into(), 1, 1, true).unwrap().1
        };
        let none = || Queue::restored(0, Vec::new());
        for (counter, is_used) in [(MOST, true), (MOST + 1, false), (u64::MAX - 1, false), (u64::MAX, false)]
        {
            for waiting in [&b""[..], b"text"] {
                let left = reopened(&with_output(counter, waiting), none());
                assert_eq!(left.is_some(), is_used, "output {counter}");
                let left = reopened(&Machine::new(true), Queue::restored(counter, waiting.to_vec()));
                assert_eq!(left.is_some(), is_used, "input {counter}");
            }
        }
    }

    #[test]
    fn a_record_of_the_largest_machine_fits() {
        let fd = memfd_create(c"state", MFdFlags::MFD_CLOEXEC).unwrap();
        let (mut state, _) = State::open(fd, u64::MAX, MAX_CHARDEVS, true).unwrap();
        state.begin(65);
        for link in 0..65 {
            state.set_reply(link, (u32::MAX, [0xff; REPLY_LEN]));
        }
        for chardev in 0..MAX_CHARDEVS {
            state.set_names(chardev, Names { peer: Some(u32::MAX), far: Some(u32::MAX) });
        }
        state.commit(&with_output(MOST, b""), None).unwrap();
        let read_back = State::open(state.file.into(), u64::MAX, MAX_CHARDEVS, true).unwrap().0;
        assert_eq!(read_back.names(MAX_CHARDEVS - 1).far, Some(u32::MAX));
    }

    #[test]
    fn a_ring_wraps() {
        let fd = memfd_create(c"ring", MFdFlags::MFD_CLOEXEC).unwrap();
        let (file, ring) = (File::from(fd), Ring { base: 10, size: 16 });
        file.set_len(26).unwrap();
        let mut appended = 0;
        for piece in [&b"abcdef"[..], b"ghijkl", b"mnopqr"] {
            appended += piece.len() as u64;
            ring.put(&file, appended, piece).unwrap();
        }
        assert_eq!(ring.get(&file, 10, 18).unwrap(), b"klmnopqr");
        assert_eq!(ring.get(&file, 18, 18).unwrap(), b"");
        assert!(ring.get(&file, 1, 18).is_none() && ring.get(&file, 19, 18).is_none());
    }
}
