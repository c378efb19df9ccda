//! `bulkhead-dump`: takes its descriptors, enters its jail, writes guest memory to one file, exits.

use std::os::fd::OwnedFd;
use std::process::ExitCode;

use bulkhead_dump::job::{Links, end_with};
use bulkhead_jail::link::LinkError;
use bulkhead_jail::start::{Start, StartError};
use bulkhead_jail::topology;
use nix::errno::Errno;

/// Takes the descriptors and enters the jail.
fn begin() -> Result<(OwnedFd, OwnedFd), StartError> {
    let mut start = Start::begin(&topology::DUMP)?;
    let (core, broker) = (start.take("core")?, start.take("broker")?);
    let errno = |error: std::io::Error| error.raw_os_error().map_or(Errno::EIO, Errno::from_raw);
    end_with(&core, &broker).map_err(|error| StartError::Step("thread", errno(error)))?;
    start.enter()?;
    Ok((core, broker))
}

fn main() -> ExitCode {
    let (core, broker) = match begin() {
        Ok(taken) => taken,
        Err(error) => {
            bulkhead_jail::error!("{error}");
            return ExitCode::FAILURE;
        }
    };
    match Links::new(core, broker).and_then(Links::serve) {
        // The client is gone, or the broker, or the VM.
        Ok(()) | Err(LinkError::Closed) => ExitCode::SUCCESS,
        Err(error) => {
            bulkhead_jail::error!("{error}");
            ExitCode::FAILURE
        }
    }
}
