//! Clients that misbehave, and peers that do.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::thread::sleep;
use std::time::{Duration, Instant};

use bulkhead_control_api::core::{Cause, Event, RunState};
use bulkhead_framework::Result;
use bulkhead_qmp_tests::broker::{Broker, Kind, Setup};
use bulkhead_qmp_tests::wire::Wire;
use serde_json::{Value, json};

const VERSION: &str = "{'execute': 'query-version'}";

fn negotiated(broker: &Broker) -> Result<Wire> {
    let mut wire = Wire::connect(&broker.path(0))?;
    wire.negotiate(false)?;
    Ok(wire)
}

/// Waits until `condition` holds.
fn eventually(what: &str, condition: impl Fn() -> bool) -> Result<()> {
    let end = Instant::now() + Duration::from_secs(10);
    while !condition() {
        if Instant::now() > end {
            return Err(format!("not in time: {what}").into());
        }
        sleep(Duration::from_millis(2));
    }
    Ok(())
}

#[test]
fn events_reach_every_negotiated_client() -> Result<()> {
    let broker = Broker::start(&[Kind::Server, Kind::Inherited], false)?;
    let mut first = negotiated(&broker)?;
    let mut second = Wire::connect(&broker.path(1))?;
    second.negotiate(true)?;
    let mut silent = Wire::connect(&broker.path(0))?;
    first.ask("{'execute': 'cont'}")?;
    assert!(second.line()?.get("timestamp").is_some());
    // Negotiation comes late: the first line is its reply, not the event.
    silent.negotiate(false)?;
    let cause = [
        (Event::Stop, RunState::Paused, "STOP", Value::Null),
        (
            Event::Shutdown(Cause::GuestShutdown),
            RunState::Shutdown,
            "SHUTDOWN",
            json!({"guest": true, "reason": "guest-shutdown"}),
        ),
        (
            Event::Reset(Cause::GuestReset),
            RunState::Running,
            "RESET",
            json!({"guest": true, "reason": "guest-reset"}),
        ),
        (Event::GuestPanicked, RunState::GuestPanicked, "GUEST_PANICKED", json!({"action": "pause"})),
    ];
    for (event, state, name, data) in cause {
        broker.core.event(event, state);
        for client in [&mut first, &mut second, &mut silent] {
            let line = client.line()?;
            assert_eq!(line.get("event"), Some(&json!(name)), "{line}");
            assert_eq!(line.get("data").unwrap_or(&Value::Null), &data, "{line}");
        }
    }
    Ok(())
}

#[test]
fn some_states_need_a_reset() -> Result<()> {
    let broker = Broker::start(&[Kind::Server], false)?;
    let mut wire = negotiated(&broker)?;
    for (state, name) in [(RunState::InternalError, "internal-error"), (RunState::Shutdown, "shutdown")] {
        broker.core.event(Event::Stop, state);
        wire.event("STOP")?;
        let refused = wire.ask("{'execute': 'cont'}")?;
        assert_eq!(refused.pointer("/error/desc"), Some(&json!("Resetting the Virtual Machine is required")));
        let status = wire.ask("{'execute': 'query-status'}")?;
        assert_eq!(status.pointer("/return/status"), Some(&json!(name)));
        assert!(wire.ask("{'execute': 'system_powerdown'}")?.get("return").is_some());
    }
    Ok(())
}

#[test]
fn quit_ends_everything() -> Result<()> {
    let broker = Broker::start(&[Kind::Server], false)?;
    let mut other = negotiated(&broker)?;
    let mut wire = negotiated(&broker)?;
    wire.send(b"{'execute': 'quit', 'id': 7}")?;
    assert_eq!(wire.line()?, json!({"return": {}, "id": 7}));
    for client in [&mut wire, &mut other] {
        let event = client.event("SHUTDOWN")?;
        assert_eq!(event.get("data"), Some(&json!({"guest": false, "reason": "host-qmp-quit"})));
        assert_eq!(client.line().unwrap_err().message(), "the connection is closed");
    }
    broker.join()
}

