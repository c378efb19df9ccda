//! `memsave` and `pmemsave`: the opener opens the file, the starter starts a process that writes it, and this waits.

use std::cell::RefCell;
use std::os::fd::{AsFd as _, OwnedFd};
use std::rc::Rc;
use std::time::Duration;

use bulkhead_control_api::core;
use bulkhead_control_api::dump::{Failure, FromDump, Job, Space};
use bulkhead_jail::{info, warn};
use bulkhead_qapi::types::misc::{DumpProgressData, MemsaveArg, PmemsaveArg};
use bulkhead_qapi::{Error, table};
use nix::errno::Errno;
use serde_json::json;
use tokio::io::unix::AsyncFd;
use tokio::sync::{Mutex, oneshot};
use tokio::time::{sleep, timeout};

use crate::client::Client;
use crate::commands::Reply;
use crate::fd::accept;
use crate::hub::{Hub, away};
use crate::opener::Failed;
use crate::peer::{Link, NoAnswer};

/// How long one waits for another client's dump.
const TURN: Duration = Duration::from_secs(10);
/// How long a process may take to come, on a loaded host.
const ARRIVAL: Duration = Duration::from_secs(30);
/// How long one that has come may take to say hello.
const HELLO: Duration = Duration::from_secs(10);
/// The pause after an error of the listener.
const PAUSE: Duration = Duration::from_millis(5);

/// The way to dump processes. Any of them does any job, so nobody asks which one has come.
#[derive(Debug, Default)]
pub struct Dumps {
    /// A word on it asks the starter for one.
    trigger: RefCell<Option<OwnedFd>>,
    /// One at a time.
    turn: Mutex<()>,
    /// Who waits for one.
    waiting: RefCell<Option<oneshot::Sender<Link>>>,
}

impl Dumps {
    /// By this the starter is asked.
    pub fn begin(&self, trigger: OwnedFd) {
        *self.trigger.borrow_mut() = Some(trigger);
    }

    /// Asks for a process.
    async fn process(&self) -> Result<Link, NoAnswer> {
        let (sender, receiver) = oneshot::channel();
        *self.waiting.borrow_mut() = Some(sender);
        let asked = match &*self.trigger.borrow() {
            // A socket under the launcher, a FIFO under systemd. Neither waits.
            Some(trigger) => nix::unistd::write(trigger, b"dump"),
            None => Err(Errno::ENOTCONN),
        };
        asked.map_err(|_| NoAnswer::Away)?;
        let came = timeout(ARRIVAL, receiver).await.map_err(|_| NoAnswer::Late(ARRIVAL))?;
        came.map_err(|_| NoAnswer::Away)
    }
}

/// Lets processes in, for ever. One that nobody waits for, or no more, finds its link closed.
pub async fn let_in(hub: Rc<Hub>, listener: AsyncFd<OwnedFd>) {
    loop {
        let begun = match accept(&listener).await {
            Ok(fd) => timeout(HELLO, Link::begin(fd)).await,
            Err(error) => {
                warn!("link to a dump: {error}");
                sleep(PAUSE).await;
                continue;
            }
        };
        let waiting = hub.dumps.waiting.borrow_mut().take();
        match (begun, waiting) {
            (Ok(Ok(link)), Some(waiting)) => drop(waiting.send(link)),
            (Ok(Ok(_)), None) => info!("a dump has come for which nobody waits"),
            // The starter's to explain; another one may come.
            (Ok(Err(_)) | Err(_), waiting) => *hub.dumps.waiting.borrow_mut() = waiting,
        }
    }
}

fn no_cpu() -> Error {
    Error::generic("Parameter 'cpu-index' expects a CPU number")
}

fn not_opened(path: &str, errno: Errno) -> Error {
    Error::generic(format!("Could not open '{path}': {}", errno.desc()))
}

/// What a job's failure is called.
fn failed(failure: Failure, job: Job) -> Error {
    let errno = match failure {
        Failure::Unmapped => {
            let (addr, size) = (job.addr, job.size);
            return Error::generic(format!("Invalid addr 0x{addr:016x}/size {size} specified"));
        }
        Failure::Output(errno) | Failure::Memory(errno) => Errno::from_raw(errno),
    };
    info!("the memory dump has failed: {errno}");
    Error::generic("An IO error has occurred")
}

/// A number of bytes in an event.
fn bytes(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

impl Hub {
    pub(crate) async fn memsave(&self, client: &Client, args: MemsaveArg) -> Reply {
        let answer = self.core.ask(|id| core::Request { id, op: core::Op::Cpus }).await;
        let Ok(core::Answer::Cpus(cpus)) = answer.map_err(|error| away("The machine", error))? else {
            return Err(Error::generic("core answered something else"));
        };
        let cpu = u32::try_from(args.cpu_index.unwrap_or(0)).map_err(|_| no_cpu())?;
        if cpu as usize >= cpus.len() {
            return Err(no_cpu());
        }
        self.dump(client, Space::Virtual(cpu), (args.val, args.size), args.filename).await
    }

    pub(crate) async fn pmemsave(&self, client: &Client, args: PmemsaveArg) -> Reply {
        self.dump(client, Space::Physical, (args.val, args.size), args.filename).await
    }

    /// Saves memory, until it is done or the client is gone.
    async fn dump(&self, client: &Client, space: Space, (val, size): (i64, i64), path: String) -> Reply {
        // With it QEMU overruns its buffer.
        let size = u64::try_from(size)
            .map_err(|_| Error::generic("Parameter 'size' expects a non-negative value"))?;
        let job = Job { space, addr: val.cast_unsigned(), size };
        tokio::select! {
            reply = self.save(job, &path) => reply,
            // What it holds it drops: the end of its link ends the process.
            () = client.gone() => Err(Error::generic("The client is gone")),
        }
    }

    async fn save(&self, job: Job, path: &str) -> Reply {
        let turn = timeout(TURN, self.dumps.turn.lock()).await;
        let _turn = turn.map_err(|_| away("What another client saves", NoAnswer::Late(TURN)))?;
        let output = self.output(path).await?;
        let link = self.dumps.process().await.map_err(|error| away("The dump process", error))?;
        let ended = |error| Error::generic(format!("The dump process has ended: {error}"));
        link.send_with(&job, &[output.as_fd()]).await.map_err(ended)?;
        drop(output);
        loop {
            match link.receive().await.map_err(ended)? {
                FromDump::Ended(Ok(())) => return Ok(json!({})),
                FromDump::Ended(Err(failure)) => return Err(failed(failure, job)),
                FromDump::Progress { done } => {
                    let (filename, saved, size) = (path.to_owned(), bytes(done), bytes(job.size));
                    let data = serde_json::to_value(DumpProgressData { filename, saved, size });
                    self.emit(&table::DUMP_PROGRESS, data.ok());
                }
            }
        }
    }

    /// The file, empty: a member of a set, or what the opener opens.
    async fn output(&self, path: &str) -> Result<OwnedFd, Error> {
        let member = self.descriptors.borrow().output(path);
        if let Some(member) = member {
            return member.map_err(|errno| not_opened(path, errno));
        }
        self.opener.output(path).await.map_err(|failed| match failed {
            Failed::Refused(errno) => not_opened(path, errno),
            Failed::Away => away("The opener", NoAnswer::Away),
        })
    }
}
