//! Each step of a jail by itself, in a fresh process that times it.

use std::ffi::CStr;
use std::process::Command;
use std::time::Instant;

use bulkhead_framework::{Failure, Result};
use bulkhead_jail::topology;
use landlock::{ABI, Access, AccessFs, AccessNet, Ruleset, RulesetAttr, Scope};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{chdir, pivot_root};

use crate::host::Host;
use crate::report::Samples;

/// First argument of the process that takes a step and prints its nanoseconds.
pub const STEP: &str = "--step";

const ROUNDS: usize = 15;

/// Name and what it stands for.
const STEPS: [(&str, &str); 12] = [
    ("nothing", "fork, exec, exit of a process like ours"),
    ("user", "user namespace"),
    ("mount", "mount namespace"),
    ("pid", "pid namespace"),
    ("net", "network namespace"),
    ("ipc", "ipc namespace"),
    ("uts", "uts namespace"),
    ("all", "all six at once"),
    ("root", "empty root: tmpfs, pivot_root, detach"),
    ("landlock", "Landlock"),
    ("seccomp", "seccomp, core's filter"),
    ("seccomp-loader", "seccomp, the loader's filter"),
];

/// Measures and prints.
///
/// # Errors
/// A step is refused: the figure needs root.
pub fn run(_: &Host) -> Result<()> {
    let own = std::env::current_exe()?;
    let mut samples: [Samples; STEPS.len()] = Default::default();
    for _ in 0..ROUNDS {
        for ((step, _), samples) in STEPS.iter().zip(&mut samples) {
            let start = Instant::now();
            let output = Command::new(&own).args([STEP, step]).output()?;
            let whole = start.elapsed();
            let text = String::from_utf8_lossy(&output.stdout);
            match text.trim().parse::<f64>() {
                Ok(_) if *step == "nothing" => samples.time(whole),
                Ok(nanos) => samples.value(nanos / 1e3),
                Err(_) => {
                    let why = String::from_utf8_lossy(&output.stderr).into_owned();
                    return Err(Failure::new(why).context(format!("{step} (needs root)")));
                }
            }
        }
    }
    for ((_, what), samples) in STEPS.iter().zip(&samples) {
        samples.print(what, "us", 1.0);
    }
    Ok(())
}

/// Takes one step and prints how long it took, in nanoseconds.
///
/// # Errors
/// The kernel refuses it.
pub fn step(name: &str) -> Result<()> {
    let text = |error: &dyn std::fmt::Display| Failure::new(error.to_string());
    let all = ["user", "mount", "pid", "net", "ipc", "uts"];
    if name == "root" {
        unshare(CloneFlags::CLONE_NEWNS).map_err(|e| text(&e))?;
    }
    if name.starts_with("seccomp") || name == "landlock" {
        nix::sys::prctl::set_no_new_privs().map_err(|e| text(&e))?;
    }
    let start = Instant::now();
    match name {
        "nothing" => {}
        "all" => unshare(all.into_iter().map(namespace).collect()).map_err(|e| text(&e))?,
        "root" => empty_root().map_err(|e| text(&e))?,
        "landlock" => landlock().map_err(|e| text(&e))?,
        "seccomp" => seccompiler::apply_filter(topology::CORE.filter).map_err(|e| text(&e))?,
        "seccomp-loader" => seccompiler::apply_filter(topology::LOADER.filter).map_err(|e| text(&e))?,
        one => unshare(namespace(one)).map_err(|e| text(&e))?,
    }
    let nanos = start.elapsed().as_nanos();
    // One write and an end by exit_group, which the filters allow.
    println!("{nanos}");
    std::process::exit(0);
}

fn namespace(name: &str) -> CloneFlags {
    match name {
        "user" => CloneFlags::CLONE_NEWUSER,
        "mount" => CloneFlags::CLONE_NEWNS,
        "pid" => CloneFlags::CLONE_NEWPID,
        "net" => CloneFlags::CLONE_NEWNET,
        "ipc" => CloneFlags::CLONE_NEWIPC,
        "uts" => CloneFlags::CLONE_NEWUTS,
        _ => CloneFlags::empty(),
    }
}

/// As the launcher makes it.
fn empty_root() -> nix::Result<()> {
    let none = None::<&CStr>;
    mount(none, c"/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    let flags = MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some(c"bulkhead"), c"/proc", Some(c"tmpfs"), flags, Some(c"size=4k,nr_inodes=2,mode=0555"))?;
    chdir(c"/proc")?;
    pivot_root(c".", c".")?;
    umount2(c".", MntFlags::MNT_DETACH)
}

/// As every process does it.
fn landlock() -> std::result::Result<(), landlock::RulesetError> {
    Ruleset::default()
        .handle_access(AccessFs::from_all(ABI::V5))?
        .handle_access(AccessNet::from_all(ABI::V4))?
        .scope(Scope::AbstractUnixSocket | Scope::Signal)?
        .create()?
        .restrict_self()
        .map(drop)
}
