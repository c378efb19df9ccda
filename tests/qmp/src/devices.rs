//! The table of cases: machines with devices, and without.

use serde_json::{Value, json};

use crate::cases::{Case, error, ok};

pub(crate) fn execute(command: &str, arguments: Value) -> String {
    json!({ "execute": command, "arguments": arguments }).to_string()
}

/// An object with one more member, or another value of it.
fn with(mut object: Value, name: &str, value: Value) -> Value {
    if let Some(members) = object.as_object_mut() {
        members.insert(name.to_owned(), value);
    }
    object
}

fn failed(class: &str, desc: &str) -> Value {
    json!({ "error": { "class": class, "desc": desc } })
}

/// A machine without devices, but with a bus.
#[must_use]
pub fn none() -> Vec<Case> {
    let host = json!({
        "bus": 0, "slot": 0, "function": 0, "irq_pin": 0, "qdev_id": "", "regions": [],
        "class_info": { "class": 0x0600, "desc": "Host bridge" },
        "id": { "device": "*", "vendor": "*", "subsystem": "*", "subsystem-vendor": "*" },
    });
    let inactive = || failed("DeviceNotActive", "No balloon device has been activated");
    let balloon = |value: Value| execute("balloon", json!({ "value": value }));
    vec![
        Case::new(execute("query-pci", json!({})), [ok(json!([{ "bus": 0, "devices": [host, "..."] }]))]),
        Case::new(execute("query-iothreads", json!({})), [ok(json!([]))]),
        Case::new(execute("query-balloon", json!({})), [inactive()]),
        Case::new(balloon(1.into()), [inactive()]),
        // Before the size is looked at.
        Case::new(balloon(0.into()), [inactive()]),
        Case::new(balloon("1".into()), [error("Invalid parameter type for 'value', expected: integer")]),
        Case::new(execute("balloon", json!({})), [error("Parameter 'value' is missing")]),
        Case::new(
            execute("human-monitor-command", json!({ "command-line": "info balloon" })),
            [ok("Error: No balloon device has been activated\r\n".into())],
        ),
    ]
}

/// The machine of [`crate::qemu::Qemu::with_devices`] and of [`crate::fake_bus`].
#[must_use]
pub fn some() -> Vec<Case> {
    [
        bus(),
        threads(),
        balloon(),
        human(),
        adding(),
        ours(),
        removing(),
        tree(),
        values(),
        setting(),
        chardevs(),
        objects(),
        // The last ones: what follows would find more.
        plugging(),
    ]
    .concat()
}

fn threads() -> Vec<Case> {
    let thread = json!({
        "id": "io0", "thread-id": "*", "poll-max-ns": 32768, "poll-grow": 0, "poll-shrink": 0,
    });
    vec![
        Case::new(execute("query-iothreads", json!({})), [ok(json!([thread]))])
            .qemu72("aio-max-batch came with 6.1", [ok(json!([with(thread, "aio-max-batch", 0.into())]))]),
    ]
}

