//! Serial port, platform registers and character devices.

use std::process::ExitCode;

use bulkhead_console::kept;
use bulkhead_console::server::{Parts, Server, ServerError};
use bulkhead_console::state::{MAX_CHARDEVS, State};
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
    #[error("configuration: at most {MAX_CHARDEVS} character devices")]
    Chardevs,
}

fn run() -> Result<(), Failure> {
    let mut start = Start::begin(&CONSOLE)?;
    let config: Console = start.config()?;
    if config.chardevs.len() > MAX_CHARDEVS {
        return Err(Failure::Chardevs);
    }
    let serial = match config.serial {
        None => None,
        Some(id) => match config.chardevs.iter().position(|c| c.id == id) {
            None => return Err(Failure::Serial(id)),
            found => found,
        },
    };
    let (mut state, left) =
        State::open(start.state()?, config.life, config.chardevs.len(), serial.is_some())?;
    let chardevs = kept::open::<Failure>(&mut start, &config.chardevs, &mut state, left.is_some())?;
    let (core, broker) = (start.take("core")?, start.take("broker")?);
    let parts = Parts { core, broker, opener: start.opener(), chardevs, serial, state, left };
    let server = Server::new(parts)?;
    let starter = start.enter()?;
    Ok(server.run(starter)?)
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
