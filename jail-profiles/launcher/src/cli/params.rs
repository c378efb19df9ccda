//! `key=value,...` in QEMU's syntax: an implied first key, `,,` for a comma, `key` for `key=on`.

use super::error::Problem;
use super::kinds::Kinds;
use super::table::{Group, Kind, Param};

/// The parameters of one option, checked against its group.
#[derive(Clone, Debug, Default)]
pub struct Params {
    given: Vec<(&'static str, Value)>,
}

#[derive(Clone, Debug)]
enum Value {
    Text(String),
    Flag(bool),
    /// Number or size, with the text that it came from.
    Number(u64, String),
}

impl Params {
    /// Splits and checks a value.
    ///
    /// # Errors
    /// The first parameter that the group does not have or whose value is not of its type.
    pub fn parse(group: &'static Group, text: &str) -> Result<Self, Problem> {
        Self::parse_with(group, group.implied, text)
    }

    /// As [`Self::parse`], with another key that may be left out.
    ///
    /// # Errors
    /// As [`Self::parse`].
    pub fn parse_with(
        group: &'static Group,
        implied: Option<&'static str>,
        text: &str,
    ) -> Result<Self, Problem> {
        let known = |name: &str| group.params.iter().any(|p| p.name == name);
        let mut params = Self::default();
        for (key, value) in split(implied, known, text) {
            let Some(param) = group.params.iter().find(|p| p.name == key) else {
                return Err(Problem::InvalidParameter(key));
            };
            params.given.push((param.name, check(param, value)?));
        }
        Ok(params)
    }

    /// Splits and checks a value whose parameters depend on one of them, which is among the result.
    ///
    /// # Errors
    /// The deciding one is missing or unknown; else as [`Self::parse`].
    pub fn parse_kinds(kinds: &'static Kinds, text: &str) -> Result<Self, Problem> {
        let implied = kinds.implied.then_some(kinds.key);
        let given = split(implied, |_| false, text);
        let name = given.iter().rev().find(|(key, _)| key == kinds.key);
        let (_, name) = name.ok_or(Problem::MissingParameter(kinds.key))?;
        let sort = kinds.find(name).ok_or_else(|| (kinds.unknown)(name.clone()))?;
        let mut params = Self { given: vec![(kinds.key, Value::Text(sort.group.name.to_owned()))] };
        for (key, value) in given.into_iter().filter(|(key, _)| key != kinds.key) {
            let Some(param) = kinds.params(sort).find(|p| p.name == key) else {
                return Err((kinds.unexpected)(sort.group.name, key));
            };
            params.given.push((param.name, check(param, value)?));
        }
        Ok(params)
    }

    /// Adds what a later option of the same group says; it wins.
    pub fn merge(&mut self, later: &Self) {
        self.given.extend_from_slice(&later.given);
    }

    /// Names of the parameters that were given.
    pub fn names(&self) -> impl Iterator<Item = &'static str> {
        self.given.iter().map(|(name, _)| *name)
    }

    fn get(&self, name: &str) -> Option<&Value> {
        self.given.iter().rev().find(|(n, _)| *n == name).map(|(_, value)| value)
    }

    /// Text of a parameter; of a number or size as it was written.
    pub fn text(&self, name: &str) -> Option<&str> {
        match self.get(name)? {
            Value::Text(text) | Value::Number(_, text) => Some(text),
            Value::Flag(_) => None,
        }
    }

    /// A flag.
    pub fn flag(&self, name: &str) -> Option<bool> {
        match self.get(name)? {
            Value::Flag(on) => Some(*on),
            Value::Text(_) | Value::Number(..) => None,
        }
    }

    /// All numbers of a parameter that may be given several times.
    pub fn numbers(&self, name: &str) -> impl Iterator<Item = u64> {
        self.given.iter().filter(move |(given, _)| *given == name).filter_map(|(_, value)| match value {
            Value::Number(number, _) => Some(*number),
            Value::Text(_) | Value::Flag(_) => None,
        })
    }

    /// A number or a size in bytes.
    pub fn number(&self, name: &str) -> Option<u64> {
        match self.get(name)? {
            Value::Number(number, _) => Some(*number),
            Value::Text(_) | Value::Flag(_) => None,
        }
    }
}

