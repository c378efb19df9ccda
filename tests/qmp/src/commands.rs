//! The table of cases: every command.

use serde_json::{Value, json};

use crate::cases::{Case, error, not_found, ok, with_id};

fn execute(command: &str) -> String {
    format!("{{\"execute\":\"{command}\"}}")
}

pub(crate) fn event(name: &str) -> Value {
    json!({ "event": name, "timestamp": { "seconds": "*", "microseconds": "*" } })
}

pub(crate) fn reset() -> Value {
    let mut event = event("RESET");
    if let Some(members) = event.as_object_mut() {
        members.insert("data".to_owned(), json!({ "guest": false, "reason": "host-qmp-system-reset" }));
    }
    event
}

fn done() -> Value {
    ok(json!({}))
}

pub(crate) fn status(name: &str) -> Value {
    ok(json!({ "running": name == "running", "singlestep": false, "status": name }))
}

/// All cases.
#[must_use]
pub fn all() -> Vec<Case> {
    [queries(), run_state(), dirty_log(), options(), absent(), surplus_arguments()].concat()
}

fn cpu(index: u32) -> Value {
    json!({
        "cpu-index": index, "qom-path": "*", "thread-id": "*", "target": "x86_64", "arch": "x86",
        "props": { "socket-id": "*", "core-id": "*", "thread-id": "*" },
    })
}

fn queries() -> Vec<Case> {
    let cpus = [cpu(0), cpu(1)];
    let mut cpus72 = cpus.clone();
    for cpu in &mut cpus72 {
        cpu.as_object_mut().map(|members| members.remove("arch"));
    }
    let triple = |major: Value| json!({ "major": major, "minor": "*", "micro": "*" });
    let later = "gone or changed after 5.1";
    vec![
        Case::new(execute("query-version"), [ok(json!({ "qemu": triple(5.into()), "package": "*" }))])
            .qemu72("another version", [ok(json!({ "qemu": triple("*".into()), "package": "*" }))]),
        Case::new(execute("query-commands"), [ok(json!([{ "name": "*" }, { "name": "*" }, "..."]))]),
        Case::new(execute("query-events"), [ok(json!([{ "name": "*" }, { "name": "*" }, "..."]))])
            .qemu72(later, [not_found("The command query-events has not been found")]),
        Case::new(
            execute("query-qmp-schema"),
            [ok(
                json!([{ "name": "*", "meta-type": "command", "arg-type": "*", "ret-type": "*", "...": 0 }, "..."]),
            )],
        ),
        Case::new(execute("query-name"), [done()]),
        Case::new(execute("query-uuid"), [ok(json!({ "UUID": "00000000-0000-0000-0000-000000000000" }))]),
        Case::new(execute("query-kvm"), [ok(json!({ "enabled": true, "present": true }))])
            .qemu72("the oracle runs without KVM", [ok(json!({ "enabled": false, "present": true }))]),
        Case::new(
            execute("query-memory-size-summary"),
            [ok(json!({ "base-memory": 16 << 20, "plugged-memory": 0 }))],
        ),
        Case::new(execute("query-cpus-fast"), [ok(json!(cpus))]).qemu72(later, [ok(json!(cpus72))]),
        Case::new(
            execute("query-chardev"),
            [ok(json!([{ "label": "compat_monitor0", "filename": "*", "frontend-open": true }, "..."]))],
        ),
        Case::new(execute("query-status"), [status("prelaunch")]).stopped(),
        Case::new(execute("inject-nmi"), [done()]).stopped(),
    ]
}

fn run_state() -> Vec<Case> {
    let all = |commands: &[&str]| commands.iter().map(|command| execute(command)).collect::<String>();
    vec![
        Case::new(all(&["stop", "query-status"]), [done(), status("prelaunch")]).stopped(),
        Case::new(
            all(&["cont", "cont", "query-status", "stop", "stop", "query-status"]),
            [
                event("RESUME"),
                done(),
                done(),
                status("running"),
                event("STOP"),
                done(),
                done(),
                status("paused"),
            ],
        )
        .stopped(),
        Case::new(
            all(&["cont", "stop", "cont", "stop"]),
            [event("RESUME"), done(), event("STOP"), done(), event("RESUME"), done(), event("STOP"), done()],
        )
        .stopped(),
        Case::new(
            "{\"execute\":\"cont\",\"id\":\"a\"}{\"execute\":\"stop\",\"id\":\"b\"}",
            [event("RESUME"), with_id(done(), "a".into()), event("STOP"), with_id(done(), "b".into())],
        )
        .stopped(),
        Case::new(all(&["system_reset"]), [done(), reset()]).stopped(),
        Case::new(all(&["system_powerdown"]), [done(), event("POWERDOWN")]).stopped(),
        Case::new(
            all(&["cont", "query-status", "system_powerdown"]),
            [event("RESUME"), done(), status("running"), done(), event("POWERDOWN")],
        )
        .stopped(),
    ]
}

