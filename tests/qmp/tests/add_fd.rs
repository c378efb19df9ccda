//! `-add-fd` and `/dev/fdset/N` on the command line: one table for Bulkhead and QEMU.

use std::fs;
use std::path::Path;
use std::process::Child;

use bulkhead_framework::{Failure, Result, Scratch};
use bulkhead_qmp_tests::started::Server;
use bulkhead_qmp_tests::vms_run_here;
use bulkhead_qmp_tests::wire::Wire;
use serde_json::{Value, json};

/// Opens 7 to read, 8 to write, 9 to do both, 6 as a pipe's end.
const SHELL: &str = "exec 7<input 8>>output 9<>both; mkfifo pipe; exec 5<>pipe 6>pipe 5>&-";

fn start(server: Server, dir: &Path, args: &str) -> Result<Child> {
    fs::write(dir.join("input"), "input")?;
    fs::write(dir.join("output"), "before ")?;
    Ok(server.command(dir, SHELL, args).spawn()?)
}

/// The last line of a start that fails, without the program's name.
fn refusal(server: Server, args: &str) -> Result<String> {
    let scratch = Scratch::new()?;
    let status = start(server, scratch.path(), args)?.wait()?;
    let text = fs::read_to_string(scratch.path().join("errors"))?;
    if status.code() != Some(1) {
        return Err(Failure::new(format!("{server:?} {args}: {status}: {text}")));
    }
    let line = text.lines().last().unwrap_or_default();
    Ok(line.split_once(": ").map_or(line, |(_, rest)| rest).to_owned())
}

/// What is refused, and how: the line, or for a character device its cause.
const REFUSED: [(&str, &str); 21] = [
    ("-add-fd fd=7", "-add-fd fd=7: set option is required and must be non-negative"),
    ("-add-fd set=7", "-add-fd set=7: fd option is required and must be non-negative"),
    ("-add-fd fd=-1,set=0", "-add-fd fd=-1,set=0: fd option is required and must be non-negative"),
    ("-add-fd fd=2,set=0", "-add-fd fd=2,set=0: fd cannot be a standard I/O stream"),
    ("-add-fd fd=0,set=-1", "-add-fd fd=0,set=-1: fd cannot be a standard I/O stream"),
    ("-add-fd fd=55,set=0", "-add-fd fd=55,set=0: fd is not valid or already in use"),
    ("-add-fd fd=99999999999,set=1", "-add-fd fd=99999999999,set=1: fd is not valid or already in use"),
    ("-add-fd fd=7,set=-1", "-add-fd fd=7,set=-1: set option is required and must be non-negative"),
    ("-add-fd fd=x,set=1", "-add-fd fd=x,set=1: Parameter 'fd' expects a number"),
    ("-add-fd fd=7,set=1,foo=1", "-add-fd fd=7,set=1,foo=1: Invalid parameter 'foo'"),
    (
        "-add-fd fd=7,set=99999999999999999999",
        "-add-fd fd=7,set=99999999999999999999: Value '99999999999999999999' is too large for parameter 'set'",
    ),
    ("-add-fd fd=7,set=1 -chardev file,id=a,path=/dev/fdset/1", "Permission denied"),
    ("-add-fd fd=9,set=1 -chardev file,id=a,path=/dev/fdset/1", "Permission denied"),
    ("-add-fd fd=8,set=1 -chardev file,id=a,path=/dev/fdset/2", "No such file or directory"),
    ("-add-fd fd=8,set=1 -chardev file,id=a,path=/dev/fdset/x", "Invalid argument"),
    ("-add-fd fd=8,set=1 -chardev file,id=a,path=/dev/fdset/", "Invalid argument"),
    ("-add-fd fd=8,set=1 -chardev file,id=a,path=/dev/fdset/-1", "Invalid argument"),
    ("-add-fd fd=8,set=1 -chardev file,id=a,path=/dev/fdset/0x1", "Invalid argument"),
    ("-add-fd fd=8,set=1 -chardev file,id=a,path=/dev/fdset/1x", "Invalid argument"),
    ("-add-fd fd=6,set=1 -chardev file,id=a,path=/dev/fdset/1", "Invalid argument"),
    ("-chardev file,id=a,path=/dev/fdset/0", "No such file or directory"),
];

fn check_refusals(server: Server) -> Result<()> {
    for (args, expected) in REFUSED {
        let expected =
            match args.rsplit_once(" -chardev ").or(args.strip_prefix("-chardev ").map(|rest| ("", rest))) {
                Some((_, chardev)) => {
                    let path = chardev.rsplit_once('=').map_or("", |(_, path)| path);
                    format!("-chardev {chardev}: Could not open '{path}': {expected}")
                }
                None => expected.to_owned(),
            };
        assert_eq!(refusal(server, args)?, expected, "{server:?} {args}");
    }
    Ok(())
}

