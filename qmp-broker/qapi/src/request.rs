//! Requests: their shape, and which command they mean.

use serde_json::{Map, Value};

use crate::json::Item;
use crate::table::Role;
use crate::{Error, check, table};

/// State of a client's session that decides what a request may be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mode {
    /// Negotiation is complete.
    pub negotiated: bool,
    /// Out-of-band execution is enabled.
    pub oob: bool,
}

/// A request whose shape, command and arguments are right.
#[derive(Debug)]
pub struct Call {
    /// The command.
    pub command: &'static table::Command,
    /// Its arguments, checked.
    pub args: Map<String, Value>,
}

/// Why a request is not carried out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// It is wrong.
    Invalid(Error),
    /// The client's role does not have this command. The reply is that to an unknown one.
    Forbidden(&'static str),
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        Self::Invalid(error)
    }
}

impl From<Refusal> for Error {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Invalid(error) => error,
            Refusal::Forbidden(name) => not_found(name),
        }
    }
}

fn not_found(name: &str) -> Error {
    Error::command_not_found(format!("The command {name} has not been found"))
}

/// Whether the item is to overtake the ones before it: it asks for out-of-band execution, allowed
/// or not.
#[must_use]
pub fn is_out_of_band(item: &Item) -> bool {
    match item {
        Item::Value(Value::Object(request)) => {
            request.contains_key("exec-oob") && !request.contains_key("execute")
        }
        _ => false,
    }
}

/// The id to echo in the reply of a client of this role, if there is one, and what to call or why not.
/// In run state `preconfig` few commands may be called.
pub fn resolve(
    item: Item,
    mode: Mode,
    role: Role,
    preconfig: bool,
) -> (Option<Value>, Result<Call, Refusal>) {
    match item {
        Item::Error(desc) => (None, Err(Error::generic(desc).into())),
        Item::Value(Value::Object(mut request)) => {
            let id = request.remove("id");
            (id, call(request, mode, role, preconfig))
        }
        Item::Value(_) => (None, Err(Error::generic("QMP input must be a JSON object").into())),
    }
}

/// Name of the command, and whether it is to be executed out of band.
fn command_name(request: &Map<String, Value>, oob: bool) -> Result<(&str, bool), Error> {
    let expected = |key: &str| matches!(key, "execute" | "arguments") || (oob && key == "exec-oob");
    if let Some(key) = request.keys().find(|key| !expected(key)) {
        return Err(Error::generic(format!("QMP input member '{key}' is unexpected")));
    }
    for key in ["exec-oob", "execute"] {
        if request.get(key).is_some_and(|name| !name.is_string()) {
            return Err(Error::generic(format!("QMP input member '{key}' must be a string")));
        }
    }
    if request.get("arguments").is_some_and(|arguments| !arguments.is_object()) {
        return Err(Error::generic("QMP input member 'arguments' must be an object"));
    }
    let name = |key: &str| request.get(key).and_then(Value::as_str);
    match (name("execute"), name("exec-oob")) {
        (Some(_), Some(_)) => Err(Error::generic("QMP input member 'execute' clashes with 'exec-oob'")),
        (Some(name), None) => Ok((name, false)),
        (None, Some(name)) => Ok((name, true)),
        (None, None) => Err(Error::generic("QMP input lacks member 'execute'")),
    }
}

fn call(mut request: Map<String, Value>, mode: Mode, role: Role, preconfig: bool) -> Result<Call, Refusal> {
    let (name, out_of_band) = command_name(&request, mode.oob)?;
    if !mode.negotiated && name != "qmp_capabilities" {
        let desc = "Expecting capabilities negotiation with 'qmp_capabilities'";
        return Err(Error::command_not_found(desc).into());
    }
    let command = table::command(name).ok_or_else(|| not_found(name))?;
    // Before anything that would tell it from an unknown one.
    if !role.may(command) {
        return Err(Refusal::Forbidden(command.name));
    }
    if out_of_band && !command.allow_oob {
        return Err(Error::generic(format!("The command {name} does not support OOB")).into());
    }
    if preconfig && !command.allow_preconfig {
        let desc = format!("The command '{name}' isn't permitted in 'preconfig' state");
        return Err(Error::generic(desc).into());
    }
    let args = match request.remove("arguments") {
        Some(Value::Object(args)) => args,
        _ => Map::new(),
    };
    if !command.open {
        check::arguments(command.args, &args)?;
    }
    Ok(Call { command, args })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn outcome_of(role: Role, request: Value, negotiated: bool, oob: bool) -> String {
        let (_, result) = resolve(Item::Value(request), Mode { negotiated, oob }, role, false);
        result.map_or_else(|refusal| Error::from(refusal).desc, |call| format!("call {}", call.command.name))
    }

    fn outcome(request: Value, negotiated: bool, oob: bool) -> String {
        outcome_of(Role::Operator, request, negotiated, oob)
    }

    #[test]
    fn a_forbidden_command_is_an_unknown_one() {
        for key in ["execute", "exec-oob"] {
            for arguments in [json!({}), json!({"surplus": 1}), json!(1)] {
                for (negotiated, oob) in [(false, false), (true, false), (true, true)] {
                    let reply = |name: &str| {
                        let request = json!({key: name, "arguments": arguments});
                        outcome_of(Role::Monitor, request, negotiated, oob).replace(name, "X")
                    };
                    assert_eq!(reply("quit"), reply("quite"));
                }
            }
        }
        let quit = json!({"execute": "quit"});
        assert_eq!(outcome_of(Role::Console, quit, true, false), "The command quit has not been found");
    }

    #[test]
    fn shape_comes_before_negotiation() {
        let expecting = "Expecting capabilities negotiation with 'qmp_capabilities'";
        assert_eq!(outcome(json!({"execute": "query-name"}), false, false), expecting);
        assert_eq!(outcome(json!({"id": 1}), false, false), "QMP input lacks member 'execute'");
        assert_eq!(outcome(json!(1), false, false), "QMP input must be a JSON object");
        assert_eq!(outcome(json!({"execute": "qmp_capabilities"}), false, false), "call qmp_capabilities");
    }

    #[test]
    fn out_of_band_needs_the_capability() {
        let request = json!({"exec-oob": "query-name"});
        assert!(is_out_of_band(&Item::Value(request.clone())));
        assert!(!is_out_of_band(&Item::Value(json!({"exec-oob": "x", "execute": "x"}))));
        assert_eq!(outcome(request.clone(), true, false), "QMP input member 'exec-oob' is unexpected");
        assert_eq!(outcome(request, true, true), "The command query-name does not support OOB");
    }

    #[test]
    fn ids_survive_errors() {
        for id in [json!(null), json!([1, {"a": 2}]), json!("x"), json!(1.5)] {
            let (echoed, result) = resolve(Item::Value(json!({"id": id})), Mode::default(), Role::Any, false);
            assert_eq!((echoed, result.is_err()), (Some(id), true));
        }
    }
}
