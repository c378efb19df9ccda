//! Mutated input to our broker and to QEMU: the answers are the same. BULKHEAD_ORACLE_MUTATIONS sets
//! the number of inputs.

use std::path::Path;

use bulkhead_framework::{Failure, Result};
use bulkhead_qmp_tests::Case;
use bulkhead_qmp_tests::broker::{Broker, Kind};
use bulkhead_qmp_tests::drive::Mutator;
use bulkhead_qmp_tests::qemu::Qemu;
use bulkhead_qmp_tests::runner::exchange;
use serde_json::Value;

/// Commands whose answers differ, that change the machine or open any file; and out-of-band execution, whose replies
/// have no fixed place.
const LEFT_OUT: [&str; 20] = [
    "oob",
    "query-version",
    "query-commands",
    "query-events",
    "query-qmp-schema",
    "query-kvm",
    "query-cpus-fast",
    "query-chardev",
    "query-pci",
    "query-status",
    "quit",
    "stop",
    "cont",
    "system_",
    "change",
    "preconfig",
    "query-command-line-options",
    "human-monitor-command",
    "xen-load-devices-state",
    "memsave",
];

fn answers(path: &Path, case: &Case) -> Result<Vec<Value>> {
    let mut lines = exchange(path, case)?;
    lines.retain(|line| line.get("event").is_none());
    for id in lines.iter_mut().filter_map(|line| line.get_mut("id")).filter(|id| id.is_f64()) {
        // serde_json does not read the last digits exactly.
        *id = format!("{:.12e}", id.as_f64().unwrap_or_default()).into();
    }
    for desc in lines.iter_mut().filter_map(|line| line.pointer_mut("/error/desc")) {
        // 5.1 and 7.2 word a bad enumeration value differently: see the table of cases.
        let text = desc.as_str().unwrap_or_default();
        let mut text = text.replace("Parameter 'null' does not accept value", "Invalid parameter");
        // Which of several bad members is named depends on QEMU's hash.
        if text.starts_with("QMP input member") || text.ends_with("is unexpected") {
            text = "a bad member".to_owned();
        }
        *desc = text.into();
    }
    Ok(lines)
}

#[test]
fn mutated_input_is_answered_alike() -> Result<()> {
    let count =
        std::env::var("BULKHEAD_ORACLE_MUTATIONS").ok().and_then(|text| text.parse().ok()).unwrap_or(2000);
    let broker = Broker::start(&[Kind::Server], false)?;
    let qemu = Qemu::start()?;
    let mut mutator = Mutator::new(0xACE);
    let mut differ = Vec::new();
    let mut compared = 0;
    while compared < count {
        let input = mutator.next_input();
        let text = String::from_utf8_lossy(&input);
        if LEFT_OUT.iter().any(|word| text.contains(word)) {
            continue;
        }
        compared += 1;
        let case = Case::new(&input, []);
        let case = if compared % 4 == 0 { case.fresh() } else { case };
        let ours = answers(&broker.path(0), &case)?;
        match answers(&qemu.path(), &case) {
            Ok(theirs) if theirs == ours => {}
            // QEMU echoes a number beyond the doubles as inf, which is not JSON.
            Err(failure) if failure.message().contains("inf") => {}
            theirs => differ.push(format!("{}\n  ours: {ours:?}\n  qemu: {theirs:?}", input.escape_ascii())),
        }
    }
    if differ.is_empty() {
        Ok(())
    } else {
        Err(Failure::new(format!("{} differ\n{}", differ.len(), differ.join("\n"))))
    }
}
