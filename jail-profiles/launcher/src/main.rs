//! The `bulkhead` command: `run` starts and supervises the processes of a VM, `doctor` looks at the host.

mod cli;
mod machine;
mod opener;
mod options;

use std::process::ExitCode;

use cli::{Command, help};

fn main() -> ExitCode {
    // Before anything is opened: these are the descriptors that `fd=` may name.
    let inherited = opener::Inherited::at_start().unwrap_or_default();
    let args: Result<Vec<String>, _> =
        std::env::args_os().skip(1).map(std::ffi::OsString::into_string).collect();
    let outcome = match args {
        Ok(args) => run(&args, inherited),
        Err(arg) => Err(format!("{}: not valid UTF-8", arg.display())),
    };
    outcome.unwrap_or_else(|message| {
        eprintln!("bulkhead: {message}");
        ExitCode::FAILURE
    })
}

fn run(args: &[String], inherited: opener::Inherited) -> Result<ExitCode, String> {
    match cli::parse(args).map_err(|e| e.to_string())? {
        Command::Help => print!("{}", help::USAGE),
        Command::RunHelp => print!("{}", help::options()),
        Command::Version => print!("{}", help::version()),
        Command::Doctor => {}
        Command::Run(given) => {
            let options = options::Options::new(&given).map_err(|e| e.to_string())?;
            let plan = machine::plan(&options).map_err(|e| e.to_string())?;
            let mut opened = opener::open(&plan.opens, inherited, &mut |_| {}).map_err(|e| e.to_string())?;
            opened.remove_created();
        }
    }
    Ok(ExitCode::SUCCESS)
}
