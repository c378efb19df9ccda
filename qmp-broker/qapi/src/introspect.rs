//! Builds what `query-qmp-schema` returns from the tables.

use std::collections::{BTreeMap, VecDeque};

use serde_json::{Map, Value, json};

use crate::schema::{Builtin, EMPTY, Enum, Member, Object, Type};
use crate::table::{self, Role};

/// Types that commands and events refer to, with the masked names that they get on the way.
#[derive(Default)]
struct Walk {
    /// Masked name by the type's own name. QEMU masks names too: they are not part of the interface.
    names: BTreeMap<String, String>,
    /// Types that have a name and wait to be described.
    queue: VecDeque<(String, Type)>,
}

impl Walk {
    fn name(&mut self, ty: &Type) -> String {
        if let Type::Recursive(object) = ty {
            return self.name(&Type::Object(object()));
        }
        let (key, masked) = match ty {
            Type::Builtin(builtin) => (builtin_name(*builtin).to_owned(), None),
            Type::Array(element) => {
                let key = format!("[{}]", self.name(element));
                (key.clone(), Some(key))
            }
            Type::Enum(Enum { name, .. }) | Type::Object(Object { name, .. }) => ((*name).to_owned(), None),
            Type::Recursive(object) => (object().name.to_owned(), None),
        };
        if let Some(name) = self.names.get(&key) {
            return name.clone();
        }
        let numbered = self.names.values().filter(|name| name.parse::<u32>().is_ok()).count();
        let name = match ty {
            Type::Builtin(_) => key.clone(),
            _ => masked.unwrap_or_else(|| numbered.to_string()),
        };
        self.names.insert(key, name.clone());
        self.queue.push_back((name.clone(), *ty));
        name
    }

    fn object(&mut self, object: &'static Object) -> Map<String, Value> {
        let members: Vec<Value> = object.members.iter().map(|member| self.member(member)).collect();
        let mut info = map([("members", members.into())]);
        let tagged = object.union.as_ref().and_then(|union| {
            object.members.iter().find(|member| member.name == union.tag).map(|member| (union, member))
        });
        if let Some((union, Member { ty: Type::Enum(tag), .. })) = tagged {
            let mut variants = Vec::with_capacity(tag.values.len());
            for case in tag.values {
                let found = union.variants.iter().find(|(value, _)| value == case);
                let variant = found.map_or(&EMPTY, |(_, variant)| variant);
                variants.push(json!({ "case": case, "type": self.name(&Type::Object(variant)) }));
            }
            info.extend(map([("tag", union.tag.into()), ("variants", variants.into())]));
        }
        info
    }

    fn member(&mut self, member: &'static Member) -> Value {
        let mut info = map([("name", member.name.into()), ("type", self.name(&member.ty).into())]);
        if member.optional {
            info.extend(map([("default", Value::Null)]));
        }
        if !member.features.is_empty() {
            info.extend(map([("features", member.features.into())]));
        }
        info.into()
    }

    fn describe(&mut self, name: &str, ty: &Type) -> Value {
        let (meta, mut info) = match ty {
            Type::Builtin(builtin) => ("builtin", map([("json-type", json_type(*builtin).into())])),
            Type::Enum(values) => ("enum", map([("values", values.values.into())])),
            Type::Array(element) => ("array", map([("element-type", self.name(element).into())])),
            Type::Object(object) => ("object", self.object(object)),
            Type::Recursive(object) => ("object", self.object(object())),
        };
        info.extend(map([("name", name.into()), ("meta-type", meta.into())]));
        info.into()
    }
}

fn map<const N: usize>(members: [(&str, Value); N]) -> Map<String, Value> {
    members.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}

const fn builtin_name(builtin: Builtin) -> &'static str {
    match builtin {
        Builtin::Str => "str",
        Builtin::Number => "number",
        Builtin::Int => "int",
        Builtin::Bool => "bool",
        Builtin::Any => "any",
    }
}

const fn json_type(builtin: Builtin) -> &'static str {
    match builtin {
        Builtin::Str => "string",
        Builtin::Number => "number",
        Builtin::Int => "int",
        Builtin::Bool => "boolean",
        Builtin::Any => "value",
    }
}

