//! A virtio block device on a file or a block device.

use std::process::ExitCode;

use bulkhead_block::transport::Transport;
use bulkhead_control_api::config::Block;
use bulkhead_jail::topology::BLOCK;
use bulkhead_kit::serve;

fn main() -> ExitCode {
    serve::main(&BLOCK, |start, config: &Block, _| {
        let disk = start.take(&config.disk)?;
        let device = Transport::new(config, disk).map_err(|error| format!("{}: {error}", config.path))?;
        Ok((Box::new(device), config.iothread.clone()))
    })
}
