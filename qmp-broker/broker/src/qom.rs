//! The object tree, as far as clients of QEMU use it: devices by id, buses, objects, character devices.
//!
//! ```text
//! /machine/pcie.0                       /objects/ID
//! /machine/peripheral/ID[/ID: a bus]    /chardevs/ID
//! /machine/peripheral-anon/device[N]
//! ```

use bulkhead_control_api::balloon::{Answer, Op, Stats};
use bulkhead_control_api::config::MemoryDeviceInfo;
use bulkhead_control_api::pci::Function;
use bulkhead_control_api::side::MemorySizes;
use bulkhead_qapi::Error;
use bulkhead_qapi::types::char::ChardevInfo;
use bulkhead_qapi::types::qom::{ObjectPropertyInfo, QomGetArg, QomListArg, QomSetArg};
use serde_json::{Map, Value, json};

use crate::balloon;
use crate::commands::{Reply, reply};
use crate::hub::Hub;
use crate::memory::{self, Present, REQUESTED};
use crate::objects::{MEMORY, THREAD};
use crate::plug::ROOT_BUS;

/// Where devices with ids are.
pub const PERIPHERAL: &str = "/machine/peripheral";
/// Type of the property that names a memory back end.
const MEMDEV: &str = "link<memory-backend>";
/// Class of the host bridge, which is part of the machine.
const HOST_BRIDGE: u16 = 0x0600;
/// The property that sets how often the guest is asked for statistics.
const POLLING: &str = "guest-stats-polling-interval";
/// QEMU's names of the balloon's statistics, by their tags (virtio 1.2, 5.5.6.4).
const STATS: [&str; 10] = [
    "stat-swap-in",
    "stat-swap-out",
    "stat-major-faults",
    "stat-minor-faults",
    "stat-free-memory",
    "stat-total-memory",
    "stat-available-memory",
    "stat-disk-caches",
    "stat-htlb-pgalloc",
    "stat-htlb-pgfail",
];

/// What a property's value is.
#[derive(Clone, Debug, PartialEq)]
enum Content {
    /// This.
    Known(Value),
    /// What the balloon says.
    GuestStats,
    /// What the balloon says.
    PollingInterval,
    /// How much a memory device has, as it says.
    Plugged,
    /// How much it is to have.
    Requested,
    /// This of the virtio device inside, which could be set before it was made.
    Inner(Value),
    /// This; there is a setter that refuses.
    Fixed(Value),
}

/// A property.
#[derive(Clone, Debug, PartialEq)]
struct Property {
    name: String,
    kind: &'static str,
    content: Content,
    /// It could be set before its device was made.
    early: bool,
}

/// An object.
#[derive(Clone, Debug)]
pub struct Node {
    path: Vec<String>,
    kind: String,
    /// Index of its function, if it is a device.
    pub function: Option<usize>,
    properties: Vec<Property>,
}

impl Node {
    fn new(path: &[&str], kind: &str) -> Self {
        let path = path.iter().map(|part| (*part).to_owned()).collect();
        Self { path, kind: kind.to_owned(), function: None, properties: Vec::new() }
    }

    fn with(mut self, name: &str, kind: &'static str, value: impl Into<Value>) -> Self {
        let content = Content::Known(value.into());
        self.properties.push(Property { name: name.to_owned(), kind, content, early: false });
        self
    }

    fn early(mut self) -> Self {
        if let Some(property) = self.properties.last_mut() {
            property.early = true;
        }
        self
    }

    /// The properties of a memory device.
    fn memory(mut self, device: &Present<'_>) -> Self {
        let Present { info, .. } = device;
        let mut own = |name: &str, kind, content| {
            self.properties.push(Property { name: name.to_owned(), kind, content, early: false });
        };
        own("memaddr", "uint64", Content::Inner(info.addr.into()));
        own("memdev", MEMDEV, Content::Inner(memory::path_of(&info.memdev).into()));
        if let Some(block) = info.block_size {
            own("node", "uint32", Content::Inner(info.node.into()));
            own("size", "size", Content::Plugged);
            own("block-size", "size", Content::Fixed(block.into()));
            own(REQUESTED, "size", Content::Requested);
        }
        self
    }

    fn absolute(&self) -> String {
        format!("/{}", self.path.join("/"))
    }
}

/// All objects.
#[derive(Debug)]
pub struct Tree(Vec<Node>);

