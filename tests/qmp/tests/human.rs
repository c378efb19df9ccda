//! `human-monitor-command`: what differs between machines, and the limit of a line.

use bulkhead_framework::Result;
use bulkhead_qmp_tests::broker::{Broker, Kind};
use bulkhead_qmp_tests::wire::Wire;
use serde_json::{Value, json};

fn ask(wire: &mut Wire, arguments: Value) -> Result<Value> {
    wire.ask(&json!({ "execute": "human-monitor-command", "arguments": arguments }).to_string())
}

fn client(broker: &Broker) -> Result<Wire> {
    let mut wire = Wire::connect(&broker.path(0))?;
    wire.negotiate(false)?;
    Ok(wire)
}

#[test]
fn what_qmp_returns_is_printed() -> Result<()> {
    let broker = Broker::start(&[Kind::Inherited], false)?;
    let mut wire = client(&broker)?;
    let version = format!("5.1.0bulkhead {}\r\n", env!("CARGO_PKG_VERSION"));
    let path = broker.path(0);
    let chardevs =
        format!("compat_monitor0: filename=unix:{},server\r\nserial0: filename=null\r\n", path.display());
    let lines = [
        ("info version", version.as_str()),
        ("info chardev", chardevs.as_str()),
        ("info cpus", "* CPU #0: thread_id=1000\r\n  CPU #1: thread_id=1001\r\n"),
    ];
    for (line, text) in lines {
        assert_eq!(ask(&mut wire, json!({ "command-line": line }))?, json!({ "return": text }));
    }
    let second = ask(&mut wire, json!({ "command-line": "info cpus", "cpu-index": 1 }))?;
    assert_eq!(second["return"], "  CPU #0: thread_id=1000\r\n* CPU #1: thread_id=1001\r\n");
    Ok(())
}

#[test]
fn help_lists_every_command_and_subject() -> Result<()> {
    let broker = Broker::start(&[Kind::Server], false)?;
    let mut wire = client(&broker)?;
    let mut lines = Vec::new();
    for line in ["help", "info"] {
        let reply = ask(&mut wire, json!({ "command-line": line }))?;
        let text = reply["return"].as_str().unwrap_or_default().to_owned();
        assert!(text.ends_with("\r\n"), "{text}");
        lines.extend(text.lines().map(str::to_owned));
    }
    let names: Vec<&str> = lines.iter().filter_map(|line| Some(line.split_once(" -- ")?.0)).collect();
    let commands = [
        "balloon target",
        "closefd closefd name",
        "cont|c ",
        "exit_preconfig ",
        "getfd getfd name",
        "help|? [cmd]",
        "info [subcommand]",
        "nmi ",
        "quit|q ",
        "stop ",
        "system_powerdown ",
        "system_reset ",
        "system_wakeup ",
    ];
    let subjects = [
        "balloon",
        "chardev",
        "cpus",
        "iothreads",
        "kvm",
        "memory-devices",
        "memory_size_summary",
        "name",
        "pci",
        "status",
        "uuid",
        "version",
    ]
    .map(|name| format!("info {name} "));
    assert_eq!(names, commands.into_iter().chain(subjects.iter().map(String::as_str)).collect::<Vec<_>>());
    Ok(())
}

#[test]
fn a_line_is_limited() -> Result<()> {
    let broker = Broker::start(&[Kind::Server], false)?;
    let mut wire = client(&broker)?;
    let longest = "x".repeat(4096);
    let reply = ask(&mut wire, json!({ "command-line": longest }))?;
    assert_eq!(reply["return"], format!("unknown command: '{longest}'\r\n"));
    let reply = ask(&mut wire, json!({ "command-line": longest + "x" }))?;
    assert_eq!(reply["error"]["desc"], "Parameter 'command-line' expects at most 4096 bytes");
    Ok(())
}

#[test]
fn quit_ends_the_machine() -> Result<()> {
    let broker = Broker::start(&[Kind::Server], false)?;
    let mut wire = client(&broker)?;
    assert_eq!(ask(&mut wire, json!({ "command-line": "q" }))?, json!({ "return": "" }));
    broker.join()
}
