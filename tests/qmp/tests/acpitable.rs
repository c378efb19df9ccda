//! `-acpitable` on the command line: what Bulkhead and QEMU refuse, and how.

use std::fs;

use bulkhead_framework::{Failure, Result, Scratch};
use bulkhead_qmp_tests::started::Server;
use bulkhead_qmp_tests::vms_run_here;

const SOURCE: &str = "'-acpitable' requires one of 'data' or 'file'";
const PATH: &str = "'-acpitable' requires at least one pathname";

/// Values, and what is wrong with them. Files: `short` has 35 bytes, `big` 65,500.
const REFUSED: [(&str, &str); 23] = [
    ("sig=FOOO", SOURCE),
    ("file=short,data=short", SOURCE),
    ("rev=1,oem_id=a,oem_table_id=b,oem_rev=2,asl_compiler_id=c,asl_compiler_rev=3", SOURCE),
    ("data=", PATH),
    ("file=", PATH),
    ("data=short,foo=1", "Invalid parameter 'foo'"),
    ("id=x,data=short", "Invalid parameter 'id'"),
    ("rev=x,data=short", "Parameter 'rev' expects a uint64 value"),
    ("rev=-1,data=short", "Parameter 'rev' expects a uint64 value"),
    ("rev=1k,data=short", "Parameter 'rev' expects a uint64 value"),
    ("rev=08,data=short", "Parameter 'rev' expects a uint64 value"),
    ("rev=256,data=short", "Parameter 'rev' expects uint8_t"),
    ("rev=0400,data=short", "Parameter 'rev' expects uint8_t"),
    ("oem_rev=4294967296,data=short", "Parameter 'oem_rev' expects uint32_t"),
    ("oem_rev=18446744073709551616,data=short", "Parameter 'oem_rev' expects a uint64 value"),
    ("asl_compiler_rev=,data=short", "Parameter 'asl_compiler_rev' expects a uint64 value"),
    ("data=:", "can't open file : No such file or directory"),
    ("nope", "can't open file nope: No such file or directory"),
    ("data=short:nope", "can't open file nope: No such file or directory"),
    ("file=nope:short", "can't open file nope: No such file or directory"),
    ("file=short", "ACPI table claiming to have header is too short, available: 35, expected: 36"),
    ("sig=A,data=big", "ACPI table too big, requested: 65536, max: 65535"),
    ("file=big:short:short", "ACPI table too big, requested: 65570, max: 65535"),
];

/// The last line of a start that fails.
fn refusal(server: Server, value: &str) -> Result<String> {
    let scratch = Scratch::new()?;
    fs::write(scratch.path().join("short"), [0; 35])?;
    fs::write(scratch.path().join("big"), [0; 65_500])?;
    let mut command = server.command(scratch.path(), ":", &format!("-acpitable {value}"));
    let status = command.spawn()?.wait()?;
    let text = fs::read_to_string(scratch.path().join("errors"))?;
    if status.code() != Some(1) {
        return Err(Failure::new(format!("{server:?} {value}: {status}: {text}")));
    }
    Ok(text.lines().last().unwrap_or_default().to_owned())
}

fn check(server: Server) -> Result<()> {
    for (value, expected) in REFUSED {
        let line = refusal(server, value)?;
        let expected = format!(": -acpitable {value}: {expected}");
        assert!(line.ends_with(&expected), "{server:?}: {line:?} does not end with {expected:?}");
    }
    Ok(())
}

#[test]
fn qemu_refuses_tables_so() -> Result<()> {
    check(Server::Qemu)
}

#[test]
fn a_command_line_takes_tables_as_qemus() -> Result<()> {
    if vms_run_here() { check(Server::Bulkhead) } else { Ok(()) }
}
