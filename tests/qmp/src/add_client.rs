//! The table of cases: `add_client`.

use serde_json::{Value, json};

use crate::cases::{Case, error, not_found};
use crate::descriptors::{case, closefd, done, execute, getfd, unknown};

fn add_client(protocol: &str, more: &str) -> String {
    execute("add_client", &format!("\"protocol\":\"{protocol}\",\"fdname\":\"a\"{more}"))
}

/// All cases. `compat_monitor0` has a client, the one that asks; `serial0` is no socket.
#[must_use]
pub fn all() -> Vec<Case> {
    let unnamed = |name: &str| error(format!("File descriptor named '{name}' has not been found"));
    let spice = || json!({"error": {"class": "DeviceNotActive", "desc": "SPICE is not in use"}});
    let refused = || error("failed to add client");
    let mut cases: Vec<Case> = vec![
        case(&[(add_client("x", ""), 1)], [unnamed("a")]),
        case(&[(add_client("spice", ""), 0)], [unnamed("a")]),
        case(&[(add_client("compat_monitor0", ""), 0)], [unnamed("a")]),
        case(&[(execute("add_client", "\"protocol\":\"vnc\",\"fdname\":\"\""), 0)], [unnamed("")]),
        // The other names stay.
        case(
            &[
                (getfd("a"), 1),
                (getfd("b"), 1),
                (add_client("x", ""), 0),
                (closefd("a"), 0),
                (closefd("b"), 0),
            ],
            [done(), done(), error("protocol 'x' is invalid"), unknown("a"), done()],
        ),
    ];
    let answers: [(&str, &str, Value); 12] = [
        ("", "", error("protocol '' is invalid")),
        ("VNC", "", error("protocol 'VNC' is invalid")),
        ("serial9", ",\"tls\":true", error("protocol 'serial9' is invalid")),
        ("unix:q", ",\"skipauth\":true", error("protocol 'unix:q' is invalid")),
        ("spice", "", spice()),
        ("spice", ",\"skipauth\":true,\"tls\":true", spice()),
        ("vnc", "", done()),
        ("vnc", ",\"skipauth\":true,\"tls\":true", done()),
        ("compat_monitor0", "", refused()),
        ("compat_monitor0", ",\"skipauth\":false,\"tls\":false", refused()),
        ("serial0", "", refused()),
        ("serial0", ",\"skipauth\":true,\"tls\":true", refused()),
    ];
    for (protocol, more, answer) in answers {
        // The descriptor is consumed whatever follows.
        cases.push(case(
            &[(getfd("a"), 1), (add_client(protocol, more), 0), (closefd("a"), 0)],
            [done(), answer, unknown("a")],
        ));
    }
    cases.extend(arguments());
    cases
}

fn arguments() -> Vec<Case> {
    let ill_typed = |name: &str, expected: &str| {
        error(format!("Invalid parameter type for '{name}', expected: {expected}"))
    };
    let missing = |name: &str| error(format!("Parameter '{name}' is missing"));
    let with = |arguments: &str| execute("add_client", arguments);
    vec![
        Case::new(with(""), [missing("protocol")]),
        Case::new(with("\"protocol\":\"x\""), [missing("fdname")]),
        Case::new(with("\"fdname\":\"a\""), [missing("protocol")]),
        Case::new(with("\"protocol\":1,\"fdname\":\"a\""), [ill_typed("protocol", "string")]),
        Case::new(with("\"protocol\":\"x\",\"fdname\":null"), [ill_typed("fdname", "string")]),
        Case::new(add_client("x", ",\"skipauth\":1"), [ill_typed("skipauth", "boolean")]),
        Case::new(add_client("x", ",\"tls\":\"no\""), [ill_typed("tls", "boolean")]),
        Case::new(add_client("x", ",\"surplus\":1"), [error("Parameter 'surplus' is unexpected")]),
        Case::new("{\"exec-oob\":\"add_client\"}", [error("The command add_client does not support OOB")])
            .oob(),
        // A refused command takes nothing.
        case(
            &[(getfd("a"), 1), (add_client("x", ",\"tls\":1"), 0), (closefd("a"), 0)],
            [done(), ill_typed("tls", "boolean"), done()],
        ),
        Case::new(
            add_client("x", ""),
            [not_found("Expecting capabilities negotiation with 'qmp_capabilities'")],
        )
        .fresh(),
        Case::new("{\"execute\":\"add_client\"}", [missing("protocol")]),
    ]
}
