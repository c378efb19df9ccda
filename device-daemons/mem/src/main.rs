//! virtio-mem: memory of the guest that comes and goes in blocks.

use std::process::ExitCode;

use bulkhead_control_api::config::Mem;
use bulkhead_jail::error;
use bulkhead_jail::start::{Start, StartError};
use bulkhead_jail::topology::MEM;
use bulkhead_kit::device::{Listeners, Notices};
use bulkhead_kit::serve::{Daemon, ServeError};
use bulkhead_mem::transport::{Parts, Transport};
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
    let mut start = Start::begin(&MEM)?;
    let config: Mem = start.config()?;
    let listeners = Listeners { vhost: start.take("vhost")?, side: start.take("side")? };
    let notices = Notices::new()?;
    let parts = Parts { memory: start.take("memory")?, state: start.state()?, notices: notices.clone() };
    let device = Transport::new(&config, parts)?;
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
