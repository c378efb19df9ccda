//! What the reader makes of bytes. Each expectation was read off a running QEMU.

use serde_json::{Value, json};

use super::*;

fn read_all(input: &[u8], step: usize) -> Vec<Item> {
    let mut reader = Reader::default();
    let mut items = Vec::new();
    for chunk in input.chunks(step) {
        let mut rest = chunk;
        while !rest.is_empty() {
            let (used, item) = reader.feed(rest);
            rest = &rest[used..];
            items.extend(item);
        }
    }
    items
}

fn value(value: Value) -> Item {
    Item::Value(value)
}

fn error(text: &str) -> Item {
    Item::Error(format!("JSON parse error, {text}"))
}

#[test]
fn reads_as_qemu_does() {
    let table: Vec<(&[u8], Vec<Item>)> = vec![
        (b"{}[]", vec![value(json!({})), value(json!([]))]),
        (b"1 2\n", vec![value(json!(1)), value(json!(2))]),
        (b"{'a': \"b\"}", vec![value(json!({"a": "b"}))]),
        (b"[null, true,false]", vec![value(json!([null, true, false]))]),
        (b"@}5 ", vec![error("stray '@'"), error("expecting value"), value(json!(5))]),
        (b"@ x\t\"5 ", vec![error("stray '@'")]),
        (b"@\n5 ", vec![error("stray '@'"), value(json!(5))]),
        (b"@\xfe5 ", vec![error("stray '@'"), error("stray '\u{FFFD}'")]),
        (b"\"\x01[]", vec![error("stray '\"\x01'"), value(json!([]))]),
        (b"0e5 ", vec![value(json!(0)), error("invalid keyword 'e'"), value(json!(5))]),
        (b"01 ", vec![error("stray '01'")]),
        (b"1e+ ", vec![error("stray '1e+ '")]),
        (b"hello1 ", vec![error("invalid keyword 'hello'"), value(json!(1))]),
        (b"[1 2]", vec![error("expected separator in list")]),
        (b"{\"a\":1 2}", vec![error("expected separator in dict")]),
        (b"{\"a\" 1}", vec![error("missing : in object pair")]),
        (b"{1:2}", vec![error("key is not a string in object")]),
        (b"{\"a\":1,\"a\":2}", vec![error("duplicate key")]),
        (b"[1,]", vec![error("expecting value")]),
        (b"\"\\u12\"", vec![error("\\u12\" is not a valid Unicode character")]),
        (b"\"\\uD800\\uDC00\"", vec![value(json!("\u{10000}"))]),
        (b"\"\\x\"", vec![error("invalid escape sequence in string")]),
        (b"\"\xed\xa0\x80\"", vec![error("invalid UTF-8 sequence in string")]),
        (b"\"\xc0\x80\"", vec![value(json!("\0"))]),
        (b"9223372036854775808 ", vec![value(json!(9_223_372_036_854_775_808_u64))]),
        (b"-9223372036854775809 ", vec![value(json!(-9_223_372_036_854_775_808.0))]),
        (b"1e999 ", vec![value(json!(f64::MAX))]),
        (b"1.0 ", vec![value(json!(1.0))]),
        (b"[{]", vec![]),
        (b"[{]}", vec![error("expecting value")]),
    ];
    for (input, expected) in table {
        for step in [input.len(), 1, 3] {
            assert_eq!(read_all(input, step), expected, "{} by {step}", input.escape_ascii());
        }
    }
}

#[test]
fn nesting_is_limited() {
    let deep = |depth: usize| ["[".repeat(depth), "]".repeat(depth)].concat();
    assert!(matches!(read_all(deep(1024).as_bytes(), 100)[..], [Item::Value(_)]));
    let items = read_all(deep(1025).as_bytes(), 100);
    assert_eq!(items[0], Item::Error("JSON nesting depth limit exceeded".to_owned()));
    assert_eq!(items.len(), 1026);
}

#[test]
fn tokens_are_limited() {
    let list = |numbers: usize| ["[", &"1,".repeat(numbers - 1), "1]"].concat();
    assert!(matches!(read_all(list(MAX_TOKENS / 2 - 1).as_bytes(), 4096)[..], [Item::Value(_)]));
    let items = read_all(list(MAX_TOKENS / 2).as_bytes(), 4096);
    assert_eq!(items, [Item::Error("JSON token count limit exceeded".to_owned())]);
}

#[test]
fn text_is_limited() {
    let limit = || Item::Error("JSON token size limit exceeded".to_owned());
    let string = |length: usize| ["\"", &"x".repeat(length - 2), "\""].concat();
    assert!(matches!(read_all(string(MAX_TOKEN_BYTES - 1).as_bytes(), 1 << 20)[..], [Item::Value(_)]));
    assert_eq!(read_all(string(MAX_TOKEN_BYTES).as_bytes(), 1 << 20), [limit()]);
    // The token is given up at its limit; what follows is read as something new.
    let long = [string(MAX_TOKEN_BYTES + 2).trim_end_matches('"'), "[]"].concat();
    assert_eq!(read_all(long.as_bytes(), 1 << 20), [limit(), value(json!([]))]);
}

#[test]
fn a_budget_is_kept_and_memory_given_back() {
    let mut reader = Reader::default();
    reader.set_budget(1000);
    let input = ["[\"", &"x".repeat(2000)].concat();
    let (used, item) = reader.feed(input.as_bytes());
    assert_eq!(item, Some(Item::Error("JSON token size limit exceeded".to_owned())));
    assert!(used < 1003 && reader.held() == 0);
    assert_eq!(reader.feed(b"@"), (1, Some(error("stray '@'"))));
}