fn bus() -> Vec<Case> {
    // The registers are undefined until they are set: QEMU's ports have closed windows then.
    let window = json!({ "base": "*", "limit": "*" });
    let port = |slot: u32, id: &str| {
        json!({
            "bus": 0, "slot": slot, "function": 0, "irq_pin": "*", "qdev_id": id, "regions": "*", "...": 0,
            "class_info": { "class": 0x0604, "desc": "PCI bridge" },
            // No subsystem: QEMU does not read that of a bridge.
            "id": { "device": "*", "vendor": "*" },
            "pci_bridge": { "bus": {
                "number": 0, "secondary": 0, "subordinate": 0,
                "io_range": window, "memory_range": window, "prefetchable_range": window,
            } },
        })
    };
    let memory = |bar: u32, size: u32, wide: bool| {
        json!({
            "bar": bar, "type": "memory", "address": -1, "size": size, "prefetch": wide, "mem_type_64": wide,
        })
    };
    let ids = json!({ "device": "*", "vendor": 0x1af4, "subsystem": "*", "subsystem-vendor": 0x1af4 });
    let device = |slot: u32, id: &str, class: Value, regions: Value| {
        json!({
            "bus": 0, "slot": slot, "function": 0, "irq_pin": "*", "qdev_id": id, "...": 0,
            // QEMU has no words for some classes.
            "class_info": class, "id": ids, "regions": regions,
        })
    };
    let disk = [memory(1, 4096, false), memory(4, 16384, true)];
    let devices = json!([
        "*",
        port(1, "rp0"),
        port(2, "rp1"),
        // QEMU's balloon has no MSI-X.
        device(3, "b0", json!({ "class": 0x00ff }), "*".into()),
        device(4, "", json!({ "class": 0x0100, "desc": "SCSI controller" }), json!(disk)),
        "..."
    ]);
    vec![Case::new(execute("query-pci", json!({})), [ok(json!([{ "bus": 0, "devices": devices }]))])]
}

fn balloon() -> Vec<Case> {
    let balloon = |value: Value| execute("balloon", json!({ "value": value }));
    let no_size = || error("Parameter 'target' expects a size");
    let done = || ok(json!({}));
    vec![
        Case::new(execute("query-balloon", json!({})), [ok(json!({ "actual": crate::fake_bus::RAM }))]),
        Case::new(balloon(0.into()), [no_size()]),
        Case::new(balloon((-1).into()), [no_size()]),
        Case::new(balloon(1.into()), [done()]),
        // More than there is, too.
        Case::new(balloon(i64::MAX.into()), [done()]),
        Case::new(balloon(crate::fake_bus::RAM.into()), [done()]),
    ]
}

/// Lines for people.
fn human() -> Vec<Case> {
    let prints = |line: &str, text: &str| {
        let text = text.replace('\n', "\r\n");
        Case::new(execute("human-monitor-command", json!({ "command-line": line })), [ok(text.into())])
    };
    let usage = |line: &str, what: &str| {
        prints(line, &format!("{what}\nTry \"help balloon\" for more information\n"))
    };
    vec![
        prints("info balloon", "balloon: actual=64\n"),
        prints("balloon 32", ""),
        prints("balloon 0x20", ""),
        prints(" balloon 040 ", ""),
        prints("balloon 0", "Error: Parameter 'target' expects a size\n"),
        usage("balloon", "unexpected end of expression"),
        usage("balloon x", "invalid char 'x' in expression"),
        usage("balloon -", "unexpected end of expression"),
        usage("balloon -5", "enter a positive value"),
        usage("balloon 99999999999999999999", "number too large"),
        usage("balloon 5k", "balloon: extraneous characters at the end of line"),
        usage("balloon 5 5", "balloon: extraneous characters at the end of line"),
    ]
}

pub(crate) const NO_CLASS: &str = "5.1 did not name the class";

fn not_found(id: &str) -> Value {
    failed("DeviceNotFound", &format!("Device '{id}' not found"))
}

