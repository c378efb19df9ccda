//! `qapi/introspect.json`: the shape of what `query-qmp-schema` returns.

use serde_json::Value;

use crate::schema::{Described, qapi_enum, qapi_struct};

qapi_enum! {
    /// Kind of an entity.
    SchemaMetaType {
        /// A built-in type.
        "builtin" Builtin,
        /// An enumeration.
        "enum" Enum,
        /// An array.
        "array" Array,
        /// A struct or union.
        "object" Object,
        /// An alternate.
        "alternate" Alternate,
        /// A command.
        "command" Command,
        /// An event.
        "event" Event,
    }
}

qapi_enum! {
    /// JSON type of a built-in type.
    JSONType {
        /// Text.
        "string" String,
        /// A number.
        "number" Number,
        /// A number without a fraction.
        "int" Int,
        /// A boolean.
        "boolean" Boolean,
        /// Null.
        "null" Null,
        /// An object.
        "object" Object,
        /// An array.
        "array" Array,
        /// Anything.
        "value" Value,
    }
}

qapi_struct! {
    /// A built-in type.
    SchemaInfoBuiltin {
        /// Its JSON type.
        "json-type" json_type: JSONType,
    }
}

qapi_struct! {
    /// An enumeration.
    SchemaInfoEnum {
        /// Its values.
        "values" values: Vec<String>,
    }
}

qapi_struct! {
    /// An array.
    SchemaInfoArray {
        /// Type of its elements.
        "element-type" element_type: String,
    }
}

qapi_struct! {
    /// A member of an object type.
    SchemaInfoObjectMember {
        /// Its name.
        "name" name: String,
        /// Its type.
        "type" ty: String,
        /// Present if it may be left out; null means without a known default.
        "default" default: Option<Value>,
        /// Its features.
        "features" features: Option<Vec<String>>,
    }
}

qapi_struct! {
    /// A variant of an object type.
    SchemaInfoObjectVariant {
        /// Value of the tag.
        "case" case: String,
        /// Type with the members that it adds.
        "type" ty: String,
    }
}

qapi_struct! {
    /// A struct or union.
    SchemaInfoObject {
        /// Its members.
        "members" members: Vec<SchemaInfoObjectMember>,
        /// The tag of a union.
        "tag" tag: Option<String>,
        /// The variants of a union.
        "variants" variants: Option<Vec<SchemaInfoObjectVariant>>,
    }
}

qapi_struct! {
    /// A member of an alternate.
    SchemaInfoAlternateMember {
        /// Its type.
        "type" ty: String,
    }
}

qapi_struct! {
    /// An alternate.
    SchemaInfoAlternate {
        /// Its members.
        "members" members: Vec<SchemaInfoAlternateMember>,
    }
}

qapi_struct! {
    /// A command.
    SchemaInfoCommand {
        /// Type of its arguments.
        "arg-type" arg_type: String,
        /// Type of its return value.
        "ret-type" ret_type: String,
        /// Whether it may be executed out of band.
        "allow-oob" allow_oob: Option<bool>,
    }
}

qapi_struct! {
    /// An event.
    SchemaInfoEvent {
        /// Type of its data.
        "arg-type" arg_type: String,
    }
}

qapi_struct! {
    /// An entity of the schema.
    SchemaInfo {
        /// Its name.
        "name" name: String,
        /// Its kind.
        "meta-type" meta_type: SchemaMetaType,
        /// Its features.
        "features" features: Option<Vec<String>>,
    } by "meta-type" {
        "builtin" => SchemaInfoBuiltin,
        "enum" => SchemaInfoEnum,
        "array" => SchemaInfoArray,
        "object" => SchemaInfoObject,
        "alternate" => SchemaInfoAlternate,
        "command" => SchemaInfoCommand,
        "event" => SchemaInfoEvent,
    }
}
