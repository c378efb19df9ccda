//! The disk on virtqueues: chains in, system calls on the file, chains out.
//!
//! Reads that the host's cache answers are done at once. The kernel is told of all others of a turn first, so that it
//! fetches them side by side, and then they are waited for.

use std::fs::File;
use std::io::{self, Seek as _, SeekFrom};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use bulkhead_control_api::config::Block;
use bulkhead_kit::chain::Chain;
use bulkhead_kit::device::{Device, Progress};
use bulkhead_kit::io::Vectors;
use bulkhead_kit::memory::Memory;
use bulkhead_kit::ring::{Ring, RingError, Rings};
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, PosixFadviseAdvice, fallocate, posix_fadvise};

use crate::device::{Disk, Extent, HEADER, Model, RANGE, Request, S_IOERR, S_OK};

/// Requests of one ring before others have their turn.
const TURN: usize = 32;
/// Bytes of zeroes written at once where the file system has no better way.
const ZEROES: usize = 64 * 1024;

/// What a request without header or status is called.
const INCOMPLETE: &str = "block request without header or status";

/// A disk with its file.
#[derive(Debug)]
pub struct Transport {
    disk: Disk,
    file: File,
    vectors: Vectors,
    /// Whether a read can say that it would wait.
    tells: bool,
    /// Reads of this turn that would have to wait.
    later: Vec<(Chain, Extent)>,
}

/// What became of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Served {
    /// Done, with so many bytes written to it.
    Done(u32),
    /// A read that would have to wait.
    Later(Extent),
}

/// An error that has no name of its own in virtio.
fn failed(_: Errno) -> u8 {
    S_IOERR
}

impl Transport {
    /// The disk of this configuration on this file or block device.
    ///
    /// # Errors
    /// Its size cannot be found out.
    pub fn new(config: &Block, disk: OwnedFd) -> io::Result<Self> {
        let mut file = File::from(disk);
        // A block device has no length that stat tells. Nothing else uses the position.
        let bytes = file.seek(SeekFrom::End(0))?;
        let model = Model {
            bytes,
            read_only: config.read_only,
            discard: config.discard,
            queues: config.queues.max(1),
            serial: &config.serial,
        };
        let (disk, vectors) = (Disk::new(&model), Vectors::default());
        Ok(Self { disk, file, vectors, tells: true, later: Vec::new() })
    }

    /// Does what a chain asks, but for a read that would have to wait.
    fn serve(&mut self, memory: &Memory, chain: &Chain) -> Result<Served, RingError> {
        let (readable, writable) = (chain.readable(), chain.writable());
        let mut header = [0; HEADER];
        let data_in = writable.len().checked_sub(1).ok_or(RingError::Request(INCOMPLETE))?;
        if readable.read(memory, &mut header)? < HEADER {
            return Err(RingError::Request(INCOMPLETE));
        }
        let data_out = readable.len().saturating_sub(16);
        let request = self.disk.request(&header, data_out, data_in);
        let outcome = match request {
            Ok(Request::Read(extent)) if self.read_cached(memory, chain, extent) => Ok(extent.len),
            Ok(Request::Read(extent)) => return Ok(Served::Later(extent)),
            Ok(request) => self.carry_out(memory, chain, request),
            Err(status) => Err(status),
        };
        finish(memory, chain, outcome).map(Served::Done)
    }

    /// False if the read has to wait, or fails.
    fn read_cached(&mut self, memory: &Memory, chain: &Chain, extent: Extent) -> bool {
        let Some(bytes) = chain.writable().slice(0, extent.len) else { return false };
        if extent.len == 0 {
            return true;
        }
        if !self.tells {
            return false;
        }
        match self.vectors.read_cached(self.file.as_fd(), memory, &bytes, extent.offset) {
            Ok(true) => return true,
            Ok(false) => {
                let fetch = PosixFadviseAdvice::POSIX_FADV_WILLNEED;
                let place = (i64::try_from(extent.offset), i64::try_from(extent.len));
                if let (Ok(offset), Ok(len)) = place {
                    // A hint.
                    let _ = posix_fadvise(&self.file, offset, len, fetch);
                }
            }
            Err(Errno::EOPNOTSUPP | Errno::ENOSYS) => self.tells = false,
            // The read that waits will say it.
            Err(_) => {}
        }
        false
    }

    /// Waits for the reads that were put off.
    fn catch_up(&mut self, ring: &mut Ring, memory: &Memory) {
        let mut later = std::mem::take(&mut self.later);
        if !later.is_empty() {
            // What is done need not wait for them.
            ring.signal();
        }
        for (chain, extent) in later.drain(..) {
            let outcome = self.carry_out(memory, &chain, Request::Read(extent));
            match finish(memory, &chain, outcome) {
                Ok(written) => ring.done(chain, written),
                Err(error) => ring.fail(error),
            }
        }
        self.later = later;
    }