fn adding() -> Vec<Case> {
    let add = |arguments: Value| execute("device_add", arguments);
    let plain = |arguments: Value, desc: &str| Case::new(add(arguments), [error(desc)]);
    let later = |arguments: Value, ours: &str, reason, theirs: &str| {
        Case::new(add(arguments), [error(ours)]).qemu72(reason, [error(theirs)])
    };
    let vsock = |name: &str, value: Value| {
        with(json!({ "driver": "vhost-user-vsock-pci", "bus": "rp0" }), name, value)
    };
    let blk =
        |name: &str, value: Value| with(json!({ "driver": "vhost-user-blk-pci", "bus": "rp0" }), name, value);
    let fs =
        |name: &str, value: Value| with(json!({ "driver": "vhost-user-fs-pci", "bus": "rp0" }), name, value);
    let no_hotplug = "Bus 'pcie.0' does not support hotplugging";
    let no_identifier = "Parameter 'id' expects an identifier";
    let bad_addr = |addr: &str| format!("Property 'vhost-user-vsock-pci.addr' doesn't take value '{addr}'");
    vec![
        plain(json!({}), "Parameter 'driver' is missing"),
        plain(json!({ "driver": "x" }), "'x' is not a valid device model name"),
        plain(json!({ "driver": "" }), "'' is not a valid device model name"),
        // Numbers are taken as text, lists are left out.
        plain(json!({ "driver": 1 }), "'1' is not a valid device model name"),
        plain(json!({ "driver": [1] }), "Parameter 'driver' is missing"),
        plain(json!({ "driver": "x", "bus": "nope" }), "'x' is not a valid device model name"),
        plain(json!({ "driver": "virtio-blk-pci" }), no_hotplug),
        plain(json!({ "driver": "vhost-user-vsock-pci" }), no_hotplug),
        plain(vsock("bus", "pcie.0".into()), no_hotplug),
        plain(vsock("bus", "nope".into()), "Bus 'nope' not found"),
        plain(vsock("bus", "".into()), "Bus '' not found"),
        plain(vsock("bus", "b0".into()), "Bus 'b0' not found"),
        plain(vsock("id", "1x".into()), no_identifier),
        plain(vsock("id", "a/b".into()), no_identifier),
        plain(vsock("id", "".into()), no_identifier),
        later(
            vsock("id", "b0".into()),
            "Duplicate ID 'b0' for device",
            "6.2 has another check",
            "Duplicate device ID 'b0'",
        ),
        later(
            vsock("foo", 1.into()),
            "Property '.foo' not found",
            NO_CLASS,
            "Property 'vhost-user-vsock-pci.foo' not found",
        ),
        plain(vsock("addr", "x".into()), &bad_addr("x")),
        plain(vsock("addr", "40".into()), &bad_addr("40")),
        plain(vsock("addr", "0.8".into()), &bad_addr("0.8")),
        plain(vsock("multifunction", "maybe".into()), "Parameter 'multifunction' expects 'on' or 'off'"),
        plain(vsock("multifunction", 1.into()), "Parameter 'multifunction' expects 'on' or 'off'"),
        plain(vsock("multifunction", json!([1])), "missing chardev"),
        plain(
            vsock("chardev", "no".into()),
            "Property 'vhost-user-vsock-device.chardev' can't find value 'no'",
        ),
        plain(blk("chardev", 1.into()), "Property 'vhost-user-blk.chardev' can't find value '1'"),
        plain(fs("chardev", "no".into()), "Property 'vhost-user-fs-device.chardev' can't find value 'no'"),
        later(
            blk("num-queues", 1.into()),
            "vhost-user-blk: chardev is mandatory",
            "6.0 dropped the name",
            "chardev is mandatory",
        ),
        plain(fs("tag", "x".into()), "missing chardev"),
    ]
}

/// A disk that no device had. It stays: no guest is there to give it up.
fn plugging() -> Vec<Case> {
    let add = |id: &str, bus: &str| {
        let disk = json!({ "driver": "virtio-blk-pci", "drive": "hd", "id": id, "bus": bus });
        execute("device_add", disk)
    };
    vec![Case::new(
        add("h", "rp0") + &add("i", "rp1"),
        [ok(json!({})), error("Drive 'hd' is already in use by another device")],
    )]
}

