//! A compartment's configuration as a sealed memfd.

use std::os::fd::{AsFd as _, OwnedFd};

use bulkhead_jail::start::read_config;
use serde::{Serialize, de::DeserializeOwned};

use crate::opener;

/// Encodes a configuration into a memfd that nobody can change any more.
///
/// # Errors
/// One line.
pub fn seal<T: Serialize>(config: &T) -> Result<OwnedFd, String> {
    let bytes = bulkhead_control_api::encode_config(config).map_err(|_| {
        "the configuration is too long: shorten -append or give fewer character devices".to_owned()
    })?;
    opener::sealed("bulkhead-config", &bytes).map_err(|e| format!("cannot make a memfd: {e}"))
}

/// Reads a configuration back.
///
/// # Errors
/// One line: it is of another version.
pub fn read<T: DeserializeOwned>(fd: &OwnedFd) -> Result<T, String> {
    read_config(fd.as_fd()).map_err(|e| format!("kept {e}"))
}
