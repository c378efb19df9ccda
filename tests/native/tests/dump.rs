//! `memsave` and `pmemsave` on a running guest: what is in the file, and what is left when nobody wants it any more.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{PipeReader, Read as _};
use std::os::fd::AsFd as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use bulkhead_framework::{Failure, Process, Qmp, Result};
use bulkhead_jail::link::send_packet;
use bulkhead_native_tests::{Guest, SOON, eventually};
use nix::sys::socket::MsgFlags;
use nix::unistd::{Whence, lseek, mkfifo};
use serde_json::{Value, json};

const PAGE: u64 = 4096;
const GIB: u64 = 1 << 30;
/// First page that the guest fills, and the one above 4 GiB.
const FIRST: u64 = 0x4000;
const HIGH: u64 = 0x10_0800;
const PAGES: u64 = 64;
const STEP: u64 = 16;
/// The GiB at which it shows the first one again.
const ALIAS: u64 = 7;

/// A guest that has filled its pages, with RAM on both sides of the hole.
fn filled() -> Result<(Guest, Qmp)> {
    let append = format!("test=fill first={FIRST} high={HIGH} pages={PAGES} step={STEP} alias={ALIAS}");
    let guest = Guest::boot(&append, &["-m", "4G", "-smp", "2"])?;
    guest.expect("filled, alias true")?;
    let qmp = guest.qmp()?;
    Ok((guest, qmp))
}

fn file(guest: &Guest) -> PathBuf {
    guest.trace().dir().join("dump")
}

/// Saves, as a string of the command and its arguments; the reply is an error's text or empty.
fn save(qmp: &mut Qmp, command: &str, arguments: Value) -> Result<String> {
    Ok(qmp.try_execute(command, arguments)?.err().map(|error| error.desc).unwrap_or_default())
}

/// Whether the page at `at` in the file is that of this number.
fn is_page(file: &File, at: u64, number: u64) -> Result<bool> {
    let mut page = vec![0; 4096];
    file.read_exact_at(&mut page, at)?;
    let number = u32::try_from(number).unwrap_or(u32::MAX);
    let (first, last) = (page.get(..4), page.get(4092..));
    let between = page.get(4..4092).is_some_and(|bytes| bytes.iter().all(|byte| *byte == 0));
    Ok(first == Some(&number.to_le_bytes()) && last == Some(&(!number).to_le_bytes()) && between)
}

#[test]
fn physical_memory_is_what_the_guest_has_written_and_holes_stay_holes() -> Result<()> {
    let (guest, mut qmp) = filled()?;
    let path = file(&guest);
    // Over the end of RAM, at 5 GiB.
    let size = 6 * GIB + 5;
    let said = save(&mut qmp, "pmemsave", json!({ "val": 0, "size": size, "filename": path }))?;
    guest.check(said.is_empty(), &said)?;
    let dump = File::open(&path)?;
    let metadata = dump.metadata()?;
    guest.check(metadata.len() == size, &format!("{} bytes", metadata.len()))?;
    for number in [FIRST, HIGH].iter().flat_map(|first| (0..PAGES).map(move |page| first + page * STEP)) {
        guest.check(is_page(&dump, number * PAGE, number)?, &format!("page {number:#x}"))?;
    }
    // The guest's image and pages, in huge pages, and nothing of what it has not touched.
    let most = 32 << 20;
    guest.check(metadata.blocks() * 512 < most, &format!("{} blocks", metadata.blocks()))?;
    let data = |from: u64| lseek(&dump, i64::try_from(from).unwrap_or(0), Whence::SeekData);
    let next = data(3 * GIB).map_err(|error| error.to_string())?;
    guest.check(u64::try_from(next) == Ok(HIGH * PAGE), &format!("data at {next:#x}"))?;
    guest.check(data(5 * GIB).is_err(), "data over the end of RAM")?;
    // A part from within a page, across the hole; what the file had is gone.
    let from = HIGH * PAGE - 2 * GIB + 4092;
    let said = save(&mut qmp, "pmemsave", json!({ "val": from, "size": 2 * GIB, "filename": path }))?;
    guest.check(said.is_empty(), &said)?;
    let mut end = [0; 4];
    dump.read_exact_at(&mut end, 2 * GIB - 4)?;
    let is_end = dump.metadata()?.len() == 2 * GIB
        && u64::from(u32::from_le_bytes([end[0], end[1], end[2], end[3]])) == 0;
    guest.check(is_end, &format!("{end:?} at the end"))?;
    let mut first = [0; 4];
    dump.read_exact_at(&mut first, 2 * GIB - 4092)?;
    guest.check(u64::from(u32::from_le_bytes(first)) == HIGH, &format!("{first:?}"))?;
    fs::remove_file(path)?;
    guest.quit()
}

