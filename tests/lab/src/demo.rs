//! The demonstration: a VM in its jails, driven over QMP, as far as the host's KVM allows it here and else in L1.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use bulkhead_framework::{Failure, Process, Qmp, Result, Scratch, Vm, VmBuilder, launcher_path, process};
use serde_json::json;

use crate::agent::debian::{APPEND, BOOT, SOON, UP, watch_button};
use crate::{agent, host, paths};

/// Where the demonstration's lines go.
type Say<'a> = &'a dyn Fn(&str) -> Result<()>;

/// A guest that the demonstration can drive.
struct Guest {
    builder: VmBuilder,
    /// Waits for a boot to end and for the guest to mind its power button.
    ready: fn(&mut Vm) -> Result<()>,
}

/// Shows what this host can run, and the rest in L1. True if all went well.
///
/// # Errors
/// Something did not go as it should; the failure has the logs.
pub fn on_host(options: &host::Options) -> Result<bool> {
    let say: Say = &|text| {
        println!("{text}");
        Ok(())
    };
    host::product()?;
    match doctor(say)?.as_str() {
        "full" => {
            say("\n== Debian's unmodified kernel on this host's KVM")?;
            let dir = Scratch::new()?;
            let (kernel, initrd) = host::debian(dir.path())?;
            show(debian(&kernel, &initrd), say)?;
            Ok(true)
        }
        "limited" => {
            say(
                "\n== The native guest on this host's KVM, which emulates kernel mode and cannot run Debian's kernel",
            )?;
            show(native(), say)?;
            say(
                "\n== Debian's unmodified kernel in the lab: on the nested KVM of a Debian system that QEMU emulates",
            )?;
            host::demo(options)
        }
        _ => {
            say(
                "\n== All in the lab, as no VM can run on this host: on the nested KVM of a Debian system that QEMU emulates",
            )?;
            host::demo(options)
        }
    }
}

/// The part inside L1.
///
/// # Errors
/// As [`on_host`].
pub fn in_lab() -> Result<()> {
    let say: Say = &agent::show;
    doctor(say)?;
    show(debian(Path::new(paths::KERNEL), Path::new(paths::INITRD)), say)
}

/// Shows what `bulkhead doctor` says and returns the class of the host.
fn doctor(say: Say) -> Result<String> {
    say("$ bulkhead doctor")?;
    let launcher = launcher_path();
    let output = Command::new(&launcher)
        .arg("doctor")
        .output()
        .map_err(|error| Failure::new(format!("cannot run {}: {error}", launcher.display())))?;
    let text = String::from_utf8_lossy(&output.stdout);
    indented(&text, say)?;
    let class = text.lines().rev().find_map(|line| line.strip_prefix("class: ")?.split_whitespace().next());
    let class = class.ok_or_else(|| {
        Failure::new(format!("doctor names no class: {text}{}", String::from_utf8_lossy(&output.stderr)))
    })?;
    Ok(class.trim_end_matches([':', ',']).to_owned())
}

fn native() -> Guest {
    Guest {
        builder: Vm::builder().args(["-append", "test=powerbutton"]),
        ready: |vm| vm.console().expect("press the button", BOOT),
    }
}

fn debian(kernel: &Path, initrd: &Path) -> Guest {
    Guest {
        builder: Vm::builder().args(["-m", "512M", "-smp", "2"]).kernel(kernel, initrd, APPEND),
        ready: |vm| {
            vm.console().expect(UP, BOOT)?;
            watch_button(vm)
        },
    }
}

/// Drives one guest from boot to power-off.
fn show(guest: Guest, say: Say) -> Result<()> {
    // The log then has the exit record of each loader.
    say(&format!("$ BULKHEAD_LOG=info {}", guest.builder.command_line()))?;
    let start = Instant::now();
    let mut vm = guest.builder.start_with(|command, _| {
        command.env("BULKHEAD_LOG", "info");
        Ok(())
    })?;
    let result = drive(&mut vm, guest.ready, start, say);
    result.map_err(|failure| failure.with_logs(&[vm.console().clone(), vm.stderr().clone()]))
}

