//! The table of cases: `human-monitor-command`.

use serde_json::{Value, json};

use crate::cases::{Case, error, ok};
use crate::commands::{event, reset, status};

fn human(line: &str) -> String {
    json!({ "execute": "human-monitor-command", "arguments": { "command-line": line } }).to_string()
}

/// A line and what it prints, less the carriage returns.
fn prints(line: &str, text: &str) -> Case {
    Case::new(human(line), [ok(text.replace('\n', "\r\n").into())])
}

/// All cases.
#[must_use]
pub fn all() -> Vec<Case> {
    [arguments(), lines(), help(), info(), actions()].concat()
}

fn arguments() -> Vec<Case> {
    let execute =
        |arguments: Value| json!({ "execute": "human-monitor-command", "arguments": arguments }).to_string();
    let on = |cpu: Value| execute(json!({ "command-line": "", "cpu-index": cpu }));
    let no_cpu = || error("Parameter 'cpu-index' expects a CPU number");
    let ill_typed =
        |name: &str, kind: &str| error(format!("Invalid parameter type for '{name}', expected: {kind}"));
    vec![
        Case::new(execute(json!({})), [error("Parameter 'command-line' is missing")]),
        Case::new(execute(json!({ "command-line": 1 })), [ill_typed("command-line", "string")]),
        Case::new(on("0".into()), [ill_typed("cpu-index", "integer")]),
        Case::new(on(0.into()), [ok("".into())]),
        Case::new(on(1.into()), [ok("".into())]),
        Case::new(on(2.into()), [no_cpu()]),
        Case::new(on((-1).into()), [no_cpu()]),
    ]
}

/// How lines are understood.
fn lines() -> Vec<Case> {
    let unknown = |line: &str, part: &str| prints(line, &format!("unknown command: '{part}'\n"));
    let surplus = |line: &str, name: &str, known: &str| {
        let what = "extraneous characters at the end of line";
        prints(line, &format!("{name}: {what}\nTry \"help {known}\" for more information\n"))
    };
    let closed =
        |line: &str, name: &str| prints(line, &format!("Error: File descriptor named '{name}' not found\n"));
    let no_name =
        |line: &str| prints(line, "closefd: string expected\nTry \"help closefd\" for more information\n");
    vec![
        prints("", ""),
        prints(" \t\n\u{b}", ""),
        unknown("nope", "nope"),
        unknown("  nope a b", "  nope"),
        unknown("STOP", "STOP"),
        unknown("sto", "sto"),
        unknown("quit|q", "quit|q"),
        unknown("stop;cont", "stop;cont"),
        unknown("# x", "#"),
        unknown("/x", ""),
        unknown("\u{e9} x", "\u{e9}"),
        unknown("a\0b", "a\0b"),
        unknown("info nope x", "info nope"),
        unknown("info\nnope", "info\nnope"),
        unknown("info/x status", "info"),
        surplus("cont x", "cont|c", "cont"),
        surplus("  c  x", "cont|c", "  c"),
        surplus("nmi/x 1", "nmi", "nmi"),
        surplus("info  status /", "status", "info  status"),
        surplus("closefd a b", "closefd", "closefd"),
        surplus("closefd \"a\"b", "closefd", "closefd"),
        no_name("closefd"),
        no_name("closefd "),
        no_name("closefd \"a"),
        no_name("closefd \"a\\x\""),
        no_name("closefd \"a\\"),
        closed("closefd a\"b", "a\"b"),
        closed("closefd 'a'", "'a'"),
        closed("closefd \"\"", ""),
        closed("closefd\t\"a b\\\\\\'\\\"\\n\\r\" ", "a b\\'\"\n\r"),
    ]
}

