//! A virtio network device on TAP interfaces.

use std::process::ExitCode;

use bulkhead_control_api::config::Net;
use bulkhead_jail::topology::NET;
use bulkhead_kit::serve;
use bulkhead_net::transport::Transport;

fn main() -> ExitCode {
    serve::main(&NET, |start, config: &Net, _| {
        let taps = config.taps.iter().map(|name| start.take(name)).collect::<Result<_, _>>()?;
        let device = Transport::new(config, taps, start.state()?)?;
        Ok((Box::new(device), config.iothread.clone()))
    })
}
