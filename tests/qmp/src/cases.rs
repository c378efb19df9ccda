//! The table of cases: requests that never reach a command. [`crate::commands`] and
//! [`crate::descriptors`] have the others.

use serde_json::{Value, json};

/// How negotiation stands when a case begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// Not begun.
    Fresh,
    /// Complete.
    Plain,
    /// Complete, with out-of-band execution.
    Oob,
}

/// Bytes and what they are answered with.
#[derive(Clone, Debug)]
pub struct Case {
    /// How negotiation stands.
    pub start: Start,
    /// The machine is brought into run state `prelaunch` before.
    pub stopped: bool,
    /// What is sent, each chunk with a write of its own.
    pub send: Vec<Vec<u8>>,
    /// How many descriptors, of /dev/null, come with each chunk; none where this ends.
    pub fds: Vec<usize>,
    /// What QEMU 5.1 answers: see [`crate::runner::like`] for the patterns.
    pub expect: Vec<Value>,
    /// Why, and how, QEMU 7.2 answers otherwise.
    pub qemu72: Option<(&'static str, Vec<Value>)>,
}

impl Case {
    /// A case after plain negotiation.
    pub fn new(send: impl AsRef<[u8]>, expect: impl IntoIterator<Item = Value>) -> Self {
        Self {
            start: Start::Plain,
            stopped: false,
            send: vec![send.as_ref().to_vec()],
            fds: Vec::new(),
            expect: expect.into_iter().collect(),
            qemu72: None,
        }
    }

    /// Before negotiation.
    #[must_use]
    pub fn fresh(mut self) -> Self {
        self.start = Start::Fresh;
        self
    }

    /// With out-of-band execution.
    #[must_use]
    pub fn oob(mut self) -> Self {
        self.start = Start::Oob;
        self
    }

    /// From run state `prelaunch`.
    #[must_use]
    pub fn stopped(mut self) -> Self {
        self.stopped = true;
        self
    }

    /// One byte per write.
    #[must_use]
    pub fn bytewise(mut self) -> Self {
        self.send = self.send.concat().into_iter().map(|byte| vec![byte]).collect();
        self
    }

    /// What QEMU 7.2 answers, and why.
    #[must_use]
    pub fn qemu72(mut self, reason: &'static str, expect: impl IntoIterator<Item = Value>) -> Self {
        self.qemu72 = Some((reason, expect.into_iter().collect()));
        self
    }

