//! Devices: what differs between machines, and events.

use std::time::{Duration, Instant};

use bulkhead_control_api::config::{IoThread, PciKind};
use bulkhead_control_api::pci::Event;
use bulkhead_control_api::plug::Settings;
use bulkhead_framework::{Result, Vm};
use bulkhead_qmp_tests::broker::{Broker, Kind};
use bulkhead_qmp_tests::fake_bus::Bus;
use bulkhead_qmp_tests::vms_run_here;
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

fn execute(wire: &mut Wire, command: &str, arguments: Value) -> Result<Value> {
    wire.ask(&json!({ "execute": command, "arguments": arguments }).to_string())
}

fn unix(path: &str) -> Value {
    let addr = json!({ "type": "unix", "data": { "path": path } });
    json!({ "type": "socket", "data": { "addr": addr, "server": false } })
}

fn desc(reply: &Value) -> &str {
    reply.pointer("/error/desc").and_then(Value::as_str).unwrap_or_default()
}

/// Of `query-chardev`.
fn filename(wire: &mut Wire, id: &str) -> Result<Value> {
    let all = wire.ask("{'execute': 'query-chardev'}")?;
    let all = all.get("return").and_then(Value::as_array).cloned().unwrap_or_default();
    let named = |chardev: &Value| chardev.get("label").and_then(Value::as_str) == Some(id);
    Ok(all.into_iter().find(named).unwrap_or_default())
}

/// As systemd-vmspawn does it: a character device, then the device behind it; and back.
#[test]
fn a_device_comes_with_its_character_device_and_goes() -> Result<()> {
    let broker = Broker::with_devices()?;
    let bus = broker.bus.clone().ok_or("no bus")?;
    let mut wire = negotiated(&broker)?;
    let done = json!({ "return": {} });
    assert_eq!(execute(&mut wire, "chardev-add", json!({ "id": "fs", "backend": unix("/fs.sock") }))?, done);
    assert_eq!(bus.defined("chardev.fs").as_deref(), Some("/fs.sock"));
    let chardev = filename(&mut wire, "fs")?;
    assert_eq!(
        (&chardev["filename"], &chardev["frontend-open"]),
        (&json!("disconnected:unix:/fs.sock"), &json!(false))
    );
    let device = json!({
        "driver": "vhost-user-fs-pci", "id": "fs0", "bus": "rp0", "chardev": "fs", "tag": "share",
        "num-request-queues": "2", "queue-size": 1024,
    });
    assert_eq!(execute(&mut wire, "device_add", device.clone())?, done);
    let added = bus.added();
    let PciKind::Virtio(virtio) = &added[0].kind else { return Err("not virtio".into()) };
    assert_eq!((virtio.device_type, virtio.queues, virtio.queue_size), (26, 3, 1024));
    assert_eq!(
        (virtio.socket.as_str(), &virtio.config[..6], virtio.config.len()),
        ("chardev.fs", &b"share\0"[..], 40)
    );
    let chardev = filename(&mut wire, "fs")?;
    assert_eq!((&chardev["filename"], &chardev["frontend-open"]), (&json!("unix:/fs.sock"), &json!(true)));

    assert_eq!(desc(&execute(&mut wire, "device_add", device)?), "Duplicate ID 'fs0' for device");
    let second = json!({ "driver": "vhost-user-vsock-pci", "bus": "rp1", "chardev": "fs" });
    let in_use = "Property 'vhost-user-vsock-device.chardev' can't take value 'fs', it's in use";
    assert_eq!(desc(&execute(&mut wire, "device_add", second)?), in_use);
    let third = json!({ "driver": "vhost-user-vsock-pci", "bus": "rp0", "chardev": "sk" });
    let taken = "PCI: slot 0 function 0 not available for vhost-user-vsock-pci, in use by vhost-user-fs-pci";
    assert_eq!(desc(&execute(&mut wire, "device_add", third)?), taken);
    assert_eq!(desc(&execute(&mut wire, "chardev-remove", json!({ "id": "fs" }))?), "Chardev 'fs' is busy");

    assert_eq!(execute(&mut wire, "device_del", json!({ "id": "fs0" }))?, done);
    let again = execute(&mut wire, "device_del", json!({ "id": "/machine/peripheral/fs0" }))?;
    assert_eq!(desc(&again), "Device /machine/peripheral/fs0 is already in the process of unplug");
    bus.event(Event::Deleted { id: "fs0".to_owned() });
    let event = wire.line()?;
    assert_eq!(event["event"], "DEVICE_DELETED");
    assert_eq!(event["data"], json!({ "device": "fs0", "path": "/machine/peripheral/fs0" }));
    assert_eq!(execute(&mut wire, "chardev-remove", json!({ "id": "fs" }))?, done);
    assert_eq!((bus.defined("chardev.fs"), filename(&mut wire, "fs")?), (None, Value::Null));
    Ok(())
}

