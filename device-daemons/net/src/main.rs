//! A virtio network device on TAP interfaces.

use std::process::ExitCode;

use bulkhead_control_api::config::Net;
use bulkhead_jail::error;
use bulkhead_jail::start::{Start, StartError};
use bulkhead_jail::topology::NET;
use bulkhead_kit::device::{Listeners, Notices};
use bulkhead_kit::serve::{Daemon, ServeError};
use bulkhead_net::transport::{NetError, Transport};
use nix::errno::Errno;

/// Why the process fails.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("{0}")]
    Start(#[from] StartError),
    #[error("{0}")]
    Serve(#[from] ServeError),
    #[error("{0}")]
    Net(#[from] NetError),
    #[error("eventfd: {0}")]
    Notices(Errno),
}

fn run() -> Result<(), Failure> {
    let mut start = Start::begin(&NET)?;
    let config: Net = start.config()?;
    let listeners = Listeners { vhost: start.take("vhost")?, side: start.take("side")? };
    let taps = config.taps.iter().map(|name| start.take(name)).collect::<Result<_, _>>()?;
    let device = Transport::new(&config, taps, start.state()?)?;
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
