//! Checks arguments against the schema, with QEMU's errors.

use serde_json::{Map, Value};

use crate::Error;
use crate::schema::{Builtin, Member, Object, Type};

/// Checks the arguments of a command.
///
/// # Errors
/// The first missing, ill-typed or unexpected argument, in that order of precedence per member.
pub fn arguments(object: &Object, given: &Map<String, Value>) -> Result<(), Error> {
    members(object, given, "")
}

/// Full name of a member as QEMU writes it: `outer.inner`.
fn join(path: &str, name: &str) -> String {
    if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") }
}

fn members(object: &Object, given: &Map<String, Value>, path: &str) -> Result<(), Error> {
    let mut known: Vec<&Member> = object.members.iter().collect();
    for member in object.members {
        check_member(member, given, path)?;
    }
    if let Some(union) = &object.union {
        let tag = given.get(union.tag).and_then(Value::as_str);
        let variant = union.variants.iter().find(|(value, _)| Some(*value) == tag);
        for member in variant.map_or(&[][..], |(_, object)| object.members) {
            check_member(member, given, path)?;
            known.push(member);
        }
    }
    match given.keys().find(|name| !known.iter().any(|member| member.name == name.as_str())) {
        Some(name) => Err(Error::generic(format!("Parameter '{}' is unexpected", join(path, name)))),
        None => Ok(()),
    }
}

fn check_member(member: &Member, given: &Map<String, Value>, path: &str) -> Result<(), Error> {
    let name = join(path, member.name);
    match given.get(member.name) {
        Some(value) => check(&member.ty, value, &name),
        None if member.optional => Ok(()),
        None => Err(Error::generic(format!("Parameter '{name}' is missing"))),
    }
}

fn check(ty: &Type, value: &Value, name: &str) -> Result<(), Error> {
    let expected = match (ty, value) {
        (Type::Builtin(Builtin::Any), _)
        | (Type::Builtin(Builtin::Str), Value::String(_))
        | (Type::Builtin(Builtin::Bool), Value::Bool(_))
        | (Type::Builtin(Builtin::Number), Value::Number(_)) => return Ok(()),
        (Type::Builtin(Builtin::Int), Value::Number(number)) if number.is_i64() => return Ok(()),
        (Type::Array(element), Value::Array(items)) => {
            return items
                .iter()
                .enumerate()
                .try_for_each(|(index, item)| check(element, item, &format!("{name}[{index}]")));
        }
        (Type::Object(object), Value::Object(given)) => return members(object, given, name),
        (Type::Recursive(object), Value::Object(given)) => return members(object(), given, name),
        (Type::Enum(values), Value::String(text)) => {
            return if values.values.contains(&text.as_str()) {
                Ok(())
            } else {
                Err(Error::generic(format!("Invalid parameter '{text}'")))
            };
        }
        (Type::Builtin(Builtin::Str) | Type::Enum(_), _) => "string",
        (Type::Builtin(Builtin::Bool), _) => "boolean",
        (Type::Builtin(Builtin::Number), _) => "number",
        (Type::Builtin(Builtin::Int), _) => "integer",
        (Type::Array(_), _) => "array",
        (Type::Object(_) | Type::Recursive(_), _) => "object",
    };
    Err(Error::generic(format!("Invalid parameter type for '{name}', expected: {expected}")))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::schema::{Described, qapi_struct};
    use crate::types::control::QmpCapabilitiesArg;
    use crate::types::machine::CpuInfoFast;

    qapi_struct! {
        /// Every kind of member.
        Sample {
            /// A number.
            "count" count: i64,
            /// A text.
            "text" text: Option<String>,
            /// A flag.
            "flag" flag: Option<bool>,
            /// A double.
            "ratio" ratio: Option<f64>,
            /// A nested list.
            "list" list: Option<Vec<QmpCapabilitiesArg>>,
        }
    }

    fn error(object: &Object, value: Value) -> String {
        let given = value.as_object().cloned().unwrap();
        arguments(object, &given).map_or_else(|error| error.desc, |()| "ok".to_owned())
    }

    #[test]
    fn wording_is_qemus() {
        let cases = [
            (json!({}), "Parameter 'count' is missing"),
            (json!({"x": 1}), "Parameter 'count' is missing"),
            (json!({"count": 1}), "ok"),
            (json!({"count": 1, "x": 1}), "Parameter 'x' is unexpected"),
            (json!({"count": 1.0}), "Invalid parameter type for 'count', expected: integer"),
            (json!({"count": 1u64 << 63}), "Invalid parameter type for 'count', expected: integer"),
            (json!({"count": null}), "Invalid parameter type for 'count', expected: integer"),
            (json!({"count": 1, "text": 1}), "Invalid parameter type for 'text', expected: string"),
            (json!({"count": 1, "flag": 1}), "Invalid parameter type for 'flag', expected: boolean"),
            (json!({"count": 1, "ratio": "1"}), "Invalid parameter type for 'ratio', expected: number"),
            (json!({"count": 1, "ratio": 1}), "ok"),
            (json!({"count": 1, "list": {}}), "Invalid parameter type for 'list', expected: array"),
            (json!({"count": 1, "list": [{}, 1]}), "Invalid parameter type for 'list[1]', expected: object"),
            (
                json!({"count": 1, "list": [{"enable": 1}]}),
                "Invalid parameter type for 'list[0].enable', expected: array",
            ),
            (json!({"count": 1, "list": [{"enable": ["x"]}]}), "Invalid parameter 'x'"),
            (json!({"count": 1, "list": [{"zz": 1}]}), "Parameter 'list[0].zz' is unexpected"),
        ];
        for (given, expected) in cases {
            assert_eq!(error(Sample::DESCRIPTION, given), expected);
        }
    }

    #[test]
    fn a_union_takes_the_members_of_its_variant() {
        let x86 = json!({"cpu-index": 0, "qom-path": "", "thread-id": 1, "arch": "x86", "target": "x86_64"});
        assert_eq!(error(CpuInfoFast::DESCRIPTION, x86.clone()), "ok");
        let mut s390 = x86.clone();
        s390["target"] = "s390x".into();
        assert_eq!(error(CpuInfoFast::DESCRIPTION, s390.clone()), "Parameter 'cpu-state' is missing");
        s390["cpu-state"] = "load".into();
        assert_eq!(error(CpuInfoFast::DESCRIPTION, s390), "ok");
        let mut odd = x86;
        odd["cpu-state"] = "load".into();
        assert_eq!(error(CpuInfoFast::DESCRIPTION, odd), "Parameter 'cpu-state' is unexpected");
    }
}
