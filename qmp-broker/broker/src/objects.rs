//! Objects: memory back ends that come and go while the machine runs, and I/O threads.

use bulkhead_qapi::Error;
use bulkhead_qapi::types::qom::{ObjectAddArg, ObjectDelArg};
use serde_json::{Map, Value, json};

use crate::commands::Reply;
use crate::hub::Hub;
use crate::registry::{MAX_ENTRIES, MAX_ID, Memory, is_identifier};

/// The type of a memory back end that can be added.
pub const MEMORY: &str = "memory-backend-memfd";
/// The type of an I/O thread.
pub const THREAD: &str = "iothread";
/// A page.
const PAGE: u64 = 4096;

/// A property of a flag or number of the wrong type.
fn wrong_type(name: &str, expected: &str) -> Error {
    Error::generic(format!("Invalid parameter type for '{name}', expected: {expected}"))
}

fn missing(name: &str) -> Error {
    Error::generic(format!("Parameter '{name}' is missing"))
}

/// Takes a text out of the arguments.
fn text(args: &mut Map<String, Value>, name: &str) -> Result<String, Error> {
    match args.remove(name) {
        Some(Value::String(text)) => Ok(text),
        Some(_) => Err(wrong_type(name, "string")),
        None => Err(missing(name)),
    }
}

/// The arguments with the members of `props` among them.
fn flat(mut args: Map<String, Value>) -> Result<Map<String, Value>, Error> {
    match args.remove("props") {
        None => {}
        Some(Value::Object(props)) => {
            for (name, value) in props {
                if args.insert(name.clone(), value).is_some() {
                    return Err(Error::generic(format!(
                        "Option in 'props' conflicts with top level: {name}"
                    )));
                }
            }
        }
        Some(_) => return Err(wrong_type("props", "dict")),
    }
    Ok(args)
}

/// A memory back end of these properties. Those that change where or how memory is put must have the value that they
/// have anyway.
fn memory(id: String, properties: Map<String, Value>) -> Result<Memory, Error> {
    let mut memory = Memory { id, size: 0, share: true };
    for (name, value) in properties {
        match (name.as_str(), value.as_bool()) {
            ("size", _) => memory.size = value.as_u64().ok_or_else(|| wrong_type("size", "integer"))?,
            ("share", Some(share)) => memory.share = share,
            ("seal" | "dump" | "merge" | "prealloc" | "hugetlb", Some(flag)) => {
                let only = name == "seal";
                if flag != only {
                    let desc = format!("property '{name}' of {MEMORY} doesn't take value '{flag}'");
                    return Err(Error::generic(desc));
                }
            }
            ("share" | "seal" | "dump" | "merge" | "prealloc" | "hugetlb", None) => {
                return Err(wrong_type(&name, "boolean"));
            }
            _ => return Err(Error::generic(format!("Property '.{name}' not found"))),
        }
    }
    match memory.size {
        0 => Err(Error::generic("can't create backend with size 0")),
        size if !size.is_multiple_of(PAGE) => {
            Err(Error::generic(format!("property 'size' of {MEMORY} doesn't take value '{size}'")))
        }
        _ => Ok(memory),
    }
}

impl Hub {
    fn has_object(&self, id: &str) -> bool {
        self.store.registry.borrow().memory.iter().any(|memory| memory.id == id)
            || self.config.iothreads.iter().any(|own| own.thread.id == id)
    }

    pub(crate) async fn object_add(&self, args: Map<String, Value>) -> Reply {
        let mut args = flat(args)?;
        let qom_type = text(&mut args, "qom-type")?;
        let id = text(&mut args, "id")?;
        let ObjectAddArg { qom_type, id, .. } = ObjectAddArg { qom_type, id, props: None };
        match qom_type.as_str() {
            MEMORY => {}
            THREAD => {
                let desc =
                    "an I/O thread is one of a device's daemon: it can be given on the command line only";
                return Err(Error::generic(desc));
            }
            _ => return Err(Error::generic(format!("invalid object type: {qom_type}"))),
        }
        let memory = memory(id, args)?;
        let id = &memory.id;
        if !is_identifier(id) || id.len() > MAX_ID {
            return Err(Error::generic("Parameter 'id' expects an identifier"));
        }
        if self.has_object(id) {
            let desc = format!("attempt to add duplicate property '{id}' to object (type 'container')");
            return Err(Error::generic(desc));
        }
        if self.store.registry.borrow().memory.len() >= MAX_ENTRIES {
            return Err(Error::generic(format!("at most {MAX_ENTRIES} objects")));
        }
        self.store.registry.borrow_mut().memory.push(memory);
        self.commit().await;
        Ok(json!({}))
    }

    pub(crate) async fn object_del(&self, args: ObjectDelArg) -> Reply {
        let id = args.id;
        if !self.has_object(&id) {
            return Err(Error::generic(format!("object '{id}' not found")));
        }
        if self.config.iothreads.iter().any(|own| own.thread.id == id) {
            return Err(Error::generic(format!("object '{id}' is in use, can not be deleted")));
        }
        self.store.registry.borrow_mut().memory.retain(|memory| memory.id != id);
        self.commit().await;
        Ok(json!({}))
    }
}
