//! The `bulkhead` command: `run` starts and supervises the processes of a VM, `doctor` looks at the host.

mod cli;
mod config_blob;
mod doctor;
mod guard;
mod jailed;
mod machine;
mod opener;
mod options;
mod relay;
mod rendezvous;
mod spawn;
mod supervise;
mod terminal;
mod unit;

use std::ffi::OsString;
use std::process::ExitCode;

use cli::{Command, Given, help};
use guard::Guard;
use opener::Inherited;
use supervise::Vm;

fn main() -> ExitCode {
    // Before anything is opened: these are the descriptors that `fd=` may name.
    let inherited = Inherited::at_start().unwrap_or_default();
    let args: Result<Vec<String>, _> = std::env::args_os().skip(1).map(OsString::into_string).collect();
    let outcome = match args {
        Ok(args) => execute(&args, inherited),
        Err(arg) => Err(format!("{}: not valid UTF-8", arg.to_string_lossy())),
    };
    ExitCode::from(outcome.unwrap_or_else(|message| {
        eprintln!("bulkhead: {message}");
        1
    }))
}

fn execute(args: &[String], inherited: Inherited) -> Result<u8, String> {
    let text = match cli::parse(args).map_err(|e| e.to_string())? {
        Command::Run(given) => return run(&given, inherited),
        Command::Unit(words) => return unit::run(&words),
        Command::Doctor => return doctor::run(),
        Command::Help => help::USAGE.to_owned(),
        Command::ListHelp(text) => text,
        Command::RunHelp => help::options(),
        Command::Version => help::version(),
    };
    help::print(&text)
}

/// Opens what the command line names, then lets the supervisor run the VM to its end.
fn run(given: &[Given], inherited: Inherited) -> Result<u8, String> {
    let options = options::Options::new(given).map_err(|e| e.to_string())?;
    let plan = machine::plan(&options).map_err(|e| e.to_string())?;
    let guard = Guard::fork()?;
    let mut remember = |note: opener::Note<'_>| guard.note(note);
    match opener::open(&plan.opens, inherited, &mut remember) {
        Ok(fds) => {
            let vm = Vm {
                name: plan.broker.name.clone(),
                core: plan.core,
                loader: plan.loader,
                console: plan.console,
                broker: plan.broker,
                bus: plan.bus,
                fds,
                terminal: plan.terminal,
            };
            Ok(supervise::run(vm, guard))
        }
        Err(error) => {
            guard.finish();
            Err(error.to_string())
        }
    }
}
