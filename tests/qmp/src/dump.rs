//! The table of cases: `memsave` and `pmemsave`. None makes a file.

use serde_json::{Value, json};

use crate::cases::{Case, error, ok};

fn execute(command: &str, arguments: Value) -> String {
    json!({ "execute": command, "arguments": arguments }).to_string()
}

fn physical(val: impl Into<Value>, size: impl Into<Value>, filename: &str) -> String {
    execute("pmemsave", json!({ "val": val.into(), "size": size.into(), "filename": filename }))
}

fn virtually(val: i64, size: i64, filename: &str, cpu: i64) -> String {
    execute("memsave", json!({ "val": val, "size": size, "filename": filename, "cpu-index": cpu }))
}

/// All cases. The second vCPU is in real mode, as it begins: an address is where it says. The first one may have run.
#[must_use]
pub fn all() -> Vec<Case> {
    [arguments(), outputs(), addresses()].concat()
}

fn arguments() -> Vec<Case> {
    let missing = |name: &str| error(format!("Parameter '{name}' is missing"));
    let no_integer = |name: &str| error(format!("Invalid parameter type for '{name}', expected: integer"));
    let beyond = json!(1u64 << 63);
    vec![
        Case::new(execute("pmemsave", json!({ "val": 0, "size": 1 })), [missing("filename")]),
        Case::new(execute("memsave", json!({ "val": 0, "filename": "/dev/null" })), [missing("size")]),
        Case::new(execute("memsave", json!({ "size": 0, "filename": "/dev/null" })), [missing("val")]),
        Case::new(
            execute("pmemsave", json!({ "val": 0, "size": 1, "filename": "/dev/null", "cpu-index": 0 })),
            [error("Parameter 'cpu-index' is unexpected")],
        ),
        Case::new(physical(beyond.clone(), 1, "/dev/null"), [no_integer("val")]),
        Case::new(physical(0, beyond, "/dev/null"), [no_integer("size")]),
        Case::new(physical(0, 1.5, "/dev/null"), [no_integer("size")]),
        Case::new(physical("0", 1, "/dev/null"), [no_integer("val")]),
        // The vCPU comes before the file.
        Case::new(virtually(0, 1, "/nope/x", 2), [error("Parameter 'cpu-index' expects a CPU number")]),
        Case::new(virtually(0, 1, "/nope/x", -1), [error("Parameter 'cpu-index' expects a CPU number")]),
        Case::new(
            virtually(0, 1, "/nope/x", 1),
            [error("Could not open '/nope/x': No such file or directory")],
        ),
    ]
}

fn outputs() -> Vec<Case> {
    let not_opened = |path: &str, why: &str| error(format!("Could not open '{path}': {why}"));
    let long = format!("/{}", "x".repeat(300));
    let longer = "/x".repeat(2500);
    let mut cases = vec![
        Case::new(physical(0, 1, ""), [not_opened("", "No such file or directory")]),
        Case::new(physical(0, 1, "/"), [not_opened("/", "Is a directory")]),
        Case::new(physical(0, 1, "/nope/x"), [not_opened("/nope/x", "No such file or directory")]),
        Case::new(physical(0, 1, "/dev/null/x"), [not_opened("/dev/null/x", "Not a directory")]),
        // There are none.
        Case::new(physical(0, 1, "/dev/fdset/9"), [not_opened("/dev/fdset/9", "No such file or directory")]),
        Case::new(physical(0, 100_000, "/dev/full"), [error("An IO error has occurred")]),
        Case::new(virtually(0, 100_000, "/dev/full", 0), [error("An IO error has occurred")]),
    ];
    cases.extend(
        [long, longer]
            .map(|path| Case::new(physical(0, 1, &path), [not_opened(&path, "File name too long")])),
    );
    cases
}

fn addresses() -> Vec<Case> {
    let done = || ok(json!({}));
    let mut cases: Vec<Case> =
        [(0, 0), (0, 1), (4095, 8194), (1 << 20, 64 << 20), (-16, 32), (i64::MIN, 4096)]
            .into_iter()
            .map(|(val, size)| Case::new(physical(val, size, "/dev/null"), [done()]))
            .collect();
    cases.extend([
        Case::new(virtually(0, 0, "/dev/null", 1), [done()]),
        Case::new(virtually(4095, 5000, "/dev/null", 0), [done()]),
        Case::new(execute("memsave", json!({ "val": 0, "size": 4096, "filename": "/dev/null" })), [done()]),
    ]);
    // 5.1 does not look at what reading has come to; 7.0 and later refuse what is no memory.
    cases.extend([(1i64 << 40, 4096i64), (-4096, 8192)].map(|(val, size)| {
        let text = format!("Invalid addr 0x{val:016x}/size {size} specified");
        Case::new(virtually(val, size, "/dev/null", 1), [done()])
            .qemu72("it refuses what is no memory", [error(text)])
    }));
    cases
}
