//! Boots a Debian system with nested KVM under software emulation and runs test cases there.
//!
//! The same program is the host's side (`host`) and, inside L1, the agent that runs the cases (`agent`).

mod agent;
mod cpio;
mod demo;
mod host;
mod paths;

use std::process::ExitCode;

use bulkhead_framework::{Failure, Result};

const USAGE: &str = "usage: bulkhead-lab COMMAND [--jobs N] [--overlay DIR] [--systemd] [ARGUMENT...]
  list               the cases
  run [CASE...]      run the cases, or those whose name contains one of the words
  figures [WORD...]  measure the Debian guest beside QEMU's in L1; prints samples
  native [ARG...]    run the native tests and core's in L1; arguments go to the test programs
  build              build the product's programs with the release profile
  demo               show a VM on this host's KVM where it can run one, and a Debian guest in L1 where it cannot
  shell COMMAND      run a shell command in L1
  --jobs N           L1s side by side (default: one for each processor, at most 4)
  --overlay DIR      lay a directory tree over L1's root, for example a static strace
  --qemu             put Debian's QEMU into L1
  --systemd          run the shell command in the L1 with systemd";

/// More L1s than this cost more memory than they save time.
const MOST_JOBS: usize = 4;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match command(&args) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(failure) => {
            eprintln!("bulkhead-lab: {failure}");
            ExitCode::FAILURE
        }
    }
}

fn command(args: &[String]) -> Result<bool> {
    let (name, rest) = args.split_first().ok_or(USAGE)?;
    let (options, rest) = options(rest)?;
    match (name.as_str(), rest) {
        ("list", []) => {
            for case in agent::cases::ALL.iter().chain(agent::cases::LONG) {
                println!("{:<28} {}", case.name, case.about);
            }
            Ok(true)
        }
        ("figures", words) => host::figures(words, &host::Options { qemu: true, ..options }),
        ("run", words) => host::run(&agent::cases::matching(words)?, &options),
        ("native", args) => host::native(args, &options),
        ("build", []) => host::product().map(|_| true),
        ("demo", []) => demo::on_host(&options),
        ("shell", words) if !words.is_empty() => host::shell(&words.join(" "), &options),
        ("probe", [name, pids @ ..]) => {
            agent::probe::print(name, pids);
            Ok(true)
        }
        ("vsock", [cid, port]) => agent::vsock::pass(cid, port).map(|()| true),
        ("agent", []) => agent::serve().map(|()| true),
        _ => Err(USAGE.into()),
    }
}

/// Takes the options that stand before the arguments.
fn options(mut args: &[String]) -> Result<(host::Options, &[String])> {
    let jobs = std::thread::available_parallelism().map_or(1, usize::from).min(MOST_JOBS);
    let mut options = host::Options { jobs, overlay: None, kind: host::Kind::Busybox, qemu: false };
    while let [option, rest @ ..] = args {
        if option == "--systemd" {
            options.kind = host::Kind::Systemd;
            args = rest;
            continue;
        }
        if option == "--qemu" {
            options.qemu = true;
            args = rest;
            continue;
        }
        let [value, rest @ ..] = rest else { break };
        match option.as_str() {
            "--jobs" => options.jobs = value.parse().map_err(|_| Failure::new("--jobs takes a number"))?,
            "--overlay" => options.overlay = Some(value.into()),
            _ => break,
        }
        args = rest;
    }
    Ok((options, args))
}
