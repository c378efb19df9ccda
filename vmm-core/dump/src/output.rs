//! The file that is written. What a regular file can have as a hole stays one; anything else gets zeros.

use std::fs::File;
use std::io::Write as _;
use std::os::fd::{AsFd, OwnedFd};

use bulkhead_control_api::dump::Failure;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::sendfile::sendfile64;
use nix::sys::uio::pread;
use nix::unistd::{Whence, ftruncate, lseek};

/// Bytes between two looks at the clock.
const STEP: u64 = 16 << 20;
/// Bytes that are copied at once where the kernel does not copy, and of zeros.
const BUFFER: usize = 256 << 10;

/// Told of each step: bytes that are there.
pub type Progress<'a> = &'a mut dyn FnMut(u64);

/// An output, at some place in it.
#[derive(Debug)]
pub struct Output {
    file: File,
    /// A regular file that is written where it is told to be: it can have holes.
    sparse: bool,
    /// Bytes that are there, or are holes.
    done: u64,
    /// Where the next write goes, if that is known.
    place: Option<u64>,
    /// The kernel does not copy to this kind of file.
    by_hand: bool,
    buffer: Vec<u8>,
}

fn output(errno: Errno) -> Failure {
    Failure::Output(errno as i32)
}

fn memory(errno: Errno) -> Failure {
    Failure::Memory(errno as i32)
}

fn errno(error: &std::io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}

/// An offset for the kernel.
fn offset(at: u64) -> Result<i64, Errno> {
    i64::try_from(at).map_err(|_| Errno::EFBIG)
}

/// The next data, or the next hole, of a memfd; `end` if there is none before.
fn next(fd: impl AsFd, at: u64, end: u64, what: Whence) -> Result<u64, Errno> {
    match lseek(fd, offset(at)?, what) {
        Ok(found) => Ok(u64::try_from(found).map_or(end, |found| found.min(end))),
        // Nothing but a hole up to its end.
        Err(Errno::ENXIO) => Ok(end),
        Err(errno) => Err(errno),
    }
}

