//! virtio-pmem: a file that the guest has as memory.

use std::process::ExitCode;

use bulkhead_control_api::config::Pmem;
use bulkhead_jail::error;
use bulkhead_jail::start::{Start, StartError};
use bulkhead_jail::topology::PMEM;
use bulkhead_kit::device::{Listeners, Notices};
use bulkhead_kit::serve::{Daemon, ServeError};
use bulkhead_pmem::transport::Transport;
use nix::errno::Errno;

/// Why the process fails.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("{0}")]
    Start(#[from] StartError),
    #[error("{0}")]
    Serve(#[from] ServeError),
    #[error("eventfd: {0}")]
    Host(#[from] Errno),
}

fn run() -> Result<(), Failure> {
    let mut start = Start::begin(&PMEM)?;
    let config: Pmem = start.config()?;
    let listeners = Listeners { vhost: start.take("vhost")?, side: start.take("side")? };
    let notices = Notices::new()?;
    let device = Transport::new(&config, start.take("memory")?, notices.clone())?;
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