    fn carry_out(&mut self, memory: &Memory, chain: &Chain, request: Request) -> Result<u64, u8> {
        match request {
            Request::Read(Extent { offset, len }) => {
                let bytes = chain.writable().slice(0, len).ok_or(S_IOERR)?;
                self.vectors.read_at(self.file.as_fd(), memory, bytes, offset).map_err(failed)?;
                Ok(len)
            }
            Request::Write(Extent { offset, len }) => {
                let bytes = chain.readable().slice(16, len).ok_or(S_IOERR)?;
                self.vectors.write_at(self.file.as_fd(), memory, bytes, offset).map_err(failed)?;
                Ok(0)
            }
            Request::Flush => self.file.sync_data().map(|()| 0).map_err(|_| S_IOERR),
            Request::GetId => {
                let room = chain.writable().len().saturating_sub(1);
                let len = room.min(20);
                let bytes = chain.writable().slice(0, len).ok_or(S_IOERR)?;
                bytes.write(memory, self.disk.id()).map_err(|_| S_IOERR)?;
                Ok(len)
            }
            Request::Discard { ranges } => {
                for index in 0..ranges {
                    let extent = self.disk.discard(&range(memory, chain, index)?)?;
                    self.discard(extent)?;
                }
                Ok(0)
            }
            Request::WriteZeroes { ranges } => {
                for index in 0..ranges {
                    let (extent, unmap) = self.disk.write_zeroes(&range(memory, chain, index)?)?;
                    self.write_zeroes(extent, unmap)?;
                }
                Ok(0)
            }
        }
    }

    /// False if the file system cannot.
    fn allocate(&self, extent: Extent, flags: FallocateFlags) -> Result<bool, u8> {
        let offset = i64::try_from(extent.offset).map_err(|_| S_IOERR)?;
        let len = i64::try_from(extent.len).map_err(|_| S_IOERR)?;
        if len == 0 {
            return Ok(true);
        }
        match fallocate(&self.file, flags | FallocateFlags::FALLOC_FL_KEEP_SIZE, offset, len) {
            Ok(()) => Ok(true),
            Err(Errno::EOPNOTSUPP | Errno::ENOSYS) => Ok(false),
            Err(errno) => Err(failed(errno)),
        }
    }

    fn discard(&self, extent: Extent) -> Result<(), u8> {
        // A hint: where it cannot be followed, nothing is wrong.
        self.allocate(extent, FallocateFlags::FALLOC_FL_PUNCH_HOLE).map(drop)
    }

    fn write_zeroes(&self, extent: Extent, unmap: bool) -> Result<(), u8> {
        if unmap && self.allocate(extent, FallocateFlags::FALLOC_FL_PUNCH_HOLE)? {
            return Ok(());
        }
        if self.allocate(extent, FallocateFlags::FALLOC_FL_ZERO_RANGE)? {
            return Ok(());
        }
        let zeroes = vec![0; ZEROES];
        let (mut offset, mut left) = (extent.offset, extent.len);
        while left > 0 {
            let count = usize::try_from(left).map_or(ZEROES, |left| left.min(ZEROES));
            let piece = zeroes.get(..count).unwrap_or_default();
            self.file.write_all_at(piece, offset).map_err(|_| S_IOERR)?;
            let count = u64::try_from(count).map_err(|_| S_IOERR)?;
            (offset, left) = (offset.saturating_add(count), left.saturating_sub(count));
        }
        Ok(())
    }
}

/// Says how a request ended; returns how many bytes were written to it.
fn finish(memory: &Memory, chain: &Chain, outcome: Result<u64, u8>) -> Result<u32, RingError> {
    let writable = chain.writable();
    let (status, written) = match outcome {
        Ok(written) => (S_OK, written),
        Err(status) => (status, 0),
    };
    let last = writable.len().checked_sub(1).and_then(|at| writable.slice(at, 1));
    last.ok_or(RingError::Request(INCOMPLETE))?.write(memory, &[status])?;
    Ok(u32::try_from(written).map_or(u32::MAX, |written| written.saturating_add(1)))
}

/// A range behind the header.
fn range(memory: &Memory, chain: &Chain, index: usize) -> Result<[u8; RANGE], u8> {
    let mut range = [0; RANGE];
    let at = u64::try_from(HEADER + index * RANGE).map_err(|_| S_IOERR)?;
    let bytes = chain.readable().slice(at, 16).ok_or(S_IOERR)?;
    bytes.read(memory, &mut range).map_err(|_| S_IOERR)?;
    Ok(range)
}

impl Device for Transport {
    fn features(&self) -> u64 {
        self.disk.features()
    }

    fn queues(&self) -> u16 {
        self.disk.queues()
    }

    fn config(&self) -> &[u8] {
        self.disk.config()
    }

    fn tracks(&self) -> bool {
        true
    }

    fn process(&mut self, rings: &mut Rings, queue: u16) -> Progress {
        let Some(ring) = rings.get(queue) else { return Progress::Idle };
        let memory: Arc<Memory> = ring.memory();
        let mut progress = Progress::More;
        for _ in 0..TURN {
            let Some(chain) = ring.pop() else {
                progress = Progress::Idle;
                break;
            };
            match self.serve(&memory, &chain) {
                Ok(Served::Done(written)) => ring.done(chain, written),
                Ok(Served::Later(extent)) => self.later.push((chain, extent)),
                Err(error) => ring.fail(error),
            }
        }
        self.catch_up(ring, &memory);
        progress
    }
}