#[test]
fn virtual_memory_is_what_the_vcpus_page_tables_say() -> Result<()> {
    let (guest, mut qmp) = filled()?;
    let path = file(&guest);
    let mut save = |val: i64, size: u64, cpu: u32| {
        let arguments = json!({ "val": val, "size": size, "filename": path, "cpu-index": cpu });
        save(&mut qmp, "memsave", arguments)
    };
    let alias = i64::try_from(ALIAS * GIB + FIRST * PAGE).unwrap_or(0);
    let size = PAGES * STEP * PAGE;
    for state in ["running", "stopped"] {
        let said = save(alias, size, 0)?;
        guest.check(said.is_empty(), &said)?;
        let dump = File::open(&path)?;
        guest.check(dump.metadata()?.len() == size, "another size")?;
        for page in 0..PAGES {
            let at = page * STEP * PAGE;
            guest.check(is_page(&dump, at, FIRST + page * STEP)?, &format!("{state}: page {page}"))?;
        }
        guest.qmp()?.execute("stop", json!({}))?;
    }
    // The second vCPU waits for its start without page tables: an address is where it says.
    let said = save(i64::try_from(FIRST * PAGE).unwrap_or(0), PAGE, 1)?;
    guest.check(said.is_empty() && is_page(&File::open(&path)?, 0, FIRST)?, &said)?;
    // Not mapped at all, only in part, and no address.
    let end = (1 + ALIAS) * GIB;
    let cases = [
        (end, PAGE, 0),
        (end - 4097, 8192, 4097),
        (1 << 47, 1, 0),
        (1 << 63 | alias.unsigned_abs(), 1, 0),
        (0u64.wrapping_sub(1 << 47), 4096, 0),
        (u64::MAX, 1, 0),
    ];
    for (val, size, there) in cases {
        let said = save(val.cast_signed(), size, 0)?;
        let expected = format!("Invalid addr 0x{val:016x}/size {size} specified");
        let length = fs::metadata(&path)?.len();
        guest.check(
            said == expected && length == there,
            &format!("{said:?}, not {expected:?}; {length} bytes"),
        )?;
    }
    let said = save(0, 1, 2)?;
    guest.check(said == "Parameter 'cpu-index' expects a CPU number", &said)?;
    fs::remove_file(path)?;
    guest.quit()
}

/// Gives the VM the writing end of a pipe, as the member of set 1, by a session of its own.
fn pipe(guest: &Guest) -> Result<(PipeReader, UnixStream)> {
    let (reader, writer) = std::io::pipe()?;
    let mut stream = UnixStream::connect(guest.trace().dir().join("q.sock"))?;
    stream.set_read_timeout(Some(SOON))?;
    let send = |text: &str, fds: &[std::os::fd::BorrowedFd<'_>]| {
        send_packet(stream.as_fd(), text.as_bytes(), fds, MsgFlags::empty())
    };
    let text = |error: nix::errno::Errno| error.to_string();
    send("{'execute': 'qmp_capabilities'}", &[]).map_err(text)?;
    send("{'execute': 'add-fd', 'arguments': {'fdset-id': 1}}", &[writer.as_fd()]).map_err(text)?;
    let request = json!({ "execute": "pmemsave", "arguments": {
        "val": 0, "size": i64::MAX, "filename": "/dev/fdset/1" }});
    send(&request.to_string(), &[]).map_err(text)?;
    let mut seen = String::new();
    while !seen.contains("\"fdset-id\"") {
        let mut some = [0; 1024];
        let count = stream.read(&mut some)?;
        seen.push_str(&String::from_utf8_lossy(some.get(..count).unwrap_or_default()));
        if count == 0 {
            return Err(Failure::new(seen));
        }
    }
    Ok((reader, stream))
}

/// A dump process that waits for the reader of its pipe, in its jail.
fn dump_at_work(guest: &Guest) -> Result<Process> {
    let found = eventually("a dump at work", SOON, || {
        let dump = guest.trace().find("bulkhead-dump").ok_or("no dump")?;
        let waits = fs::read_to_string(format!("/proc/{}/wchan", dump.pid)).unwrap_or_default();
        if dump.seccomp == 2 && waits.contains("pipe") { Ok(dump) } else { Err(waits) }
    });
    found.map_err(|failure| guest.explain(failure))
}

fn no_dump(guest: &Guest) -> Result<()> {
    let gone = eventually("the end of the dump", SOON, || match guest.trace().find("bulkhead-dump") {
        Some(dump) => Err(format!("{dump:?}")),
        None => Ok(()),
    });
    gone.map_err(|failure| guest.explain(failure))
}