fn drive(vm: &mut Vm, ready: fn(&mut Vm) -> Result<()>, start: Instant, say: Say) -> Result<()> {
    let mut qmp = vm.qmp()?;
    ready(vm)?;
    say(&format!("The guest is up after {:.2} s. Its console:", start.elapsed().as_secs_f32()))?;
    let mut shown = console_from(vm, 0, say)?;
    processes(vm, say)?;
    say("A QMP client attaches through the broker:")?;
    indented(&qmp.greeting().to_string(), say)?;
    command(&mut qmp, "query-status", None, say)?;
    command(&mut qmp, "query-cpus-fast", None, say)?;
    command(&mut qmp, "stop", Some("STOP"), say)?;
    command(&mut qmp, "query-status", None, say)?;
    command(&mut qmp, "cont", Some("RESUME"), say)?;
    command(&mut qmp, "system_reset", Some("RESET"), say)?;
    ready(vm)?;
    say("The guest is up again:")?;
    shown = console_from(vm, shown, say)?;
    command(&mut qmp, "system_powerdown", Some("POWERDOWN"), say)?;
    let event = qmp.event("SHUTDOWN", SOON)?;
    indented(&event.to_string(), say)?;
    vm.wait_success(SOON)?;
    console_from(vm, shown, say)?;
    say("The VM has ended with exit status 0. Its one-shot loader ran for each boot:")?;
    for line in vm.stderr().text().lines().filter(|line| line.contains("bulkhead-loader exited")) {
        indented(line, say)?;
    }
    Ok(())
}

/// Runs a command, waits for the event that it brings, and shows both.
fn command(qmp: &mut Qmp, name: &str, event: Option<&str>, say: Say) -> Result<()> {
    qmp.pending_events();
    let began = Instant::now();
    let reply = qmp.execute(name, json!({}))?;
    let took = Duration::as_micros(&began.elapsed());
    indented(&format!("{name}: {reply} ({took} us)"), say)?;
    event.map_or(Ok(()), |event| indented(&qmp.event(event, SOON)?.to_string(), say))
}

/// Shows the console from a byte on and returns where it ends.
fn console_from(vm: &Vm, shown: usize, say: Say) -> Result<usize> {
    let text = vm.console().text();
    indented(text.get(shown..).unwrap_or_default(), say)?;
    Ok(text.len())
}

/// Shows the VM's processes and what confines them.
fn processes(vm: &Vm, say: Say) -> Result<()> {
    let own = process(i32::try_from(std::process::id()).map_err(|_| "a pid beyond i32")?)?;
    let seccomp = |process: &Process| if process.seccomp == 2 { "filter" } else { "-" };
    say("The processes of the VM, with the namespaces that each has of its own:")?;
    indented(
        "    PID    UID NAME             NAMESPACES               CAPABILITIES NO_NEW_PRIVS SECCOMP",
        say,
    )?;
    let all = std::iter::once(process(vm.pid())?).chain(vm.processes()?);
    for process in all {
        let apart: Vec<&str> = process
            .namespaces
            .keys()
            .map(String::as_str)
            .filter(|kind| process.is_apart(&own, kind))
            .collect();
        let apart = if apart.is_empty() { "-".to_owned() } else { apart.join(",") };
        let capabilities = if process.has_capabilities() { "some" } else { "none" };
        let no_new_privs = if process.no_new_privs { "yes" } else { "-" };
        let (pid, uid, name) = (process.pid, process.uid, &process.name);
        let jail = format!("{apart:<24} {capabilities:<12} {no_new_privs:<12} {}", seccomp(&process));
        indented(&format!("{pid:>7} {uid:>6} {name:<16} {jail}"), say)?;
    }
    Ok(())
}

fn indented(text: &str, say: Say) -> Result<()> {
    text.lines()
        .map(str::trim_end)
        .filter(|line| !line.is_empty())
        .try_for_each(|line| say(&format!("    {line}")))
}
