//! Where an image comes from: a file, read at offsets only (its position is shared between runs).

use std::{fs::File, io, os::unix::fs::FileExt};

use crate::Error;

/// Something with bytes at offsets.
pub trait Source {
    /// Its size in bytes.
    ///
    /// # Errors
    /// [`Error::Read`].
    fn size(&self) -> Result<u64, Error>;

    /// Fills `buffer` from `offset`.
    ///
    /// # Errors
    /// [`Error::Read`], also when the source ends before.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), Error>;
}

impl Source for File {
    fn size(&self) -> Result<u64, Error> {
        let metadata = self.metadata().map_err(Error::Read)?;
        if metadata.is_file() {
            Ok(metadata.len())
        } else {
            Err(Error::Read(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file")))
        }
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), Error> {
        self.read_exact_at(buffer, offset).map_err(Error::Read)
    }
}

impl Source for [u8] {
    fn size(&self) -> Result<u64, Error> {
        Ok(self.len() as u64)
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), Error> {
        let start = usize::try_from(offset).ok();
        let bytes = start.and_then(|start| self.get(start..start.checked_add(buffer.len())?));
        bytes
            .map(|bytes| buffer.copy_from_slice(bytes))
            .ok_or_else(|| Error::Read(io::ErrorKind::UnexpectedEof.into()))
    }
}
