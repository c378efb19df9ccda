//! The table of cases: every command.

use serde_json::{Value, json};

use crate::cases::{Case, error, not_found, ok, with_id};

fn execute(command: &str) -> String {
    format!("{{\"execute\":\"{command}\"}}")
}

fn event(name: &str) -> Value {
    json!({ "event": name, "timestamp": { "seconds": "*", "microseconds": "*" } })
}

fn reset() -> Value {
    let mut event = event("RESET");
    if let Some(members) = event.as_object_mut() {
        members.insert("data".to_owned(), json!({ "guest": false, "reason": "host-qmp-system-reset" }));
    }
    event
}

fn done() -> Value {
    ok(json!({}))
}

fn status(name: &str) -> Value {
    ok(json!({ "running": name == "running", "singlestep": false, "status": name }))
}

/// All cases.
#[must_use]
pub fn all() -> Vec<Case> {
    [queries(), run_state(), surplus_arguments()].concat()
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

/// No command here takes arguments; those of `qmp_capabilities` are tried in negotiation.
fn surplus_arguments() -> Vec<Case> {
    let commands = [
        "query-version",
        "query-commands",
        "query-qmp-schema",
        "query-name",
        "query-uuid",
        "query-kvm",
        "query-cpus-fast",
        "query-chardev",
        "query-status",
        "stop",
        "cont",
        "system_reset",
        "system_powerdown",
        "inject-nmi",
        "quit",
    ];
    let case = |command: &&str| {
        let request = format!("{{\"execute\":\"{command}\",\"arguments\":{{\"surplus\":null}},\"id\":[]}}");
        Case::new(request, [with_id(error("Parameter 'surplus' is unexpected"), json!([]))])
    };
    commands.iter().map(case).collect()
}
