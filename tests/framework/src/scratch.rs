//! A directory that a test owns.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use crate::{Failure, Result};

/// A new directory below the system's temporary one; it goes with the value.
pub struct Scratch {
    path: PathBuf,
}

impl Scratch {
    /// Makes the directory. Its path is short: unix socket addresses hold 107 bytes.
    ///
    /// # Errors
    /// The directory cannot be made.
    pub fn new() -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("bulkhead-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir(&path)
            .map_err(|error| Failure::new(format!("cannot create {}: {error}", path.display())))?;
        Ok(Self { path })
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // What cannot be removed stays in the temporary directory; the test's result does not depend on it.
        let _ = std::fs::remove_dir_all(&self.path);
    }
}
