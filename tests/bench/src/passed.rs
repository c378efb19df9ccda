//! Descriptors that a client passes: added to a set of its own, which is then removed.

use std::fs::File;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::time::Instant;

use bulkhead_framework::{Failure, Result};

use crate::host::Host;
use crate::report::{self, Samples};
use crate::session::{Both, Session};

const ROUNDS: usize = 15;
/// Pairs of commands before the other side's turn.
const PAIRS: u32 = 400;
/// Times QEMU's rate.
const GOAL: f64 = 2.0;

/// Measures and prints.
///
/// # Errors
/// A guest did not start, or a command fails.
pub fn run(host: &Host) -> Result<()> {
    let Both { mut ours, mut qemu, vms: _vms } = Both::start(host)?;
    let null = File::open("/dev/null")?;
    compare("each command waits", &mut ours, &mut qemu, |session| in_turn(session, null.as_fd()))?;
    compare("both sent at once", &mut ours, &mut qemu, |session| at_once(session, null.as_fd()))
}

/// Prints the rates of both sides and which of them is higher.
fn compare(
    how: &str,
    ours: &mut Session,
    qemu: &mut Session,
    pair: impl Fn(&mut Session) -> Result<()>,
) -> Result<()> {
    let mut rates: [Samples; 2] = Default::default();
    for _ in 0..ROUNDS {
        for (session, samples) in [&mut *ours, &mut *qemu].into_iter().zip(&mut rates) {
            let start = Instant::now();
            (0..PAIRS).try_for_each(|_| pair(session))?;
            samples.value(f64::from(PAIRS) / start.elapsed().as_secs_f64());
        }
    }
    let [ours, qemu] = &rates;
    ours.print(&format!("add-fd, remove-fd, {how}, ours"), "/s", 1.0);
    qemu.print(&format!("add-fd, remove-fd, {how}, QEMU's"), "/s", 1.0);
    report::at_least("ours / QEMU's", ours.median(), qemu.median(), GOAL);
    Ok(())
}

/// The set that add-fd has made is removed when its number is known.
fn in_turn(session: &mut Session, fd: BorrowedFd<'_>) -> Result<()> {
    session.send(b"{\"execute\": \"add-fd\"}\n", Some(fd))?;
    let reply = session.returned()?;
    let number =
        reply.split("\"fdset-id\": ").nth(1).map(|rest| rest.chars().take_while(char::is_ascii_digit));
    let set: String = number.ok_or_else(|| Failure::new(format!("no fdset-id: {reply:?}")))?.collect();
    let remove = format!("{{\"execute\": \"remove-fd\", \"arguments\": {{\"fdset-id\": {set}}}}}\n");
    session.send(remove.as_bytes(), None)?;
    session.returned().map(drop)
}

/// A client that numbers its sets itself need not wait in between.
fn at_once(session: &mut Session, fd: BorrowedFd<'_>) -> Result<()> {
    session.send(b"{\"execute\": \"add-fd\", \"arguments\": {\"fdset-id\": 7}}\n", Some(fd))?;
    session.send(b"{\"execute\": \"remove-fd\", \"arguments\": {\"fdset-id\": 7}}\n", None)?;
    session.returned()?;
    session.returned().map(drop)
}
