//! Runs cases against a server.

use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

use bulkhead_framework::{Failure, Result};
use serde_json::{Value, json};

use crate::cases::{Case, Start};
use crate::wire::Wire;

/// Pause between the writes of a case, so that the server sees them apart.
const PAUSE: Duration = Duration::from_millis(3);
/// Events whose place among the replies QEMU does not fix.
const LOOSE: [&str; 3] = ["RESET", "POWERDOWN", "SHUTDOWN"];

/// Runs a case; QEMU (Debian's, 7.2 or 10) is measured by its own expectation where the case has one.
///
/// # Errors
/// What was received is not what was expected.
pub fn run(path: &Path, case: &Case, is_qemu72: bool) -> Result<()> {
    if case.stopped {
        prepare(path)?;
    }
    let mut received = exchange(path, case)?;
    let mut expected = match &case.qemu72 {
        Some((_, expected)) if is_qemu72 => expected.clone(),
        _ => case.expect.clone(),
    };
    if is_qemu72 {
        expected.iter_mut().chain(&mut received).for_each(forget_singlestep);
    }
    if matches(&ordered(&expected), &ordered(&received)) {
        return Ok(());
    }
    let list = |values: &[Value]| values.iter().map(|value| format!("\n    {value}")).collect::<String>();
    Err(Failure::new(format!(
        "{}\n  expected:{}\n  received:{}",
        case.title(),
        list(&expected),
        list(&received)
    )))
}

/// Drops the member of `query-status` that QEMU has up to 8.2.
fn forget_singlestep(line: &mut Value) {
    if let Some(members) = line.get_mut("return").and_then(Value::as_object_mut) {
        members.remove("singlestep");
    }
}

/// Brings the machine into run state `prelaunch`.
fn prepare(path: &Path) -> Result<()> {
    let mut wire = Wire::connect(path)?;
    wire.negotiate(false)?;
    wire.ask("{'execute': 'stop'}")?;
    wire.send(b"{'execute': 'system_reset'}")?;
    // QEMU sends what a client has not read to the next one, so both lines are read, in either order.
    let (mut event, mut reply) = (false, false);
    while !(event && reply) {
        let line = wire.line()?;
        event |= line.get("event").and_then(Value::as_str) == Some("RESET");
        reply |= line.get("return").is_some();
    }
    Ok(())
}

/// Sends a case and returns the lines that it caused.
///
/// # Errors
/// The server closed the connection, or sent what is no line of QMP.
pub fn exchange(path: &Path, case: &Case) -> Result<Vec<Value>> {
    let mut wire = Wire::connect(path)?;
    match case.start {
        Start::Fresh => {}
        Start::Plain => wire.negotiate(false)?,
        Start::Oob => wire.negotiate(true)?,
    }
    let null = std::fs::File::open("/dev/null")?;
    for (chunk, fds) in case.send.iter().zip(case.fds.iter().chain(std::iter::repeat(&0))) {
        wire.send_fds(chunk, &vec![null.as_fd(); *fds])?;
        if case.send.len() > 1 {
            std::thread::sleep(PAUSE);
        }
    }
    // The byte FF ends whatever value is unfinished, with one error; then comes a known reply.
    wire.send(b"\xff\n{'execute': 'query-name', 'id': 'end of case'}")?;
    let mut lines = Vec::new();
    loop {
        let line = wire.line().map_err(|failure| failure.context(case.title()))?;
        if line.get("id") == Some(&json!("end of case")) {
            break;
        }
        lines.push(line);
    }
    match lines.pop() {
        Some(stray) if stray.to_string().contains("JSON parse error, stray") => Ok(lines),
        other => Err(Failure::new(format!("{}: no error for the last byte: {other:?}", case.title()))),
    }
}

/// The lines with the loose events moved to the end.
fn ordered(lines: &[Value]) -> Vec<&Value> {
    let is_loose =
        |line: &&Value| line.get("event").and_then(Value::as_str).is_some_and(|event| LOOSE.contains(&event));
    let (loose, mut fixed): (Vec<&Value>, Vec<&Value>) = lines.iter().partition(is_loose);
    fixed.extend(loose);
    fixed
}

fn matches(expected: &[&Value], received: &[&Value]) -> bool {
    expected.len() == received.len() && expected.iter().zip(received).all(|(e, r)| like(e, r))
}

/// Whether a value is as expected: "*" stands for anything; an object that has the member "..." may
/// have others, an array that ends with "..." too; an array may have its elements `in any order`.
#[must_use]
pub fn like(expected: &Value, received: &Value) -> bool {
    match (expected, received) {
        (Value::String(any), _) if any == "*" => true,
        (Value::Object(any), Value::Array(received)) => match any.get("in any order") {
            Some(Value::Array(expected)) => {
                expected.len() == received.len()
                    && expected.iter().all(|e| received.iter().any(|r| like(e, r)))
            }
            _ => false,
        },
        (Value::Object(expected), Value::Object(received)) => {
            let open = expected.contains_key("...");
            let named = |key: &String| key != "...";
            (open || expected.len() == received.len())
                && expected
                    .iter()
                    .filter(|(key, _)| named(key))
                    .all(|(key, value)| received.get(key).is_some_and(|other| like(value, other)))
        }
        (Value::Array(expected), Value::Array(received)) => match expected.split_last() {
            Some((Value::String(open), first)) if open == "..." => {
                received.len() >= first.len() && first.iter().zip(received).all(|(e, r)| like(e, r))
            }
            _ => expected.len() == received.len() && expected.iter().zip(received).all(|(e, r)| like(e, r)),
        },
        _ => expected == received,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns() {
        assert!(like(&json!({"a": "*"}), &json!({"a": [1]})));
        assert!(!like(&json!({"a": "*"}), &json!({"a": 1, "b": 2})));
        assert!(like(&json!({"a": "*", "...": 0}), &json!({"a": 1, "b": 2})));
        assert!(like(&json!([1, "..."]), &json!([1, 2])));
        assert!(!like(&json!([1, "..."]), &json!([2])));
        assert!(like(&json!({ "in any order": [1, 2] }), &json!([2, 1])));
        assert!(!like(&json!({ "in any order": [1, 2] }), &json!([2, 3])));
    }
}
