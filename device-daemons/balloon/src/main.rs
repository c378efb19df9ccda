//! The virtio balloon: gives guest memory back to the host.

use std::process::ExitCode;

use bulkhead_balloon::transport::{Parts, Transport};
use bulkhead_control_api::config::Balloon;
use bulkhead_jail::topology::BALLOON;
use bulkhead_kit::serve;

fn main() -> ExitCode {
    serve::main(&BALLOON, |start, config: &Balloon, notices| {
        let parts = Parts {
            broker: start.take("broker")?,
            opener: start.opener(),
            state: start.state()?,
            notices: notices.clone(),
        };
        let device = Transport::new(config, parts).map_err(|errno| format!("epoll or timer: {errno}"))?;
        Ok((Box::new(device), config.iothread.clone()))
    })
}
