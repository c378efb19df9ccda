//! The table of cases: commands that take descriptors.

use serde_json::{Value, json};

use crate::cases::{Case, error, ok};

pub(crate) fn execute(command: &str, arguments: &str) -> String {
    format!("{{\"execute\":\"{command}\",\"arguments\":{{{arguments}}}}}")
}

pub(crate) fn getfd(name: &str) -> String {
    execute("getfd", &format!("\"fdname\":\"{name}\""))
}

pub(crate) fn closefd(name: &str) -> String {
    execute("closefd", &format!("\"fdname\":\"{name}\""))
}

fn add(id: i64) -> String {
    execute("add-fd", &format!("\"fdset-id\":{id}"))
}

fn remove(id: i64) -> String {
    execute("remove-fd", &format!("\"fdset-id\":{id}"))
}

fn query() -> String {
    execute("query-fdsets", "")
}

pub(crate) fn done() -> Value {
    ok(json!({}))
}

fn not_supplied() -> Value {
    error("No file descriptor supplied via SCM_RIGHTS")
}

pub(crate) fn unknown(name: &str) -> Value {
    error(format!("File descriptor named '{name}' not found"))
}

fn added(id: i64) -> Value {
    ok(json!({ "fdset-id": id, "fd": "*" }))
}

/// A set whose members have these texts.
fn set(id: i64, members: &[Option<&str>]) -> Value {
    let member = |opaque: &Option<&str>| match opaque {
        Some(text) => json!({ "fd": "*", "opaque": text }),
        None => json!({ "fd": "*" }),
    };
    json!({ "fdset-id": id, "fds": members.iter().map(member).collect::<Vec<_>>() })
}

/// Chunks with the number of descriptors that come with each.
pub(crate) fn case<S: AsRef<str>>(chunks: &[(S, usize)], expect: impl IntoIterator<Item = Value>) -> Case {
    let mut case = Case::new("", expect);
    case.send = chunks.iter().map(|(chunk, _)| chunk.as_ref().as_bytes().to_vec()).collect();
    case.fds = chunks.iter().map(|(_, fds)| *fds).collect();
    case
}

/// The same while the machine runs: a stopped QEMU keeps what is removed from a set.
fn running<S: AsRef<str>>(chunks: &[(S, usize)], expect: impl IntoIterator<Item = Value>) -> Case {
    let resume = json!({ "event": "RESUME", "timestamp": { "seconds": "*", "microseconds": "*" } });
    let mut case = case(chunks, [resume, done()].into_iter().chain(expect));
    case.send.insert(0, execute("cont", "").into_bytes());
    case.fds.insert(0, 0);
    case.stopped()
}

/// All cases.
#[must_use]
pub fn all() -> Vec<Case> {
    [names(), arrival(), sets(), arguments()].concat()
}

fn names() -> Vec<Case> {
    let digit = || error("Parameter 'fdname' expects a name not starting with a digit");
    let mut cases = vec![
        case(&[(getfd("a"), 0)], [not_supplied()]),
        case(&[(getfd("1a"), 0)], [not_supplied()]),
        case(&[(getfd("1a"), 1), (getfd("a"), 0)], [digit(), not_supplied()]),
        case(&[(getfd("a"), 1), (closefd("a"), 0), (closefd("a"), 0)], [done(), done(), unknown("a")]),
        case(
            &[(getfd("a"), 1), (getfd("a"), 1), (closefd("a"), 0), (closefd("a"), 0)],
            [done(), done(), done(), unknown("a")],
        ),
        case(&[(closefd("7"), 0)], [unknown("7")]),
        case(&[(closefd(""), 0)], [unknown("")]),
    ];
    for name in ["", " ", "a1", "-1", "/", "é", "\u{660}"] {
        cases.push(case(&[(getfd(name), 1), (closefd(name), 0)], [done(), done()]));
    }
    cases
}

/// When a descriptor comes, and which one is taken.
fn arrival() -> Vec<Case> {
    let name = execute("query-name", "");
    let (get, close) = (getfd("a"), closefd("a"));
    let (half, rest) = get.split_at(9);
    let negotiation = execute("qmp_capabilities", "");
    vec![
        case(&[(&name, 1), (&get, 0), (&close, 0)], [done(), done(), done()]),
        case(&[("{\"execute\":\"x\"}", 1)], [crate::cases::not_found("The command x has not been found")]),
        case(
            &[("{\"execute\":\"x\"}", 1), (&get, 0), (&close, 0)],
            [crate::cases::not_found("The command x has not been found"), done(), done()],
        ),
        case(&[(" ", 1), (&get, 0), (&close, 0)], [done(), done()]),
        case(&[(half, 1), (rest, 0), (&close, 0)], [done(), done()]),
        case(&[(half, 0), (rest, 1), (&close, 0)], [done(), done()]),
        case(&[(&get, 3), (&get, 0), (&close, 0)], [done(), not_supplied(), done()]),
        case(&[(" ", 1), (" ", 2), (&get, 0), (&get, 0), (&close, 0)], [done(), not_supplied(), done()]),
        case(&[(format!("{get}{get}{close}"), 2)], [done(), not_supplied(), done()]),
        case(&[(&negotiation, 1), (&get, 0), (&close, 0)], [done(), done(), done()]).fresh(),
        case(
            &[(&get, 1), (&negotiation, 0), (&get, 0), (&close, 0)],
            [
                crate::cases::not_found("Expecting capabilities negotiation with 'qmp_capabilities'"),
                done(),
                done(),
                done(),
            ],
        )
        .fresh(),
    ]
}

