//! What the units of a VM run: `bulkhead unit opener|check|limits|power-off`.

mod file;
mod generate;
mod life;
mod serve;

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use bulkhead_jail::starter::Starter;
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::Mode;
use nix::unistd::Pid;

use crate::cli::help;
use crate::machine::{self, Plan};
use crate::opener::from_service_manager;
use crate::relay::say;
use file::Machine;
use life::Places;
use serve::Opener;

/// Usage of this command.
pub const USAGE: &str = "\
usage: bulkhead unit check FILE           check a machine file; its name is the VM's
       bulkhead unit limits FILE          give the VM's slice the limits of its machine file (as root)
       bulkhead unit generate DIRECTORY   write what devices add to the units (systemd.generator(7))
       bulkhead unit opener NAME          give the VM's processes their descriptors (started by its unit)
       bulkhead unit power-off PID        press the power button and wait for core's end (ExecStop of core)
";
/// Where machine files are.
const MACHINES: &str = "/etc/bulkhead";
/// The longest name of a user that units can have, in bytes.
const MAX_USER: usize = 31;
/// How long a guest may take to power off.
const POWER_OFF: Duration = Duration::from_secs(60);
/// How often the wait says that it waits.
const PROGRESS: Duration = Duration::from_secs(10);
/// How often it looks.
const GLANCE: Duration = Duration::from_millis(50);

/// Runs `bulkhead unit WORDS`.
///
/// # Errors
/// One line.
pub fn run(words: &[String]) -> Result<u8, String> {
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match words.as_slice() {
        [] | ["help" | "-h" | "-help" | "--help"] => help::print(USAGE),
        ["check", path] => check(path),
        ["limits", path] => limits(path),
        ["generate", directory, ..] => generate::generate(MACHINES.as_ref(), directory.as_ref()).map(|()| 0),
        ["opener", name] => opener(name),
        ["power-off"] => Ok(0),
        ["power-off", pid] => power_off(pid),
        _ => Err("unit: wrong arguments: `bulkhead unit` lists the commands".to_owned()),
    }
}

fn read(name: &str, path: &str) -> Result<Machine, String> {
    let text = std::fs::read_to_string(path).map_err(|e| format!("{path}: {e}"))?;
    file::parse(name, &text).map_err(|e| format!("{path}: {e}"))
}

/// What a machine file plans.
fn plan(name: &str, path: &str) -> Result<Plan, String> {
    let machine = read(name, path)?;
    let plan = machine::plan(&machine.options).map_err(|e| format!("{path}: {e}"))?.without_spare_balloon();
    check_devices(name, &plan).map_err(|e| format!("{path}: {e}"))?;
    Ok(plan)
}

/// Whether units can carry the names of a machine's devices, and its back ends' sockets are where units have them.
fn check_devices(name: &str, plan: &Plan) -> Result<(), String> {
    let daemons = plan.bus.daemons.iter().map(|daemon| daemon.key.as_str());
    let mut users = Vec::new();
    for key in daemons.chain(generate::others(plan)) {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_');
        let user = generate::user(name, key);
        if key.starts_with('#') || !key.chars().all(plain) || user.len() > MAX_USER {
            let most = MAX_USER - generate::user(name, "").len();
            return Err(format!(
                "{key:?} is no id for a device with a daemon in a unit: use a letter and up to {} letters, digits, '-' and '_'",
                most - 1
            ));
        }
        if users.contains(&user) {
            return Err(format!(
                "{key:?} is the id of a device and of a character device: their units need different users"
            ));
        }
        users.push(user);
    }
    match plan.bus.paths.values().find(|path| path.contains('/') || path.is_empty()) {
        None => Ok(()),
        Some(path) => Err(format!(
            "{path}: a back end's socket in a unit is a name without '/', in {}/{name}",
            generate::OTHERS
        )),
    }
}

/// The VM's name: that of its machine file.
fn name_of(path: &str) -> Result<String, String> {
    let file = path.rsplit('/').next().unwrap_or(path);
    let name =
        file.strip_suffix(".toml").ok_or_else(|| format!("{path}: a machine file is named NAME.toml"))?;
    file::check_name(name)?;
    Ok(name.to_owned())
}

fn check(path: &str) -> Result<u8, String> {
    plan(&name_of(path)?, path).map(|_| 0)
}

/// Checks the machine file, then sets the limits until the host's next start.
fn limits(path: &str) -> Result<u8, String> {
    let name = name_of(path)?;
    if !generate::is_current(&name, &plan(&name, path)?, generate::GENERATED.as_ref()) {
        return Err(format!(
            "{path}: its devices have changed: run systemctl daemon-reload, then start the VM"
        ));
    }
    let machine = read(&name, path)?;
    let slice = format!("bulkhead-{name}.slice");
    let mut words = vec!["set-property", "--runtime", &slice];
    words.extend(machine.limits.iter().map(String::as_str));
    systemctl(&words)
}

fn systemctl(words: &[&str]) -> Result<u8, String> {
    let output = Command::new("systemctl").args(words).output();
    let output = output.map_err(|e| format!("systemctl: {e}"))?;
    if output.status.success() {
        return Ok(0);
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let said = said.lines().next().unwrap_or("no word");
    Err(format!("systemctl {}: {said}", words.join(" ")))
}

/// The opener's life.
fn opener(name: &str) -> Result<u8, String> {
    let given = from_service_manager()?;
    let var =
        |name: &str| std::env::var(name).map_err(|_| format!("{name} is not set: this command is for units"));
    let credentials = PathBuf::from(var("CREDENTIALS_DIRECTORY")?);
    let plan = plan(name, &credentials.join("machine").display().to_string());
    let starter = Starter::connect(&var("NOTIFY_SOCKET")?).map_err(|e| format!("NOTIFY_SOCKET: {e}"))?;
    let places = Places {
        state: directory(&var("STATE_DIRECTORY")?)?,
        links: var("RUNTIME_DIRECTORY")?.into(),
        others: generate::OTHERS.into(),
    };
    Opener::new(plan, places, starter, given)?.serve()
}

fn directory(path: &str) -> Result<OwnedFd, String> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    open(path, flags, Mode::empty()).map_err(|e| format!("{path}: {e}"))
}

/// SIGPWR is core's power button. When this returns, the service manager ends what still runs.
fn power_off(pid: &str) -> Result<u8, String> {
    let number =
        pid.parse().ok().filter(|pid| *pid > 1).ok_or_else(|| format!("{pid:?} is no process id"))?;
    let core = Pid::from_raw(number);
    match kill(core, Signal::SIGPWR) {
        Err(Errno::ESRCH) => return Ok(0),
        result => result.map_err(|e| format!("SIGPWR to {pid}: {e}"))?,
    }
    let began = Instant::now();
    let mut said = began;
    while kill(core, None).is_ok() {
        if began.elapsed() > POWER_OFF {
            say("<4>", "bulkhead", "the guest does not power off: it is switched off");
            return Ok(0);
        }
        if said.elapsed() > PROGRESS {
            said = Instant::now();
            let seconds = (began.elapsed().as_secs(), POWER_OFF.as_secs());
            say(
                "<5>",
                "bulkhead",
                &format!("waiting for the guest to power off, {} of {} s", seconds.0, seconds.1),
            );
        }
        std::thread::sleep(GLANCE);
    }
    Ok(0)
}
