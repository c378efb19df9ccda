//! Prints the product's figures beside their references, which are measured in the same run.
//!
//! Both sides of a comparison take turns, so that whatever else the host does falls on both. A figure
//! that misses its goal is printed as such and is no error; one that cannot be measured is.

mod balloon;
mod bus;
mod disk;
mod dump;
mod host;
mod jail;
mod lab;
mod machine;
mod memory;
mod passed;
mod pci;
mod qmp;
mod report;
mod restart;
mod session;
mod size;
mod start;
mod units;

use std::process::ExitCode;

use bulkhead_framework::Result;

use crate::host::Host;

const USAGE: &str = "usage: bulkhead-bench [FIGURE...]";

/// A figure: its name, what it is, and what measures and prints it.
type Figure = (&'static str, &'static str, fn(&Host) -> Result<()>);

const FIGURES: [Figure; 14] = [
    (
        "start",
        "from exec to the first serial byte of the native guest, the whole VM in its jails",
        start::run,
    ),
    ("jail", "what each step of a jail costs", jail::run),
    (
        "memory",
        "proportional set size of all processes, less guest RAM, and what their jails allow",
        memory::run,
    ),
    ("qmp", "QMP round trip", qmp::run),
    ("passed", "descriptors that a client passes: add-fd, then remove-fd", passed::run),
    ("restart", "from kill -9 of a compartment until the next one serves", restart::run),
    ("bus", "round trip of an access that the console answers", bus::run),
    ("disk", "virtio-blk: random reads of 4 KiB by the native guest, the host's cache warm", disk::run),
    ("pci", "enumeration of a bus with 32 functions by the native guest", pci::run),
    ("balloon", "memory that the native guest gives and takes back", balloon::run),
    ("lab", "network and balloon of Debian's guest in the lab, beside QEMU there", lab::run),
    ("dump", "pmemsave of 1 GiB to a new file", dump::run),
    ("size", "lines of code, and system calls that the jail allows", size::run),
    ("units", "exposure of the systemd units, as systemd-analyze judges it offline", units::run),
];

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let outcome = match args.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        // What the bench starts itself as.
        [jail::STEP, step] => jail::step(step),
        [bus::PONG] => bus::pong(),
        names => figures(names),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("bulkhead-bench: {failure}");
            ExitCode::FAILURE
        }
    }
}

fn figures(names: &[&str]) -> Result<()> {
    if let Some(unknown) = names.iter().find(|name| !FIGURES.iter().any(|(known, ..)| known == *name)) {
        let known: Vec<_> = FIGURES.iter().map(|(name, what, _)| format!("  {name:<8} {what}")).collect();
        return Err(format!("no figure {unknown:?}\n{USAGE}\n{}", known.join("\n")).into());
    }
    let host = Host::look()?;
    println!("{}", host.describe());
    for (name, what, run) in FIGURES {
        if names.is_empty() || names.contains(&name) {
            println!("\n{name}: {what}");
            run(&host).map_err(|failure| failure.context(name))?;
        }
    }
    Ok(())
}