/// Whether something is so soon.
fn soon(is_so: impl Fn() -> bool) -> bool {
    let end = Instant::now() + Duration::from_secs(30);
    while !is_so() && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(5));
    }
    is_so()
}

/// Whether the opener is told soon that a daemon is to end.
fn is_ended(bus: &Bus, key: &str) -> bool {
    soon(|| bus.begun(key).is_none())
}

/// A daemon of ours is started for its device, with what that says of it, and ended when it is gone, or does not come.
#[test]
fn a_device_comes_with_its_daemon_and_goes() -> Result<()> {
    let broker = Broker::with_devices()?;
    let bus = broker.bus.clone().ok_or("no bus")?;
    let mut wire = negotiated(&broker)?;
    let done = json!({ "return": {} });
    let thread = json!({ "qom-type": "iothread", "id": "t", "poll-max-ns": 9 });
    assert_eq!(execute(&mut wire, "object-add", thread)?, done);
    let disk = json!({
        "driver": "virtio-blk-pci", "id": "h", "bus": "rp0", "drive": "hd", "serial": "s", "num-queues": 3,
        "discard": false, "iothread": "t",
    });
    assert_eq!(execute(&mut wire, "device_add", disk.clone())?, done);
    let iothread = IoThread { id: "t".to_owned(), poll_max_ns: 9, ..IoThread::default() };
    let settings = Settings::Block { serial: "s".to_owned(), queues: 3, discard: false, iothread };
    assert_eq!(bus.begun("hd"), Some(settings.clone()));
    let added = bus.added();
    assert_eq!(added[0].kind, PciKind::Virtio(settings.virtio("hd")));
    let in_use = execute(&mut wire, "object-del", json!({ "id": "t" }))?;
    assert_eq!(desc(&in_use), "object 't' is in use, can not be deleted");

    // Pci refuses it: its daemon is not left.
    let net = json!({ "driver": "virtio-net-pci", "id": "n", "bus": "rp0", "netdev": "hn", "mq": "on" });
    let taken = "PCI: slot 0 function 0 not available for virtio-net-pci, in use by virtio-blk-pci";
    assert_eq!(desc(&execute(&mut wire, "device_add", net.clone())?), taken);
    assert_eq!(bus.begun("hn"), None);
    let mut wrong = net.clone();
    wrong["mac"] = "xx".into();
    let no_mac = "Property 'virtio-net-device.mac' doesn't take value 'xx'";
    assert_eq!(desc(&execute(&mut wire, "device_add", wrong)?), no_mac);
    let mut elsewhere = net;
    elsewhere["bus"] = "rp1".into();
    assert_eq!(execute(&mut wire, "device_add", elsewhere)?, done);
    let mac = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
    assert_eq!(bus.begun("hn"), Some(Settings::Net { mac, pairs: 2, iothread: IoThread::default() }));

    assert_eq!(execute(&mut wire, "device_del", json!({ "id": "h" }))?, done);
    bus.event(Event::Deleted { id: "h".to_owned() });
    assert_eq!(wire.line()?["event"], "DEVICE_DELETED");
    assert!(is_ended(&bus, "hd"), "the daemon runs on");
    assert!(bus.begun("hn").is_some(), "another one was ended");
    assert_eq!(execute(&mut wire, "object-del", json!({ "id": "t" }))?, done);
    let mut again = disk;
    again["iothread"] = "io0".into();
    assert_eq!(execute(&mut wire, "device_add", again)?, done);

    // The balloon of the command line cannot go here; a second one is refused before anything is started.
    let balloon = json!({ "driver": "virtio-balloon-pci", "bus": "rp1" });
    assert_eq!(desc(&execute(&mut wire, "device_add", balloon)?), "Only one balloon device is supported");
    assert_eq!(bus.begun("b0"), None);
    Ok(())
}

