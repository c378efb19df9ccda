//! The broker's life: links, monitors, the start of the machine, the end.

use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Duration;

use bulkhead_control_api::{console, core};
use bulkhead_jail::link::LinkError;
use bulkhead_jail::{info, warn};
use nix::errno::Errno;
use serde::de::DeserializeOwned;
use tokio::io::unix::AsyncFd;
use tokio::task::{JoinHandle, spawn_local};
use tokio::time::{sleep, timeout};

use crate::client::FLUSH;
use crate::fd::accept;
use crate::hub::Hub;
use crate::monitor::{self, Source};
use crate::peer::{Link, Peer};
use crate::{dump, reload};

/// How often the end looks whether all clients have read everything.
const GLANCE: Duration = Duration::from_millis(5);
/// How long a peer may take to say its hello: the starter connects before it starts the process,
/// which on a loaded host takes seconds to get there.
const HELLO: Duration = Duration::from_secs(10);

/// Listeners that peers connect to.
#[derive(Debug)]
pub struct Callers {
    /// For the console.
    pub console: AsyncFd<OwnedFd>,
    /// For pci, in a machine with a bus.
    pub pci: Option<AsyncFd<OwnedFd>>,
    /// For the balloon.
    pub balloon: Option<AsyncFd<OwnedFd>>,
    /// For dumps.
    pub dump: AsyncFd<OwnedFd>,
}

/// What the broker works with, beside its hub.
#[derive(Debug)]
pub struct Sources {
    /// The connection to core.
    pub core: OwnedFd,
    /// Listeners that peers connect to.
    pub callers: Callers,
    /// A word on it asks the starter for a dump process.
    pub job: OwnedFd,
    /// Where another configuration comes from.
    pub opener: Option<AsyncFd<OwnedFd>>,
    /// What clients come from, one for each monitor of the hub.
    pub monitors: Vec<Source>,
}

/// Serves until the VM ends, or core's link does. A link that is closed is most often the VM's end, too: starters find out.
/// Needs a `LocalSet`.
///
/// # Errors
/// The link failed in another way, while core may live.
pub async fn run(hub: Rc<Hub>, sources: Sources) -> Result<(), LinkError> {
    accept_peers(&hub, sources.callers);
    hub.dumps.begin(sources.job);
    let core: JoinHandle<LinkError> = spawn_local(core_loop(Rc::clone(&hub), sources.core));
    // The next one is to know that it is not the first.
    hub.commit().await;
    if let Some(opener) = sources.opener {
        hub.opener.begin(opener);
        spawn_local(reload::follow(Rc::clone(&hub)));
        spawn_local(define_again(Rc::clone(&hub)));
    }
    let monitors = hub.monitors.clone();
    for (monitor, source) in monitors.iter().zip(sources.monitors) {
        monitor::start(&hub, monitor, source);
    }
    let ended = tokio::select! {
        biased;
        // Core has said so, whatever becomes of its link then.
        () = hub.ended.notified() => Ok(()),
        error = core => match error {
            Ok(LinkError::Closed) => Ok(()),
            Ok(error) => Err(error),
            Err(_) => Err(LinkError::Io(Errno::ECANCELED)),
        },
        () = hub.store.watchdog() => Ok(()),
        () = hub.catch_up() => Ok(()),
        () = hub.sweep() => Ok(()),
    };
    let flush = async {
        while !hub.is_flushed() {
            sleep(GLANCE).await;
        }
    };
    let _ = timeout(FLUSH, flush).await;
    ended
}

/// Tells the opener what a predecessor had told it: it may have been started anew, too.
async fn define_again(hub: Rc<Hub>) {
    hub.define_again().await;
}

/// Follows core until its link ends.
async fn core_loop(hub: Rc<Hub>, fd: OwnedFd) -> LinkError {
    let error = match Link::begin(fd).await {
        Ok(link) => {
            let link = Rc::new(link);
            hub.core.attach(Rc::clone(&link));
            spawn_local(begin_machine(Rc::clone(&hub)));
            follow_core(&hub, &link).await
        }
        Err(error) => error,
    };
    // Core has said why it ends, or the starter will.
    if matches!(error, LinkError::Closed) {
        info!("core is gone");
    }
    hub.core.detach();
    error
}

