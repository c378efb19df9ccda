//! Writes values as QEMU does: ASCII only, a space after `:` and `,`.

use std::fmt::Write as _;

use serde_json::{Number, Value};

/// Appends `value` to `out`.
pub fn write(out: &mut String, value: &Value) {
    match value {
        Value::Null => out.push_str("null"),
        Value::Bool(true) => out.push_str("true"),
        Value::Bool(false) => out.push_str("false"),
        Value::Number(number) => write_number(out, number),
        Value::String(text) => write_string(out, text),
        Value::Array(items) => {
            let mut separator = "[";
            for item in items {
                out.push_str(separator);
                write(out, item);
                separator = ", ";
            }
            out.push_str(if items.is_empty() { "[]" } else { "]" });
        }
        Value::Object(members) => {
            let mut separator = "{";
            for (key, member) in members {
                out.push_str(separator);
                write_string(out, key);
                out.push_str(": ");
                write(out, member);
                separator = ", ";
            }
            out.push_str(if members.is_empty() { "{}" } else { "}" });
        }
    }
}

/// A whole double is written without a point, as QEMU does: 1e3 is echoed as 1000. Like C's `%.17g`,
/// very large and very small ones have an exponent; other than there, the shortest digits are used.
fn write_number(out: &mut String, number: &Number) {
    let result = match number.as_f64() {
        Some(double) if number.is_f64() => match double.abs() {
            0.0 | 1e-5..1e17 => write!(out, "{double}"),
            _ => write!(out, "{double:e}"),
        },
        _ => write!(out, "{number}"),
    };
    debug_assert!(result.is_ok(), "a string takes everything");
}

fn write_string(out: &mut String, text: &str) {
    out.push('"');
    for character in text.chars() {
        match character {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\u{8}' => out.push_str("\\b"),
            '\u{C}' => out.push_str("\\f"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            ' '..='~' => out.push(character),
            _ => {
                for unit in character.encode_utf16(&mut [0; 2]) {
                    let result = write!(out, "\\u{unit:04X}");
                    debug_assert!(result.is_ok(), "a string takes everything");
                }
            }
        }
    }
    out.push('"');
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn writes_ascii_with_spaces() {
        let mut out = String::new();
        write(
            &mut out,
            &json!({"a": [1, -2.5, 1e3, 0.1], "b": {}, "c": [], "d": "\0é😀\"\\\n\u{7f}", "e": null}),
        );
        let expected = r#"{"a": [1, -2.5, 1000, 0.1], "b": {}, "c": [], "d": "\u0000\u00E9\uD83D\uDE00\"\\\n\u007F", "e": null}"#;
        assert_eq!(out, expected);
        let mut big = String::new();
        write(&mut big, &json!([u64::MAX, i64::MIN]));
        assert_eq!(big, "[18446744073709551615, -9223372036854775808]");
    }
}