#[test]
fn a_dump_ends_with_its_client_with_the_broker_and_with_the_vm() -> Result<()> {
    let guest = Guest::boot("test=counter", &[])?;
    let mut qmp = guest.running()?;
    // The client goes; others are served all the time.
    let (_reader, client) = pipe(&guest)?;
    let dump = dump_at_work(&guest)?;
    guest.check(dump.no_new_privs && dump.capabilities == [0; 3], &format!("{dump:?}"))?;
    guest.check(qmp.status()? == "running", "not running")?;
    let kinds = kinds(&dump)?;
    guest.check(!kinds.keys().any(|kind| kind.contains("kvm")), &format!("{kinds:?}"))?;
    drop(client);
    no_dump(&guest)?;
    let null = json!({ "val": 0, "size": 4096, "filename": "/dev/null" });
    qmp.execute("pmemsave", null.clone())?;
    // The broker dies.
    let (_reader, _client) = pipe(&guest)?;
    dump_at_work(&guest)?;
    guest.kill("broker")?;
    no_dump(&guest)?;
    guest.qmp()?.execute("pmemsave", null)?;
    // The VM ends.
    let (_reader, _client) = pipe(&guest)?;
    dump_at_work(&guest)?;
    guest.quit()
}

/// Its descriptors by what they are, and how many of each.
fn kinds(process: &Process) -> Result<BTreeMap<String, usize>> {
    let mut kinds = BTreeMap::new();
    for entry in fs::read_dir(format!("/proc/{}/fd", process.pid))? {
        // Some are gone again.
        if let Ok(target) = fs::read_link(entry?.path()) {
            let target = target.display().to_string();
            let kind = target.split_once(":[").map_or(target.as_str(), |(kind, _)| kind);
            *kinds.entry(kind.to_owned()).or_default() += 1;
        }
    }
    Ok(kinds)
}

#[test]
fn fifty_dumps_leave_no_process_and_no_descriptor() -> Result<()> {
    let guest = Guest::boot("test=counter", &[])?;
    let mut qmp = guest.running()?;
    let mut round = || qmp.execute("pmemsave", json!({ "val": 0, "size": 1 << 20, "filename": "/dev/null" }));
    round()?;
    no_dump(&guest)?;
    let count = || -> Result<Vec<(String, usize)>> {
        let all = guest.trace().processes().into_iter().map(|process| {
            let total: usize = kinds(&process)?.values().sum();
            Ok((process.name, total))
        });
        let mut all = all.collect::<Result<Vec<_>>>()?;
        all.sort();
        Ok(all)
    };
    let before = count()?;
    for _ in 0..50 {
        round()?;
    }
    no_dump(&guest)?;
    // The guard may have had one more for a moment.
    let same = eventually("no more descriptors than before", SOON, || {
        let now = count().map_err(|failure| failure.to_string())?;
        let names = |all: &[(String, usize)]| all.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>();
        let no_more = now.iter().zip(&before).all(|((_, now), (_, before))| now <= before);
        if no_more && names(&now) == names(&before) {
            Ok(())
        } else {
            Err(format!("{now:?}, not {before:?}"))
        }
    });
    same.map_err(|failure| guest.explain(failure))?;
    guest.quit()
}

#[test]
fn outputs_that_cannot_be_are_refused_and_nobody_waits() -> Result<()> {
    let guest = Guest::boot("test=counter", &["-chardev", "file,id=f,path=log"])?;
    let mut qmp = guest.running()?;
    let dir = guest.trace().dir().to_owned();
    let fifo = dir.join("fifo");
    mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).map_err(std::io::Error::from)?;
    let at = |name: &str| dir.join(name).display().to_string();
    let cases = [
        (at("fifo"), 1, "Could not open 'PATH': No such device or address"),
        (at("."), 1, "Could not open 'PATH': Is a directory"),
        (at("log"), 1, "Could not open 'PATH': Device or resource busy"),
        ("/proc/version/x".to_owned(), 1, "Could not open 'PATH': Not a directory"),
        ("/dev/full".to_owned(), 1, "An IO error has occurred"),
        (at("large"), i64::MAX, "An IO error has occurred"),
        (at("large"), -1, "Parameter 'size' expects a non-negative value"),
        (at("large"), 0, ""),
    ];
    for (path, size, expected) in cases {
        let said = save(&mut qmp, "pmemsave", json!({ "val": 0, "size": size, "filename": path }))?;
        let expected = expected.replace("PATH", &path);
        guest.check(said == expected, &format!("{said:?}, not {expected:?}"))?;
    }
    // One that somebody reads is written, from the first byte to the last.
    let reader = std::thread::spawn(move || -> std::io::Result<usize> { Ok(fs::read(fifo)?.len()) });
    std::thread::sleep(Duration::from_millis(100));
    let said = save(&mut qmp, "pmemsave", json!({ "val": 0, "size": 10 << 20, "filename": at("fifo") }))?;
    let read = reader.join().map_err(|_| "the reader panicked")??;
    guest.check(said.is_empty() && read == 10 << 20, &format!("{said:?}, {read} bytes"))?;
    for name in ["fifo", "large", "log"] {
        fs::remove_file(at(name))?;
    }
    guest.quit()
}
