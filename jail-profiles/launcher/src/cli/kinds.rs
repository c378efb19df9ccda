//! Options whose parameters depend on one of them: `-device` on `driver`, `-netdev` on `type`.

use super::error::Problem;
use super::table::{Group, Kind, Param};

/// Such an option.
#[derive(Debug)]
pub struct Kinds {
    /// QEMU's name for the group.
    pub name: &'static str,
    /// The parameter that decides.
    pub key: &'static str,
    /// It may be left out if it comes first.
    pub implied: bool,
    /// Parameters that all have.
    pub common: &'static [Param],
    /// What it decides between, by name.
    pub groups: &'static [Sort],
    /// What is wrong with a name that is none of them.
    pub unknown: fn(String) -> Problem,
    /// What is wrong with a parameter that the chosen one does not have: its name, then the parameter's.
    pub unexpected: fn(&'static str, String) -> Problem,
    /// `query-command-line-options` names the group; QEMU gives it no parameters.
    pub listed: bool,
}

/// One of them.
#[derive(Debug)]
pub struct Sort {
    /// What it is for, in a few words.
    pub about: &'static str,
    /// Its name and own parameters.
    pub group: Group,
}

impl Kinds {
    /// The one of that name.
    pub fn find(&self, name: &str) -> Option<&'static Sort>
    where
        Self: 'static,
    {
        self.groups.iter().find(|sort| sort.group.name == name)
    }

    /// All parameters of one of them.
    pub fn params(&self, sort: &'static Sort) -> impl Iterator<Item = &'static Param> {
        self.common.iter().chain(sort.group.params)
    }

    /// What `-device help` and `-device NAME,help` print; none if the value asks for neither.
    pub fn help(&self, text: &str) -> Option<Result<String, Problem>> {
        if matches!(text, "help" | "?") {
            return Some(Ok(self.groups.iter().map(Sort::line).collect()));
        }
        let name = text.strip_suffix(",help").or_else(|| text.strip_suffix(",?"))?;
        let name = name.strip_prefix(self.key).and_then(|rest| rest.strip_prefix('=')).unwrap_or(name);
        match self.groups.iter().find(|sort| sort.group.name == name) {
            None => Some(Err((self.unknown)(name.to_owned()))),
            Some(sort) => {
                let params = self.common.iter().chain(sort.group.params).map(line_of);
                Some(Ok(format!("{name} options:\n{}", params.collect::<String>())))
            }
        }
    }
}

impl Sort {
    fn line(&self) -> String {
        format!("name \"{}\", desc \"{}\"\n", self.group.name, self.about)
    }
}

fn line_of(param: &Param) -> String {
    let kind = match param.kind {
        Kind::Id | Kind::Text => "str",
        Kind::Flag => "bool",
        Kind::Number | Kind::Signed => "uint",
        Kind::Size => "size",
    };
    format!("  {:<22} - {}\n", format!("{}=<{kind}>", param.name), param.help)
}