/// Devices that daemons of ours serve.
fn ours() -> Vec<Case> {
    let add = |arguments: Value| execute("device_add", arguments);
    let plain = |arguments: Value, desc: &str| Case::new(add(arguments), [error(desc)]);
    let blk =
        |name: &str, value: Value| with(json!({ "driver": "virtio-blk-pci", "bus": "rp0" }), name, value);
    let hd = |name: &str, value: Value| with(blk("drive", "hd".into()), name, value);
    let net =
        |name: &str, value: Value| with(json!({ "driver": "virtio-net-pci", "bus": "rp0" }), name, value);
    let balloon =
        |name: &str, value: Value| with(json!({ "driver": "virtio-balloon-pci", "bus": "rp0" }), name, value);
    vec![
        plain(blk("id", "x".into()), "drive property not set"),
        plain(blk("drive", "no".into()), "Property 'virtio-blk-device.drive' can't find value 'no'"),
        plain(blk("drive", "d0".into()), "Drive 'd0' is already in use by another device"),
        plain(hd("bus", "pcie.0".into()), "Bus 'pcie.0' does not support hotplugging"),
        plain(hd("num-queues", 0.into()), "num-queues property must be larger than 0"),
        plain(hd("num-queues", "x".into()), "Parameter 'num-queues' expects integer"),
        plain(hd("discard", "maybe".into()), "Parameter 'discard' expects 'on' or 'off'"),
        Case::new(add(hd("iothread", "no".into())), [not_found("no")]),
        plain(net("netdev", "no".into()), "Property 'virtio-net-device.netdev' can't find value 'no'"),
        plain(balloon("id", "b1".into()), "Only one balloon device is supported"),
        plain(balloon("deflate-on-oom", "maybe".into()), "Parameter 'deflate-on-oom' expects 'on' or 'off'"),
    ]
}

fn removing() -> Vec<Case> {
    let delete = |id: &str| execute("device_del", json!({ "id": id }));
    let no_hotplug = || error("Bus 'pcie.0' does not support hotplugging");
    let no_device = |id: &str| Case::new(delete(id), [error(format!("{id} is not a hotpluggable device"))]);
    vec![
        Case::new(execute("device_del", json!({})), [error("Parameter 'id' is missing")]),
        Case::new(delete("nope"), [not_found("nope")]),
        Case::new(delete("/nope"), [not_found("/nope")]),
        Case::new(delete("io0"), [not_found("io0")]),
        Case::new(delete("/machine/peripheral/nope"), [not_found("/machine/peripheral/nope")]),
        Case::new(delete("peripheral/b0"), [not_found("peripheral/b0")]),
        Case::new(delete("b0"), [no_hotplug()]),
        Case::new(delete("rp0"), [no_hotplug()]),
        Case::new(delete("/machine/peripheral/b0"), [no_hotplug()]),
        Case::new(delete("/machine/peripheral-anon/device[0]"), [no_hotplug()]),
        no_device(""),
        no_device("/machine"),
        no_device("/machine/peripheral"),
        no_device("/objects/io0"),
    ]
}

fn tree() -> Vec<Case> {
    let list = |path: &str| execute("qom-list", json!({ "path": path }));
    let child = |name: &str, kind: &str| json!({ "name": name, "type": format!("child<{kind}>") });
    let kind = json!({ "name": "type", "type": "string" });
    let devices = [kind.clone(), child("rp0", "pcie-root-port"), child("rp1", "pcie-root-port")];
    let devices = [&devices[..], &[child("b0", "virtio-balloon-pci")]].concat();
    let all = |path: &str, members: &[Value]| Case::new(list(path), [ok(json!({ "in any order": members }))]);
    let some = |path: &str| Case::new(list(path), [ok(json!([kind, "..."]))]);
    let ambiguous = |path: &str| Case::new(list(path), [error(format!("Path '{path}' is ambiguous"))]);
    vec![
        Case::new(execute("qom-list", json!({})), [error("Parameter 'path' is missing")]),
        all("/machine/peripheral", &devices),
        all("/machine//peripheral/", &devices),
        all("peripheral", &devices),
        all("/machine/peripheral-anon", &[kind.clone(), child("device[0]", "virtio-blk-pci")]),
        some("/"),
        some("/machine"),
        some("machine"),
        some("/machine/peripheral/b0"),
        some("b0"),
        some("peripheral/b0"),
        some("/objects"),
        some("/objects/io0"),
        some("io0"),
        some("/chardevs"),
        some("/chardevs/compat_monitor0"),
        some("/machine/peripheral-anon/device[0]"),
        ambiguous(""),
        // The port and the bus behind it.
        ambiguous("rp0"),
        Case::new(list("nope"), [not_found("nope")]),
        Case::new(list("/nope"), [not_found("/nope")]),
        Case::new(list("/machine/peripheral/nope"), [not_found("/machine/peripheral/nope")]),
    ]
}

