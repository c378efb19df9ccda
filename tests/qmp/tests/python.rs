//! `qemu.qmp` from PyPI against our broker and against QEMU.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use bulkhead_framework::{Failure, Result, target_dir};
use bulkhead_qmp_tests::broker::{Broker, Kind};
use bulkhead_qmp_tests::qemu::Qemu;

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

#[test]
fn the_python_library_drives_qemu() -> Result<()> {
    check(&Qemu::start()?.path())
}