/// The parts of a path.
fn parts(path: &str) -> Vec<&str> {
    path.split('/').filter(|part| !part.is_empty()).collect()
}

/// What a path means.
enum Found<'a> {
    One(&'a Node),
    None,
    Several,
}

impl Tree {
    /// The bus that a device is on.
    pub fn bus_of<'a>(device: &Function, functions: &'a [Function]) -> &'a str {
        let port = device.parent.and_then(|port| functions.get(usize::from(port)));
        port.map_or(ROOT_BUS, |port| port.qdev_id.as_str())
    }

    /// The object at an absolute path.
    pub fn absolute(&self, path: &str) -> Option<&Node> {
        let parts = parts(path);
        self.0.iter().find(|node| node.path == parts)
    }

    /// The object of an absolute path, or the only one whose path ends so.
    fn find(&self, path: &str) -> Found<'_> {
        if path.starts_with('/') {
            return self.absolute(path).map_or(Found::None, Found::One);
        }
        let parts = parts(path);
        let fits = |node: &&Node| {
            let mut own = node.path.iter().rev();
            parts.iter().rev().all(|part| own.next().is_some_and(|own| own == part))
        };
        let mut all = self.0.iter().filter(fits);
        match (all.next(), all.next()) {
            (Some(node), None) => Found::One(node),
            (None, _) => Found::None,
            (Some(_), Some(_)) => Found::Several,
        }
    }

    fn children<'a>(&'a self, node: &'a Node) -> impl Iterator<Item = &'a Node> + 'a {
        self.0.iter().filter(|other| other.path.split_last().is_some_and(|(_, parent)| *parent == node.path))
    }

    /// The function's node, and that of the bus behind it.
    fn push_device(
        &mut self,
        index: usize,
        (functions, devices): (&[Function], &[MemoryDeviceInfo]),
        anonymous: &mut usize,
    ) {
        let Some(device) = functions.get(index).filter(|device| device.class != HOST_BRIDGE) else { return };
        let number = format!("device[{anonymous}]");
        let path = if device.qdev_id.is_empty() {
            *anonymous += 1;
            ["machine", "peripheral-anon", number.as_str()]
        } else {
            ["machine", "peripheral", device.qdev_id.as_str()]
        };
        let parent_bus = match device.parent {
            None => format!("/machine/{ROOT_BUS}"),
            Some(_) => {
                let bus = Self::bus_of(device, functions);
                format!("{PERIPHERAL}/{bus}/{bus}")
            }
        };
        let mut node = Node::new(&path, &device.driver)
            .with("parent_bus", "link<bus>", parent_bus)
            .with("realized", "bool", true)
            .with("hotpluggable", "bool", device.parent.is_some())
            .with("addr", "int32", i64::from(device.slot) * 8 + i64::from(device.function))
            .early()
            .with("legacy-addr", "str", format!("{:02x}.{:x}", device.slot, device.function));
        if let Some(device) = memory::of(device, devices) {
            node = node.memory(&device);
        }
        if device.driver == balloon::DRIVER {
            let own =
                |name: &str, kind, content| Property { name: name.to_owned(), kind, content, early: false };
            node.properties.push(own("guest-stats", "guest statistics", Content::GuestStats));
            node.properties.push(own(POLLING, "int", Content::PollingInterval));
        }
        node.function = Some(index);
        self.0.push(node);
        if device.bridge.is_some() && !device.qdev_id.is_empty() {
            let [first, second, id] = path;
            self.0.push(Node::new(&[first, second, id, id], "PCIE"));
        }
    }

    fn properties(&self, node: &Node) -> Vec<ObjectPropertyInfo> {
        let info = |name: &str, kind: String| ObjectPropertyInfo {
            name: name.to_owned(),
            kind,
            description: None,
            default_value: None,
        };
        let mut all = vec![info("type", "string".to_owned())];
        all.extend(node.properties.iter().map(|property| info(&property.name, property.kind.to_owned())));
        all.extend(
            self.children(node).filter_map(|child| {
                child.path.last().map(|name| info(name, format!("child<{}>", child.kind)))
            }),
        );
        all
    }
}

fn not_found(path: &str) -> Error {
    Error::device_not_found(format!("Device '{path}' not found"))
}