fn values() -> Vec<Case> {
    let get = |path: &str, property: &str| execute("qom-get", json!({ "path": path, "property": property }));
    let is = |path: &str, property: &str, value: Value| Case::new(get(path, property), [ok(value)]);
    let stats: serde_json::Map<String, Value> = [
        "swap-in",
        "swap-out",
        "major-faults",
        "minor-faults",
        "free-memory",
        "total-memory",
        "available-memory",
        "disk-caches",
        "htlb-pgalloc",
        "htlb-pgfail",
    ]
    .iter()
    .map(|name| (format!("stat-{name}"), u64::MAX.into()))
    .collect();
    let unknown = |path: &str, property: &str, kind: &str| {
        Case::new(get(path, property), [error(format!("Property '.{property}' not found"))])
            .qemu72(NO_CLASS, [error(format!("Property '{kind}.{property}' not found"))])
    };
    vec![
        is("b0", "type", "virtio-balloon-pci".into()),
        is("b0", "guest-stats", json!({ "stats": stats, "last-update": 0 })),
        is("b0", "guest-stats-polling-interval", 0.into()),
        is("b0", "realized", true.into()),
        is("b0", "hotpluggable", false.into()),
        is("b0", "addr", 24.into()),
        is("b0", "legacy-addr", "03.0".into()),
        is("b0", "parent_bus", "*".into()),
        is("/machine/peripheral/rp0", "rp0", "/machine/peripheral/rp0/rp0".into()),
        is("/machine/peripheral/rp0", "type", "pcie-root-port".into()),
        is("/", "machine", "/machine".into()),
        is("/machine/peripheral", "b0", "/machine/peripheral/b0".into()),
        is("/machine/peripheral", "type", "container".into()),
        is("io0", "type", "iothread".into()),
        unknown("b0", "nope", "virtio-balloon-pci"),
        unknown("b0", "", "virtio-balloon-pci"),
        unknown("b0", "id", "virtio-balloon-pci"),
        Case::new(get("nope", "type"), [not_found("nope")]),
        Case::new(get("rp0", "type"), [not_found("rp0")]),
        Case::new(execute("qom-get", json!({ "path": "b0" })), [error("Parameter 'property' is missing")]),
    ]
}