/// Learns the run state, waits for clients that must be there, then starts the machine.
async fn begin_machine(hub: Rc<Hub>) {
    // The answer, or the end of the link, is handled where it arrives.
    let _ = hub.core.ask_patiently(|id| core::Request { id, op: core::Op::Status }).await;
    for monitor in &hub.monitors {
        monitor.wait().await;
    }
    hub.start().await;
}

async fn follow_core(hub: &Hub, link: &Link) -> LinkError {
    loop {
        match link.receive().await {
            Ok(core::FromCore::Event { event, state }) => hub.machine_event(event, state),
            Ok(core::FromCore::Reply { id, result }) => {
                // At once, so that no later event is overwritten.
                if let Ok(core::Answer::Status(state)) = result {
                    hub.set_state(state);
                }
                hub.core.answer(id, result);
            }
            Err(error) => return error,
        }
    }
}

/// Takes a message.
type Take<M> = fn(&Rc<Hub>, M, Option<OwnedFd>) -> Result<(), LinkError>;

/// A peer that connects to the broker, and what its messages do.
struct Caller<M, A> {
    /// What the log calls it.
    name: &'static str,
    /// The peer.
    peer: fn(&Hub) -> &Peer<A>,
    /// It is there.
    attached: fn(&Hub),
    /// Takes a message and the descriptor that came with it; an error ends the link.
    take: Take<M>,
}

/// Accepts a peer, again after each time it is gone.
async fn accept_loop<M: DeserializeOwned, A>(hub: Rc<Hub>, listener: AsyncFd<OwnedFd>, caller: Caller<M, A>) {
    let Caller { name, peer, attached, take } = caller;
    loop {
        let link = match accept(&listener).await {
            Ok(fd) => timeout(HELLO, Link::begin(fd)).await.unwrap_or(Err(LinkError::Io(Errno::ETIMEDOUT))),
            Err(error) => Err(LinkError::Io(error)),
        };
        match link {
            Ok(link) => {
                let link = Rc::new(link);
                peer(&hub).attach(Rc::clone(&link));
                attached(&hub);
                let error = loop {
                    let taken = match link.receive_with().await {
                        Ok((message, fd)) => take(&hub, message, fd),
                        Err(error) => Err(error),
                    };
                    if let Err(error) = taken {
                        break error;
                    }
                };
                peer(&hub).detach();
                info!("link to {name}: {error}");
            }
            // A peer's end is the starter's to explain.
            Err(LinkError::Closed) => info!("{name} is gone"),
            Err(error) => {
                warn!("link to {name}: {error}");
                sleep(GLANCE).await;
            }
        }
    }
}

/// Only pci sends descriptors.
fn without(fd: Option<&OwnedFd>) -> Result<(), LinkError> {
    if fd.is_some() { Err(LinkError::Malformed) } else { Ok(()) }
}

/// Begins to wait for the peers that connect. One without a listener is not of this machine.
fn accept_peers(hub: &Rc<Hub>, callers: Callers) {
    let console = Caller {
        name: "the console",
        peer: |hub| &hub.console,
        attached: |_| {},
        take: |hub, console::Reply { id, answer }, fd| {
            hub.console.answer(id, answer);
            without(fd.as_ref())
        },
    };
    let pci = Caller {
        name: "pci",
        peer: |hub| &hub.pci,
        // It may have died while a device was being added.
        attached: |hub| hub.to_sweep.notify_one(),
        take: Hub::pci_message,
    };
    let balloon = Caller {
        name: "the balloon",
        peer: |hub| &hub.balloon,
        attached: |_| {},
        take: |hub, message, fd| {
            hub.balloon_message(message);
            without(fd.as_ref())
        },
    };
    spawn_local(dump::let_in(Rc::clone(hub), callers.dump));
    hub.console.set_exists();
    spawn_local(accept_loop(Rc::clone(hub), callers.console, console));
    if let Some(listener) = callers.pci {
        hub.pci.set_exists();
        spawn_local(accept_loop(Rc::clone(hub), listener, pci));
    }
    if let Some(listener) = callers.balloon {
        hub.balloon.set_exists();
        spawn_local(accept_loop(Rc::clone(hub), listener, balloon));
    }
}
