//! Run state `preconfig`. The oracle's version has none, so there are no cases of the table for it.

use bulkhead_control_api::core::RunState;
use bulkhead_framework::{Result, Vm};
use bulkhead_qapi::table::COMMANDS;
use bulkhead_qmp_tests::broker::{Broker, Kind, Setup};
use bulkhead_qmp_tests::vms_run_here;
use bulkhead_qmp_tests::wire::Wire;
use serde_json::{Value, json};

const EXIT: &str = "{'execute': 'x-exit-preconfig'}";

fn preconfig(kinds: &[Kind], autostart: bool) -> Result<Broker> {
    Broker::start_as(
        kinds,
        Setup {
            limits: &[],
            connected: None,
            autostart,
            console: true,
            preconfig: true,
            former: None,
            devices: None,
        },
    )
}

fn client(broker: &Broker, monitor: usize) -> Result<Wire> {
    let mut wire = Wire::connect(&broker.path(monitor))?;
    wire.negotiate(false)?;
    Ok(wire)
}

fn refused(desc: &str) -> Value {
    json!({ "error": { "class": "GenericError", "desc": desc } })
}

fn status(wire: &mut Wire) -> Result<Value> {
    let reply = wire.ask("{'execute': 'query-status'}")?;
    Ok(reply.get("return").cloned().unwrap_or_default())
}

#[test]
fn few_commands_are_permitted_in_preconfig() -> Result<()> {
    let broker = preconfig(&[Kind::Server], true)?;
    let mut wire = client(&broker, 0)?;
    assert_eq!(status(&mut wire)?, json!({ "running": false, "singlestep": false, "status": "preconfig" }));
    let permitted = [
        "qmp_capabilities",
        "query-version",
        "query-commands",
        "query-events",
        "quit",
        "query-qmp-schema",
        "query-status",
        "query-name",
        "query-uuid",
        "query-command-line-options",
        "x-exit-preconfig",
        "query-iothreads",
        "qom-list",
        "qom-get",
        "qom-set",
        "query-chardev",
    ];
    for command in COMMANDS {
        let name = command.name;
        // An argument that no command has, so that none is carried out; it is looked at last.
        let request = json!({ "execute": name, "arguments": { "surplus": 1 } });
        let reply = wire.ask(&request.to_string())?;
        if !permitted.contains(&name) {
            let expected = refused(&format!("The command '{name}' isn't permitted in 'preconfig' state"));
            assert_eq!(reply, expected);
        } else if !reply.to_string().contains(" is missing\"") {
            // One that needs arguments says so first.
            assert!(reply.to_string().contains("surplus"), "{name}: {reply}");
        }
    }
    let unknown = wire.ask("{'execute': 'nope'}")?;
    assert_eq!(unknown.pointer("/error/desc"), Some(&json!("The command nope has not been found")));
    assert!(!broker.core.is_started());
    Ok(())
}

#[test]
fn the_machine_starts_after_preconfig() -> Result<()> {
    let broker = preconfig(&[Kind::Server, Kind::Server], true)?;
    let (mut wire, mut other) = (client(&broker, 0)?, client(&broker, 1)?);
    wire.send(EXIT.as_bytes())?;
    wire.event("RESUME")?;
    assert_eq!(wire.line()?, json!({ "return": {} }));
    other.event("RESUME")?;
    assert_eq!(status(&mut other)?["status"], "running");
    let again = refused("The command is permitted only in 'preconfig' state");
    assert_eq!(other.ask(EXIT)?, again);
    assert_eq!(wire.ask("{'execute': 'stop'}")?, json!({ "return": {} }));
    Ok(())
}

#[test]
fn a_stopped_machine_does_not_start_after_preconfig() -> Result<()> {
    let broker = preconfig(&[Kind::Server], false)?;
    let mut wire = client(&broker, 0)?;
    assert_eq!(wire.ask(EXIT)?, json!({ "return": {} }));
    assert_eq!(status(&mut wire)?, json!({ "running": false, "singlestep": false, "status": "prelaunch" }));
    assert!(!broker.core.is_started());
    assert_eq!(wire.ask("{'execute': 'cont'}")?, json!({ "return": {} }));
    assert_eq!(broker.core.state(), RunState::Running);
    Ok(())
}

#[test]
fn the_end_of_preconfig_is_answered_while_a_client_is_waited_for() -> Result<()> {
    let broker = preconfig(&[Kind::Server, Kind::Waiting], true)?;
    let mut wire = client(&broker, 0)?;
    assert_eq!(wire.ask(EXIT)?, json!({ "return": {} }));
    assert_eq!(status(&mut wire)?["status"], "prelaunch");
    let _second = client(&broker, 1)?;
    wire.event("RESUME")?;
    Ok(())
}

#[test]
fn quit_is_permitted_in_preconfig() -> Result<()> {
    let broker = preconfig(&[Kind::Server], true)?;
    let mut wire = client(&broker, 0)?;
    wire.ask("{'execute': 'quit'}")?;
    broker.join()
}

/// It needs the release build and a host that runs VMs; the other tests do not.
#[test]
fn a_vm_starts_after_preconfig() -> Result<()> {
    if !vms_run_here() {
        return Ok(());
    }
    let vm = Vm::builder().args(["--preconfig"]).start()?;
    let mut wire = Wire::connect(&vm.dir().join("q.sock"))?;
    wire.negotiate(false)?;
    assert_eq!(status(&mut wire)?["status"], "preconfig");
    wire.send(EXIT.as_bytes())?;
    wire.event("RESUME")?;
    assert_eq!(wire.line()?, json!({ "return": {} }));
    let options =
        wire.ask("{'execute': 'query-command-line-options', 'arguments': {'option': 'smp-opts'}}")?;
    let first = options.pointer("/return/0/parameters/0/name");
    assert_eq!(first, Some(&json!("maxcpus")), "{options}");
    let cpus =
        wire.ask("{'execute': 'human-monitor-command', 'arguments': {'command-line': 'info cpus'}}")?;
    let text = cpus["return"].as_str().unwrap_or_default();
    assert!(text.starts_with("* CPU #0: thread_id=") && text.ends_with("\r\n"), "{text}");
    Ok(())
}
