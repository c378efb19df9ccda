//! The table of cases against our broker and against Debian's QEMU.

use std::path::Path;

use bulkhead_framework::{Failure, Result};
use bulkhead_qmp_tests::broker::{Broker, Kind};
use bulkhead_qmp_tests::qemu::Qemu;
use bulkhead_qmp_tests::{cases, runner};

fn run_all(path: &Path, is_qemu72: bool) -> Result<()> {
    let cases = cases::all();
    let failed: Vec<String> = cases
        .iter()
        .filter_map(|case| runner::run(path, case, is_qemu72).err())
        .map(|failure| failure.to_string())
        .collect();
    if failed.is_empty() {
        println!("{} cases", cases.len());
        return Ok(());
    }
    Err(Failure::new(format!("{} of {} cases:\n{}", failed.len(), cases.len(), failed.join("\n"))))
}

#[test]
fn our_broker_answers_as_the_table_says() -> Result<()> {
    let broker = Broker::start(&[Kind::Server], false)?;
    run_all(&broker.path(0), false)
}

#[test]
fn qemu_answers_as_the_table_says() -> Result<()> {
    let qemu = Qemu::start()?;
    run_all(&qemu.path(), true)
}