/// The schema of the commands and events of a role and of every type that they use.
#[must_use]
pub fn schema(role: Role) -> Value {
    let mut walk = Walk::default();
    let mut entities = Vec::new();
    for command in table::commands(role) {
        let arg_type = walk.name(&Type::Object(command.args));
        let ret_type = walk.name(&command.returns.unwrap_or(Type::Object(&EMPTY)));
        let mut info = map([
            ("name", command.name.into()),
            ("meta-type", "command".into()),
            ("arg-type", arg_type.into()),
            ("ret-type", ret_type.into()),
        ]);
        if command.allow_oob {
            info.extend(map([("allow-oob", true.into())]));
        }
        if command.deprecated {
            info.extend(map([("features", json!(["deprecated"]))]));
        }
        entities.push(info.into());
    }
    for event in table::events(role) {
        let arg_type = walk.name(&Type::Object(event.data));
        entities.push(json!({ "name": event.name, "meta-type": "event", "arg-type": arg_type }));
    }
    while let Some((name, ty)) = walk.queue.pop_front() {
        entities.push(walk.describe(&name, &ty));
    }
    Value::Array(entities)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::schema::Described;
    use crate::types::introspect::SchemaInfo;

    /// Every string under a key that refers to a type.
    fn references<'a>(value: &'a Value, found: &mut BTreeSet<&'a str>) {
        match value {
            Value::Object(members) => {
                for (key, member) in members {
                    if matches!(key.as_str(), "type" | "element-type" | "arg-type" | "ret-type") {
                        found.insert(member.as_str().unwrap());
                    }
                    references(member, found);
                }
            }
            Value::Array(items) => items.iter().for_each(|item| references(item, found)),
            _ => (),
        }
    }

    fn check_types(role: Role) {
        let schema = schema(role);
        let mut defined = BTreeSet::new();
        for entity in schema.as_array().unwrap() {
            assert!(defined.insert((entity["name"].as_str().unwrap(), entity["meta-type"] == "command")));
        }
        let mut used = BTreeSet::new();
        references(&schema, &mut used);
        let is_type = |entity: &&Value| entity["meta-type"] != "command" && entity["meta-type"] != "event";
        let types: BTreeSet<&str> = schema
            .as_array()
            .unwrap()
            .iter()
            .filter(is_type)
            .map(|entity| entity["name"].as_str().unwrap())
            .collect();
        assert_eq!(types, used);
    }

    const ROLES: [Role; 4] = [Role::Any, Role::Monitor, Role::Console, Role::Operator];

    #[test]
    fn every_type_is_defined_once_and_used() {
        ROLES.into_iter().for_each(check_types);
    }

    fn names(role: Role, meta: &str) -> BTreeSet<String> {
        let schema = schema(role);
        let entities = schema.as_array().unwrap().iter().filter(|entity| entity["meta-type"] == meta);
        entities.map(|entity| entity["name"].as_str().unwrap().to_owned()).collect()
    }

    #[test]
    fn a_role_sees_what_it_may_use() {
        let of = |role| names(role, "command");
        let all: BTreeSet<_> = table::COMMANDS.iter().map(|command| command.name.to_owned()).collect();
        assert_eq!(of(Role::Operator), all);
        let is_query = |name: &String| name.starts_with("query-") || name == "qmp_capabilities";
        assert_eq!(of(Role::Monitor), all.into_iter().filter(is_query).collect());
        assert!(of(Role::Console).contains("getfd") && !of(Role::Console).contains("query-status"));
        assert!(of(Role::Any).is_subset(&of(Role::Console)) && of(Role::Any).is_subset(&of(Role::Monitor)));
        assert_eq!(names(Role::Monitor, "event").len(), table::EVENTS.len());
        assert_eq!(names(Role::Console, "event"), BTreeSet::new());
    }

    /// The schema describes itself.
    #[test]
    fn each_entity_has_the_shape_of_schema_info() {
        let Type::Object(info) = SchemaInfo::TYPE else { panic!("not an object") };
        for entity in schema(Role::Operator).as_array().unwrap() {
            assert_eq!(crate::check::arguments(info, entity.as_object().unwrap()), Ok(()), "{entity}");
        }
    }
}
