//! Devices: what differs between machines, and events.

use std::time::{Duration, Instant};

use bulkhead_framework::Result;
use bulkhead_qmp_tests::broker::{Broker, Kind};
use bulkhead_qmp_tests::wire::Wire;
use serde_json::{Value, json};

fn negotiated(broker: &Broker) -> Result<Wire> {
    let mut wire = Wire::connect(&broker.path(0))?;
    wire.negotiate(false)?;
    Ok(wire)
}

fn actual(event: &Value) -> Option<(&str, i64)> {
    Some((event.get("event")?.as_str()?, event.pointer("/data/actual")?.as_i64()?))
}

/// As QEMU does it: the first at once, then the newest once a second.
#[test]
fn balloon_changes_come_once_a_second() -> Result<()> {
    let broker = Broker::with_devices()?;
    let bus = broker.bus.clone().ok_or("no bus")?;
    let mut wire = negotiated(&broker)?;
    wire.ask("{'execute': 'query-balloon'}")?;
    let began = Instant::now();
    (1..=100).for_each(|size| bus.change_balloon(size << 20));
    assert_eq!(actual(&wire.line()?), Some(("BALLOON_CHANGE", 1 << 20)));
    assert!(began.elapsed() < Duration::from_millis(900), "{:?}", began.elapsed());
    assert_eq!(actual(&wire.line()?), Some(("BALLOON_CHANGE", 100 << 20)));
    let second = began.elapsed();
    assert!(second > Duration::from_millis(950), "{second:?}");
    bus.change_balloon(7 << 20);
    assert_eq!(actual(&wire.line()?), Some(("BALLOON_CHANGE", 7 << 20)));
    assert!(began.elapsed() - second > Duration::from_millis(950), "{:?}", began.elapsed());
    Ok(())
}

#[test]
fn the_balloon_is_told_its_target() -> Result<()> {
    let broker = Broker::with_devices()?;
    let mut wire = negotiated(&broker)?;
    wire.ask(&json!({ "execute": "balloon", "arguments": { "value": 5 << 20 } }).to_string())?;
    assert_eq!(broker.bus.as_ref().and_then(|bus| bus.target()), Some(5 << 20));
    Ok(())
}

/// Without a bus there is nothing to wait for.
#[test]
fn a_machine_without_a_bus_says_so() -> Result<()> {
    let broker = Broker::without_bus(&[Kind::Server])?;
    let mut wire = negotiated(&broker)?;
    assert_eq!(wire.ask("{'execute': 'query-pci'}")?, json!({ "return": [] }));
    let reply = wire.ask("{'execute': 'query-balloon'}")?;
    assert_eq!(reply.pointer("/error/class"), Some(&json!("DeviceNotActive")));
    Ok(())
}

#[test]
fn the_bus_is_printed() -> Result<()> {
    let broker = Broker::with_devices()?;
    let mut wire = negotiated(&broker)?;
    let request = json!({ "execute": "human-monitor-command", "arguments": { "command-line": "info pci" } });
    let reply = wire.ask(&request.to_string())?;
    let text = reply["return"].as_str().unwrap_or_default().replace("\r\n", "\n");
    let port = "  Bus  0, device   1, function 0:
    PCI bridge: PCI device 1af4:1045
      BUS 0.
      secondary bus 0.
      subordinate bus 0.
      IO range [0xf000, 0x0fff]
      memory range [0xfff00000, 0x000fffff]
      prefetchable memory range [0xfff00000, 0x000fffff]
      id \"rp0\"
";
    let balloon = "  Bus  0, device   3, function 0:
    Class 0255: PCI device 1af4:1045
      PCI subsystem 1af4:1100
      BAR1: 32 bit memory at 0xffffffffffffffff [0x00000ffe].
      BAR4: 64 bit prefetchable memory at 0xffffffffffffffff [0x00003ffe].
      id \"b0\"
";
    assert!(text.contains(port) && text.contains(balloon), "{text}");
    Ok(())
}
