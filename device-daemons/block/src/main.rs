//! A virtio block device on a file or a block device.

use std::process::ExitCode;

use bulkhead_block::transport::Transport;
use bulkhead_control_api::config::Block;
use bulkhead_jail::error;
use bulkhead_jail::start::{Start, StartError};
use bulkhead_jail::topology::BLOCK;
use bulkhead_kit::device::{Listeners, Notices};
use bulkhead_kit::serve::{Daemon, ServeError};
use nix::errno::Errno;

/// Why the process fails.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("{0}")]
    Start(#[from] StartError),
    #[error("{0}")]
    Serve(#[from] ServeError),
    #[error("{0}: {1}")]
    Disk(String, std::io::Error),
    #[error("eventfd: {0}")]
    Notices(Errno),
}

fn run() -> Result<(), Failure> {
    let mut start = Start::begin(&BLOCK)?;
    let config: Block = start.config()?;
    let listeners = Listeners { vhost: start.take("vhost")?, side: start.take("side")? };
    let disk = start.take(&config.disk)?;
    let device = Transport::new(&config, disk).map_err(|error| Failure::Disk(config.path.clone(), error))?;
    let notices = Notices::new().map_err(Failure::Notices)?;
    let daemon = Daemon::new(Box::new(device), &config.iothread, notices, listeners)?;
    Ok(daemon.run(start)?)
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            error!("{failure}");
            ExitCode::FAILURE
        }
    }
}