fn sets() -> Vec<Case> {
    let new = execute("add-fd", "");
    let noted = |text: &str| execute("add-fd", &format!("\"fdset-id\":1,\"opaque\":\"{text}\""));
    let remove_one = |id: i64, fd: i64| execute("remove-fd", &format!("\"fdset-id\":{id},\"fd\":{fd}"));
    let negative = || error("Parameter 'fdset-id' expects a non-negative value");
    let list = |sets: &[Value]| ok(json!(sets));
    vec![
        case(&[(query(), 0)], [list(&[])]),
        case(&[(&new, 0), (&add(-1), 0)], [not_supplied(), not_supplied()]),
        case(&[(&add(-1), 1), (&new, 0)], [negative(), not_supplied()]),
        case(&[(add(i64::MIN), 2), (query(), 0)], [negative(), list(&[])]),
        case(&[(remove(3), 0)], [unknown("fdset-id:3")]),
        case(&[(remove(-1), 0)], [unknown("fdset-id:-1")]),
        case(&[(remove_one(3, 7), 0)], [unknown("fdset-id:3, fd:7")]),
        case(&[(remove_one(-3, -7), 0)], [unknown("fdset-id:-3, fd:-7")]),
        running(&[(&new, 1), (&remove(0), 0), (&remove(0), 0)], [added(0), done(), unknown("fdset-id:0")]),
        // An id of the client's own, removed in the same write.
        running(&[(add(7) + &remove(7) + &query(), 1)], [added(7), done(), list(&[])]),
        running(
            &[
                (&add(2), 1),
                (&new, 1),
                (&new, 1),
                (&new, 1),
                (&remove(1), 0),
                (&query(), 0),
                (&new, 1),
                (&remove(0), 0),
                (&remove(1), 0),
                (&remove(2), 0),
                (&remove(3), 0),
                (&query(), 0),
            ],
            [
                added(2),
                added(0),
                added(1),
                added(3),
                done(),
                list(&[set(3, &[None]), set(2, &[None]), set(0, &[None])]),
                added(1),
                done(),
                done(),
                done(),
                done(),
                list(&[]),
            ],
        ),
        running(
            &[
                (&noted("b"), 1),
                (&noted(""), 3),
                (&add(1), 1),
                (&add(i64::MAX), 1),
                (&query(), 0),
                (&remove_one(1, 99999), 0),
                (&remove(1), 0),
                (&remove(i64::MAX), 0),
                (&query(), 0),
            ],
            [
                added(1),
                added(1),
                added(1),
                added(i64::MAX),
                list(&[set(i64::MAX, &[None]), set(1, &[Some("b"), Some(""), None])]),
                unknown("fdset-id:1, fd:99999"),
                done(),
                done(),
                list(&[]),
            ],
        ),
    ]
}

fn arguments() -> Vec<Case> {
    let ill_typed = |name: &str, expected: &str| {
        error(format!("Invalid parameter type for '{name}', expected: {expected}"))
    };
    let missing = |name: &str| error(format!("Parameter '{name}' is missing"));
    let surplus = || error("Parameter 'surplus' is unexpected");
    let mut cases = vec![
        Case::new(execute("getfd", ""), [missing("fdname")]),
        Case::new(execute("closefd", ""), [missing("fdname")]),
        Case::new(execute("remove-fd", "\"fd\":1"), [missing("fdset-id")]),
        Case::new(execute("getfd", "\"fdname\":1"), [ill_typed("fdname", "string")]),
        Case::new(execute("add-fd", "\"fdset-id\":\"0\""), [ill_typed("fdset-id", "integer")]),
        Case::new(execute("add-fd", "\"opaque\":null"), [ill_typed("opaque", "string")]),
        Case::new(execute("remove-fd", "\"fdset-id\":0,\"fd\":1.5"), [ill_typed("fd", "integer")]),
        // A refused command takes nothing.
        case(
            &[(execute("getfd", ""), 1), (getfd("a"), 0), (closefd("a"), 0)],
            [missing("fdname"), done(), done()],
        ),
    ];
    for (command, needed) in [
        ("getfd", "\"fdname\":\"a\","),
        ("closefd", "\"fdname\":\"a\","),
        ("add-fd", ""),
        ("remove-fd", "\"fdset-id\":0,"),
        ("query-fdsets", ""),
    ] {
        cases.push(Case::new(execute(command, &format!("{needed}\"surplus\":1")), [surplus()]));
        let oob = format!("{{\"exec-oob\":\"{command}\"}}");
        cases.push(Case::new(oob, [error(format!("The command {command} does not support OOB"))]).oob());
    }
    cases
}
