//! Objects: memory back ends that come and go while the machine runs, and I/O threads.

use bulkhead_control_api::config::{IoThread, MemoryBackEnd};
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
/// QEMU's default of `poll-max-ns`.
const POLL_MAX: u64 = 32768;
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

/// An I/O thread of these properties. Where no device uses it there is no thread: it is one of a daemon.
fn thread(id: String, properties: Map<String, Value>) -> Result<IoThread, Error> {
    let mut thread = IoThread { id, poll_max_ns: POLL_MAX, poll_grow: 0, poll_shrink: 0 };
    for (name, value) in properties {
        let place = match name.as_str() {
            "poll-max-ns" => &mut thread.poll_max_ns,
            "poll-grow" => &mut thread.poll_grow,
            "poll-shrink" => &mut thread.poll_shrink,
            _ => return Err(Error::generic(format!("Property '.{name}' not found"))),
        };
        let number = value.as_i64().ok_or_else(|| wrong_type(&name, "integer"))?;
        *place = u64::try_from(number)
            .map_err(|_| Error::generic(format!("{name} value must be in range [0, {}]", i64::MAX)))?;
    }
    Ok(thread)
}

/// What can be added.
enum Object {
    Memory(Memory),
    Thread(IoThread),
}

impl Hub {
    /// The memory back ends that there are.
    pub(crate) fn memory_back_ends(&self) -> Vec<MemoryBackEnd> {
        let registry = self.store.registry.borrow();
        let given = self.config.memory_back_ends.iter();
        let given = given.filter(|memory| !registry.removed_objects.contains(&memory.id)).cloned();
        let added = registry.memory.iter().map(|memory| MemoryBackEnd {
            qom_type: MEMORY.to_owned(),
            id: memory.id.clone(),
            size: memory.size,
            share: memory.share,
            prealloc: false,
            huge_pages: None,
            path: None,
        });
        given.chain(added).collect()
    }

    fn has_object(&self, id: &str) -> bool {
        self.memory_back_ends().iter().any(|memory| memory.id == id)
            || self.threads().iter().any(|thread| thread.id == id)
    }

    pub(crate) async fn object_add(&self, args: Map<String, Value>) -> Reply {
        let mut args = flat(args)?;
        let qom_type = text(&mut args, "qom-type")?;
        let id = text(&mut args, "id")?;
        let ObjectAddArg { qom_type, id, .. } = ObjectAddArg { qom_type, id, props: None };
        let object = match qom_type.as_str() {
            MEMORY => Object::Memory(memory(id.clone(), args)?),
            THREAD => Object::Thread(thread(id.clone(), args)?),
            _ => return Err(Error::generic(format!("invalid object type: {qom_type}"))),
        };
        let id = &id;
        if !is_identifier(id) || id.len() > MAX_ID {
            return Err(Error::generic("Parameter 'id' expects an identifier"));
        }
        if self.has_object(id) {
            let desc = format!("attempt to add duplicate property '{id}' to object (type 'container')");
            return Err(Error::generic(desc));
        }
        {
            let mut registry = self.store.registry.borrow_mut();
            let (memory, threads) = (registry.memory.len(), registry.threads.len());
            match object {
                Object::Memory(new) if memory < MAX_ENTRIES => registry.memory.push(new),
                Object::Thread(new) if threads < MAX_ENTRIES => registry.threads.push(new),
                _ => return Err(Error::generic(format!("at most {MAX_ENTRIES} objects of a type"))),
            }
        }
        self.commit().await;
        Ok(json!({}))
    }

    pub(crate) async fn object_del(&self, args: ObjectDelArg) -> Reply {
        let id = args.id;
        if !self.has_object(&id) {
            return Err(Error::generic(format!("object '{id}' not found")));
        }
        let in_use = || Error::generic(format!("object '{id}' is in use, can not be deleted"));
        // A memory device never goes.
        if self.config.memory_devices.iter().any(|device| device.memdev == id) {
            return Err(in_use());
        }
        if self.threads().iter().any(|thread| thread.id == id) {
            let functions = self.functions().await?;
            if self.daemon_on(&id, &functions).is_some() {
                return Err(in_use());
            }
        }
        {
            let mut registry = self.store.registry.borrow_mut();
            let former = registry.threads.len() + registry.memory.len();
            registry.memory.retain(|memory| memory.id != id);
            registry.threads.retain(|thread| thread.id != id);
            let given = self.config.iothreads.iter().any(|thread| thread.id == id)
                || self.config.memory_back_ends.iter().any(|memory| memory.id == id);
            if given
                && registry.threads.len() + registry.memory.len() == former
                && !registry.removed_objects.contains(&id)
            {
                registry.removed_objects.push(id);
            }
        }
        self.commit().await;
        Ok(json!({}))
    }
}
