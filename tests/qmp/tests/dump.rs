//! `memsave` and `pmemsave`: what is written, and what becomes of a dump that nobody wants any more.

use std::fs::{self, File};
use std::io::Read as _;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use bulkhead_framework::{Failure, Result, Scratch};
use bulkhead_qmp_tests::broker::{Broker, Kind};
use bulkhead_qmp_tests::fake_dump::{Process, RAM};
use bulkhead_qmp_tests::wire::Wire;
use serde_json::{Value, json};

/// How long something may take that nothing holds up.
const SOON: Duration = Duration::from_secs(20);

fn client(broker: &Broker) -> Result<Wire> {
    let mut wire = Wire::connect(&broker.path(0))?;
    wire.negotiate(false)?;
    Ok(wire)
}

fn pmemsave(val: i64, size: i64, filename: &str) -> String {
    json!({ "execute": "pmemsave", "arguments": { "val": val, "size": size, "filename": filename } })
        .to_string()
}

fn expect(wire: &mut Wire, request: &str, reply: Value) -> Result<()> {
    let received = wire.ask(request)?;
    if received == reply { Ok(()) } else { Err(Failure::new(format!("{request}: {received}"))) }
}

fn done() -> Value {
    json!({ "return": {} })
}

fn error(desc: &str) -> Value {
    json!({ "error": { "class": "GenericError", "desc": desc } })
}

