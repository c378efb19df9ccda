//! `qemu.qmp` from PyPI, its shell, and a session by hand, against our broker and against QEMU.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use bulkhead_framework::{Failure, Result, target_dir};
use bulkhead_qmp_tests::broker::{Broker, Kind};
use bulkhead_qmp_tests::qemu::Qemu;
use bulkhead_qmp_tests::wire::Wire;

/// The version that is installed; later ones may need a later Python.
const LIBRARY: &str = "qemu.qmp==0.0.3";

fn run(command: &mut Command) -> Result<String> {
    let output = command.output()?;
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    if output.status.success() { Ok(text) } else { Err(Failure::new(format!("{command:?}: {text}"))) }
}

/// A Python that has the library: made once, kept in the target directory.
fn python() -> Result<PathBuf> {
    static PYTHON: OnceLock<std::result::Result<PathBuf, String>> = OnceLock::new();
    let made = PYTHON.get_or_init(|| {
        let venv = target_dir().join("venv");
        let python = venv.join("bin/python");
        let import = || Command::new(&python).args(["-c", "import qemu.qmp"]).output();
        if import().is_ok_and(|output| output.status.success()) {
            return Ok(python);
        }
        run(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&venv))
            .and_then(|_| run(Command::new(&python).args(["-m", "pip", "install", "-q", LIBRARY])))
            .map_err(|failure| failure.to_string())?;
        Ok(python)
    });
    Ok(made.clone()?)
}

fn check(path: &Path) -> Result<()> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("client.py");
    let output = run(Command::new(python()?).arg(script).arg(path))?;
    if output.ends_with("ok\n") { Ok(()) } else { Err(output.into()) }
}

#[test]
fn the_python_library_drives_our_broker() -> Result<()> {
    check(&Broker::start(&[Kind::Server], false)?.path(0))
}

/// What a user types into `qmp-shell`, and what must be among its output.
const TYPED: [(&str, &str); 8] = [
    ("query-status", "\"status\": \"prelaunch\""),
    ("cont", "{\"return\": {}}"),
    ("query-status", "\"status\": \"running\""),
    ("add-fd fdset-id=5", "No file descriptor supplied via SCM_RIGHTS"),
    ("closefd fdname=x", "File descriptor named 'x' not found"),
    ("stop", "{\"return\": {}}"),
    ("query-status", "\"status\": \"paused\""),
    ("no-such-command", "The command no-such-command has not been found"),
];

fn check_shell(path: &Path) -> Result<()> {
    let mut shell = Command::new(python()?.with_file_name("qmp-shell"))
        .arg(path)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut input = shell.stdin.take().ok_or("no standard input")?;
    for (typed, _) in TYPED {
        writeln!(input, "{typed}")?;
    }
    drop(input);
    let output = shell.wait_with_output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let answers: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("(QEMU) ")).collect();
    for (at, (typed, expected)) in TYPED.iter().enumerate() {
        if !answers.get(at).is_some_and(|answer| answer.contains(expected)) {
            return Err(Failure::new(format!("{typed}: no {expected} in {text}")));
        }
    }
    Ok(())
}

#[test]
fn qmp_shell_drives_our_broker() -> Result<()> {
    check_shell(&Broker::start(&[Kind::Server], false)?.path(0))
}

#[test]
fn qmp_shell_drives_qemu() -> Result<()> {
    check_shell(&Qemu::start()?.path())
}

/// What the README types by hand.
fn check_by_hand(path: &Path) -> Result<()> {
    let readme = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../README.md"))?;
    let line = readme.lines().find(|line| line.contains("socat ")).ok_or("the README has no socat")?;
    let mut command = Command::new("/bin/sh");
    command.args(["-c", line]).current_dir(path.parent().ok_or("no directory")?);
    let text = run(&mut command)?;
    let answers: Vec<&str> = text.lines().collect();
    let good = matches!(answers.as_slice(), [greeting, negotiated, status] if greeting.starts_with("{\"QMP\": ")
        && *negotiated == "{\"return\": {}}" && status.contains("\"status\": \"prelaunch\""));
    if good { Ok(()) } else { Err(Failure::new(text)) }
}

#[test]
fn a_session_by_hand_with_our_broker() -> Result<()> {
    let broker = Broker::start(&[Kind::Server], false)?;
    std::os::unix::fs::symlink(broker.path(0), broker.path(0).with_file_name("q.sock"))?;
    check_by_hand(&broker.path(0))
}

#[test]
fn a_session_by_hand_with_qemu() -> Result<()> {
    let qemu = Qemu::start()?;
    // It announces its socket by listening there.
    drop(Wire::connect(&qemu.path())?);
    std::os::unix::fs::symlink(qemu.path(), qemu.path().with_file_name("q.sock"))?;
    check_by_hand(&qemu.path())
}

#[test]
fn the_python_library_drives_qemu() -> Result<()> {
    check(&Qemu::start()?.path())
}