#[test]
fn a_core_that_does_not_answer_blocks_only_what_needs_it() -> Result<()> {
    let broker = Broker::start(&[Kind::Server], false)?;
    let mut stuck = negotiated(&broker)?;
    broker.core.set_silent(true);
    stuck.send(b"{'execute': 'stop'}")?;
    let mut other = negotiated(&broker)?;
    let began = Instant::now();
    for request in [VERSION, "{'execute': 'query-status'}", "{'execute': 'query-qmp-schema'}"] {
        assert!(other.ask(request)?.get("return").is_some());
    }
    assert_eq!(other.ask("{'execute': 'quit'}")?, json!({"return": {}}));
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    // Core never answers: the broker ends without it, and says so to its clients.
    let event = other.event("SHUTDOWN")?;
    assert_eq!(event.pointer("/data/reason"), Some(&json!("host-qmp-quit")));
    broker.join()
}

/// A stop takes longer when the console holds a vCPU up, and is done all the same.
#[test]
fn a_slow_stop_is_answered() -> Result<()> {
    let broker = Broker::start(&[Kind::Server], true)?;
    let mut wire = negotiated(&broker)?;
    eventually("start", || broker.core.is_started())?;
    broker.core.set_slow(Duration::from_secs(8));
    assert_eq!(wire.ask("{'execute': 'stop'}")?, json!({"return": {}}));
    assert_eq!(broker.core.state(), RunState::Paused);
    Ok(())
}

/// Core may be in the middle of such a stop when its broker is started anew: what the broker knows is answered
/// at once, the run state when core has told it.
#[test]
fn the_run_state_is_told_once_it_is_known() -> Result<()> {
    let setup = Setup {
        limits: &[],
        connected: None,
        autostart: true,
        console: true,
        preconfig: false,
        devices: None,
        former: Some(Duration::from_secs(3)),
    };
    let broker = Broker::start_as(&[Kind::Server], setup)?;
    let began = Instant::now();
    let mut wire = negotiated(&broker)?;
    assert!(wire.ask(VERSION)?.get("return").is_some());
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    assert_eq!(wire.ask("{'execute': 'query-status'}")?.pointer("/return/status"), Some(&json!("running")));
    Ok(())
}

/// A broker that loses core to a fault of the link fails, so that another one is started.
#[test]
fn a_link_that_breaks_is_a_failure() -> Result<()> {
    let broker = Broker::start(&[Kind::Server], false)?;
    let mut wire = negotiated(&broker)?;
    assert!(wire.ask("{'execute': 'query-cpus-fast'}")?.get("return").is_some());
    broker.core.send_garbage();
    assert_eq!(wire.line().unwrap_err().message(), "the connection is closed");
    assert!(broker.join().is_err());
    Ok(())
}

/// Commands that wait for a console that is away are not in the way of those for core.
#[test]
fn an_absent_console_delays_no_command_of_core() -> Result<()> {
    let broker = Broker::start_with(&[Kind::Server], None, true, false)?;
    let mut waiting: Vec<Wire> = (0..3).map(|_| negotiated(&broker)).collect::<Result<_>>()?;
    let mut operator = negotiated(&broker)?;
    eventually("start", || broker.core.is_started())?;
    let began = Instant::now();
    for wire in &mut waiting {
        wire.send(b"{'execute': 'query-chardev'}")?;
    }
    for request in ["stop", "cont", "query-cpus-fast", "query-status", "system_reset"] {
        assert!(operator.ask(&format!("{{'execute': '{request}'}}"))?.get("return").is_some(), "{request}");
    }
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    for wire in &mut waiting {
        let reply = wire.ask("")?;
        assert_eq!(
            reply.pointer("/error/desc"),
            Some(&json!("The console cannot be reached: not connected"))
        );
    }
    assert!(began.elapsed() < Duration::from_secs(8), "not one after the other: {:?}", began.elapsed());
    Ok(())
}