/// A launcher that is held up, and answers too late or never, is told again.
#[test]
fn a_daemon_ends_also_if_the_opener_does_not_answer_at_first() -> Result<()> {
    let broker = Broker::with_devices()?;
    let bus = broker.bus.clone().ok_or("no bus")?;
    let mut wire = negotiated(&broker)?;
    // A broker that finds pci looks after all three that no device has.
    assert!(soon(|| bus.ends() == 3), "{}", bus.ends());
    let disk = json!({ "driver": "virtio-blk-pci", "id": "h", "bus": "rp0", "drive": "hd" });
    assert_eq!(execute(&mut wire, "device_add", disk)?, json!({ "return": {} }));
    assert!(bus.begun("hd").is_some());
    bus.miss_an_end("hd");
    bus.event(Event::Deleted { id: "h".to_owned() });
    assert!(is_ended(&bus, "hd"), "the daemon runs on");
    Ok(())
}

/// What is behind it in the list moves up, and is not overlooked.
#[test]
fn a_device_that_goes_while_a_long_list_is_read_hides_no_other() -> Result<()> {
    let broker = Broker::with_devices()?;
    let bus = broker.bus.clone().ok_or("no bus")?;
    let mut wire = negotiated(&broker)?;
    let count = bus.fill();
    let reply = wire.ask("{'execute': 'query-pci'}")?;
    let devices = reply.pointer("/return/0/devices").and_then(Value::as_array).ok_or("no devices")?;
    let ids: Vec<&str> = devices.iter().filter_map(|device| device.get("qdev_id")?.as_str()).collect();
    assert_eq!(ids.len(), count, "{ids:?}");
    assert!(!ids.contains(&"x0") && ids.contains(&"x28"), "{ids:?}");
    Ok(())
}

/// A node has one writer, and says so in other words than a drive.
#[test]
fn a_node_has_one_writer() -> Result<()> {
    let broker = Broker::with_devices()?;
    let mut wire = negotiated(&broker)?;
    let disk =
        |id: &str, bus: &str| json!({ "driver": "virtio-blk-pci", "id": id, "bus": bus, "drive": "hnode" });
    assert_eq!(execute(&mut wire, "device_add", disk("h", "rp0"))?, json!({ "return": {} }));
    let taken = "Conflicts with use by /machine/peripheral/h/virtio-backend as 'root', which does not allow 'write' on hnode";
    assert_eq!(desc(&execute(&mut wire, "device_add", disk("i", "rp1"))?), taken);
    Ok(())
}

#[test]
fn what_happens_to_devices_is_told() -> Result<()> {
    let broker = Broker::with_devices()?;
    let bus = broker.bus.clone().ok_or("no bus")?;
    let mut wire = negotiated(&broker)?;
    wire.ask("{'execute': 'query-pci'}")?;
    bus.event(Event::BackEnd { id: "b0".to_owned(), connected: false });
    let event = wire.line()?;
    assert_eq!(event["event"], "__org.bulkhead_DEVICE_BACK_END");
    assert_eq!(
        event["data"],
        json!({ "device": "b0", "path": "/machine/peripheral/b0", "connected": false })
    );
    bus.event(Event::UnplugRefused { id: "b0".to_owned() });
    let event = wire.line()?;
    assert_eq!(event["event"], "__org.bulkhead_DEVICE_UNPLUG_REFUSED");
    assert_eq!(event["data"], json!({ "device": "b0", "path": "/machine/peripheral/b0" }));
    Ok(())
}

