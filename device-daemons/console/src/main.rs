//! Serial port, platform registers and character devices.

use std::process::ExitCode;

use bulkhead_console::chardev::Chardev;
use bulkhead_console::server::{Parts, Server, ServerError};
use bulkhead_control_api::config::Console;
use bulkhead_jail::error;
use bulkhead_jail::start::{Start, StartError};
use bulkhead_jail::topology::CONSOLE;

/// Why the process fails.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("{0}")]
    Start(#[from] StartError),
    #[error("{0}")]
    Server(#[from] ServerError),
    #[error("character devices: {0}")]
    Chardev(#[from] std::io::Error),
    #[error("configuration: the serial port's chardev {0:?} does not exist")]
    Serial(String),
}

fn run() -> Result<(), Failure> {
    let mut start = Start::begin(&CONSOLE)?;
    let config: Console = start.config()?;
    let mut chardevs = Vec::new();
    for chardev in &config.chardevs {
        chardevs.push(Chardev::new(chardev, |name| start.take(name).map_err(Failure::from))?);
    }
    let serial = match config.serial {
        None => None,
        Some(id) => match chardevs.iter().position(|c| c.label() == id) {
            None => return Err(Failure::Serial(id)),
            found => found,
        },
    };
    let (core, broker) = (start.take("core")?, start.take("broker")?);
    let parts = Parts { core, broker, opener: start.opener(), chardevs, serial };
    let server = Server::new(parts)?;
    start.enter()?;
    Ok(server.run()?)
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