fn until(what: &str, is_so: impl Fn() -> bool) -> Result<()> {
    let end = Instant::now() + SOON;
    while !is_so() {
        if Instant::now() > end {
            return Err(Failure::new(format!("not within {SOON:?}: {what}")));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// Passes a descriptor as a set's only member.
fn add_fd(wire: &mut Wire, set: u32, fd: impl Into<OwnedFd>) -> Result<()> {
    let request = format!("{{'execute': 'add-fd', 'arguments': {{'fdset-id': {set}}}}}");
    let reply = wire.ask_with(&request, &[fd.into().as_fd()])?;
    if reply.get("return").is_some() { Ok(()) } else { Err(Failure::new(reply.to_string())) }
}

fn made(dir: &Path) -> Result<String> {
    let path = dir.join("dump");
    fs::write(&path, vec![9; 5000])?;
    Ok(path.display().to_string())
}

#[test]
fn what_is_saved_is_memory_and_zeros_where_there_is_none() -> Result<()> {
    let broker = Broker::start(&[Kind::Server], false)?;
    let mut wire = client(&broker)?;
    let scratch = Scratch::new()?;
    let path = made(scratch.path())?;
    let end = i64::try_from(RAM).unwrap_or(0);
    // The addresses after the last one begin at 0 again.
    for (val, size, first, last) in
        [(0, 8192, 0xa5, 0), (4095, 2, 0xa5, 0), (end - 1, 5, 0, 0), (-16, 17, 0, 0xa5)]
    {
        expect(&mut wire, &pmemsave(val, size, &path), done())?;
        let bytes = fs::read(&path)?;
        if bytes.len() as i64 != size || bytes.first() != Some(&first) || bytes.last() != Some(&last) {
            return Err(Failure::new(format!("{val} {size}: {} bytes", bytes.len())));
        }
    }
    let request =
        json!({ "execute": "memsave", "arguments": { "val": 4090, "size": 5000, "filename": path } });
    expect(&mut wire, &request.to_string(), done())?;
    let bytes = fs::read(&path)?;
    if bytes.len() != 5000 || bytes.iter().take_while(|byte| **byte == 0xa5).count() != 6 {
        return Err("memsave".into());
    }
    expect(&mut wire, &pmemsave(0, 0, &path), done())?;
    if !fs::read(&path)?.is_empty() {
        return Err("a dump of no bytes".into());
    }
    expect(&mut wire, &pmemsave(0, -1, &path), error("Parameter 'size' expects a non-negative value"))
}

#[test]
fn a_member_of_a_set_is_written_if_it_was_opened_to_write() -> Result<()> {
    let broker = Broker::start(&[Kind::Server], false)?;
    let mut wire = client(&broker)?;
    let scratch = Scratch::new()?;
    let path = made(scratch.path())?;
    add_fd(&mut wire, 1, File::open(&path)?)?;
    add_fd(&mut wire, 1, File::options().read(true).write(true).open(&path)?)?;
    let to = "/dev/fdset/1";
    expect(&mut wire, &pmemsave(0, 1, to), error("Could not open '/dev/fdset/1': Permission denied"))?;
    add_fd(&mut wire, 1, File::options().write(true).open(&path)?)?;
    for _ in 0..2 {
        expect(&mut wire, &pmemsave(0, 4097, to), done())?;
        let bytes = fs::read(&path)?;
        if bytes.len() != 4097 || bytes.first() != Some(&0xa5) || bytes.last() != Some(&0) {
            return Err(Failure::new(format!("{} bytes", bytes.len())));
        }
    }
    expect(
        &mut wire,
        &pmemsave(0, 1, "/dev/fdset/x"),
        error("Could not open '/dev/fdset/x': Invalid argument"),
    )
}

#[test]
fn a_pipe_that_nobody_reads_holds_up_nobody_once_its_client_is_gone() -> Result<()> {
    let broker = Broker::start(&[Kind::Server], false)?;
    let (reader, writer) = std::io::pipe()?;
    let mut wire = client(&broker)?;
    add_fd(&mut wire, 1, writer)?;
    wire.send(pmemsave(0, i64::MAX, "/dev/fdset/1").as_bytes())?;
    until("a process", || broker.dumps.count() == (1, 0))?;
    // Others are served meanwhile.
    let mut other = client(&broker)?;
    expect(&mut other, "{'execute': 'query-fdsets', 'id': 1}", other_sets())?;
    other.send(pmemsave(0, 4096, "/dev/null").as_bytes())?;
    drop(wire);
    let reply = other.line()?;
    if reply != done() {
        return Err(Failure::new(format!("the next dump: {reply}")));
    }
    // A thread does not end as a process does, which the native tests show.
    drop(reader);
    until("both processes have ended", || broker.dumps.count() == (2, 2))
}

fn other_sets() -> Value {
    json!({ "return": [{ "fdset-id": 1, "fds": [{ "fd": 3 }] }], "id": 1 })
}

#[test]
fn a_client_that_only_sends_no_more_gets_its_answer() -> Result<()> {
    let broker = Broker::start(&[Kind::Server], false)?;
    let (mut reader, writer) = std::io::pipe()?;
    let mut wire = client(&broker)?;
    add_fd(&mut wire, 1, writer)?;
    wire.send(pmemsave(0, 1 << 20, "/dev/fdset/1").as_bytes())?;
    wire.stream().shutdown(std::net::Shutdown::Write)?;
    until("a process", || broker.dumps.count() == (1, 0))?;
    std::thread::sleep(Duration::from_millis(500));
    reader.read_exact(&mut vec![0; 1 << 20])?;
    let reply = wire.line()?;
    if reply == done() { Ok(()) } else { Err(Failure::new(reply.to_string())) }
}

#[test]
fn progress_is_told_to_all_once_a_second() -> Result<()> {
    let broker = Broker::start(&[Kind::Server], false)?;
    let (mut reader, writer) = std::io::pipe()?;
    let mut wire = client(&broker)?;
    let mut other = client(&broker)?;
    add_fd(&mut wire, 1, writer)?;
    wire.send(pmemsave(0, 1 << 20, "/dev/fdset/1").as_bytes())?;
    until("a process", || broker.dumps.count() == (1, 0))?;
    std::thread::sleep(Duration::from_millis(1100));
    reader.read_exact(&mut vec![0; 1 << 19])?;
    for wire in [&mut wire, &mut other] {
        let event = wire.event("__org.bulkhead_DUMP_PROGRESS")?;
        let data = event.get("data").ok_or("no data")?;
        let saved = data.get("saved").and_then(Value::as_i64).unwrap_or_default();
        let named =
            data.get("filename") == Some(&json!("/dev/fdset/1")) && data.get("size") == Some(&json!(1 << 20));
        if !named || !(1..1 << 20).contains(&saved) {
            return Err(Failure::new(event.to_string()));
        }
    }
    reader.read_exact(&mut vec![0; 1 << 19])?;
    let reply = wire.line()?;
    if reply == done() { Ok(()) } else { Err(Failure::new(reply.to_string())) }
}

#[test]
fn a_process_that_dies_fails_its_command_and_no_other() -> Result<()> {
    let broker = Broker::start(&[Kind::Server], false)?;
    let mut wire = client(&broker)?;
    broker.dumps.set(Process::DiesLater);
    let reply = wire.ask(&pmemsave(0, 4096, "/dev/null"))?;
    let desc = reply.pointer("/error/desc").and_then(Value::as_str).unwrap_or_default();
    if !desc.starts_with("The dump process has ended") {
        return Err(Failure::new(reply.to_string()));
    }
    // One that never says hello: the client waits for another one until it goes.
    broker.dumps.set(Process::Dies);
    wire.send(pmemsave(0, 4096, "/dev/null").as_bytes())?;
    until("a process that dies", || broker.dumps.count() == (2, 2))?;
    drop(wire);
    broker.dumps.set(Process::Works);
    expect(&mut client(&broker)?, &pmemsave(0, 4096, "/dev/null"), done())
}
