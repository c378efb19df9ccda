//! `bulkhead-loader`: takes its descriptors, enters its jail, does one job, exits.

use std::process::ExitCode;

use bulkhead_control_api::config;
use bulkhead_jail::link::LinkError;
use bulkhead_jail::start::{Start, StartError};
use bulkhead_jail::topology;
use bulkhead_loader::job::{Files, serve};

/// Takes the descriptors and enters the jail.
fn begin() -> Result<(Files, config::Loader, std::os::fd::OwnedFd), StartError> {
    let mut start = Start::begin(&topology::LOADER)?;
    let config: config::Loader = start.config()?;
    let tables = config.tables.iter().map(|table| {
        table.files.iter().map(|name| start.take(name).map(Into::into)).collect::<Result<Vec<_>, _>>()
    });
    let tables = tables.collect::<Result<Vec<_>, _>>()?;
    let (kernel, initrd) = (start.take("kernel")?.into(), start.take_optional("initrd").map(Into::into));
    let files = Files { kernel, initrd, tables };
    let core = start.take("core")?;
    start.enter()?;
    Ok((files, config, core))
}

fn main() -> ExitCode {
    let (files, config, core) = match begin() {
        Ok(taken) => taken,
        Err(error) => {
            bulkhead_jail::error!("{error}");
            return ExitCode::FAILURE;
        }
    };
    match serve(&files, &config, core) {
        Ok(()) => ExitCode::SUCCESS,
        Err(LinkError::Closed) => {
            // Core has said why it ends, or the starter will.
            bulkhead_jail::info!("core is gone");
            ExitCode::FAILURE
        }
        Err(error) => {
            bulkhead_jail::error!("link to core: {error}");
            ExitCode::FAILURE
        }
    }
}
