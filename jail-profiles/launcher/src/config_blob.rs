//! A compartment's configuration as a sealed memfd.

use std::fs::File;
use std::io::Write as _;
use std::os::fd::OwnedFd;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use serde::Serialize;

/// Encodes a configuration into a memfd that nobody can change any more.
///
/// # Errors
/// One line.
pub fn seal<T: Serialize>(config: &T) -> Result<OwnedFd, String> {
    let bytes = bulkhead_control_api::encode_config(config)
        .map_err(|_| "the configuration is too long".to_owned())?;
    seal_bytes(c"bulkhead-config", &bytes)
}

/// A sealed memfd with these bytes.
///
/// # Errors
/// One line.
pub fn seal_bytes(name: &std::ffi::CStr, bytes: &[u8]) -> Result<OwnedFd, String> {
    let fail = |e: &dyn std::fmt::Display| format!("cannot make a memfd: {e}");
    let fd = memfd_create(name, MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING).map_err(|e| fail(&e))?;
    let mut file = File::from(fd);
    file.write_all(bytes).map_err(|e| fail(&e))?;
    let seals =
        SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_WRITE | SealFlag::F_SEAL_SEAL;
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals)).map_err(|e| fail(&e))?;
    Ok(file.into())
}
