//! Every test that `docs/SPECIFICATION.md` names exists.

use std::collections::BTreeSet;
use std::fs;
use std::process::Command;

use crate::metadata::root;

/// Names of all functions marked `#[test]` in the repository.
fn tests() -> BTreeSet<String> {
    let listed = Command::new("git").args(["ls-files", "*.rs"]).current_dir(root()).output().unwrap();
    let mut names = BTreeSet::new();
    for file in String::from_utf8(listed.stdout).unwrap().lines() {
        let source = fs::read_to_string(root().join(file)).unwrap_or_default();
        for part in source.split("#[test]").skip(1) {
            let name = part.split("fn ").nth(1).and_then(|rest| rest.split('(').next());
            names.extend(name.map(str::to_owned));
        }
    }
    names
}

#[test]
fn the_specification_names_real_tests() {
    let page = fs::read_to_string(root().join("docs/SPECIFICATION.md")).unwrap();
    let known = tests();
    let mut named = 0;
    for row in page.lines().filter(|line| line.starts_with("| ") && !line.starts_with("| ---")) {
        let column = row.trim_end_matches(" |").rsplit(" | ").next().unwrap_or_default();
        for name in column.split('`').skip(1).step_by(2) {
            named += 1;
            assert!(known.contains(name), "docs/SPECIFICATION.md names {name}, which is no test");
        }
    }
    assert!(named > 50, "only {named} tests are named");
}
