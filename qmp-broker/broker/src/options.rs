//! `query-command-line-options`: the option table, as the starter describes it.

use bulkhead_control_api::config::{OptionGroup, Parameter, ParameterType};
use bulkhead_qapi::Error;
use bulkhead_qapi::types::misc::{CommandLineOptionInfo, CommandLineParameterInfo, CommandLineParameterType};

use crate::commands::{Reply, reply};

/// The groups with their parameters, or the one of that name; in QEMU's order: what was defined last
/// comes first.
///
/// # Errors
/// There is no such group.
pub fn query(groups: &[OptionGroup], name: Option<&str>) -> Reply {
    let chosen = groups.iter().rev().filter(|group| name.is_none_or(|name| group.name == name));
    let infos: Vec<CommandLineOptionInfo> = chosen.map(info).collect();
    match name {
        Some(name) if infos.is_empty() => Err(Error::generic(format!("invalid option name: {name}"))),
        _ => reply(infos),
    }
}

fn info(group: &OptionGroup) -> CommandLineOptionInfo {
    let parameters = group.parameters.iter().rev().map(parameter).collect();
    CommandLineOptionInfo { option: group.name.clone(), parameters }
}

fn parameter(parameter: &Parameter) -> CommandLineParameterInfo {
    let kind = match parameter.kind {
        ParameterType::Text => CommandLineParameterType::String,
        ParameterType::Flag => CommandLineParameterType::Boolean,
        ParameterType::Number => CommandLineParameterType::Number,
        ParameterType::Size => CommandLineParameterType::Size,
    };
    CommandLineParameterInfo {
        name: parameter.name.clone(),
        kind,
        help: Some(parameter.help.clone()),
        default: None,
    }
}