/// On or off, running or not, once or twice.
fn dirty_log() -> Vec<Case> {
    let command = "xen-set-global-dirty-log";
    let log = |arguments: Value| json!({ "execute": command, "arguments": arguments }).to_string();
    let [on, off] = [true, false].map(|enable| log(json!({ "enable": enable })));
    let twice = format!("{on}{on}{off}{off}");
    let done_four_times = [done(), done(), done(), done()];
    vec![
        Case::new(&twice, done_four_times.clone()).stopped(),
        Case::new(
            format!("{}{twice}{}", execute("cont"), execute("stop")),
            [&[event("RESUME"), done()][..], &done_four_times, &[event("STOP"), done()]].concat(),
        )
        .stopped(),
        Case::new(execute(command), [error("Parameter 'enable' is missing")]),
        Case::new(
            log(json!({ "enable": 1 })),
            [error("Invalid parameter type for 'enable', expected: boolean")],
        ),
        Case::new(log(json!({ "enable": true, "surplus": 1 })), [error("Parameter 'surplus' is unexpected")]),
    ]
}

fn options() -> Vec<Case> {
    let query = |option: Value| {
        json!({ "execute": "query-command-line-options", "arguments": { "option": option } }).to_string()
    };
    let parameter = |name: &str, kind: &str| json!({ "name": name, "type": kind, "...": 0 });
    let memory =
        json!([parameter("maxmem", "size"), parameter("slots", "number"), parameter("size", "size")]);
    vec![
        Case::new(
            execute("query-command-line-options"),
            [ok(json!([{ "option": "*", "parameters": "*" }, "..."]))],
        ),
        Case::new(query("memory".into()), [ok(json!([{ "option": "memory", "parameters": memory }]))]),
        // Its parameters are not listed, as QEMU reads them by a visitor.
        Case::new(query("acpi".into()), [ok(json!([{ "option": "acpi", "parameters": [] }]))]),
        Case::new(query("nope".into()), [error("invalid option name: nope")]),
        // An option, but none that has a group.
        Case::new(query("serial".into()), [error("invalid option name: serial")]),
        Case::new(query(1.into()), [error("Invalid parameter type for 'option', expected: string")]),
    ]
}

/// What this machine does not have.
fn absent() -> Vec<Case> {
    let change = |arguments: Value| json!({ "execute": "change", "arguments": arguments }).to_string();
    let load = |file: &str| {
        json!({ "execute": "xen-load-devices-state", "arguments": { "filename": file } }).to_string()
    };
    let no_device = |name: &str| json!({ "error": { "class": "DeviceNotFound", "desc": format!("Device '{name}' not found") } });
    let change_is_gone = [not_found("The command change has not been found")];
    let changes = [
        (json!({ "device": "nope", "target": "x" }), no_device("nope")),
        (json!({ "device": "", "target": "x", "arg": "raw" }), no_device("")),
        (json!({ "device": "vnc", "target": "password" }), error("Parameter 'password' is missing")),
        (json!({ "device": "vnc", "target": "passwd", "arg": "x" }), error("Could not set password")),
        (json!({ "device": "vnc", "target": ":1" }), error("The feature 'vnc' is not enabled")),
        (json!({ "target": "x" }), error("Parameter 'device' is missing")),
        (json!({ "device": "x" }), error("Parameter 'target' is missing")),
    ];
    let mut cases: Vec<Case> = changes
        .into_iter()
        .map(|(arguments, reply)| {
            Case::new(change(arguments), [reply]).qemu72("gone with 6.0", change_is_gone.clone())
        })
        .collect();
    cases.extend([
        Case::new(execute("system_wakeup"), [error("wake-up from suspend is not supported by this guest")])
            .qemu72(
                "its machine can be suspended",
                [error("Unable to wake up: guest is not in suspended state")],
            ),
        Case::new(execute("x-exit-preconfig"), [error("The command is permitted only in 'preconfig' state")])
            .qemu72(
                "6.0 has no such state",
                [error("The command is permitted only before machine initialization")],
            ),
        Case::new(load("/nope"), [error("Unable to open /nope: No such file or directory")]).stopped(),
        Case::new(load(""), [error("Unable to open : No such file or directory")]).stopped(),
        Case::new(
            execute("cont") + &load("/nope"),
            [event("RESUME"), done(), error("Cannot update device state while vm is running")],
        )
        .stopped(),
        Case::new(execute("xen-load-devices-state"), [error("Parameter 'filename' is missing")]),
    ]);
    cases
}

/// No command here takes arguments; those of `qmp_capabilities` are tried in negotiation.
fn surplus_arguments() -> Vec<Case> {
    let commands = [
        "query-version",
        "query-commands",
        "query-qmp-schema",
        "query-name",
        "query-uuid",
        "query-kvm",
        "query-memory-size-summary",
        "query-cpus-fast",
        "query-chardev",
        "query-status",
        "stop",
        "cont",
        "system_reset",
        "system_powerdown",
        "inject-nmi",
        "quit",
        "query-command-line-options",
        "x-exit-preconfig",
        "system_wakeup",
    ];
    let case = |command: &&str| {
        let request = format!("{{\"execute\":\"{command}\",\"arguments\":{{\"surplus\":null}},\"id\":[]}}");
        Case::new(request, [with_id(error("Parameter 'surplus' is unexpected"), json!([]))])
    };
    commands.iter().map(case).collect()
}
