//! virtio-mem: memory of the guest that comes and goes in blocks.

use std::process::ExitCode;

use bulkhead_control_api::config::Mem;
use bulkhead_jail::topology::MEM;
use bulkhead_kit::serve;
use bulkhead_mem::transport::{Parts, Transport};

fn main() -> ExitCode {
    serve::main(&MEM, |start, config: &Mem, notices| {
        let parts = Parts { memory: start.take("memory")?, state: start.state()?, notices: notices.clone() };
        let device = Transport::new(config, parts).map_err(|errno| format!("eventfd: {errno}"))?;
        Ok((Box::new(device), config.iothread.clone()))
    })
}