/// `guest-stats` as QEMU has it: what the guest has not told is all ones.
fn guest_stats(stats: &Stats) -> Value {
    let value = |tag: u16| {
        let told = stats.values.iter().rev().find(|(own, _)| *own == tag);
        told.map_or(u64::MAX, |(_, value)| *value)
    };
    let all: Map<String, Value> =
        (0u16..).zip(STATS).map(|(tag, name)| (name.to_owned(), value(tag).into())).collect();
    json!({ "stats": all, "last-update": stats.last_update })
}

impl Hub {
    /// The tree of a machine with these functions, without character devices.
    pub(crate) fn tree(&self, functions: &[Function]) -> Tree {
        let mut tree = Tree(vec![
            Node::new(&[], "container"),
            Node::new(&["machine"], "bulkhead-machine"),
            Node::new(&["machine", "peripheral"], "container"),
            Node::new(&["machine", "peripheral-anon"], "container"),
            Node::new(&["objects"], "container"),
            Node::new(&["chardevs"], "container"),
        ]);
        if !functions.is_empty() {
            tree.0.push(Node::new(&["machine", ROOT_BUS], "PCIE"));
        }
        let mut anonymous = 0;
        (0..functions.len()).for_each(|index| {
            tree.push_device(index, (functions, &self.config.memory_devices), &mut anonymous)
        });
        for thread in self.threads() {
            tree.0.push(
                Node::new(&["objects", &thread.id], THREAD)
                    .with("poll-max-ns", "int", thread.poll_max_ns)
                    .with("poll-grow", "int", thread.poll_grow)
                    .with("poll-shrink", "int", thread.poll_shrink),
            );
        }
        for memory in self.memory_back_ends() {
            let node = Node::new(&["objects", &memory.id], &memory.qom_type)
                .with("size", "int", memory.size)
                .with("share", "bool", memory.share)
                .with("prealloc", "bool", memory.prealloc);
            tree.0.push(match (&memory.path, memory.qom_type.as_str()) {
                (Some(path), _) => node.with("mem-path", "str", path.clone()),
                (None, MEMORY) => node
                    .with("seal", "bool", true)
                    .with("hugetlb", "bool", memory.huge_pages.is_some())
                    .with("hugetlbsize", "int", memory.huge_pages.unwrap_or(0)),
                (None, _) => node,
            });
        }
        tree
    }

    /// The tree for a path. Only where it asks for character devices is the console asked for its own.
    async fn tree_for(&self, path: &str) -> Result<Tree, Error> {
        let mut tree = self.tree(&self.functions().await?);
        if path.starts_with('/') && parts(path).first() == Some(&"chardevs") {
            for ChardevInfo { label, filename, .. } in self.chardevs().await? {
                let kind = match filename.trim_start_matches("disconnected:") {
                    "null" => "chardev-null",
                    "stdio" => "chardev-stdio",
                    "file" => "chardev-file",
                    _ => "chardev-socket",
                };
                let mut node = Node::new(&["chardevs", &label], kind);
                if kind == "chardev-socket" {
                    node = node.with("connected", "bool", !filename.starts_with("disconnected:"));
                }
                tree.0.push(node);
            }
        }
        Ok(tree)
    }

    pub(crate) async fn qom_list(&self, args: QomListArg) -> Reply {
        let tree = self.tree_for(&args.path).await?;
        match tree.find(&args.path) {
            Found::One(node) => reply(tree.properties(node)),
            Found::None => Err(not_found(&args.path)),
            Found::Several => Err(Error::generic(format!("Path '{}' is ambiguous", args.path))),
        }
    }

    pub(crate) async fn qom_get(&self, args: QomGetArg) -> Reply {
        let QomGetArg { path, property } = args;
        let tree = self.tree_for(&path).await?;
        let Found::One(node) = tree.find(&path) else { return Err(not_found(&path)) };
        if property == "type" {
            return Ok(node.kind.clone().into());
        }
        if let Some(child) = tree.children(node).find(|child| child.path.last() == Some(&property)) {
            return Ok(child.absolute().into());
        }
        match node.properties.iter().find(|own| own.name == property).map(|own| &own.content) {
            Some(Content::Known(value) | Content::Inner(value) | Content::Fixed(value)) => Ok(value.clone()),
            Some(Content::Plugged) => Ok(self.memory_sizes(node, &path).await?.plugged.into()),
            Some(Content::Requested) => Ok(self.memory_sizes(node, &path).await?.requested.into()),
            Some(Content::GuestStats) => Ok(guest_stats(&self.balloon_stats().await?)),
            Some(Content::PollingInterval) => Ok(self.balloon_stats().await?.polling_interval.into()),
            None => Err(no_property(&property)),
        }
    }

