//! However a VM ends, one line says why, nothing of it is left, and no other VM notices.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use bulkhead_framework::{Qmp, Result, Scratch, Transcript, launcher_path};
use bulkhead_native_tests::{CLEAN, Enter as _, Guest, Pty, SOON, Setup, Step, Trace, eventually, kill_pid};
use nix::sys::signal::{Signal, kill, killpg};
use nix::sys::termios::LocalFlags;
use nix::unistd::Pid;
use serde_json::json;

/// Compartments whose death is the VM's; the others are started again (`restarts.rs`).
const MORTAL: [&str; 1] = ["core"];

/// A VM with everything that could be left: two sockets, a pid file, a terminal's worth of output.
fn setup() -> Setup {
    Setup::new(
        "test=counter ms=1",
        &["-m", "64M", "-smp", "2", "-pidfile", "pid", "-serial", "unix:s.sock,server=on,wait=off"],
    )
    .with(|vm| vm.without_serial())
}

/// A VM beside, which must not notice anything.
struct Neighbour {
    guest: Guest,
    qmp: Qmp,
}

impl Neighbour {
    fn start() -> Result<Self> {
        let guest = Guest::boot("test=counter ms=1", &[])?;
        let qmp = guest.running()?;
        Ok(Self { guest, qmp })
    }

    /// It still counts and answers.
    fn is_well(&mut self) -> Result<()> {
        let status = self.qmp.status()?;
        self.guest.check(status == "running", &format!("the neighbour is {status}"))?;
        self.guest.console().take_new();
        self.guest.expect("count ")?;
        let said = self.guest.vm().stderr().text();
        self.guest.check(said.is_empty(), &format!("the neighbour says {said}"))
    }
}

#[test]
fn the_launcher_killed_after_any_delay_leaves_nothing() -> Result<()> {
    let mut neighbour = Neighbour::start()?;
    for step in 1..=80_u64 {
        let mut guest = setup().start()?;
        // The delay is what is tested: no event marks the places between.
        std::thread::sleep(Duration::from_micros(500 * step));
        kill_pid(guest.vm().pid())?;
        guest.nothing_left().map_err(|failure| failure.context(format!("after {} us", 500 * step)))?;
    }
    neighbour.is_well()?;
    neighbour.guest.quit()
}

#[test]
fn the_launcher_killed_as_each_process_appears_leaves_nothing() -> Result<()> {
    for name in ["bulkhead-guard", "bulkhead-core", "bulkhead-consol", "bulkhead-broker", "bulkhead-loader"] {
        for round in 0..4 {
            let mut guest = setup().start()?;
            // A loader may have been too quick to be seen.
            let limit = if name == "bulkhead-loader" { Duration::from_millis(100) } else { SOON };
            let seen = guest.trace().wait_for(name, limit);
            if name != "bulkhead-loader" {
                seen?;
            }
            kill_pid(guest.vm().pid())?;
            guest.nothing_left().map_err(|failure| failure.context(format!("{name}, round {round}")))?;
        }
    }
    Ok(())
}

#[test]
fn the_launcher_killed_in_full_run_leaves_nothing() -> Result<()> {
    let mut neighbour = Neighbour::start()?;
    let mut guest = setup().start()?;
    guest.running()?;
    kill_pid(guest.vm().pid())?;
    guest.nothing_left()?;
    neighbour.is_well()?;
    neighbour.guest.quit()
}

#[test]
fn a_killed_process_group_leaves_nothing() -> Result<()> {
    for wait_for_run in [true, false] {
        let mut guest = setup().steps(&[Step::Group]).start()?;
        if wait_for_run {
            guest.running()?;
        } else {
            guest.trace().wait_for("bulkhead-core", SOON)?;
        }
        let group = Pid::from_raw(guest.vm().pid());
        killpg(group, Signal::SIGKILL).map_err(|error| error.to_string())?;
        guest.nothing_left()?;
    }
    Ok(())
}

/// Kills a compartment as soon as it is there, or in full run.
fn loses(name: &str, in_run: bool) -> Result<()> {
    let guest = setup().start()?;
    if in_run {
        guest.running()?;
    }
    guest.kill(name)?;
    guest.ends(1)?;
    guest.said_among(&["bulkhead: ", &format!("bulkhead-{name}"), "killed by SIGKILL: the VM ends"])
}

#[test]
fn a_compartment_killed_in_full_run_ends_its_vm_only() -> Result<()> {
    let mut neighbour = Neighbour::start()?;
    for name in MORTAL {
        loses(name, true).map_err(|failure| failure.context(name))?;
        neighbour.is_well()?;
    }
    neighbour.guest.quit()
}