impl Output {
    /// The output at its beginning, empty.
    ///
    /// # Errors
    /// It cannot be emptied.
    pub fn new(fd: OwnedFd) -> Result<Self, Failure> {
        let flags = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL).map_err(output)?);
        let file = File::from(fd);
        let kind = file.metadata().map_err(|error| output(errno(&error)))?;
        if kind.is_file() {
            // What it had would show through the holes.
            ftruncate(&file, 0).map_err(output)?;
        }
        let sparse = kind.is_file() && !flags.contains(OFlag::O_APPEND);
        Ok(Self { file, sparse, done: 0, place: None, by_hand: false, buffer: Vec::new() })
    }

    /// Appends bytes of a memfd.
    ///
    /// # Errors
    /// The output's or the memfd's.
    pub fn copy(&mut self, fd: &OwnedFd, from: u64, len: u64, progress: Progress<'_>) -> Result<(), Failure> {
        let end = from.saturating_add(len);
        let mut at = from;
        while at < end {
            let data = next(fd, at, end, Whence::SeekData).map_err(memory)?;
            self.skip(data - at, progress)?;
            let hole = next(fd, data, end, Whence::SeekHole).map_err(memory)?;
            self.copy_data(fd, data, hole, progress)?;
            at = hole;
        }
        Ok(())
    }

    fn copy_data(&mut self, fd: &OwnedFd, from: u64, to: u64, progress: Progress<'_>) -> Result<(), Failure> {
        let mut at = from;
        while at < to {
            self.go_to_place()?;
            let some = self.copy_some(fd, at, (to - at).min(STEP))?;
            at += some;
            self.advance(some);
            progress(self.done);
        }
        Ok(())
    }

    /// Copies at least one byte; returns how many.
    fn copy_some(&mut self, fd: &OwnedFd, at: u64, len: u64) -> Result<u64, Failure> {
        let mut from = offset(at).map_err(memory)?;
        if !self.by_hand {
            let count = usize::try_from(len).unwrap_or(usize::MAX);
            match sendfile64(&self.file, fd, Some(&mut from), count) {
                // The memfd ends here: core gave a region that is longer.
                Ok(0) => return Err(memory(Errno::ENODATA)),
                Ok(some) => return Ok(some as u64),
                Err(Errno::EINTR) => return Ok(0),
                // A device, or a file that only appends.
                Err(Errno::EINVAL) => self.by_hand = true,
                Err(errno) => return Err(output(errno)),
            }
        }
        self.buffer.resize(BUFFER, 0);
        let most = usize::try_from(len).unwrap_or(BUFFER).min(BUFFER);
        let some = self.buffer.get_mut(..most).unwrap_or_default();
        let count = match pread(fd, some, from) {
            Ok(0) => return Err(memory(Errno::ENODATA)),
            Ok(count) => count,
            Err(errno) => return Err(memory(errno)),
        };
        let some = self.buffer.get(..count).unwrap_or_default();
        self.file.write_all(some).map_err(|error| output(errno(&error)))?;
        Ok(count as u64)
    }

    /// Appends zeros: a hole where there can be one.
    ///
    /// # Errors
    /// The output's.
    pub fn skip(&mut self, len: u64, progress: Progress<'_>) -> Result<(), Failure> {
        if self.sparse {
            self.done = self.done.saturating_add(len);
            progress(self.done);
            return Ok(());
        }
        let mut left = len;
        let zeros = [0; BUFFER / 8];
        while left > 0 {
            let some = usize::try_from(left).unwrap_or(zeros.len()).min(zeros.len());
            let written = self.file.write_all(zeros.get(..some).unwrap_or_default());
            written.map_err(|error| output(errno(&error)))?;
            left -= some as u64;
            self.advance(some as u64);
            progress(self.done);
        }
        Ok(())
    }

    fn advance(&mut self, len: u64) {
        self.done = self.done.saturating_add(len);
        self.place = Some(self.done);
    }

    /// The next write goes to the end of what is there.
    fn go_to_place(&mut self) -> Result<(), Failure> {
        if self.sparse && self.place != Some(self.done) {
            lseek(&self.file, offset(self.done).map_err(output)?, Whence::SeekSet).map_err(output)?;
            self.place = Some(self.done);
        }
        Ok(())
    }

    /// Gives the file its full size, also if it ends with a hole.
    ///
    /// # Errors
    /// The output's.
    pub fn finish(self) -> Result<(), Failure> {
        if self.sparse && self.place != Some(self.done) {
            ftruncate(&self.file, offset(self.done).map_err(output)?).map_err(output)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Seek as _};
    use std::os::unix::fs::{FileExt as _, MetadataExt as _};

    use nix::sys::memfd::{MFdFlags, memfd_create};

    use super::*;

    const MIB: u64 = 1 << 20;

    /// A memfd of 64 MiB with two pages of data.
    fn guest() -> OwnedFd {
        let file = File::from(memfd_create("ram", MFdFlags::MFD_CLOEXEC).unwrap());
        file.set_len(64 * MIB).unwrap();
        file.write_all_at(&[1; 4096], 0).unwrap();
        file.write_all_at(&[2; 4096], 32 * MIB).unwrap();
        file.into()
    }

    fn scratch(name: &str) -> (File, std::path::PathBuf) {
        let path = std::env::temp_dir().join(format!("bulkhead-dump-{name}-{}", std::process::id()));
        let file = File::options().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
        (file, path)
    }

    fn copied(out: File, from: u64, len: u64) -> Result<(), Failure> {
        let mut output = Output::new(out.into())?;
        output.copy(&guest(), from, len, &mut |_| {})?;
        output.finish()
    }

    #[test]
    fn a_hole_stays_a_hole() {
        let (file, path) = scratch("hole");
        file.write_all_at(&[7; 4096], 16 * MIB).unwrap();
        copied(file.try_clone().unwrap(), 0, 64 * MIB).unwrap();
        let mut bytes = Vec::new();
        (&file).rewind().unwrap();
        (&file).read_to_end(&mut bytes).unwrap();
        assert_eq!(bytes.len() as u64, 64 * MIB);
        let ones = bytes.iter().filter(|byte| **byte == 1).count();
        let twos = bytes.iter().filter(|byte| **byte == 2).count();
        assert_eq!((ones, twos, bytes[4095], bytes[32 << 20]), (4096, 4096, 1, 2));
        assert!(file.metadata().unwrap().blocks() * 512 <= 1 << 16, "{}", file.metadata().unwrap().blocks());
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn a_part_begins_and_ends_within_pages() {
        let (file, path) = scratch("part");
        copied(file.try_clone().unwrap(), 4090, 32 * MIB - 4090 + 7).unwrap();
        let mut ends = [[0; 8]; 2];
        file.read_exact_at(&mut ends[0], 0).unwrap();
        file.read_exact_at(&mut ends[1], 32 * MIB - 4090 - 1).unwrap();
        assert_eq!(ends, [[1, 1, 1, 1, 1, 1, 0, 0], [0, 2, 2, 2, 2, 2, 2, 2]]);
        assert_eq!(file.metadata().unwrap().len(), 32 * MIB - 4090 + 7);
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn a_pipe_and_a_file_that_appends_get_zeros() {
        let (mut reader, writer) = std::io::pipe().unwrap();
        let read = std::thread::spawn(move || {
            let mut bytes = Vec::new();
            reader.read_to_end(&mut bytes).unwrap();
            bytes
        });
        copied(File::from(OwnedFd::from(writer)), 0, 33 * MIB).unwrap();
        let bytes = read.join().unwrap();
        assert_eq!((bytes.len() as u64, bytes[0], bytes[32 << 20]), (33 * MIB, 1, 2));

        let (_, path) = scratch("append");
        let appending = File::options().append(true).open(&path).unwrap();
        copied(appending, 0, 33 * MIB).unwrap();
        assert!(std::fs::read(&path).unwrap() == bytes);
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn a_full_disk_and_a_size_that_no_file_has_are_errors() {
        let full = || File::options().write(true).open("/dev/full").unwrap();
        let no_room = Err(Failure::Output(Errno::ENOSPC as i32));
        assert_eq!(copied(full(), 0, 4096), no_room, "data");
        assert_eq!(copied(full(), 4096, 4096), no_room, "a hole");
        let (file, path) = scratch("large");
        let mut output = Output::new(file.try_clone().unwrap().into()).unwrap();
        output.skip(u64::MAX >> 1, &mut |_| {}).unwrap();
        assert_eq!(output.finish(), Err(Failure::Output(Errno::EFBIG as i32)));
        // A reader that is gone.
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let ended = copied(File::from(OwnedFd::from(writer)), 0, 4096);
        assert_eq!(ended, Err(Failure::Output(Errno::EPIPE as i32)));
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn memory_that_is_shorter_than_core_says_is_an_error() {
        let (file, path) = scratch("short");
        // Its last page has data, so that SEEK_DATA finds it.
        let ram = File::from(guest());
        ram.write_all_at(&[3; 4096], 64 * MIB - 4096).unwrap();
        let mut output = Output::new(file.into()).unwrap();
        let copied = output.copy_data(&ram.into(), 64 * MIB - 4096, 64 * MIB + 1, &mut |_| {});
        assert_eq!(copied, Err(Failure::Memory(Errno::ENODATA as i32)));
        std::fs::remove_file(path).unwrap();
    }
}
