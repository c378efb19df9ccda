//! QMP round trips.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use bulkhead_framework::{Qmp, Result};

use crate::host::Host;
use crate::report::{self, Samples};

const BLOCKS: usize = 16;
/// Requests before the other side's turn: so many that the first, which finds a server that has been asleep
/// meanwhile, is not all that p99 shows.
const BLOCK: usize = 250;
const SOON: Duration = Duration::from_secs(20);

/// Command, who answers it, and the most that ours may take of QEMU's time.
const COMMANDS: [(&str, &str, f64); 4] = [
    ("query-version", "broker", 0.5),
    ("query-status", "broker", 0.5),
    ("query-cpus-fast", "core", 1.0),
    ("query-chardev", "console", 1.0),
];

/// Measures and prints.
///
/// # Errors
/// A guest did not start, or an answer is none.
pub fn run(host: &Host) -> Result<()> {
    host.needs_kvm()?;
    let (ours, ours_path) = host.with_qmp(host.ours("halt"), "ours")?;
    let (qemu, qemu_path) = host.with_qmp(host.qemu("halt"), "qemu")?;
    ours.stdout().expect("halting", SOON)?;
    qemu.stdout().expect("halting", SOON)?;
    let mut ours = Session::open(&ours_path)?;
    let mut qemu = Session::open(&qemu_path)?;
    for (command, who, most) in COMMANDS {
        let mut times: [Samples; 2] = Default::default();
        for _ in 0..BLOCKS {
            for (session, samples) in [&mut ours, &mut qemu].into_iter().zip(&mut times) {
                for _ in 0..BLOCK {
                    samples.time(session.ask(command)?);
                }
            }
        }
        let [ours, qemu] = &times;
        ours.print(&format!("{command}, ours ({who} answers)"), "us", 1.0);
        qemu.print(&format!("{command}, QEMU's"), "us", 1.0);
        report::ratio("ours / QEMU's, p50", ours.median(), qemu.median(), most);
        report::ratio("ours / QEMU's, p99", ours.percentile(99), qemu.percentile(99), most);
    }
    Ok(())
}

/// A session that only times lines.
struct Session {
    stream: UnixStream,
    reader: BufReader<UnixStream>,
    line: String,
}

impl Session {
    fn open(path: &Path) -> Result<Self> {
        // The first session waits for the server and is dropped.
        drop(Qmp::connect(path, SOON)?);
        let stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(SOON))?;
        let mut session = Self { reader: BufReader::new(stream.try_clone()?), stream, line: String::new() };
        session.reader.read_line(&mut session.line)?;
        session.ask("qmp_capabilities")?;
        Ok(session)
    }

    fn ask(&mut self, command: &str) -> Result<Duration> {
        let request = format!("{{\"execute\": \"{command}\"}}\n");
        self.line.clear();
        let start = Instant::now();
        self.stream.write_all(request.as_bytes())?;
        self.reader.read_line(&mut self.line)?;
        let time = start.elapsed();
        if self.line.starts_with("{\"return\"") {
            Ok(time)
        } else {
            Err(format!("{command}: {}", self.line).into())
        }
    }
}