/// Keys and values in their order; what stands first without a key has the `implied` one.
fn split(implied: Option<&str>, known: impl Fn(&str) -> bool, text: &str) -> Vec<(String, String)> {
    let mut pairs = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let (equals, comma) = (rest.find('='), rest.find(','));
        let has_key = equals.is_some_and(|e| comma.is_none_or(|c| e < c));
        let (key, value, after) = if has_key {
            let (key, tail) = rest.split_once('=').unwrap_or((rest, ""));
            let (value, after) = unescape(tail);
            (key.to_owned(), value, after)
        } else {
            let (word, after) = unescape(rest);
            match implied {
                Some(implied) if pairs.is_empty() => (implied.to_owned(), word, after),
                _ => {
                    let (key, value) = short_form(&known, &word);
                    (key, value.to_owned(), after)
                }
            }
        };
        pairs.push((key, value));
        rest = after;
    }
    pairs
}

/// `key` alone is `key=on`, `nokey` is `key=off`.
fn short_form(known: impl Fn(&str) -> bool, word: &str) -> (String, &'static str) {
    match word.strip_prefix("no") {
        Some(key) if known(key) && !known(word) => (key.to_owned(), "off"),
        _ => (word.to_owned(), "on"),
    }
}

/// Reads up to the next single comma; returns the text and what follows that comma.
fn unescape(text: &str) -> (String, &str) {
    let mut value = String::new();
    let mut rest = text;
    while let Some((head, tail)) = rest.split_once(',') {
        value.push_str(head);
        let Some(after) = tail.strip_prefix(',') else { return (value, tail) };
        value.push(',');
        rest = after;
    }
    value.push_str(rest);
    (value, "")
}

fn check(param: &'static Param, text: String) -> Result<Value, Problem> {
    let name = param.name;
    match param.kind {
        Kind::Text => Ok(Value::Text(text)),
        Kind::Id if is_identifier(&text) => Ok(Value::Text(text)),
        Kind::Id => Err(Problem::ExpectsIdentifier(name)),
        Kind::Flag => match text.as_str() {
            "on" => Ok(Value::Flag(true)),
            "off" => Ok(Value::Flag(false)),
            _ => Err(Problem::ExpectsFlag(name)),
        },
        Kind::Number => match number(&text) {
            Ok(number) => Ok(Value::Number(number, text)),
            Err(Bad::Form) => Err(Problem::ExpectsNumber(name)),
            Err(Bad::Range) => Err(Problem::TooLarge(name, text)),
        },
        Kind::Signed => {
            let (digits, negative) = text.strip_prefix('-').map_or((&*text, false), |digits| (digits, true));
            match number(digits) {
                Ok(number) if negative => Ok(Value::Number(number.wrapping_neg(), text)),
                Ok(number) => Ok(Value::Number(number, text)),
                Err(Bad::Form) => Err(Problem::ExpectsNumber(name)),
                Err(Bad::Range) => Err(Problem::TooLarge(name, text)),
            }
        }
        Kind::Size => match size(&text) {
            Ok(bytes) => Ok(Value::Number(bytes, text)),
            Err(Bad::Form) => Err(Problem::ExpectsSize(name)),
            Err(Bad::Range) => Err(Problem::OutOfRange(name, text)),
        },
    }
}

/// Whether `text` may identify an object.
pub fn is_identifier(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphabetic())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_'))
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Bad {
    Form,
    Range,
}

/// Decimal or, with `0x`, hexadecimal.
fn number(text: &str) -> Result<u64, Bad> {
    let (digits, radix) = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(hex) => (hex, 16),
        None => (text, 10),
    };
    if digits.is_empty() || !digits.chars().all(|c| c.is_digit(radix)) {
        return Err(Bad::Form);
    }
    u64::from_str_radix(digits, radix).map_err(|_| Bad::Range)
}

/// A number of bytes: `512`, `1.5G`, `0x1000`.
fn size(text: &str) -> Result<u64, Bad> {
    if text.starts_with("0x") || text.starts_with("0X") {
        return number(text);
    }
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match text.get(digits.len()..).unwrap_or("").to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        "p" => 50,
        "e" => 60,
        _ => return Err(Bad::Form),
    };
    let (whole, fraction) = match digits.split_once('.') {
        None => (digits, ""),
        // A fraction of a byte means nothing.
        Some(_) if shift == 0 => return Err(Bad::Form),
        Some((whole, fraction)) if is_fraction(fraction) => (whole, fraction),
        Some(_) => return Err(Bad::Form),
    };
    if whole.starts_with(['x', 'X']) {
        return Err(Bad::Form);
    }
    let unit = 1u128 << shift;
    let part = match fraction.parse::<u128>() {
        Ok(f) => f * unit / 10u128.pow(u32::try_from(fraction.len()).unwrap_or(0)),
        Err(_) => 0,
    };
    let bytes = u128::from(number(whole)?) * unit + part;
    u64::try_from(bytes).map_err(|_| Bad::Range)
}

