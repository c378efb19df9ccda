//! `qapi/qom.json`, and the I/O threads' part of `qapi/misc.json`.

use serde_json::Value;

use crate::schema::{Described, qapi_struct};

qapi_struct! {
    /// A property of an object.
    ObjectPropertyInfo {
        /// Its name.
        "name" name: String,
        /// Its type.
        "type" kind: String,
        /// What it is for.
        "description" description: Option<String>,
        /// Its value if it is not given.
        "default-value" default_value: Option<Value>,
    }
}

qapi_struct! {
    /// Arguments of `qom-list`.
    QomListArg {
        /// The object.
        "path" path: String,
    }
}

qapi_struct! {
    /// Arguments of `qom-get`.
    QomGetArg {
        /// The object.
        "path" path: String,
        /// The property.
        "property" property: String,
    }
}

qapi_struct! {
    /// Arguments of `qom-set`.
    QomSetArg {
        /// The object.
        "path" path: String,
        /// The property.
        "property" property: String,
        /// Its new value.
        "value" value: Value,
    }
}

qapi_struct! {
    /// Arguments of `object-add`; the others are properties of the object.
    ObjectAddArg {
        /// Its type.
        "qom-type" qom_type: String,
        /// Its id.
        "id" id: String,
        /// Its properties, too.
        "props" props: Option<Value>,
    }
}

qapi_struct! {
    /// Arguments of `object-del`.
    ObjectDelArg {
        /// The object's id.
        "id" id: String,
    }
}

qapi_struct! {
    /// An I/O thread.
    IOThreadInfo {
        /// Its id.
        "id" id: String,
        /// Host thread.
        "thread-id" thread_id: i64,
        /// Longest busy polling in nanoseconds, 0 for none.
        "poll-max-ns" poll_max_ns: i64,
        /// Factor by which polling grows, 0 for the usual one.
        "poll-grow" poll_grow: i64,
        /// Divisor by which polling shrinks, 0 for the usual way.
        "poll-shrink" poll_shrink: i64,
    }
}
