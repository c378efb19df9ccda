//! The device on its virtqueue: flushes in, what the file system says out. The memory itself is one piece, from the start.

use std::fs::File;
use std::os::fd::{BorrowedFd, OwnedFd};

use bulkhead_control_api::config::Pmem;
use bulkhead_control_api::side::{MemorySizes, Piece};
use bulkhead_jail::{error, warn};
use bulkhead_kit::chain::Chain;
use bulkhead_kit::device::{Device, Notices, Progress};
use bulkhead_kit::pieces::{Outcome, Pieces};
use bulkhead_kit::ring::{Ring, RingError, Rings};
use nix::errno::Errno;

use crate::device::{CONFIG_LEN, REQUEST_LEN, RESPONSE_LEN, config, is_flush, response};

/// The most requests that one write-back answers.
const MAX_CHAINS: usize = 1024;

/// The device with its file.
#[derive(Debug)]
pub struct Transport {
    space: [u8; CONFIG_LEN],
    file: File,
    pieces: Pieces,
    chains: Vec<Chain>,
}

impl Transport {
    /// The device on `memory`, a file of at least its size.
    ///
    /// # Errors
    /// The host's.
    pub fn new(of: &Pmem, memory: OwnedFd, notices: Notices) -> Result<Self, Errno> {
        let file = File::from(memory.try_clone().map_err(|_| Errno::EMFILE)?);
        let pieces = Pieces::new(memory, notices)?;
        pieces.want(0, Some(Piece { addr: of.addr, len: of.size, offset: 0 }));
        pieces.say_sizes(MemorySizes { plugged: of.size, requested: of.size });
        Ok(Self { space: config(of.addr, of.size), file, pieces, chains: Vec::new() })
    }

    /// Takes the requests that are there; true if there may be more.
    fn take(&mut self, ring: &mut Ring) -> bool {
        while self.chains.len() < MAX_CHAINS {
            let Some(chain) = ring.pop() else { return false };
            let (readable, writable) = (chain.readable(), chain.writable());
            let mut request = [0xff; REQUEST_LEN];
            let read = readable.read(&ring.memory(), &mut request);
            match read {
                Ok(REQUEST_LEN) if writable.len() >= RESPONSE_LEN as u64 && is_flush(&request) => {
                    self.chains.push(chain);
                }
                Ok(_) => {
                    ring.fail(RingError::Request("a request that is no flush, or has no room for an answer"));
                    return false;
                }
                Err(error) => {
                    ring.fail(error.into());
                    return false;
                }
            }
        }
        true
    }
}

impl Device for Transport {
    fn features(&self) -> u64 {
        0
    }

    fn queues(&self) -> u16 {
        1
    }

    fn config(&self) -> &[u8] {
        &self.space
    }

    fn process(&mut self, rings: &mut Rings, queue: u16) -> Progress {
        let Some(ring) = rings.get(queue) else { return Progress::Idle };
        let more = self.take(ring);
        if !self.chains.is_empty() {
            // One for all: what the guest wrote before any of them is in the file.
            let done = self.file.sync_all();
            if let Err(error) = &done {
                error!("what the guest flushed is not in the file: {error}");
            }
            for chain in self.chains.drain(..) {
                let written = chain.writable().write(&ring.memory(), &response(done.is_ok()));
                ring.done(chain, u32::try_from(written.unwrap_or(0)).unwrap_or(0));
            }
        }
        if more { Progress::More } else { Progress::Idle }
    }

    fn sources(&self) -> Vec<BorrowedFd<'_>> {
        vec![self.pieces.source()]
    }

    fn ready(&mut self, _rings: &mut Rings, _source: usize) -> u64 {
        self.pieces.seen();
        if let Outcome::Refused(text) = self.pieces.outcome() {
            warn!("the guest does not get the memory: {text}");
        }
        0
    }

    fn pieces(&self) -> Option<Pieces> {
        Some(self.pieces.clone())
    }
}