/// Asks without arguments, or with those of a set.
fn ask(wire: &mut Wire, command: &str, set: Option<i64>) -> Result<Value> {
    let arguments = set.map(|set| format!(", 'arguments': {{'fdset-id': {set}}}")).unwrap_or_default();
    wire.ask(&format!("{{'execute': '{command}'{arguments}}}"))
}

/// The sets, each with its texts.
fn sets(wire: &mut Wire) -> Result<Value> {
    let mut reply = ask(wire, "query-fdsets", None)?;
    let sets = reply.get_mut("return").and_then(Value::as_array_mut).ok_or("no list")?;
    for fd in sets.iter_mut().filter_map(|set| set.get_mut("fds")).filter_map(Value::as_array_mut).flatten() {
        assert!(fd.as_object_mut().and_then(|fd| fd.remove("fd")).is_some_and(|number| number.is_i64()));
    }
    Ok(json!(sets))
}

/// A VM with sets, some of which are in use.
fn check_sets(server: Server) -> Result<()> {
    let scratch = Scratch::new()?;
    let args = "-add-fd fd=7,set=3,opaque=first -add-fd fd=7,set=3 -add-fd set=0x1,fd=8,opaque=a,,b -add-fd fd=8,set=9 \
                -chardev file,id=a,path=/dev/fdset/1,append=on -chardev file,id=b,path=/dev/fdset/09 \
                -qmp unix:q,server=on,wait=off";
    let mut child = start(server, scratch.path(), args)?;
    // A panic must not leave the server behind.
    let ended = std::panic::catch_unwind(|| run_sets(&scratch.path().join("q")));
    let ended = ended.unwrap_or_else(|_| Err("an assertion failed".into()));
    if ended.is_err() {
        child.kill()?;
    }
    let status = child.wait()?;
    let log = fs::read_to_string(scratch.path().join("errors"))?;
    ended.map_err(|failure| Failure::new(format!("{server:?}: {failure}: {log}")))?;
    assert!(status.success(), "{log}");
    // Truncated by the second, and nothing was written.
    assert_eq!(fs::read_to_string(scratch.path().join("output"))?, "");
    Ok(())
}

fn run_sets(path: &Path) -> Result<()> {
    let mut wire = Wire::connect(path)?;
    wire.negotiate(false)?;
    let three = json!({"fdset-id": 3, "fds": [{"opaque": "first"}, {}]});
    let nine = json!({"fdset-id": 9, "fds": [{}]});
    assert_eq!(sets(&mut wire)?, json!([nine, three, {"fdset-id": 1, "fds": [{"opaque": "a,b"}]}]));
    ask(&mut wire, "cont", None)?;
    assert_eq!(ask(&mut wire, "remove-fd", Some(1))?, json!({"return": {}}));
    let one = json!({"fdset-id": 1, "fds": []});
    assert_eq!(sets(&mut wire)?, json!([nine, three, one]), "in use");
    assert_eq!(ask(&mut wire, "remove-fd", Some(1))?, json!({"return": {}}));
    drop(wire);
    // The last client takes the sets with it, a moment later, but for those in use.
    let end = std::time::Instant::now() + bulkhead_qmp_tests::wire::LIMIT;
    loop {
        let mut wire = Wire::connect(path)?;
        wire.negotiate(false)?;
        let left = sets(&mut wire)?;
        if left == json!([nine, one]) {
            // QEMU forgets what a client asked for that is gone.
            return ask(&mut wire, "quit", None).map(drop);
        }
        if std::time::Instant::now() > end {
            return Err(Failure::new(format!("not in time: {left}")));
        }
    }
}

#[test]
fn qemu_takes_descriptors_so() -> Result<()> {
    check_refusals(Server::Qemu)?;
    check_sets(Server::Qemu)
}

#[test]
fn a_command_line_takes_descriptors_as_qemus() -> Result<()> {
    if !vms_run_here() {
        return Ok(());
    }
    check_refusals(Server::Bulkhead)?;
    check_sets(Server::Bulkhead)
}

/// QEMU cuts this number to 32 bits; ours does not, and takes no descriptor for two purposes.
#[test]
fn a_descriptor_is_what_was_named() -> Result<()> {
    let refusal = |args| refusal(Server::Bulkhead, args);
    let cut = "-add-fd fd=4294967303,set=1";
    assert_eq!(refusal(cut)?, format!("{cut}: fd is not valid or already in use"));
    let twice = refusal("-add-fd fd=7,set=1 -chardev socket,id=a,fd=7")?;
    assert_eq!(twice, "-chardev socket,id=a,fd=7: File descriptor '7' is not a socket: it is not open");
    Ok(())
}