#[test]
fn without_a_console_only_its_commands_fail() -> Result<()> {
    let broker = Broker::start_with(&[Kind::Server], None, false, false)?;
    let mut wire = negotiated(&broker)?;
    let reply = wire.ask("{'execute': 'query-chardev'}")?;
    assert_eq!(reply.pointer("/error/desc"), Some(&json!("The console cannot be reached: not connected")));
    assert!(wire.ask("{'execute': 'stop'}")?.get("return").is_some());
    Ok(())
}

#[test]
fn a_waiting_monitor_holds_the_start() -> Result<()> {
    let broker = Broker::start(&[Kind::Server, Kind::Waiting], true)?;
    let _first = negotiated(&broker)?;
    sleep(Duration::from_millis(100));
    assert!(!broker.core.is_started());
    let _second = Wire::connect(&broker.path(1))?;
    eventually("start", || broker.core.is_started())
}

#[test]
fn a_connected_socket_is_a_monitor() -> Result<()> {
    let (ours, theirs) = UnixStream::pair()?;
    let broker = Broker::start_with(&[], Some(theirs), true, true)?;
    let mut wire = Wire::over(ours)?;
    assert!(wire.line()?.get("QMP").is_some());
    wire.negotiate(false)?;
    eventually("start", || broker.core.is_started())?;
    let reply = wire.ask("{'execute': 'query-chardev'}")?;
    assert_eq!(reply.pointer("/return/0/filename"), Some(&json!("unix:/client")));
    Ok(())
}

#[test]
fn what_was_asked_before_the_end_is_answered() -> Result<()> {
    let broker = Broker::start(&[Kind::Server], false)?;
    let mut wire = negotiated(&broker)?;
    wire.send(VERSION.repeat(100).as_bytes())?;
    wire.stream().shutdown(std::net::Shutdown::Write)?;
    for _ in 0..100 {
        assert!(wire.line()?.get("return").is_some());
    }
    assert_eq!(wire.line().unwrap_err().message(), "the connection is closed");
    Ok(())
}

/// Writes as much as the broker takes; returns the number of bytes.
fn flood(stream: &UnixStream, request: &[u8]) -> Result<usize> {
    let mut stream = stream;
    stream.set_write_timeout(Some(Duration::from_millis(200)))?;
    let mut taken = 0;
    loop {
        match stream.write(request) {
            Ok(count) => taken += count,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(taken),
            Err(error) => return Err(error.into()),
        }
    }
}

#[test]
fn a_client_that_never_reads_is_paused_then_dropped() -> Result<()> {
    let broker = Broker::start(&[Kind::Server], false)?;
    let greedy = negotiated(&broker)?;
    let request = "{'execute': 'query-qmp-schema'}".repeat(100);
    let taken = flood(greedy.stream(), request.as_bytes())?;
    assert!(taken < 4 << 20, "{taken} bytes were taken");
    let mut other = negotiated(&broker)?;
    assert!(other.ask(VERSION)?.get("return").is_some());
    // Now events come, more than are kept for it.
    let mut reader = other.stream().try_clone()?;
    std::thread::spawn(move || while reader.read(&mut [0; 65536]).is_ok_and(|count| count > 0) {});
    for _ in 0..20_000 {
        broker.core.event(Event::Resume, RunState::Running);
    }
    let mut stream = greedy.stream();
    let mut rest = Vec::new();
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    // It gets what its socket held, then the end.
    match stream.read_to_end(&mut rest) {
        Ok(_) => assert!(rest.len() < 4 << 20, "{} bytes", rest.len()),
        Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset),
    }
    Ok(())
}

