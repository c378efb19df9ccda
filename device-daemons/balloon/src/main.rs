//! The virtio balloon: gives guest memory back to the host.

use std::process::ExitCode;

use bulkhead_balloon::transport::{Parts, Transport};
use bulkhead_control_api::config::Balloon;
use bulkhead_jail::error;
use bulkhead_jail::start::{Start, StartError};
use bulkhead_jail::topology::BALLOON;
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
    #[error("eventfd, epoll or timer: {0}")]
    Host(#[from] Errno),
}

fn run() -> Result<(), Failure> {
    let mut start = Start::begin(&BALLOON)?;
    let config: Balloon = start.config()?;
    let listeners = Listeners { vhost: start.take("vhost")?, side: start.take("side")? };
    let notices = Notices::new()?;
    let parts = Parts {
        broker: start.take("broker")?,
        opener: start.opener(),
        state: start.state()?,
        notices: notices.clone(),
    };
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