    /// What is sent, for people.
    #[must_use]
    pub fn title(&self) -> String {
        let mut text = self.send.concat().escape_ascii().to_string();
        if text.len() > 200 {
            text.truncate(200);
            text.push_str("...");
        }
        format!("{:?} {text} {:?}", self.start, self.fds)
    }
}

/// An error of class GenericError.
#[must_use]
pub fn error(desc: impl AsRef<str>) -> Value {
    json!({ "error": { "class": "GenericError", "desc": desc.as_ref() } })
}

/// A parse error.
#[must_use]
pub fn parse_error(desc: impl AsRef<str>) -> Value {
    error(format!("JSON parse error, {}", desc.as_ref()))
}

/// An error of class CommandNotFound.
#[must_use]
pub fn not_found(desc: &str) -> Value {
    json!({ "error": { "class": "CommandNotFound", "desc": desc } })
}

/// A successful reply.
#[must_use]
pub fn ok(value: Value) -> Value {
    json!({ "return": value })
}

/// The same reply with an id.
#[must_use]
pub fn with_id(mut reply: Value, id: Value) -> Value {
    if let Some(members) = reply.as_object_mut() {
        members.insert("id".to_owned(), id);
    }
    reply
}

/// All cases.
#[must_use]
pub fn all() -> Vec<Case> {
    [
        lexical(),
        strings(),
        numbers(),
        structure(),
        limits(),
        shape(),
        negotiation(),
        writes(),
        crate::commands::all(),
        crate::descriptors::all(),
        crate::dump::all(),
        crate::add_client::all(),
        crate::human::all(),
        crate::devices::none(),
    ]
    .concat()
}

/// A well-formed request and its reply, to show that parsing has recovered.
const Q: &str = "{\"execute\":\"query-name\"}";

fn not_an_object() -> Value {
    error("QMP input must be a JSON object")
}

fn stray(text: &str) -> Value {
    parse_error(format!("stray '{text}'"))
}

fn named() -> Value {
    ok(json!({}))
}

/// Bytes that begin no token, and what ends the recovery from them.
fn lexical() -> Vec<Case> {
    let expecting = || parse_error("expecting value");
    let mut cases = vec![
        Case::new(format!("@{Q}"), [stray("@"), named()]),
        Case::new(format!("@ \t'\"x7 {Q}"), [stray("@"), named()]),
        Case::new(format!("@\n{Q}"), [stray("@"), named()]),
        Case::new("A[]", [stray("A"), not_an_object()]),
        Case::new(b"@}5 ", [stray("@"), expecting(), not_an_object()]),
        Case::new(b"@]5 ", [stray("@"), expecting(), not_an_object()]),
        Case::new(b"@:5 ", [stray("@"), expecting(), not_an_object()]),
        Case::new(b"@,5 ", [stray("@"), expecting(), not_an_object()]),
        Case::new(b"@\r5 ", [stray("@"), not_an_object()]),
        Case::new(b"@\x005 ", [stray("@"), stray("")]),
        Case::new(b"@\x015 ", [stray("@"), stray("\x01")]),
        Case::new(b"@\x7f\x80\xfd05 ", [stray("@")]),
        Case::new(b"@\xfe5 ", [stray("@"), stray("\u{FFFD}")]),
        Case::new([b"\xff", Q.as_bytes()].concat(), [stray("\u{FFFD}"), named()]),
        Case::new([b"\x80", Q.as_bytes()].concat(), [stray("\u{FFFD}"), named()]),
        Case::new([b"\x00", Q.as_bytes()].concat(), [stray(""), named()]),
        Case::new("{\"execute\": @}", [stray("@"), expecting()]),
        Case::new("hello ", [parse_error("invalid keyword 'hello'")]),
        Case::new("hello1 ", [parse_error("invalid keyword 'hello'"), not_an_object()]),
        Case::new("True ", [stray("T")]),
        Case::new("tru\n", [parse_error("invalid keyword 'tru'")]),
        Case::new("h".repeat(2000) + " ", [parse_error(format!("invalid keyword '{}", "h".repeat(1006)))]),
    ];
    for comment in ["/* c */", "//c\n", "#\n", "%d ", "%"] {
        cases.push(Case::new(format!("{comment}{Q}"), [stray(&comment[..1]), named()]));
    }
    for value in ["true ", "false ", "null ", "1 ", "\"x\"", "'x'", "[]", "[1, {}]"] {
        cases.push(Case::new(value, [not_an_object()]));
    }
    cases
}

/// A request whose id is `text`, echoed as `id`.
fn echo(text: impl AsRef<[u8]>, id: impl Into<Value>) -> Case {
    let request = [b"{\"execute\":\"query-name\",\"id\":".as_slice(), text.as_ref(), b"}"].concat();
    Case::new(request, [with_id(named(), id.into())])
}

fn strings() -> Vec<Case> {
    let invalid = |text: &str| parse_error(format!("{text} is not a valid Unicode character"));
    let utf8 = || parse_error("invalid UTF-8 sequence in string");
    let escape = || parse_error("invalid escape sequence in string");
    let bare = |text: &[u8], error: Value| Case::new([b"{\"id\":\"", text, b"\"}"].concat(), [error]);
    let mut cases = vec![
        echo("\"x\"", "x"),
        echo("'a\"b\\''", "a\"b'"),
        echo(r#""\'\"\/\\\b\f\n\r\t""#, "'\"/\\\u{8}\u{C}\n\r\t"),
        echo(r#""\u0000a\u00e9\uD83D\ude00""#, "\0aé😀"),
        echo(b"\"\xc0\x80\x7f\xc2\x80\xe2\x80\xa8\xf0\x9f\x98\x80\"", "\0\u{7f}\u{80}\u{2028}😀"),
        bare(b"\xc0\x81", utf8()),
        bare(b"\xe2\x80", utf8()),
        bare(b"\xed\xa0\x80", utf8()),
        bare(b"\xef\xbf\xbf", utf8()),
        bare(b"\xf4\x90\x80\x80", utf8()),
        bare(b"\xf8\x88\x80\x80\x80", utf8()),
        bare(b"\x80", utf8()),
        bare(b"\\x", escape()),
        bare(b"\\\x80", escape()),
        bare(b"\\u12", invalid("\\u12\"")),
        bare(b"\\u12G4", invalid("\\u12G4")),
        bare(b"\\u+123", invalid("\\u+123")),
        bare(b"\\uffff", invalid("\\uffff")),
        bare(b"\\ufdd0", invalid("\\ufdd0")),
        bare(b"\\uD800", invalid("\\uD800")),
        bare(b"\\uD800\\u0041", invalid("\\uD800")),
        bare(b"\\uD800\\uD800", invalid("\\uD800")),
        bare(b"\\uD800\\n", invalid("\\uD800")),
        bare(b"\\uDC00", invalid("\\uDC00")),
        Case::new(
            b"{\"a\x01b\":1}",
            [
                stray("\"a\x01"),
                parse_error("expecting value"),
                not_an_object(),
                parse_error("expecting value"),
            ],
        ),
        Case::new([b"{\"a\xff", Q.as_bytes()].concat(), [stray("\"a\u{FFFD}"), named()]),
        Case::new([b"\"\xe2\x82\xff", Q.as_bytes()].concat(), [stray("\"\u{FFFD}\u{FFFD}"), named()]),
    ];
    for byte in [b'\t', b'\n', 0x00, 0x01, 0x1f, 0xfe] {
        let text = if byte == 0xfe { "\u{FFFD}".to_owned() } else { char::from(byte).to_string() };
        let shown = if byte == 0 { String::new() } else { text };
        cases.push(Case::new(
            [b"\"", &[byte][..], b"[]"].concat(),
            [stray(&format!("\"{shown}")), not_an_object()],
        ));
        let escaped = stray(&format!("\"\\{shown}"));
        cases.push(Case::new([b"\"\\", &[byte][..], b"[]"].concat(), [escaped, not_an_object()]));
    }
    cases
}

fn numbers() -> Vec<Case> {
    let no_infinity = "7.2 echoes inf, which no client can parse; ours saturates";
    let mut cases = vec![
        echo("-0", 0),
        echo("1e3", 1000),
        echo("1.5", 1.5),
        echo("0.1", 0.1),
        echo("1e-7", 1e-7),
        echo("1e300", 1e300),
        echo("9223372036854775807", i64::MAX),
        echo("9223372036854775808", 1u64 << 63),
        echo("18446744073709551615", u64::MAX),
        echo("18446744073709551616", 18_446_744_073_709_551_616.0),
        echo("-9223372036854775808", i64::MIN),
        echo("-9223372036854775809", -9_223_372_036_854_775_808.0),
        echo("123456789012345678901234567890", 123_456_789_012_345_678_901_234_567_890.0),
        Case::new("01 ", [stray("01")]),
        Case::new("-a", [stray("-a")]),
        Case::new("- ", [stray("- ")]),
        Case::new("+1", [stray("+")]),
        Case::new(".5 ", [stray(".")]),
        Case::new("1.a", [stray("1.a")]),
        Case::new("1e+ ", [stray("1e+ ")]),
        Case::new("1.5 ", [not_an_object()]),
        Case::new("0.5e+5 ", [not_an_object()]),
        Case::new("0e5 ", [not_an_object(), parse_error("invalid keyword 'e'"), not_an_object()]),
        Case::new("1e999 ", [not_an_object()]),
    ];
    // Not compared by value with 7.2, whose reply to it is not JSON.
    cases.retain(|case| case.qemu72.as_ref().is_none_or(|(reason, _)| *reason != no_infinity));
    cases
}

fn structure() -> Vec<Case> {
    let expecting = || parse_error("expecting value");
    let single = [
        ("[1 2]", "expected separator in list"),
        ("[1:2]", "expected separator in list"),
        ("[[1}", "expected separator in list"),
        ("{1:2}", "key is not a string in object"),
        ("{[]:2}", "key is not a string in object"),
        ("{\"a\" 1}", "missing : in object pair"),
        ("{\"a\"}", "missing : in object pair"),
        ("{\"a\"]", "missing : in object pair"),
        ("{\"a\":1 \"b\":2}", "expected separator in dict"),
        ("{\"a\":1]", "expected separator in dict"),
        ("{\"a\":1,}", "expecting value"),
        ("[1,]", "expecting value"),
        ("[,]", "expecting value"),
        ("{,}", "expecting value"),
        ("{\"a\":}", "expecting value"),
        ("{:1}", "expecting value"),
        ("[}", "expecting value"),
        ("{]", "expecting value"),
        ("[{]}", "expecting value"),
        ("{\"a\":1,\"a\":2}", "duplicate key"),
        ("{\"a\":hello}", "invalid keyword 'hello'"),
        ("{hello:1}", "invalid keyword 'hello'"),
    ];
    let mut cases: Vec<Case> =
        single.iter().map(|(text, desc)| Case::new(text, [parse_error(desc)])).collect();
    for text in ["]", "}", ",", ":"] {
        cases.push(Case::new(format!("{text}{Q}"), [expecting(), named()]));
    }
    cases.extend([
        Case::new("][]", [expecting(), not_an_object()]),
        Case::new(format!(",,{Q}"), [expecting(), expecting(), named()]),
        Case::new(format!("{{\"a\":}}}}{Q}"), [expecting(), expecting(), named()]),
        // Unbalanced brackets wait for more.
        Case::new(format!("[{{]{Q}"), []),
        Case::new("{\"a\":[}", []),
        Case::new("{\"a\":1.x}", [stray("1.x"), expecting()]),
        Case::new(format!("{Q},{Q}"), [named(), expecting(), named()]),
    ]);
    cases
}

fn limits() -> Vec<Case> {
    let deep = |depth: usize| "[".repeat(depth) + &"]".repeat(depth);
    let mut too_deep = vec![error("JSON nesting depth limit exceeded")];
    // One error at the 1025th bracket; each of those that close is then one too many.
    too_deep.extend(std::iter::repeat_n(parse_error("expecting value"), 1025));
    vec![
        Case::new(deep(1024), [not_an_object()]),
        Case::new(deep(1025), too_deep),
        // What serde_json reads back.
        echo(deep(120), (1..120).fold(json!([]), |inner, _| json!([inner]))),
    ]
}

/// The shape of requests.
fn shape() -> Vec<Case> {
    let unexpected = |name: &str| error(format!("QMP input member '{name}' is unexpected"));
    let lacks = || error("QMP input lacks member 'execute'");
    vec![
        Case::new("{}", [lacks()]),
        Case::new("{\"id\":5}", [with_id(lacks(), json!(5))]),
        Case::new("{\"arguments\":{}}", [lacks()]),
        Case::new("{\"execute\":1}", [error("QMP input member 'execute' must be a string")]),
        Case::new(
            "{\"execute\":1,\"id\":1}",
            [with_id(error("QMP input member 'execute' must be a string"), json!(1))],
        ),
        Case::new("{\"foo\":1}", [unexpected("foo")]),
        Case::new("{\"execute\":\"query-name\",\"foo\":1}", [unexpected("foo")]),
        Case::new("{\"a\\u0000b\":1}", [unexpected("a\0b")]),
        Case::new(
            "{\"execute\":\"query-name\",\"arguments\":[]}",
            [error("QMP input member 'arguments' must be an object")],
        ),
        Case::new(
            "{\"execute\":\"query-name\",\"arguments\":null}",
            [error("QMP input member 'arguments' must be an object")],
        ),
        Case::new("{\"execute\":\"x\"}", [not_found("The command x has not been found")]),
        Case::new("{\"execute\":\"\"}", [not_found("The command  has not been found")]),
        Case::new("{\"execute\":\"a\\u0000b\"}", [not_found("The command a\0b has not been found")]),
        Case::new("{\"execute\":\"\\u00e9\"}", [not_found("The command é has not been found")]),
        Case::new("{\"execute\":\"QUIT\"}", [not_found("The command QUIT has not been found")]),
        Case::new("{\"execute\":\"query-name\",\"arguments\":{}}", [named()]),
        Case::new(
            "{\"execute\":\"query-name\",\"arguments\":{\"x\":1}}",
            [error("Parameter 'x' is unexpected")],
        ),
        echo("null", Value::Null),
        echo("true", true),
        echo("false", false),
        echo("{}", json!({})),
        echo("[]", json!([])),
        echo("[1, {\"b\": 1, \"a\": [null]}]", json!([1, {"b": 1, "a": [null]}])),
        echo("{\"id\": {\"id\": []}}", json!({"id": {"id": []}})),
    ]
}

/// Negotiation and out-of-band execution.
fn negotiation() -> Vec<Case> {
    let expecting = || not_found("Expecting capabilities negotiation with 'qmp_capabilities'");
    let oob_unexpected = || error("QMP input member 'exec-oob' is unexpected");
    let negotiate =
        |arguments: &str| format!("{{\"execute\":\"qmp_capabilities\",\"arguments\":{arguments}}}");
    let ill_typed = |name: &str, expected: &str| {
        error(format!("Invalid parameter type for '{name}', expected: {expected}"))
    };
    let enums = "since 6.0 a bad enumeration value is worded otherwise";
    vec![
        Case::new(Q, [expecting()]).fresh(),
        Case::new("{\"execute\":\"x\",\"id\":1}", [with_id(expecting(), json!(1))]).fresh(),
        Case::new("{\"execute\":1}", [error("QMP input member 'execute' must be a string")]).fresh(),
        Case::new("{\"id\":5}", [with_id(error("QMP input lacks member 'execute'"), json!(5))]).fresh(),
        Case::new("[]", [not_an_object()]).fresh(),
        Case::new("@ ", [stray("@")]).fresh(),
        Case::new("{\"exec-oob\":\"x\"}", [oob_unexpected()]).fresh(),
        Case::new("{\"exec-oob\":\"qmp_capabilities\"}", [oob_unexpected()]).fresh(),
        Case::new(negotiate("{\"foo\":1}"), [error("Parameter 'foo' is unexpected")]).fresh(),
        Case::new(negotiate("{\"enable\":1}"), [ill_typed("enable", "array")]).fresh(),
        Case::new(negotiate("{\"enable\":null}"), [ill_typed("enable", "array")]).fresh(),
        Case::new(negotiate("{\"enable\":[1]}"), [ill_typed("enable[0]", "string")]).fresh(),
        Case::new(negotiate("{\"enable\":[\"x\"]}"), [error("Invalid parameter 'x'")])
            .fresh()
            .qemu72(enums, [error("Parameter 'null' does not accept value 'x'")]),
        Case::new(
            negotiate("{\"enable\":[\"oob\",\"x\"]}") + Q + &negotiate("{}") + Q,
            [error("Invalid parameter 'x'"), expecting(), ok(json!({})), named()],
        )
        .fresh()
        .qemu72(
            enums,
            [error("Parameter 'null' does not accept value 'x'"), expecting(), ok(json!({})), named()],
        ),
        Case::new(
            negotiate("{\"enable\":[]}") + "{'exec-oob': 'query-name'}",
            [ok(json!({})), oob_unexpected()],
        )
        .fresh(),
        Case::new(
            negotiate("{\"enable\":[\"oob\",\"oob\"]}") + "{'exec-oob': 'query-name'}",
            [ok(json!({})), error("The command query-name does not support OOB")],
        )
        .fresh(),
        Case::new(
            negotiate("{}"),
            [not_found("Capabilities negotiation is already complete, command ignored")],
        ),
        Case::new(negotiate("{\"foo\":1}"), [error("Parameter 'foo' is unexpected")]),
        Case::new("{\"exec-oob\":\"x\"}", [oob_unexpected()]),
        Case::new(
            "{\"exec-oob\":\"x\",\"id\":1}",
            [with_id(not_found("The command x has not been found"), json!(1))],
        )
        .oob(),
        Case::new("{\"exec-oob\":\"query-name\"}", [error("The command query-name does not support OOB")])
            .oob(),
        Case::new(
            "{\"exec-oob\":\"qmp_capabilities\"}",
            [error("The command qmp_capabilities does not support OOB")],
        )
        .oob(),
        Case::new("{\"exec-oob\":1}", [error("QMP input member 'exec-oob' must be a string")]).oob(),
        Case::new(
            "{\"exec-oob\":\"query-name\",\"execute\":\"query-name\"}",
            [error("QMP input member 'execute' clashes with 'exec-oob'")],
        )
        .oob(),
        Case::new("{\"exec-oob\":\"query-name\",\"execute\":\"query-name\"}", [oob_unexpected()]),
        Case::new(Q.repeat(20), std::iter::repeat_n(named(), 20)).oob(),
    ]
}

/// Requests and writes that do not begin and end together.
fn writes() -> Vec<Case> {
    let request = |id: usize| format!("{{\"execute\":\"query-name\",\"id\":{id}}}");
    let reply = |id: usize| with_id(named(), json!(id));
    vec![
        Case::new(Q, [named()]).bytewise(),
        Case::new(format!("\n\n {Q} \r\n\t{Q}"), [named(), named()]).bytewise(),
        Case::new((0..50).map(request).collect::<String>(), (0..50).map(reply)),
        Case::new((0..50).map(|id| request(id) + "\r\n").collect::<String>(), (0..50).map(reply)),
        Case::new("{\"id\":\"\\uD83D\\uDE00\",\"execute\":\"query-name\"}", [with_id(named(), "😀".into())])
            .bytewise(),
        Case::new(
            b"{\"id\":\"\xf0\x9f\x98\x80\",\"execute\":\"query-name\"}",
            [with_id(named(), "😀".into())],
        )
        .bytewise(),
        Case::new(format!("{Q}@{Q}"), [named(), stray("@"), named()]).bytewise(),
    ]
}
