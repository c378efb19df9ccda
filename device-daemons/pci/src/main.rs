//! The PCI bus: configuration space, virtio-pci transport, front end of vhost-user back ends.

use std::collections::BTreeMap;
use std::os::unix::net::UnixListener;
use std::process::ExitCode;

use bulkhead_control_api::config::{Pci, PciKind};
use bulkhead_jail::error;
use bulkhead_jail::start::{Start, StartError};
use bulkhead_jail::topology::PCI;
use bulkhead_pci::device::Factory;
use bulkhead_pci::event;
use bulkhead_pci::server::{Parts, Server, ServerError};
use bulkhead_pci::state::State;
use bulkhead_pci::virtio::VirtioPci;

/// Why the process fails.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("{0}")]
    Start(#[from] StartError),
    #[error("{0}")]
    Server(#[from] ServerError),
    #[error("state: {0}")]
    State(std::io::Error),
    #[error("timer: {0}")]
    Timer(nix::errno::Errno),
    #[error("socket {0:?}: {1}")]
    Socket(String, std::io::Error),
}

fn run() -> Result<(), Failure> {
    let mut start = Start::begin(&PCI)?;
    let config: Pci = start.config()?;
    let (state, left) = State::open(start.state()?, config.life).map_err(Failure::State)?;
    let (mut listeners, mut connections) = (BTreeMap::new(), BTreeMap::new());
    for device in &config.devices {
        let PciKind::Virtio(virtio) = &device.kind else { continue };
        let name = virtio.socket.clone();
        match start.take_optional(&name) {
            None => {}
            Some(fd) if virtio.listens => {
                let listener = UnixListener::from(fd);
                listener.set_nonblocking(true).map_err(|error| Failure::Socket(name.clone(), error))?;
                listeners.insert(name, listener);
            }
            Some(fd) => drop(connections.insert(name, fd)),
        }
    }
    let factory: Factory = Box::new(|config, memory| Ok(Box::new(VirtioPci::new(config, memory)?)));
    let parts = Parts {
        core: start.take("core")?,
        broker: start.take_optional("broker"),
        opener: start.opener(),
        devices: config.devices,
        factory,
        listeners,
        connections,
        kept: start.kept(),
        state,
        left,
    };
    event::prepare().map_err(Failure::Timer)?;
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
