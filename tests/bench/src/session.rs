//! A QMP session that only looks at lines.

use std::io::{BufRead as _, BufReader, IoSlice, Write as _};
use std::os::fd::{AsRawFd as _, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use bulkhead_framework::{Child, Failure, Qmp, Result};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

use crate::host::Host;

const SOON: Duration = Duration::from_secs(20);

/// A session with each side, whose guests halt.
pub struct Both {
    /// With ours.
    pub ours: Session,
    /// With QEMU.
    pub qemu: Session,
    /// What keeps them running.
    pub vms: [Child; 2],
}

impl Both {
    /// Starts both sides.
    ///
    /// # Errors
    /// A guest did not start.
    pub fn start(host: &Host) -> Result<Self> {
        host.needs_kvm()?;
        let (ours, ours_path) = host.with_qmp(host.ours("halt"), "ours")?;
        let (qemu, qemu_path) = host.with_qmp(host.qemu("halt"), "qemu")?;
        ours.stdout().expect("halting", SOON)?;
        qemu.stdout().expect("halting", SOON)?;
        let vms = [ours, qemu];
        Ok(Self { ours: Session::open(&ours_path)?, qemu: Session::open(&qemu_path)?, vms })
    }
}

/// A negotiated session.
pub struct Session {
    stream: UnixStream,
    reader: BufReader<UnixStream>,
    line: String,
}

impl Session {
    /// Waits for the server and connects.
    ///
    /// # Errors
    /// There is none.
    pub fn open(path: &Path) -> Result<Self> {
        // The first session waits for the server and is dropped.
        drop(Qmp::connect(path, SOON)?);
        Self::connect(path)
    }

    /// Connects to a server that listens, however long it takes to answer.
    ///
    /// # Errors
    /// It does not listen, or went away.
    pub fn connect(path: &Path) -> Result<Self> {
        let stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(SOON))?;
        let mut session = Self { reader: BufReader::new(stream.try_clone()?), stream, line: String::new() };
        session.reader.read_line(&mut session.line)?;
        session.ask("qmp_capabilities")?;
        Ok(session)
    }

    /// Runs a command without arguments; returns how long it took.
    ///
    /// # Errors
    /// As [`Self::returned`].
    pub fn ask(&mut self, command: &str) -> Result<Duration> {
        let request = format!("{{\"execute\": \"{command}\"}}\n");
        let start = Instant::now();
        self.stream.write_all(request.as_bytes())?;
        self.returned()?;
        Ok(start.elapsed())
    }

    /// Sends bytes, in one message with a descriptor if there is one.
    ///
    /// # Errors
    /// The server went away or does not read.
    pub fn send(&self, bytes: &[u8], fd: Option<BorrowedFd<'_>>) -> Result<()> {
        let raw: Vec<_> = fd.iter().map(|fd| fd.as_raw_fd()).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let control: &[ControlMessage<'_>] = if raw.is_empty() { &[] } else { &rights };
        let parts = [IoSlice::new(bytes)];
        match sendmsg::<()>(self.stream.as_raw_fd(), &parts, control, MsgFlags::MSG_NOSIGNAL, None) {
            Ok(sent) if sent == bytes.len() => Ok(()),
            other => Err(Failure::new(format!("a request is not taken whole: {other:?}"))),
        }
    }

    /// Reads the next line, which must be the reply of a success.
    ///
    /// # Errors
    /// It is something else.
    pub fn returned(&mut self) -> Result<&str> {
        self.line.clear();
        self.reader.read_line(&mut self.line)?;
        if self.line.starts_with("{\"return\"") {
            Ok(&self.line)
        } else {
            Err(format!("not a success: {:?}", self.line).into())
        }
    }
}