fn setting() -> Vec<Case> {
    let set = |property: &str, value: Value| {
        execute("qom-set", json!({ "path": "b0", "property": property, "value": value }))
    };
    let interval = |value: Value| set("guest-stats-polling-interval", value);
    let no_integer = || error("Invalid parameter type for 'guest-stats-polling-interval', expected: integer");
    let no_permission = |property: &str, kind: &str| {
        Case::new(set(property, 1.into()), [error("Insufficient permission to perform this operation")])
            .qemu72("7.2 says which", [error(format!("Property '{kind}.{property}' is not writable"))])
    };
    let polling = execute("qom-get", json!({ "path": "b0", "property": "guest-stats-polling-interval" }));
    let after =
        "Attempt to set property 'addr' on device 'b0' (type 'virtio-balloon-pci') after it was realized";
    vec![
        Case::new(
            interval(5.into()) + &polling + &interval(0.into()) + &polling,
            [ok(json!({})), ok(5.into()), ok(json!({})), ok(0.into())],
        ),
        Case::new(interval(u32::MAX.into()) + &interval(0.into()), [ok(json!({})), ok(json!({}))]),
        Case::new(interval((-1).into()), [error("timer value must be greater than zero")]),
        Case::new(interval((1u64 << 32).into()), [error("timer value is too big")]),
        Case::new(interval("5".into()), [no_integer()]),
        Case::new(interval(json!(1.5)), [no_integer()]),
        Case::new(interval(Value::Null), [no_integer()]),
        Case::new(set("addr", "5".into()), [error(after)]),
        no_permission("guest-stats", "virtio-balloon-device"),
        no_permission("type", "virtio-balloon-pci"),
        no_permission("hotpluggable", "virtio-balloon-pci"),
        Case::new(set("nope", 1.into()), [error("Property '.nope' not found")])
            .qemu72(NO_CLASS, [error("Property 'virtio-balloon-pci.nope' not found")]),
        Case::new(
            execute("qom-set", json!({ "path": "nope", "property": "x", "value": 1 })),
            [not_found("nope")],
        ),
        Case::new(
            execute("qom-set", json!({ "path": "b0", "property": "x" })),
            [error("Parameter 'value' is missing")],
        ),
    ]
}

fn chardevs() -> Vec<Case> {
    let add = |id: &str, backend: Value| execute("chardev-add", json!({ "id": id, "backend": backend }));
    let change =
        |id: &str, backend: Value| execute("chardev-change", json!({ "id": id, "backend": backend }));
    let remove = |id: &str| execute("chardev-remove", json!({ "id": id }));
    let null = || json!({ "type": "null", "data": {} });
    let connecting = || json!({ "addr": { "type": "unix", "data": { "path": "/nope/x" } }, "server": false });
    let socket = |data: Value| json!({ "type": "socket", "data": data });
    let done = || ok(json!({}));
    let prefixed = |case: Case, desc: &str| {
        case.qemu72("6.1 says which", [error(format!("Failed to add chardev 'x': {desc}"))])
    };
    let no_such_file = "Failed to connect to '/nope/x': No such file or directory";
    let no_wait = "'wait' option is incompatible with socket in client connect mode";
    let duplicate = "attempt to add duplicate property 'x' to object (type 'container')";
    vec![
        Case::new(execute("chardev-add", json!({})), [error("Parameter 'id' is missing")]),
        Case::new(execute("chardev-add", json!({ "id": "x" })), [error("Parameter 'backend' is missing")]),
        Case::new(add("x", 1.into()), [error("Invalid parameter type for 'backend', expected: object")]),
        Case::new(add("x", json!({})), [error("Parameter 'backend.type' is missing")]),
        Case::new(add("x", json!({ "type": "nope" })), [error("Invalid parameter 'nope'")])
            .qemu72("later than 5.1", [error("Parameter 'type' does not accept value 'nope'")]),
        Case::new(add("x", json!({ "type": "null" })), [error("Parameter 'backend.data' is missing")]),
        Case::new(
            add("x", null()) + &add("x", null()) + &remove("x") + &remove("x"),
            [done(), error(duplicate), done(), error("Chardev 'x' not found")],
        )
        .qemu72(
            "6.1 looks first",
            [done(), error("Chardev with id 'x' already exists"), done(), error("Chardev 'x' not found")],
        ),
        prefixed(Case::new(add("x", socket(connecting())), [error(no_such_file)]), no_such_file),
        prefixed(
            Case::new(add("x", socket(with(connecting(), "wait", true.into()))), [error(no_wait)]),
            no_wait,
        ),
        // One that is tried again need not be there.
        Case::new(
            add("x", socket(with(connecting(), "reconnect", 60.into())))
                + &change("x", null())
                + &remove("x"),
            [done(), done(), done()],
        ),
        Case::new(remove("compat_monitor0"), [error("Chardev 'compat_monitor0' is busy")]),
        Case::new(remove("nope"), [error("Chardev 'nope' not found")]),
        Case::new(change("nope", null()), [error("Chardev 'nope' does not exist")]),
        Case::new(
            change("compat_monitor0", null()),
            [error("Chardev user does not support chardev hotswap")],
        ),
    ]
}