#[test]
fn statistics_are_those_of_the_guest() -> Result<()> {
    let broker = Broker::with_devices()?;
    let bus = broker.bus.clone().ok_or("no bus")?;
    let mut wire = negotiated(&broker)?;
    bus.set_stats(1_600_000_000, vec![(4, 123), (5, 456), (77, 1)]);
    let get = json!({ "path": "/machine/peripheral/b0", "property": "guest-stats" });
    let reply = execute(&mut wire, "qom-get", get)?;
    assert_eq!(reply.pointer("/return/last-update"), Some(&json!(1_600_000_000)));
    assert_eq!(reply.pointer("/return/stats/stat-free-memory"), Some(&json!(123)));
    assert_eq!(reply.pointer("/return/stats/stat-total-memory"), Some(&json!(456)));
    assert_eq!(reply.pointer("/return/stats/stat-swap-in"), Some(&json!(u64::MAX)));
    Ok(())
}

/// What is kept is bounded; kinds that need more than the opener gives are refused.
#[test]
fn character_devices_are_bounded() -> Result<()> {
    let broker = Broker::with_devices()?;
    let mut wire = negotiated(&broker)?;
    let null = |id: &str| json!({ "id": id, "backend": { "type": "null", "data": {} } });
    for number in 0..128 {
        let reply = execute(&mut wire, "chardev-add", null(&format!("c{number}")))?;
        assert_eq!(reply, json!({ "return": {} }), "{number}");
    }
    let reply = execute(&mut wire, "chardev-add", null("one-more"))?;
    assert!(desc(&reply).starts_with("at most 128 character devices"), "{reply}");
    let file = json!({ "type": "file", "data": { "out": "/f" } });
    let reply = execute(&mut wire, "chardev-change", json!({ "id": "c0", "backend": file }))?;
    assert!(desc(&reply).contains("on the command line only"), "{reply}");
    let long = "/".repeat(108);
    let reply = execute(&mut wire, "chardev-add", json!({ "id": "x", "backend": unix(&long) }))?;
    assert_eq!(desc(&reply), format!("UNIX socket path '{long}' is too long"));
    Ok(())
}

/// A character device of the command line that no device uses can be removed, and its id used again.
#[test]
fn a_character_device_of_the_command_line_can_be_removed() -> Result<()> {
    let broker = Broker::with_devices()?;
    let mut wire = negotiated(&broker)?;
    assert_eq!(filename(&mut wire, "sk")?["filename"], "disconnected:unix:/sk");
    assert_eq!(execute(&mut wire, "chardev-remove", json!({ "id": "sk" }))?, json!({ "return": {} }));
    assert_eq!(filename(&mut wire, "sk")?, Value::Null);
    let reply = execute(&mut wire, "chardev-add", json!({ "id": "sk", "backend": unix("/other") }))?;
    assert_eq!(reply, json!({ "return": {} }));
    assert_eq!(filename(&mut wire, "sk")?["filename"], "disconnected:unix:/other");
    Ok(())
}

/// The id is that of the daemon's thread on the host, whatever namespace it lives in.
#[test]
fn an_io_thread_is_a_thread_of_the_host() -> Result<()> {
    if !vms_run_here() {
        return Ok(());
    }
    let vm = Vm::builder().args(["-S", "-m", "64M", "-object", "iothread,id=io0,poll-max-ns=5"]);
    let vm =
        vm.args(["-object", "iothread,id=idle", "-device", "virtio-balloon-pci,iothread=io0"]).start()?;
    let mut wire = Wire::connect(&vm.dir().join("q.sock"))?;
    wire.negotiate(false)?;
    let reply = wire.ask("{'execute': 'query-iothreads'}")?;
    let threads = reply["return"].as_array().cloned().unwrap_or_default();
    assert_eq!(threads.len(), 1, "{reply}: one that no device uses does not exist");
    assert_eq!((&threads[0]["id"], &threads[0]["poll-max-ns"]), (&json!("io0"), &json!(5)));
    let id = threads[0]["thread-id"].as_i64().ok_or("no id")?;
    assert_eq!(std::fs::read_to_string(format!("/proc/{id}/comm"))?, "io0\n");
    let status = std::fs::read_to_string(format!("/proc/{id}/status"))?;
    let process = status.lines().find_map(|line| line.strip_prefix("Tgid:")).ok_or("no process")?;
    let name = std::fs::read_to_string(format!("/proc/{}/cmdline", process.trim()))?;
    assert!(name.contains("bulkhead-balloon"), "{name}");
    Ok(())
}
