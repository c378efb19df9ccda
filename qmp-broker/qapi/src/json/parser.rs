//! Parses the tokens of one complete value.

use serde_json::{Map, Number, Value};

use super::lexer::Kind;
use super::text;

/// A token: its kind and where its text ends in the shared buffer; it begins where the last ended.
#[derive(Clone, Copy, Debug)]
pub(super) struct Token {
    pub(super) kind: Kind,
    pub(super) end: usize,
}

struct Parser<'a> {
    tokens: &'a [Token],
    text: &'a [u8],
    /// Where the text of the next token begins.
    begin: usize,
}

/// Parses `tokens`, whose texts lie back to back in `text`. The recursion is bounded by the reader's
/// nesting limit.
///
/// # Errors
/// QEMU's words after "JSON parse error, ".
pub(super) fn parse(tokens: &[Token], text: &[u8]) -> Result<Value, String> {
    Parser { tokens, text, begin: 0 }.value()
}

impl<'a> Parser<'a> {
    fn peek(&self) -> Result<Kind, String> {
        self.tokens.first().map(|token| token.kind).ok_or_else(|| "premature EOI".to_owned())
    }

    fn pop(&mut self) -> &'a [u8] {
        let Some((token, rest)) = self.tokens.split_first() else { return &[] };
        let text = self.text.get(self.begin..token.end).unwrap_or_default();
        self.begin = token.end;
        self.tokens = rest;
        text
    }

    fn value(&mut self) -> Result<Value, String> {
        match self.peek()? {
            Kind::LeftBrace => self.object(),
            Kind::LeftBracket => self.array(),
            Kind::String => unquote(self.pop()).map(Value::String),
            Kind::Integer => Ok(integer(self.pop())),
            Kind::Float => Ok(double(self.pop())),
            Kind::Keyword => keyword(self.pop()),
            _ => Err("expecting value".to_owned()),
        }
    }

    fn object(&mut self) -> Result<Value, String> {
        self.pop();
        let mut members = Map::new();
        if self.peek()? == Kind::RightBrace {
            self.pop();
            return Ok(Value::Object(members));
        }
        loop {
            self.member(&mut members)?;
            match self.peek()? {
                Kind::RightBrace => break,
                Kind::Comma => self.pop(),
                _ => return Err("expected separator in dict".to_owned()),
            };
        }
        self.pop();
        Ok(Value::Object(members))
    }

    fn member(&mut self, members: &mut Map<String, Value>) -> Result<(), String> {
        let Value::String(key) = self.value()? else {
            return Err("key is not a string in object".to_owned());
        };
        if self.peek()? != Kind::Colon {
            return Err("missing : in object pair".to_owned());
        }
        self.pop();
        let value = self.value()?;
        if members.insert(key, value).is_some() {
            return Err("duplicate key".to_owned());
        }
        Ok(())
    }

    fn array(&mut self) -> Result<Value, String> {
        self.pop();
        let mut items = Vec::new();
        if self.peek()? == Kind::RightBracket {
            self.pop();
            return Ok(Value::Array(items));
        }
        loop {
            items.push(self.value()?);
            match self.peek()? {
                Kind::RightBracket => break,
                Kind::Comma => self.pop(),
                _ => return Err("expected separator in list".to_owned()),
            };
        }
        self.pop();
        Ok(Value::Array(items))
    }
}

fn keyword(word: &[u8]) -> Result<Value, String> {
    match word {
        b"true" => Ok(Value::Bool(true)),
        b"false" => Ok(Value::Bool(false)),
        b"null" => Ok(Value::Null),
        _ => {
            // QEMU formats the message into 1,024 bytes; a keyword is ASCII, so characters are bytes.
            Err(format!("invalid keyword '{}'", text::lossy(word)).chars().take(1023).collect())
        }
    }
}

/// An integer is an int64 if it fits, else an uint64, else a double.
fn integer(digits: &[u8]) -> Value {
    let text = std::str::from_utf8(digits).unwrap_or_default();
    match (text.parse::<i64>(), text.parse::<u64>()) {
        (Ok(number), _) => number.into(),
        (_, Ok(number)) => number.into(),
        _ => double(digits),
    }
}

/// A double. JSON has no infinity, so what overflows becomes the largest double; QEMU would echo
/// `inf`, which no client can parse.
fn double(digits: &[u8]) -> Value {
    let number: f64 = std::str::from_utf8(digits).unwrap_or_default().parse().unwrap_or_default();
    Number::from_f64(number.clamp(f64::MIN, f64::MAX)).map_or(Value::Null, Value::Number)
}

/// The text of a string token, quotes included.
fn unquote(token: &[u8]) -> Result<String, String> {
    let inner = token.get(1..token.len().saturating_sub(1)).unwrap_or_default();
    let mut out = String::with_capacity(inner.len());
    let mut rest = inner;
    loop {
        let (plain, special) = rest.split_at(plain_length(rest));
        out.push_str(std::str::from_utf8(plain).unwrap_or_default());
        rest = special;
        let Some(&byte) = rest.first() else { return Ok(out) };
        if byte == b'\\' {
            let (decoded, length) = escape(rest, token)?;
            out.push(decoded);
            rest = rest.get(length..).unwrap_or_default();
        } else {
            let (decoded, length) = text::decode(rest);
            out.push(decoded.ok_or("invalid UTF-8 sequence in string")?);
            rest = rest.get(length..).unwrap_or_default();
        }
    }
}

/// Length of the ASCII text at the start of `bytes` that stands for itself.
fn plain_length(bytes: &[u8]) -> usize {
    bytes.iter().position(|&byte| byte == b'\\' || !byte.is_ascii()).unwrap_or(bytes.len())
}

/// The escape at the start of `rest`: its character and its length in bytes. `token` is the whole
/// string with its closing quote, which QEMU shows when an escape is cut short by it.
fn escape(rest: &[u8], token: &[u8]) -> Result<(char, usize), String> {
    let plain = match rest.get(1) {
        Some(&byte @ (b'"' | b'\'' | b'\\' | b'/')) => char::from(byte),
        Some(b'b') => '\u{8}',
        Some(b'f') => '\u{C}',
        Some(b'n') => '\n',
        Some(b'r') => '\r',
        Some(b't') => '\t',
        Some(b'u') => return unicode(rest, token),
        _ => return Err("invalid escape sequence in string".to_owned()),
    };
    Ok((plain, 2))
}

fn hex4(bytes: Option<&[u8]>) -> Option<u32> {
    bytes?.iter().try_fold(0, |code, &byte| Some(code << 4 | char::from(byte).to_digit(16)?))
}

fn unicode(rest: &[u8], token: &[u8]) -> Result<(char, usize), String> {
    let code = hex4(rest.get(2..6));
    let low = match (code, rest.get(6..8)) {
        (Some(0xD800..=0xDBFF), Some(b"\\u")) => hex4(rest.get(8..12)),
        _ => None,
    };
    let (code, length) = match (code, low) {
        (Some(high), Some(low @ 0xDC00..=0xDFFF)) => {
            (Some(0x1_0000 + ((high & 0x3FF) << 10 | (low & 0x3FF))), 12)
        }
        (code, _) => (code, 6),
    };
    code.and_then(text::character).map(|decoded| (decoded, length)).ok_or_else(|| {
        let from = token.len().saturating_sub(rest.len() + 1);
        let shown = token.get(from..token.len().min(from + 6)).unwrap_or_default();
        format!("{} is not a valid Unicode character", text::lossy(shown))
    })
}