fn objects() -> Vec<Case> {
    let add = |arguments: Value| execute("object-add", arguments);
    let memory =
        |id: &str, size: Value| json!({ "qom-type": "memory-backend-memfd", "id": id, "size": size });
    let delete = |id: &str| execute("object-del", json!({ "id": id }));
    let done = || ok(json!({}));
    let size = execute("qom-get", json!({ "path": "/objects/m", "property": "size" }));
    let polling = execute("qom-get", json!({ "path": "/objects/t", "property": "poll-max-ns" }));
    let odd = with(memory("m", 4096.into()), "foo", 1.into());
    let unshared = with(memory("m", 4096.into()), "share", "x".into());
    let absent = |id: &str| error(format!("object '{id}' not found"));
    vec![
        Case::new(add(json!({})), [error("Parameter 'qom-type' is missing")]),
        Case::new(add(json!({ "qom-type": "iothread" })), [error("Parameter 'id' is missing")]),
        Case::new(
            add(json!({ "qom-type": "iothread", "id": "t", "poll-max-ns": 5 }))
                + &polling
                + &delete("t")
                + &delete("t"),
            [done(), ok(5.into()), done(), absent("t")],
        ),
        Case::new(
            add(json!({ "qom-type": "iothread", "id": "t", "poll-grow": -1 })),
            [error("poll-grow value must be in range [0, 9223372036854775807]")],
        ),
        Case::new(
            add(json!({ "qom-type": "iothread", "id": "t", "poll-shrink": "1" })),
            [error("Invalid parameter type for 'poll-shrink', expected: integer")],
        ),
        Case::new(
            add(json!({ "qom-type": "iothread", "id": "io0" })),
            [error("attempt to add duplicate property 'io0' to object (type 'container')")],
        ),
        Case::new(
            add(json!({ "qom-type": "iothread", "id": "t", "foo": 1 })),
            [error("Property '.foo' not found")],
        )
        .qemu72("6.0 has a schema", [error("Parameter 'foo' is unexpected")]),
        Case::new(add(json!({ "qom-type": "nope", "id": "m" })), [error("invalid object type: nope")])
            .qemu72("6.0 has a schema", [error("Parameter 'qom-type' does not accept value 'nope'")]),
        Case::new(
            add(memory("m", (8 << 20).into())) + &size + &add(memory("m", 4096.into())) + &delete("m"),
            [
                done(),
                ok((8 << 20).into()),
                error("attempt to add duplicate property 'm' to object (type 'container')"),
                done(),
            ],
        ),
        Case::new(
            add(json!({ "qom-type": "memory-backend-memfd", "id": "m", "props": { "size": 4096 } }))
                + &delete("m"),
            [done(), done()],
        )
        .qemu72("deprecated with 5.0, gone with 6.0", [error("Parameter 'size' is missing"), absent("m")]),
        Case::new(
            add(json!({ "qom-type": "memory-backend-memfd", "id": "m" })),
            [error("can't create backend with size 0")],
        )
        .qemu72("6.0 has a schema", [error("Parameter 'size' is missing")]),
        Case::new(add(memory("1m", 4096.into())), [error("Parameter 'id' expects an identifier")]),
        Case::new(add(odd), [error("Property '.foo' not found")])
            .qemu72("6.0 has a schema", [error("Parameter 'foo' is unexpected")]),
        Case::new(add(unshared), [error("Invalid parameter type for 'share', expected: boolean")]),
        Case::new(delete("nope"), [absent("nope")]),
        Case::new(delete("/objects/io0"), [absent("/objects/io0")]),
        Case::new(delete("b0"), [absent("b0")]),
    ]
}
