//! Help texts, from the option table.

use std::io::{self, Write as _};

use super::kinds::Sort;
use super::table::{Kind, OPTIONS, Param, Spec, Takes};

/// The level of QEMU's command line and QMP that this program speaks.
const QEMU_LEVEL: &str = "5.1.0";
/// Width of a line of `-h`.
const WIDTH: usize = 96;
/// Column of the help text.
const INDENT: usize = 8;

/// `bulkhead --help`.
pub const USAGE: &str = "\
usage: bulkhead run [OPTIONS]    start a VM; `bulkhead run -h` lists the options
       bulkhead unit COMMAND     what the units of a VM under systemd run; `bulkhead unit` lists it
       bulkhead doctor           say what KVM and the jails can do on this host
       bulkhead --help           print this
       bulkhead --version        print the version

`bulkhead run` alone boots a small built-in guest on this terminal.
Manual: docs/bulkhead.1.md
";

/// Prints a text; a reader that has seen enough (`| head`) is no error.
///
/// # Errors
/// One line.
pub fn print(text: &str) -> Result<u8, String> {
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => Err(format!("standard output: {e}")),
        Ok(()) | Err(_) => Ok(0),
    }
}

/// `bulkhead --version`.
pub fn version() -> String {
    format!("bulkhead {} (command line and QMP as QEMU {QEMU_LEVEL})\n", env!("CARGO_PKG_VERSION"))
}

/// `bulkhead run -h`.
pub fn options() -> String {
    let mut text = "usage: bulkhead run [OPTIONS]\n\n".to_owned();
    for spec in OPTIONS {
        for usage in usages(spec) {
            text.push_str(&usage);
            text.push('\n');
        }
        wrap(&mut text, spec.help);
        for (name, help) in params(spec) {
            wrap(&mut text, &format!("{name}: {help}"));
        }
        for sort in sorts(spec) {
            wrap(&mut text, &format!("{} ({}):", sort.group.name, sort.about));
            for param in sort.group.params {
                wrap(&mut text, &format!("{}: {}", typed(param), param.help));
            }
        }
    }
    text
}

/// The OPTIONS section of the manual page.
#[cfg(test)]
pub fn manual() -> String {
    use std::fmt::Write as _;

    let mut text = String::new();
    for spec in OPTIONS {
        let usages: Vec<String> = usages(spec).map(|usage| format!("`{usage}`")).collect();
        let _ = writeln!(text, "{}\n:   {}\n", usages.join("\\\n"), spec.help);
        for (name, help) in params(spec) {
            let _ = writeln!(text, "    - `{name}`: {help}");
        }
        for sort in sorts(spec) {
            let _ = writeln!(text, "    - `{}`: {}", sort.group.name, sort.about);
            for param in sort.group.params {
                let _ = writeln!(text, "        - `{}`: {}", typed(param), param.help);
            }
        }
        if matches!(spec.takes, Takes::Params(_) | Takes::Unlisted(_) | Takes::Kinds(_)) {
            text.push('\n');
        }
    }
    text
}

/// The ways to write an option.
fn usages(spec: &Spec) -> impl Iterator<Item = String> {
    let names: Vec<String> = spec.names.iter().map(|name| format!("-{name}")).collect();
    let names = names.join(", ");
    spec.syntax.split(" | ").map(move |syntax| format!("{names} {syntax}").trim_end().to_owned())
}

/// Names with types, and help, of an option's parameters.
fn params(spec: &Spec) -> impl Iterator<Item = (String, &'static str)> {
    let params = match spec.takes {
        Takes::Params(group) | Takes::Unlisted(group) => group.params,
        Takes::Kinds(kinds) => kinds.common,
        Takes::Nothing | Takes::Text => &[],
    };
    params.iter().map(|param| (typed(param), param.help))
}

/// A parameter's name with its type.
fn typed(param: &Param) -> String {
    let value = match param.kind {
        Kind::Id => "id",
        Kind::Text => "text",
        Kind::Flag => "on|off",
        Kind::Number | Kind::Signed => "number",
        Kind::Size => "size",
    };
    format!("{}={value}", param.name)
}

/// What an option's deciding parameter has to choose from.
fn sorts(spec: &Spec) -> &'static [Sort] {
    match spec.takes {
        Takes::Kinds(kinds) => kinds.groups,
        Takes::Nothing | Takes::Text | Takes::Params(_) | Takes::Unlisted(_) => &[],
    }
}

fn wrap(text: &mut String, paragraph: &str) {
    let mut column = WIDTH;
    for word in paragraph.split_whitespace() {
        if column + 1 + word.len() > WIDTH {
            if !text.ends_with('\n') {
                text.push('\n');
            }
            text.push_str(&" ".repeat(INDENT - 1));
            column = INDENT - 1;
        }
        text.push(' ');
        text.push_str(word);
        column += 1 + word.len();
    }
    text.push('\n');
}

#[cfg(test)]
mod tests {
    use super::*;

    const MANUAL: &str = include_str!("../../../../docs/bulkhead.1.md");

    #[test]
    fn help_names_every_option_in_lines_that_fit() {
        let text = options();
        for spec in OPTIONS {
            assert!(usages(spec).all(|usage| text.contains(&usage)), "{spec:?}");
        }
        assert!(text.lines().filter(|line| line.starts_with(' ')).all(|line| line.len() <= WIDTH));
    }

    /// To bring the page up to date, paste what this test prints.
    #[test]
    fn the_manual_has_the_options_of_the_table() {
        let options = MANUAL.split_once("## OPTIONS\n\n").and_then(|(_, rest)| rest.split_once("\n## "));
        let (options, _) = options.expect("the page has a section OPTIONS and more behind it");
        assert!(options.trim() == manual().trim(), "the section should be:\n{}", manual());
    }

    #[test]
    fn version_names_the_level() {
        assert!(version().starts_with("bulkhead ") && version().contains("QEMU 5.1.0"));
    }
}
