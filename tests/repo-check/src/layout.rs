//! Who may depend on whom, how long files may be, and where unsafe code is.

use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::metadata::{self, root, text};

/// Lines that a source file and a `main.rs` may have.
const FILE_LINES: usize = 800;
const MAIN_LINES: usize = 100;

/// The only sources with unsafe code. One more needs a reason that a reviewer accepts.
const UNSAFE: [&str; 21] = [
    "device-daemons/kit/src/io.rs",
    "device-daemons/net/src/tap.rs",
    "device-daemons/net/tests/packets.rs",
    "jail-profiles/jail/src/alarm.rs",
    "jail-profiles/jail/src/footprint.rs",
    "jail-profiles/jail/src/link.rs",
    "jail-profiles/jail/src/owner.rs",
    "jail-profiles/jail/src/sandbox.rs",
    "jail-profiles/jail/src/start.rs",
    "jail-profiles/jail/src/surroundings.rs",
    "jail-profiles/jail/tests/filter.rs",
    "jail-profiles/launcher/src/doctor/sys.rs",
    "jail-profiles/launcher/src/guard.rs",
    "jail-profiles/launcher/src/jailed.rs",
    "jail-profiles/launcher/src/opener/inherited.rs",
    "jail-profiles/launcher/src/opener/tap.rs",
    "jail-profiles/launcher/src/spawn.rs",
    "qmp-broker/broker/src/fd.rs",
    "qmp-broker/broker/src/held.rs",
    "tests/native/src/enter.rs",
    "vmm-core/core/src/sys.rs",
];

/// Beyond the shared crates, what a process may be made of.
const EXCEPTIONS: [(&str, &str); 1] = [("bulkhead-launcher", "bulkhead-guest")];

#[test]
fn processes_share_apis_and_the_jail_only() {
    let packages = metadata::packages(false);
    let names: Vec<String> = packages.iter().map(|package| text(package, "name")).collect();
    let mut wrong = Vec::new();
    for package in packages.iter().filter(|package| !is_test(package)) {
        let name = text(package, "name");
        let device = text(package, "manifest_path").contains("/device-daemons/");
        for dependency in package.get("dependencies").and_then(Value::as_array).unwrap() {
            let on = text(dependency, "name");
            let shared = on.ends_with("api") || on == "bulkhead-jail" || (on == "bulkhead-kit" && device);
            let own = names.contains(&on) && text(dependency, "kind") != "dev";
            if own && !shared && !EXCEPTIONS.contains(&(name.as_str(), on.as_str())) {
                wrong.push(format!("{name} depends on {on}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn apis_depend_on_apis_only() {
    let packages = metadata::packages(false);
    let names: Vec<String> = packages.iter().map(|package| text(package, "name")).collect();
    for package in packages.iter().filter(|package| text(package, "name").ends_with("api")) {
        for dependency in package.get("dependencies").and_then(Value::as_array).unwrap() {
            let on = text(dependency, "name");
            assert!(!names.contains(&on) || on.ends_with("api"), "{} depends on {on}", text(package, "name"));
        }
    }
}

#[test]
fn files_are_short() {
    let mut wrong = Vec::new();
    for (path, content) in sources() {
        let lines = content.lines().count();
        let most = if path.ends_with("/main.rs") { MAIN_LINES } else { FILE_LINES };
        if lines >= most {
            wrong.push(format!("{path} has {lines} lines; under {most} are allowed"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn unsafe_code_is_where_it_is_listed() {
    let mut found: Vec<String> = sources()
        .into_iter()
        .filter(|(_, content)| content.lines().any(is_unsafe))
        .map(|(path, _)| path)
        .collect();
    found.retain(|path| !path.starts_with("tests/guest/program/"));
    let unlisted: Vec<&String> = found.iter().filter(|path| !UNSAFE.contains(&path.as_str())).collect();
    assert!(unlisted.is_empty(), "unsafe code outside the list: {unlisted:#?}");
    let gone: Vec<&&str> = UNSAFE.iter().filter(|listed| !found.iter().any(|path| path == *listed)).collect();
    assert!(gone.is_empty(), "listed without need: {gone:#?}");
}

fn is_unsafe(line: &str) -> bool {
    let code = line.split("//").next().unwrap_or_default();
    ["{", "fn ", "impl ", "extern "].iter().any(|what| code.contains(&format!("{} {what}", "unsafe")))
}

fn is_test(package: &Value) -> bool {
    Path::new(&text(package, "manifest_path")).starts_with(root().join("tests"))
}

/// Every Rust source, with its path from the top.
fn sources() -> Vec<(String, String)> {
    let mut found = Vec::new();
    collect(&root(), "", &mut found);
    assert!(found.len() > 10, "only {} sources", found.len());
    found
}

fn collect(dir: &Path, below: &str, found: &mut Vec<(String, String)>) {
    for entry in fs::read_dir(dir).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        if name.starts_with('.') || name == "target" {
            continue;
        }
        let path = format!("{below}{name}");
        if entry.file_type().unwrap().is_dir() {
            collect(&entry.path(), &format!("{path}/"), found);
        } else if name.ends_with(".rs") {
            found.push((path, fs::read_to_string(entry.path()).unwrap()));
        }
    }
}
