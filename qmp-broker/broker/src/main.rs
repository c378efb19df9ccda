//! Terminates QMP: takes its descriptors, enters its jail, serves.

use std::collections::BTreeMap;
use std::os::fd::{AsFd as _, OwnedFd};
use std::process::ExitCode;
use std::rc::Rc;

use bulkhead_broker::descriptors::Descriptors;
use bulkhead_broker::fd::watch;
use bulkhead_broker::held::Held;
use bulkhead_broker::hub::Hub;
use bulkhead_broker::monitor;
use bulkhead_broker::run::{Callers, Sources, run};
use bulkhead_broker::store;
use bulkhead_control_api::config;
use bulkhead_jail::start::Start;
use bulkhead_jail::topology;
use bulkhead_jail::{error, notice};
use bulkhead_qapi::types::misc::AddFdArg;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use tokio::io::unix::AsyncFd;
use tokio::runtime::{Builder, Runtime};
use tokio::task::LocalSet;

fn main() -> ExitCode {
    match begin() {
        Ok((runtime, hub, sources)) => match LocalSet::new().block_on(&runtime, run(hub, sources)) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                error!("link to core: {error}");
                ExitCode::FAILURE
            }
        },
        Err(error) => {
            error!("{error}");
            ExitCode::FAILURE
        }
    }
}

/// Takes the descriptors and enters the jail.
fn begin() -> Result<(Runtime, Rc<Hub>, Sources), Box<dyn std::error::Error>> {
    let mut start = Start::begin(&topology::BROKER)?;
    let config: config::Broker = start.config()?;
    let runtime = Builder::new_current_thread().enable_io().enable_time().build()?;
    let context = runtime.enter();
    let core = start.take("core")?;
    let callers = Callers {
        console: nonblocking(start.take("control-console")?)?,
        pci: start.take_optional("control-pci").map(nonblocking).transpose()?,
        balloon: start.take_optional("control-balloon").map(nonblocking).transpose()?,
        dump: nonblocking(start.take("control-dump")?)?,
    };
    let job = start.take("job")?;
    let opener = start.opener().map(|link| link.as_fd().try_clone_to_owned()).transpose()?;
    let opener = opener.map(|fd| watch(fd).map_err(|(_, error)| error)).transpose()?;
    let open = |monitor| monitor::open(monitor, |name| start.take_optional(name));
    let monitors = config.monitors.iter().map(open).collect::<Result<_, _>>()?;
    let (mut store, index, kept) = store::restore(start.state()?, config.life, start.kept());
    let descriptors = match index {
        None => command_line_sets(&config, &mut start, kept)?,
        Some(index) => {
            let (came, used) = (kept.len(), config.used_fdsets.iter().copied());
            let (all, lost) = Descriptors::restored(index, kept, used);
            notice!("started anew with {came} descriptors of clients, {lost} are lost");
            all
        }
    };
    let room = store::watch_starter(start.starter())?;
    store.set_starter(start.enter()?, room);
    let sources = Sources { core, callers, job, opener, monitors };
    drop(context);
    Ok((runtime, Rc::new(Hub::new(config, descriptors, store)), sources))
}

/// The fd sets of the command line. A starter gives them once: what clients have done to them since lasts.
fn command_line_sets(
    config: &config::Broker,
    start: &mut Start,
    kept: BTreeMap<u64, Held>,
) -> Result<Descriptors, bulkhead_qapi::Error> {
    let member = |member: &config::FdsetMember| {
        let args = AddFdArg { fdset_id: Some(member.set), opaque: member.opaque.clone() };
        Some((args, start.take_optional(&member.fd)?))
    };
    let used = config.used_fdsets.iter().copied();
    Descriptors::of_command_line(config.fdsets.iter().filter_map(member), kept, used)
}

/// A listener must not block when a connection is gone before it is accepted.
fn nonblocking(fd: OwnedFd) -> Result<AsyncFd<OwnedFd>, std::io::Error> {
    let flags = OFlag::from_bits_truncate(fcntl(&fd, FcntlArg::F_GETFL)?);
    fcntl(&fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    watch(fd).map_err(|(_, error)| error)
}