#[test]
fn a_compartment_killed_at_the_start_ends_its_vm_only() -> Result<()> {
    let mut neighbour = Neighbour::start()?;
    for name in MORTAL {
        for round in 0..5 {
            loses(name, false).map_err(|failure| failure.context(format!("{name}, round {round}")))?;
        }
        neighbour.is_well()?;
    }
    neighbour.guest.quit()
}

#[test]
fn a_compartment_killed_while_held_ends_its_vm() -> Result<()> {
    for name in MORTAL {
        let guest = Guest::boot("test=hello", &["-S"])?;
        guest.check(guest.qmp()?.status()? == "prelaunch", "not held")?;
        guest.kill(name)?;
        guest.ends(1)?;
        let said = guest.said_among(&["bulkhead: ", &format!("bulkhead-{name}"), "killed by SIGKILL"]);
        said.map_err(|failure| failure.context(name))?;
    }
    Ok(())
}

/// A loader killed at the first boot ends the VM; at a reset it is an internal error, which a reset leads out of.
#[test]
fn a_killed_loader_is_named() -> Result<()> {
    let (mut ended, mut caught) = (0, 0);
    for _ in 0..40 {
        let mut guest = Guest::boot("test=hello", &["-m", "64M"])?;
        let loader = eventually("a loader", Duration::from_millis(60), || {
            guest.trace().find("bulkhead-loader").ok_or_else(String::new)
        });
        if let Ok(loader) = loader {
            caught += 1;
            // It may have ended meanwhile.
            let _ = kill_pid(loader.pid);
        }
        let done = eventually("the guest's or the VM's end", SOON, || {
            let running = guest.vm().child().is_running();
            match guest.console().text().contains("done: hello") {
                true => Ok(true),
                false if !running => Ok(false),
                false => Err("neither".to_owned()),
            }
        })?;
        if done {
            guest.quit()?;
        } else {
            guest.ends(1)?;
            guest.said(&["bulkhead-core: loader: it ended"])?;
            ended += 1;
        }
        if ended == 2 {
            return Ok(());
        }
    }
    // On a loaded host it is always too late; then there was nothing to see.
    println!("{caught} loaders were caught, {ended} before their work was done");
    Ok(())
}

#[test]
fn a_loader_killed_at_a_reset_is_an_internal_error() -> Result<()> {
    let guest = Guest::boot("test=hello", &["-m", "64M"])?;
    let mut qmp = guest.running()?;
    let end = Instant::now() + Duration::from_secs(2);
    while qmp.status()? != "internal-error" {
        if Instant::now() > end {
            return guest.quit();
        }
        qmp.execute("system_reset", json!({}))?;
        if let Some(loader) = guest.trace().find("bulkhead-loader") {
            // It may have ended meanwhile.
            let _ = kill_pid(loader.pid);
        }
    }
    qmp.event("STOP", SOON)?;
    let said = guest.trace().find("bulkhead").is_some();
    guest.check(said, "the VM has ended")?;
    qmp.execute("system_reset", json!({}))?;
    qmp.execute("cont", json!({}))?;
    guest.console().take_new();
    guest.expect("done: hello")?;
    guest.quit()
}

#[test]
fn a_killed_guard_is_replaced() -> Result<()> {
    let mut guest = setup().start()?;
    let mut qmp = guest.running()?;
    let first = guest.process("guard")?;
    kill_pid(first.pid)?;
    let second = eventually("another guard", SOON, || {
        guest.trace().find("bulkhead-guard").filter(|found| found.pid != first.pid).ok_or_else(String::new)
    });
    second.map_err(|failure| guest.explain(failure))?;
    guest.check(qmp.status()? == "running", "the VM does not run on")?;
    kill_pid(guest.vm().pid())?;
    guest.nothing_left()?;
    let said = guest.vm().stderr().text();
    guest.check(said.lines().count() == 1 && said.contains("guard"), "no line about the guard")
}

#[test]
fn a_killed_guard_does_not_keep_the_vm_from_ending() -> Result<()> {
    let guest = setup().start()?;
    let mut qmp = guest.running()?;
    guest.kill("guard")?;
    qmp.execute("quit", json!({}))?;
    guest.ends(0)
}

#[test]
fn guard_and_launcher_killed_together_leave_no_process() -> Result<()> {
    for _ in 0..5 {
        let mut guest = setup().leaves("q.sock").leaves("s.sock").leaves("pid").start()?;
        guest.running()?;
        let guard = guest.process("guard")?;
        kill_pid(guard.pid)?;
        kill_pid(guest.vm().pid())?;
        guest.nothing_left()?;
    }
    Ok(())
}

