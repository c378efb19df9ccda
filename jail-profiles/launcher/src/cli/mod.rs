//! The command line: QEMU's syntax, from the one table in [`table`].

pub mod devices;
pub mod error;
pub mod help;
pub mod kinds;
pub mod params;
pub mod table;

pub use error::{Error, Problem};
pub use params::Params;
pub use table::{Opt, Spec, Takes};

/// What the user asks the command to do.
#[derive(Debug)]
pub enum Command {
    /// `bulkhead run`: the options in the order in which they were given.
    Run(Vec<Given>),
    /// `bulkhead unit`: what a unit runs.
    Unit(Vec<String>),
    /// `bulkhead doctor`.
    Doctor,
    /// `bulkhead --help`.
    Help,
    /// `bulkhead run -h`.
    RunHelp,
    /// `-device help` and the like: what to print.
    ListHelp(String),
    /// `--version`.
    Version,
}

/// One option as given.
#[derive(Debug)]
pub struct Given {
    /// Option and value as the user wrote them, for messages.
    pub at: String,
    /// Which option.
    pub opt: Opt,
    /// Its value.
    pub value: Value,
}

/// Value of an option.
#[derive(Debug)]
pub enum Value {
    /// It takes none.
    Nothing,
    /// Taken as it is.
    Text(String),
    /// Split into parameters.
    Params(Params),
}

impl Given {
    /// A message about this option.
    pub fn error(&self, problem: Problem) -> Error {
        Error { at: self.at.clone(), problem }
    }
}

/// Parses the arguments behind the program's name.
///
/// # Errors
/// The first argument that is unknown, incomplete or ill-formed.
pub fn parse(args: &[String]) -> Result<Command, Error> {
    let Some((command, rest)) = args.split_first() else {
        return Err(Error::at("command line", Problem::NoCommand));
    };
    let known = match command.as_str() {
        "run" => return parse_run(rest),
        "unit" => return Ok(Command::Unit(rest.to_vec())),
        "doctor" => Command::Doctor,
        "help" | "-h" | "-help" | "--help" => Command::Help,
        "-version" | "--version" => Command::Version,
        other => return Err(Error::at(other, Problem::UnknownCommand)),
    };
    match rest.first() {
        None => Ok(known),
        Some(extra) => Err(Error::at(extra, Problem::UnexpectedArgument)),
    }
}

fn parse_run(args: &[String]) -> Result<Command, Error> {
    let mut given = Vec::new();
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        let Some(name) = arg.strip_prefix('-') else {
            return Err(Error::at(arg, Problem::UnexpectedArgument));
        };
        let spec = table::find(name.strip_prefix('-').unwrap_or(name))
            .ok_or_else(|| Error::at(arg, Problem::InvalidOption))?;
        let option = take(spec, arg, &mut args)?;
        // As in QEMU, a list is printed as soon as it is asked for.
        if let (Takes::Kinds(_), Value::Text(text)) = (spec.takes, &option.value) {
            return Ok(Command::ListHelp(text.clone()));
        }
        given.push(option);
    }
    // As in QEMU, -h and -version win over what else a valid command line asks for.
    for option in &given {
        match option.opt {
            Opt::Help => return Ok(Command::RunHelp),
            Opt::Version => return Ok(Command::Version),
            _ => {}
        }
    }
    Ok(Command::Run(given))
}

fn take<'a>(
    spec: &'static Spec,
    arg: &str,
    args: &mut impl Iterator<Item = &'a String>,
) -> Result<Given, Error> {
    if matches!(spec.takes, Takes::Nothing) {
        return Ok(Given { at: arg.to_owned(), opt: spec.opt, value: Value::Nothing });
    }
    let text = args.next().ok_or_else(|| Error::at(arg, Problem::RequiresArgument))?;
    let at = format!("{arg} {text}");
    let value = match spec.takes {
        Takes::Params(group) | Takes::Unlisted(group) => {
            let parsed = Params::parse(group, text);
            Value::Params(parsed.map_err(|problem| Error { at: at.clone(), problem })?)
        }
        Takes::Kinds(kinds) => match kinds.help(text) {
            Some(help) => Value::Text(help.map_err(|problem| Error { at: at.clone(), problem })?),
            None => {
                let parsed = Params::parse_kinds(kinds, text);
                Value::Params(parsed.map_err(|problem| Error { at: at.clone(), problem })?)
            }
        },
        Takes::Text | Takes::Nothing => Value::Text(text.clone()),
    };
    Ok(Given { at, opt: spec.opt, value })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Vec<String> {
        line.split_whitespace().map(str::to_owned).collect()
    }

    fn error(line: &str) -> String {
        parse(&words(line)).unwrap_err().to_string()
    }

    #[test]
    fn commands() {
        assert!(matches!(parse(&words("doctor")), Ok(Command::Doctor)));
        for help in ["--help", "-h", "-help", "help"] {
            assert!(matches!(parse(&words(help)), Ok(Command::Help)));
        }
        assert!(matches!(parse(&words("--version")), Ok(Command::Version)));
        assert!(matches!(parse(&words("run -S -h")), Ok(Command::RunHelp)));
        assert!(matches!(parse(&words("run --version")), Ok(Command::Version)));
        assert!(matches!(parse(&words("run")), Ok(Command::Run(given)) if given.is_empty()));
    }

    #[test]
    fn both_dashes_and_any_order() {
        let Ok(Command::Run(given)) = parse(&words("run --no-reboot -kernel -x --S")) else {
            panic!("refused");
        };
        let opts: Vec<Opt> = given.iter().map(|g| g.opt).collect();
        assert_eq!(opts, [Opt::NoReboot, Opt::Kernel, Opt::Stopped]);
        assert!(matches!(&given[1].value, Value::Text(text) if text == "-x"));
        assert_eq!(given[1].at, "-kernel -x");
    }

    #[test]
    fn what_is_wrong_is_named() {
        assert_eq!(error(""), "command line: a command is missing: run, doctor, --help or --version");
        assert_eq!(error("frob"), "frob: unknown command: run, doctor, --help and --version exist");
        assert_eq!(error("doctor now"), "now: unexpected argument");
        assert_eq!(error("run disk.img"), "disk.img: unexpected argument");
        assert_eq!(error("run -foo"), "-foo: invalid option");
        assert_eq!(error("run --foo -h"), "--foo: invalid option");
        assert_eq!(error("run -"), "-: invalid option");
        assert_eq!(error("run -m"), "-m: requires an argument");
        assert_eq!(error("run -h -m 1,x=1"), "-m 1,x=1: Invalid parameter 'x'");
    }
}
