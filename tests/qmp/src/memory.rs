//! The table of cases: a machine with memory devices, [`ARGS`].

use serde_json::{Value, json};

use crate::cases::{Case, error, ok};
use crate::devices::{NO_CLASS, execute};

/// What such a machine is started with, beside what only one of the two machines needs.
pub const ARGS: [&str; 8] = [
    "-m",
    "64M,maxmem=4G",
    "-object",
    "memory-backend-memfd,id=m,size=512M",
    "-object",
    "memory-backend-ram,id=n,size=64M",
    "-object",
    "memory-backend-ram,id=spare,size=4M",
];
/// Its devices.
pub const DEVICES: [&str; 2] =
    ["virtio-mem-pci,id=v,memdev=m,requested-size=64M,addr=5", "virtio-pmem-pci,id=p,memdev=n,addr=6"];
const MIB: u64 = 1 << 20;
const MEM: &str = "/machine/peripheral/v";
const PMEM: &str = "/machine/peripheral/p";

fn set(path: &str, property: &str, value: Value) -> String {
    execute("qom-set", json!({ "path": path, "property": property, "value": value }))
}

fn get(path: &str, property: &str) -> String {
    execute("qom-get", json!({ "path": path, "property": property }))
}

fn devices(requested: u64) -> Value {
    json!([
        { "type": "virtio-mem", "data": {
            "id": "v", "memaddr": "*", "requested-size": requested, "size": 0, "max-size": 512 * MIB,
            "block-size": 2 * MIB, "node": 0, "memdev": "/objects/m",
        } },
        { "type": "virtio-pmem", "data": {
            "id": "p", "memaddr": "*", "size": 64 * MIB, "memdev": "/objects/n",
        } },
    ])
}

/// All of them.
#[must_use]
pub fn some() -> Vec<Case> {
    [queries(), sizes(), properties(), objects(), goodbye()].concat()
}

fn queries() -> Vec<Case> {
    vec![
        Case::new(execute("query-memory-devices", json!({})), [ok(devices(64 * MIB))]),
        Case::new(
            execute("query-memory-size-summary", json!({})),
            [ok(json!({ "base-memory": 64 * MIB, "plugged-memory": 64 * MIB }))],
        ),
    ]
}

/// `requested-size`.
fn sizes() -> Vec<Case> {
    let request = |value: Value| set(MEM, "requested-size", value);
    let no_multiple = || error("'requested-size' has to be multiples of 'block-size' (0x200000)");
    let too_much = || error("'requested-size' cannot exceed the memory backend size(0x20000000)");
    let no_number = || error("Parameter 'requested-size' expects uint64");
    vec![
        Case::new(request((3 * MIB).into()), [no_multiple()]),
        Case::new(request(1.into()), [no_multiple()]),
        Case::new(request((-1).into()), [no_multiple()]),
        Case::new(request((514 * MIB).into()), [too_much()]),
        Case::new(request((1u64 << 63).into()), [too_much()]),
        Case::new(request("64M".into()), [no_number()]),
        Case::new(request(1.5.into()), [no_number()]),
        Case::new(request(true.into()), [no_number()]),
        Case::new(
            request((128 * MIB).into())
                + &get(MEM, "requested-size")
                + &execute("query-memory-devices", json!({}))
                + &request((64 * MIB).into()),
            [ok(json!({})), ok((128 * MIB).into()), ok(devices(128 * MIB)), ok(json!({}))],
        ),
        Case::new(request(0.into()) + &get(MEM, "requested-size"), [ok(json!({})), ok(0.into())]),
    ]
}

fn properties() -> Vec<Case> {
    let is = |path: &str, property: &str, value: Value| Case::new(get(path, property), [ok(value)]);
    let realized = |path: &str, property: &str, kind: &str, value: Value| {
        let desc = format!(
            "Attempt to set property '{property}' on anonymous device (type '{kind}') after it was realized"
        );
        Case::new(set(path, property, value), [error(desc)])
    };
    let linked = |path: &str, kind: &str| {
        let desc = format!(
            "Attempt to set link property 'memdev' on device '(null)' (type '{kind}') after it was realized"
        );
        Case::new(set(path, "memdev", "/objects/spare".into()), [error(desc)])
    };
    vec![
        is(MEM, "type", "virtio-mem-pci".into()),
        is(MEM, "size", 0.into()),
        is(MEM, "block-size", (2 * MIB).into()),
        is(MEM, "node", 0.into()),
        is(MEM, "memaddr", "*".into()),
        is(MEM, "memdev", "/objects/m".into()),
        is(PMEM, "memdev", "/objects/n".into()),
        is(PMEM, "memaddr", "*".into()),
        Case::new(get(PMEM, "size"), [error("Property '.size' not found")])
            .qemu72(NO_CLASS, [error("Property 'virtio-pmem-pci.size' not found")]),
        Case::new(set(MEM, "size", 1.into()), [error("Insufficient permission to perform this operation")])
            .qemu72("5.2 names the property", [error("Property 'virtio-mem.size' is not writable")]),
        Case::new(set(MEM, "block-size", (4 * MIB).into()), [error("'block-size' cannot be changed")]),
        realized(MEM, "memaddr", "virtio-mem", 1.into()),
        realized(MEM, "node", "virtio-mem", 1.into()),
        realized(PMEM, "memaddr", "virtio-pmem", 1.into()),
        linked(MEM, "virtio-mem"),
        linked(PMEM, "virtio-pmem"),
    ]
}

fn objects() -> Vec<Case> {
    let delete = |id: &str| execute("object-del", json!({ "id": id }));
    let in_use = |id: &str| error(format!("object '{id}' is in use, can not be deleted"));
    let taken =
        |id: &str| error(format!("attempt to add duplicate property '{id}' to object (type 'container')"));
    let add = |id: &str| {
        execute("object-add", json!({ "qom-type": "memory-backend-memfd", "id": id, "size": 4096 }))
    };
    vec![
        Case::new(get("/objects/m", "type"), [ok("memory-backend-memfd".into())]),
        Case::new(get("/objects/m", "size"), [ok((512 * MIB).into())]),
        Case::new(get("/objects/m", "share"), [ok(true.into())]),
        Case::new(get("/objects/m", "hugetlb"), [ok(false.into())]),
        Case::new(get("/objects/n", "type"), [ok("memory-backend-ram".into())]),
        Case::new(get("/objects/n", "share"), [ok(false.into())]),
        Case::new(get("/objects/n", "prealloc"), [ok(false.into())]),
        Case::new(delete("m") + &delete("n"), [in_use("m"), in_use("n")]),
        Case::new(add("m") + &add("spare"), [taken("m"), taken("spare")]),
        Case::new(
            delete("spare") + &delete("spare") + &add("spare") + &delete("spare"),
            [ok(json!({})), error("object 'spare' not found"), ok(json!({})), ok(json!({}))],
        ),
    ]
}

/// Memory devices stay.
fn goodbye() -> Vec<Case> {
    let delete = |id: &str| execute("device_del", json!({ "id": id }));
    let no_hotplug = || error("Bus 'pcie.0' does not support hotplugging");
    let lines = |text: &str| ok(text.replace('\n', "\r\n").into());
    vec![
        Case::new(delete("v") + &delete("p"), [no_hotplug(), no_hotplug()]),
        Case::new(
            execute("human-monitor-command", json!({ "command-line": "info memory_size_summary" })),
            [lines("base memory: 67108864\nplugged memory: 67108864\n")],
        ),
    ]
}