    pub(crate) async fn qom_set(&self, args: QomSetArg) -> Reply {
        let QomSetArg { path, property, value } = args;
        let functions = self.functions().await?;
        let tree = self.tree_for(&path).await?;
        let Found::One(node) = tree.find(&path) else { return Err(not_found(&path)) };
        let own = node.properties.iter().find(|own| own.name == property);
        let is_child = tree.children(node).any(|child| child.path.last() == Some(&property));
        match own {
            Some(Property { content: Content::PollingInterval, .. }) => self.set_polling(&value).await,
            Some(Property { content: Content::Requested, .. }) => {
                let function = node.function.and_then(|index| functions.get(index));
                self.request_memory(function.ok_or_else(|| not_found(&path))?, &value).await
            }
            Some(Property { content: Content::Fixed(_), .. }) => {
                Err(Error::generic(format!("'{property}' cannot be changed")))
            }
            Some(Property { content: Content::Inner(_), kind, .. }) => {
                Err(inner_after_realize(node, &property, *kind == MEMDEV))
            }
            Some(Property { early: true, .. }) => Err(after_realize(node, &property)),
            None if property != "type" && !is_child => Err(no_property(&property)),
            _ => Err(Error::generic("Insufficient permission to perform this operation")),
        }
    }

    async fn set_polling(&self, value: &Value) -> Reply {
        let seconds = value.as_i64().ok_or_else(|| {
            Error::generic(format!("Invalid parameter type for '{POLLING}', expected: integer"))
        })?;
        if seconds < 0 {
            return Err(Error::generic("timer value must be greater than zero"));
        }
        let seconds = u32::try_from(seconds).map_err(|_| Error::generic("timer value is too big"))?;
        match self.ask_balloon(Op::PollingInterval { seconds }).await? {
            Answer::Done => Ok(json!({})),
            _ => Err(balloon::unexpected()),
        }
    }

    /// What a memory device has and is to have.
    async fn memory_sizes(&self, node: &Node, path: &str) -> Result<MemorySizes, Error> {
        let functions = self.functions_with_sizes().await?;
        // Devices that came or went meanwhile move the others.
        let own = node.path.last().filter(|_| node.function.is_some());
        let function = functions.iter().find(|function| Some(&function.qdev_id) == own);
        let function = function.or_else(|| functions.get(node.function?));
        let device = function.and_then(|function| memory::of(function, &self.config.memory_devices));
        device.map(|device| device.sizes).ok_or_else(|| not_found(path))
    }

    async fn balloon_stats(&self) -> Result<Stats, Error> {
        match self.ask_balloon(Op::Stats).await? {
            Answer::Stats(stats) => Ok(stats),
            _ => Err(balloon::unexpected()),
        }
    }
}

fn no_property(property: &str) -> Error {
    Error::generic(format!("Property '.{property}' not found"))
}

/// The device inside has no id.
fn inner_after_realize(node: &Node, property: &str, is_link: bool) -> Error {
    let kind = node.kind.trim_end_matches("-pci");
    let what = if is_link {
        format!("link property '{property}' on device '(null)'")
    } else {
        format!("property '{property}' on anonymous device")
    };
    Error::generic(format!("Attempt to set {what} (type '{kind}') after it was realized"))
}

fn after_realize(node: &Node, property: &str) -> Error {
    let device = match (node.path.get(1).map(String::as_str), node.path.last()) {
        (Some("peripheral"), Some(id)) => format!("device '{id}'"),
        _ => "anonymous device".to_owned(),
    };
    Error::generic(format!(
        "Attempt to set property '{property}' on {device} (type '{}') after it was realized",
        node.kind
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statistics_that_were_not_told_are_all_ones() {
        let stats = Stats { last_update: 5, values: vec![(4, 1), (4, 2), (900, 3)], polling_interval: 0 };
        let value = guest_stats(&stats);
        assert_eq!(value["last-update"], 5);
        assert_eq!(value["stats"]["stat-free-memory"], 2, "the last one counts");
        assert_eq!(value["stats"]["stat-swap-in"], u64::MAX);
        assert_eq!(value["stats"].as_object().unwrap().len(), 10);
    }
}
