//! A child process whose exit can be waited for with a limit, and which never outlives its owner.

use std::io::Write;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::Pid;

use crate::{Failure, Result, Transcript};

/// How long a child may take to end by itself when it is told to.
const GRACE: Duration = Duration::from_secs(3);

/// Where a test writes what the child reads; dropping it gives the child end of file.
pub type Stdin = std::process::ChildStdin;

/// A running or ended child with its output. On drop it gets SIGTERM and, when that does not help, SIGKILL.
pub struct Child {
    pid: Pid,
    stdin: Option<Stdin>,
    stdout: Transcript,
    stderr: Transcript,
    exit: Arc<Exit>,
}

#[derive(Default)]
struct Exit {
    status: Mutex<Option<std::io::Result<ExitStatus>>>,
    changed: Condvar,
}

impl Child {
    /// Starts `command`; its standard streams become pipes, named for the logs by `stdout` and `stderr`.
    ///
    /// # Errors
    /// The program cannot be started.
    pub fn start(command: &mut Command, stdout: &str, stderr: &str) -> Result<Self> {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command
            .spawn()
            .map_err(|error| Failure::new(format!("cannot start {:?}: {error}", command.get_program())))?;
        let pid = Pid::from_raw(i32::try_from(child.id()).map_err(|_| "a pid beyond i32")?);
        let stdin = child.stdin.take();
        let (Some(out), Some(err)) = (child.stdout.take(), child.stderr.take()) else {
            return Err("the child's output is not a pipe".into());
        };
        let exit = Arc::new(Exit::default());
        let waiter = Arc::clone(&exit);
        std::thread::spawn(move || waiter.follow(pid, child));
        Ok(Self {
            pid,
            stdin,
            stdout: Transcript::of(stdout, out),
            stderr: Transcript::of(stderr, err),
            exit,
        })
    }

    /// The process id.
    pub fn pid(&self) -> i32 {
        self.pid.as_raw()
    }

    /// What the child writes to standard output.
    pub fn stdout(&self) -> &Transcript {
        &self.stdout
    }

    /// What the child writes to standard error.
    pub fn stderr(&self) -> &Transcript {
        &self.stderr
    }

    /// Both output streams, for a failure.
    pub fn logs(&self) -> [Transcript; 2] {
        [self.stdout.clone(), self.stderr.clone()]
    }

    /// Writes to the child's standard input.
    ///
    /// # Errors
    /// The child closed it.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let written = match &mut self.stdin {
            Some(stdin) => stdin.write_all(bytes).and_then(|()| stdin.flush()),
            None => Err(std::io::Error::other("it is closed")),
        };
        written.map_err(|error| Failure::new(format!("standard input: {error}")).with_logs(&self.logs()))
    }

    /// Closes the child's standard input.
    pub fn close_stdin(&mut self) {
        self.stdin = None;
    }

    /// Sends a signal; no effect on a child that has ended.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        // Under the lock the pid is still the child's: it is reaped only with the lock held.
        let status = self.exit.status.lock().unwrap_or_else(PoisonError::into_inner);
        if status.is_some() {
            return Ok(());
        }
        kill(self.pid, signal).map_err(|error| Failure::new(format!("{signal}: {error}")))
    }

    /// True until the child has ended.
    pub fn is_running(&self) -> bool {
        self.exit.status.lock().unwrap_or_else(PoisonError::into_inner).is_none()
    }

    /// Waits for the child's end and for the end of its output.
    ///
    /// # Errors
    /// It runs on after `limit`; the failure carries its output.
    pub fn wait(&self, limit: Duration) -> Result<ExitStatus> {
        let end = Instant::now() + limit;
        let status = self.exit.status.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.exit.changed.wait_timeout_while(status, limit, |status| status.is_none());
        let (status, _) = waited.unwrap_or_else(PoisonError::into_inner);
        let result = match status.as_ref() {
            Some(Ok(status)) => Ok(*status),
            Some(Err(error)) => Err(Failure::new(format!("waiting for the child: {error}"))),
            None => Err(Failure::new(format!("the process still runs after {limit:?}"))),
        };
        drop(status);
        let status = result.map_err(|failure| failure.with_logs(&self.logs()))?;
        for stream in [&self.stdout, &self.stderr] {
            stream.expect_end(end.saturating_duration_since(Instant::now()).max(GRACE))?;
        }
        Ok(status)
    }
}

impl Exit {
    /// Waits for the child and records how it ended.
    fn follow(&self, pid: Pid, mut child: std::process::Child) {
        // Not reaped yet: until the lock is held, signal() may still use the pid.
        let _ = waitid(Id::Pid(pid), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT);
        let mut status = self.status.lock().unwrap_or_else(PoisonError::into_inner);
        *status = Some(child.wait());
        drop(status);
        self.changed.notify_all();
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        self.stdin = None;
        for signal in [Signal::SIGTERM, Signal::SIGKILL] {
            let _ = self.signal(signal);
            let status = self.exit.status.lock().unwrap_or_else(PoisonError::into_inner);
            let waited = self.exit.changed.wait_timeout_while(status, GRACE, |status| status.is_none());
            if waited.unwrap_or_else(PoisonError::into_inner).0.is_some() {
                break;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_secs(10);

    #[test]
    fn reads_writes_and_ends() {
        let mut cat = Child::start(&mut Command::new("cat"), "out", "err").unwrap();
        cat.write(b"hello\n").unwrap();
        cat.stdout().expect("hello", SOON).unwrap();
        assert!(cat.is_running());
        let failure = cat.wait(Duration::from_millis(1)).unwrap_err();
        assert!(failure.to_string().contains("hello"), "{failure}");
        cat.close_stdin();
        assert!(cat.wait(SOON).unwrap().success());
        assert!(!cat.is_running());
    }

    #[test]
    fn a_dropped_child_is_gone() {
        let sleep = Child::start(Command::new("sleep").arg("1000"), "out", "err").unwrap();
        let pid = sleep.pid();
        drop(sleep);
        assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists());
    }
}