#[test]
fn too_many_clients_are_told_so() -> Result<()> {
    let broker = Broker::start(&[Kind::Server], false)?;
    let mut first = negotiated(&broker)?;
    let mut served = Vec::new();
    let mut refused = 0;
    for _ in 0..1000 {
        let mut wire = Wire::over(UnixStream::connect(broker.path(0))?)?;
        let line = wire.line()?;
        match line.get("QMP") {
            Some(_) => served.push(wire),
            None => {
                assert_eq!(line.pointer("/error/desc"), Some(&json!("Too many clients: 100 are connected")));
                refused += 1;
            }
        }
    }
    assert_eq!((served.len(), refused), (99, 901));
    assert!(first.ask(VERSION)?.get("return").is_some());
    drop(served);
    let end = Instant::now() + Duration::from_secs(5);
    while negotiated(&broker).is_err() {
        assert!(Instant::now() < end, "no room again");
    }
    Ok(())
}

#[test]
fn silent_clients_give_way() -> Result<()> {
    let broker = Broker::start(&[Kind::Server], false)?;
    let _first = negotiated(&broker)?;
    let mut silent = Vec::new();
    for _ in 0..99 {
        silent.push(Wire::connect(&broker.path(0))?);
    }
    assert!(Wire::connect(&broker.path(0)).is_err(), "none has been silent for 5 seconds");
    sleep(Duration::from_millis(5100));
    let mut late = negotiated(&broker)?;
    assert!(late.ask(VERSION)?.get("return").is_some());
    let oldest = silent.first_mut().ok_or("no clients")?;
    assert_eq!(oldest.line().unwrap_err().message(), "the connection is closed");
    Ok(())
}

#[test]
fn large_values_are_bounded_together() -> Result<()> {
    let broker = Broker::start(&[Kind::Server], false)?;
    let mut hogs = Vec::new();
    for _ in 0..4 {
        let mut hog = negotiated(&broker)?;
        hog.send(b"[\"")?;
        hogs.push(hog);
    }
    // Together more than the 16 MiB that all clients may hold.
    let block = vec![b'x'; 1 << 20];
    for hog in &mut hogs {
        for _ in 0..5 {
            hog.send(&block)?;
        }
    }
    let last = hogs.last_mut().ok_or("no clients")?;
    let refused = last.line()?;
    assert_eq!(refused.pointer("/error/desc"), Some(&json!("JSON token size limit exceeded")));
    let mut other = negotiated(&broker)?;
    assert!(other.ask(VERSION)?.get("return").is_some());
    Ok(())
}

/// The id of a request comes back in its reply, each DEL as `\u007F`.
#[test]
fn large_replies_that_nobody_reads_are_bounded_together() -> Result<()> {
    let broker = Broker::start(&[Kind::Server], false)?;
    let mut hogs = Vec::new();
    let request = format!("{{'execute': 'query-name', 'id': '{}'}}", "\u{7f}".repeat(8 << 20));
    for _ in 0..4 {
        let mut hog = negotiated(&broker)?;
        hog.send(request.as_bytes())?;
        hogs.push(hog);
    }
    let [first, .., last] = &mut hogs[..] else { return Err("no clients".into()) };
    let refused = last.line()?;
    assert_eq!(refused.pointer("/error/desc"), Some(&json!("JSON token size limit exceeded")));
    let reply = first.line()?;
    assert_eq!(reply.get("id").and_then(Value::as_str).map(str::len), Some(8 << 20));
    let mut other = negotiated(&broker)?;
    assert!(other.ask(VERSION)?.get("return").is_some());
    Ok(())
}

#[test]
fn a_burst_of_clients_is_counted_one_by_one() -> Result<()> {
    let broker = Broker::start(&[Kind::Server], false)?;
    let _first = negotiated(&broker)?;
    // Faster than the broker greets them.
    let burst: Vec<_> =
        (0..300).map(|_| UnixStream::connect(broker.path(0))).collect::<std::io::Result<_>>()?;
    let mut wires = burst.into_iter().map(Wire::over).collect::<Result<Vec<_>>>()?;
    let mut greeted = 0;
    for wire in &mut wires {
        greeted += usize::from(wire.line()?.get("QMP").is_some());
    }
    assert_eq!(greeted, 99);
    Ok(())
}
