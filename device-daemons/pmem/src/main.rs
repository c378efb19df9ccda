//! virtio-pmem: a file that the guest has as memory.

use std::process::ExitCode;

use bulkhead_control_api::config::Pmem;
use bulkhead_jail::topology::PMEM;
use bulkhead_kit::serve;
use bulkhead_pmem::transport::Transport;

fn main() -> ExitCode {
    serve::main(&PMEM, |start, config: &Pmem, notices| {
        let device = Transport::new(config, start.take("memory")?, notices.clone());
        let device = device.map_err(|errno| format!("eventfd: {errno}"))?;
        Ok((Box::new(device), config.iothread.clone()))
    })
}
