//! Seccomp profiles: TOML with a reason per rule, compiled to BPF by seccompiler.

use std::{collections::BTreeMap, error::Error, fs, path::Path, str::FromStr};

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch,
};
use serde::Deserialize;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    base: Option<String>,
    #[serde(default)]
    allow: Vec<Allow>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Allow {
    syscall: String,
    #[serde(default)]
    args: Vec<Arg>,
    reason: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Arg {
    index: u8,
    mask: Option<u64>,
    value: Option<u64>,
    /// Alternatives: the rule is repeated for each.
    one_of: Option<Vec<u64>>,
    width: Option<u8>,
}

/// A compiled profile.
pub struct Profile {
    /// The filter.
    pub bpf: BpfProgram,
    /// The system calls that it allows at least with some arguments.
    pub syscalls: Vec<String>,
}

fn condition(arg: &Arg, value: u64) -> Result<SeccompCondition, Box<dyn Error>> {
    let width = match arg.width {
        None | Some(32) => SeccompCmpArgLen::Dword,
        Some(64) => SeccompCmpArgLen::Qword,
        Some(other) => return Err(format!("width {other}").into()),
    };
    let operator = arg.mask.map_or(SeccompCmpOp::Eq, SeccompCmpOp::MaskedEq);
    Ok(SeccompCondition::new(arg.index, width, operator, value)?)
}

/// The rules that one entry stands for: the product of its alternatives.
fn expand(entry: &Allow) -> Result<Vec<SeccompRule>, Box<dyn Error>> {
    let mut rules: Vec<Vec<SeccompCondition>> = vec![Vec::new()];
    for arg in &entry.args {
        let values = match (&arg.one_of, arg.value) {
            (Some(values), None) => values.clone(),
            (None, Some(value)) => vec![value],
            _ => return Err(format!("{}: an argument has either value or one_of", entry.syscall).into()),
        };
        let mut next = Vec::new();
        for rule in &rules {
            for value in &values {
                let mut rule = rule.clone();
                rule.push(condition(arg, *value)?);
                next.push(rule);
            }
        }
        rules = next;
    }
    if entry.args.is_empty() {
        return Ok(Vec::new());
    }
    Ok(rules.into_iter().map(SeccompRule::new).collect::<Result<_, _>>()?)
}

fn collect(
    root: &Path,
    name: &str,
    into: &mut BTreeMap<i64, Vec<SeccompRule>>,
) -> Result<(), Box<dyn Error>> {
    let path = root.join("profiles").join(format!("{name}.toml"));
    let text = fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?;
    let file: File = toml::from_str(&text).map_err(|e| format!("{}: {e}", path.display()))?;
    if let Some(base) = &file.base {
        collect(root, base, into)?;
    }
    for entry in &file.allow {
        if entry.reason.trim().is_empty() {
            return Err(format!("{}: {} has no reason", path.display(), entry.syscall).into());
        }
        let number = syscalls::Sysno::from_str(&entry.syscall)
            .map_err(|()| format!("{}: no system call {}", path.display(), entry.syscall))?;
        let rules = expand(entry)?;
        let known = into.contains_key(&i64::from(number.id()));
        let slot = into.entry(i64::from(number.id())).or_default();
        if known && (slot.is_empty() || rules.is_empty()) {
            return Err(format!("{}: {} is already allowed", path.display(), entry.syscall).into());
        }
        slot.extend(rules);
    }
    Ok(())
}

/// Compiles `profiles/<name>.toml` with all its bases.
pub fn compile(root: &Path, name: &str) -> Result<Profile, Box<dyn Error>> {
    let mut rules = BTreeMap::new();
    collect(root, name, &mut rules)?;
    let mut syscalls = Vec::new();
    for number in rules.keys() {
        let number = usize::try_from(*number)?;
        syscalls.push(syscalls::Sysno::new(number).ok_or("unknown number")?.name().to_owned());
    }
    let filter = SeccompFilter::new(rules, SeccompAction::Trap, SeccompAction::Allow, TargetArch::x86_64)?;
    Ok(Profile { bpf: filter.try_into()?, syscalls })
}