fn help() -> Vec<Case> {
    let own_words = "what commands do is said in other words";
    let one = |line: &str, ours: &str, theirs: &str| {
        prints(line, &format!("{ours}\n")).qemu72(own_words, [ok(format!("{theirs}\r\n").into())])
    };
    vec![
        one("help cont", "cont|c  -- lets the vCPUs run on", "cont|c  -- resume emulation"),
        one("? c x", "cont|c  -- lets the vCPUs run on", "cont|c  -- resume emulation"),
        one("help ?", "help|? [cmd] -- lists the commands", "help|? [cmd] -- show the help"),
        one("help info \"kvm\" x", "info kvm  -- whether KVM is used", "info kvm  -- show KVM information"),
        // QEMU, too, writes the name twice.
        one(
            "help getfd",
            "getfd getfd name -- names a descriptor that was sent along",
            "getfd getfd name -- receive a file descriptor via SCM rights and assign it a name",
        ),
        prints("help nope", "unknown command: 'nope'\n"),
        prints("help info nope x", "unknown command: 'info nope'\n"),
        prints("help/x", "unknown command: '/x'\n"),
        prints("help \"stop", ""),
        prints(&format!("help stop{}", " x".repeat(16)), ""),
        Case::new(human("help"), [ok("*".into())]),
        Case::new(human("info"), [ok("*".into())]),
    ]
}

fn info() -> Vec<Case> {
    vec![
        prints("info kvm", "kvm support: enabled\n")
            .qemu72("the oracle runs without KVM", [ok("kvm support: disabled\r\n".into())]),
        prints("info memory_size_summary", "base memory: 16777216\nplugged memory: 0\n"),
        prints("info name", ""),
        prints("info uuid", "00000000-0000-0000-0000-000000000000\n"),
        prints("info status", "VM status: paused (prelaunch)\n").stopped(),
        prints("\tinfo\tstatus\t", "VM status: paused (prelaunch)\n").stopped(),
        Case::new(human("info version"), [ok("*".into())]),
        Case::new(human("info cpus"), [ok("*".into())]),
        Case::new(human("info chardev"), [ok("*".into())]),
    ]
}

fn actions() -> Vec<Case> {
    let all = |lines: &[&str]| lines.iter().map(|line| human(line)).collect::<String>();
    let nothing = || ok("".into());
    let query = "{\"execute\":\"query-status\"}";
    let getfd = "{\"execute\":\"getfd\",\"arguments\":{\"fdname\":\"a\"}}";
    let closefd = getfd.replace("getfd", "closefd");
    let not_supplied = || ok("Error: No file descriptor supplied via SCM_RIGHTS\r\n".into());
    let not_found = ok("Error: File descriptor named 'a' not found\r\n".into());
    // A line has a monitor of its own.
    let mut passed = Case::new(
        human("getfd a") + getfd + &human("closefd a") + &closefd,
        [not_supplied(), ok(json!({})), not_found, ok(json!({}))],
    );
    passed.fds = vec![1];
    vec![
        Case::new(
            all(&["c", "info status", "stop", "info status", "cont"]) + query + &human("stop"),
            [
                event("RESUME"),
                nothing(),
                ok("VM status: running\r\n".into()),
                event("STOP"),
                nothing(),
                ok("VM status: paused\r\n".into()),
                event("RESUME"),
                nothing(),
                status("running"),
                event("STOP"),
                nothing(),
            ],
        )
        .stopped(),
        Case::new(human("system_reset"), [nothing(), reset()]).stopped(),
        Case::new(human("system_powerdown"), [nothing(), event("POWERDOWN")]).stopped(),
        Case::new(human("nmi"), [nothing()]).stopped(),
        prints("system_wakeup", "Error: wake-up from suspend is not supported by this guest\n").qemu72(
            "its machine can be suspended",
            [ok("Error: Unable to wake up: guest is not in suspended state\r\n".into())],
        ),
        prints("exit_preconfig", "Error: The command is permitted only in 'preconfig' state\n").qemu72(
            "6.0 has no such state",
            [ok("Error: The command is permitted only before machine initialization\r\n".into())],
        ),
        Case::new(human("getfd 9"), [not_supplied()]),
        passed,
    ]
}