#[test]
fn a_second_signal_means_now() -> Result<()> {
    let mut guest = setup().start()?;
    guest.running()?;
    // Stopped, core cannot follow the first one.
    let core = guest.process("core")?;
    kill(Pid::from_raw(core.pid), Signal::SIGSTOP).map_err(|error| error.to_string())?;
    guest.vm().signal(Signal::SIGTERM)?;
    guest.vm().stderr().expect("terminating on signal", SOON)?;
    guest.vm().signal(Signal::SIGTERM)?;
    guest.vm().wait(SOON)?;
    guest.nothing_left()
}

/// A launcher on a terminal of its own.
struct OnTerminal {
    pty: Pty,
    child: std::process::Child,
    stderr: Transcript,
    trace: Trace,
    _dir: Scratch,
}

fn on_terminal(args: &[&str]) -> Result<OnTerminal> {
    let (pty, dir) = (Pty::open()?, Scratch::new()?);
    let name = format!("terminal-{}", dir.path().display());
    let mut command = Command::new(launcher_path());
    command.current_dir(dir.path()).env("XDG_RUNTIME_DIR", dir.path());
    command.args(["run", "-name", &name, "-append", "test=echo"]).args(args);
    command.stdin(pty.stdio()?).stdout(pty.stdio()?).stderr(Stdio::piped()).enter(&[Step::Terminal]);
    let mut child = command.spawn()?;
    let stderr = child.stderr.take().map(|stream| Transcript::of("stderr", stream));
    let stderr = stderr.unwrap_or_else(|| Transcript::new("stderr"));
    let trace = Trace::new(name, dir.path());
    Ok(OnTerminal { pty, child, stderr, trace, _dir: dir })
}

impl OnTerminal {
    fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).unwrap_or(-1)
    }

    /// Waits until the guest echoes and the terminal is raw.
    fn raw(&self) -> Result<()> {
        let ready = self.pty.screen().expect("ready", SOON);
        ready.map_err(|failure| failure.with_logs(std::slice::from_ref(&self.stderr)))?;
        self.pty.type_in("typed")?;
        self.pty.screen().expect("typed", SOON)?;
        let modes = self.pty.modes()?.local_flags;
        if modes.intersects(LocalFlags::ICANON | LocalFlags::ECHO) {
            return Err(format!("the terminal is not raw: {modes:?}").into());
        }
        Ok(())
    }

    /// Waits for the launcher's end; the modes must be `before`.
    fn restored(mut self, before: &nix::sys::termios::Termios) -> Result<()> {
        eventually("the launcher ends", SOON, || match self.child.try_wait() {
            Ok(Some(_)) => Ok(()),
            other => Err(format!("{other:?}")),
        })?;
        eventually("the terminal's modes", CLEAN, || match self.pty.modes() {
            Ok(modes) if modes == *before => Ok(()),
            other => Err(format!("{other:?}")),
        })?;
        self.trace.nothing_left(&[], CLEAN)
    }
}

impl Drop for OnTerminal {
    fn drop(&mut self) {
        // A test that failed leaves it running; an ended one is no matter.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The terminal is raw while the VM runs and as before after `end`.
fn terminal_after(end: impl FnOnce(&OnTerminal) -> Result<()>) -> Result<()> {
    let vm = on_terminal(&["-serial", "stdio"])?;
    let before = Pty::open()?.modes()?;
    vm.raw()?;
    end(&vm)?;
    vm.restored(&before)
}

#[test]
fn the_terminal_is_restored_after_a_kill() -> Result<()> {
    terminal_after(|vm| kill_pid(vm.pid()))
}

#[test]
fn the_terminal_is_restored_after_a_signal() -> Result<()> {
    terminal_after(|vm| {
        let launcher = Pid::from_raw(vm.pid());
        Ok(kill(launcher, Signal::SIGTERM).map_err(|error| error.to_string())?)
    })
}

#[test]
fn the_terminal_is_restored_after_the_loss_of_a_compartment() -> Result<()> {
    terminal_after(|vm| kill_pid(vm.trace.wait_for("bulkhead-core", SOON)?.pid))
}

#[test]
fn control_c_on_the_terminal_ends_the_vm() -> Result<()> {
    terminal_after(|vm| vm.pty.type_in("\x03"))
}

#[test]
fn control_c_can_be_the_guests() -> Result<()> {
    let vm = on_terminal(&["-chardev", "stdio,id=c,signal=off", "-serial", "chardev:c"])?;
    let before = Pty::open()?.modes()?;
    vm.raw()?;
    vm.pty.type_in("\x03\x1a!")?;
    vm.pty.screen().expect("\x03\x1a!", SOON)?;
    kill_pid(vm.pid())?;
    vm.restored(&before)
}
