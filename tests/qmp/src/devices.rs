//! The table of cases: machines with devices, and without.

use serde_json::{Value, json};

use crate::cases::{Case, error, ok};

fn execute(command: &str, arguments: Value) -> String {
    json!({ "execute": command, "arguments": arguments }).to_string()
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
    [bus(), balloon(), human()].concat()
}

fn bus() -> Vec<Case> {
    let port = |slot: u32, id: &str| {
        json!({
            "bus": 0, "slot": slot, "function": 0, "irq_pin": "*", "qdev_id": id, "regions": "*", "...": 0,
            "class_info": { "class": 0x0604, "desc": "PCI bridge" },
            // No subsystem: QEMU does not read that of a bridge.
            "id": { "device": "*", "vendor": "*" },
            "pci_bridge": { "bus": {
                "number": 0, "secondary": 0, "subordinate": 0,
                "io_range": { "base": 0xf000, "limit": 0xfff },
                "memory_range": { "base": 0xfff0_0000_u32, "limit": 0xf_ffff },
                "prefetchable_range": { "base": 0xfff0_0000_u32, "limit": 0xf_ffff },
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