/// Few enough digits for exact arithmetic in 128 bits.
fn is_fraction(digits: &str) -> bool {
    (1..=15).contains(&digits.len()) && digits.chars().all(|c| c.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::*;

    static GROUP: Group = Group {
        name: "test",
        implied: Some("path"),
        params: &[
            Param { name: "path", kind: Kind::Text, help: "" },
            Param { name: "id", kind: Kind::Id, help: "" },
            Param { name: "wait", kind: Kind::Flag, help: "" },
            Param { name: "node", kind: Kind::Number, help: "" },
            Param { name: "size", kind: Kind::Size, help: "" },
        ],
    };

    fn parse(text: &str) -> Result<Params, Problem> {
        Params::parse(&GROUP, text)
    }

    #[test]
    fn commas_and_implied_keys() {
        for (text, path) in [
            ("/a", "/a"),
            ("/a,,b,wait=on", "/a,b"),
            ("/a,,b=c,,,wait", "/a,b=c,"),
            ("path=x=y,wait=on", "x=y"),
            (",wait=on", ""),
        ] {
            assert_eq!(parse(text).unwrap().text("path"), Some(path), "{text}");
        }
        assert_eq!(parse("").unwrap().text("path"), None);
        assert_eq!(parse("a,path=b").unwrap().text("path"), Some("b"));
    }

    #[test]
    fn short_forms() {
        assert_eq!(parse("x,wait").unwrap().flag("wait"), Some(true));
        assert_eq!(parse("x,nowait").unwrap().flag("wait"), Some(false));
        assert_eq!(parse("x,node").unwrap_err(), Problem::ExpectsNumber("node"));
        assert_eq!(parse("x,bogus").unwrap_err(), Problem::InvalidParameter("bogus".into()));
    }

    #[test]
    fn types_are_checked() {
        assert_eq!(parse("wait=yes").unwrap_err(), Problem::ExpectsFlag("wait"));
        assert_eq!(parse("id=9a").unwrap_err(), Problem::ExpectsIdentifier("id"));
        assert_eq!(parse("node=-1").unwrap_err(), Problem::ExpectsNumber("node"));
        assert_eq!(parse("node=").unwrap_err(), Problem::ExpectsNumber("node"));
        assert_eq!(parse("node=0x10").unwrap().number("node"), Some(16));
        assert_eq!(parse("size=1x").unwrap_err(), Problem::ExpectsSize("size"));
        let huge = "99999999999999999999";
        let problem = |key: &str| parse(&format!("{key}={huge}")).unwrap_err();
        assert_eq!(problem("size"), Problem::OutOfRange("size", huge.to_owned()));
        assert_eq!(problem("node"), Problem::TooLarge("node", huge.to_owned()));
    }

    #[test]
    fn sizes() {
        for (text, bytes) in [
            ("0", 0),
            ("512", 512),
            ("1b", 1),
            ("2k", 2048),
            ("1.5G", 3 << 29),
            ("0x1000", 4096),
            ("1.0000000001T", (1 << 40) + 109),
            ("15E", 15 << 60),
        ] {
            assert_eq!(size(text), Ok(bytes), "{text}");
        }
        for text in ["", "M", "1MM", "1.M", ".5M", "1.5", "-1", "1 M", "1e3", "+1", "1.5.5M"] {
            assert_eq!(size(text), Err(Bad::Form), "{text}");
        }
        for text in ["16E", "18446744073709551616", "0x10000000000000000"] {
            assert_eq!(size(text), Err(Bad::Range), "{text}");
        }
    }

    #[test]
    fn later_values_win() {
        let mut params = parse("a,wait=on").unwrap();
        params.merge(&parse("wait=off").unwrap());
        assert_eq!((params.text("path"), params.flag("wait")), (Some("a"), Some(false)));
        assert_eq!(params.names().collect::<Vec<_>>(), ["path", "wait", "wait"]);
    }
}
