//! From a line to the command that it means, with QEMU's messages.

use bulkhead_qapi::table as qmp;
use serde_json::{Map, Value};

use super::table::{Arg, COMMANDS, Does, Entry, INFO, Show};

/// The most words that `help` takes; with more it prints nothing.
const MAX_WORDS: usize = 16;

/// What a line comes to.
#[derive(Debug)]
pub enum Line {
    /// This is printed, and no more.
    Text(String),
    /// A QMP command.
    Call {
        /// Which.
        command: &'static qmp::Command,
        /// Its arguments.
        args: Map<String, Value>,
        /// Prints what it returned.
        show: Show,
    },
}

/// White space of the C locale.
const fn is_space(char: char) -> bool {
    char.is_ascii_whitespace() || char == '\x0b'
}

fn skip_spaces(text: &str) -> &str {
    text.trim_start_matches(is_space)
}

/// What `line` has before `rest`, which is its end.
fn before<'a>(line: &'a str, rest: &str) -> &'a str {
    line.get(..line.len().saturating_sub(rest.len())).unwrap_or_default()
}

/// Understands a line.
pub fn parse(line: &str) -> Line {
    if skip_spaces(line).is_empty() {
        return Line::Text(String::new());
    }
    match find(line) {
        Ok((entry, rest)) => act(entry, line, rest),
        Err(unknown) => Line::Text(format!("unknown command: '{unknown}'\n")),
    }
}

/// The entry that a line names, and what follows; or the part of the line that names none.
fn find(line: &str) -> Result<(&'static Entry, &str), &str> {
    let (mut table, mut rest) = (COMMANDS, line);
    loop {
        let from = skip_spaces(rest);
        let end = from.find(|char| char == '/' || is_space(char)).unwrap_or(from.len());
        let (word, after) = from.split_at_checked(end).unwrap_or((from, ""));
        let entry = Entry::find(table, word).ok_or_else(|| before(line, after))?;
        rest = skip_spaces(after);
        match entry.does {
            Does::Info if !rest.is_empty() => table = INFO,
            _ => return Ok((entry, rest)),
        }
    }
}

fn act(entry: &'static Entry, line: &str, rest: &str) -> Line {
    let (command, arg, show) = match entry.does {
        Does::Help => return Line::Text(help(rest)),
        Does::Info => return Line::Text(help("info")),
        Does::Qmp { command, arg, show } => (command, arg, show),
    };
    // The table's test sees to it that there is such a command.
    let Some(command) = qmp::command(command) else { return Line::Text(String::new()) };
    let mut args = Map::new();
    let mut left = rest;
    let title = |rest| before(line, rest).trim_end_matches(is_space);
    let wrong = |what: &str| {
        let known = title(rest);
        Line::Text(format!("{}: {what}\nTry \"help {known}\" for more information\n", entry.title()))
    };
    let hint =
        |what: String| Line::Text(format!("{what}\nTry \"help {}\" for more information\n", title(rest)));
    match arg {
        None => {}
        Some((name, Arg::Word)) => {
            let Some((word, after)) = take_word(rest) else { return wrong("string expected") };
            args.insert(name.to_owned(), word.into());
            left = after;
        }
        Some((name, Arg::MiB)) => match take_number(rest) {
            Ok((number, after)) => {
                args.insert(name.to_owned(), number.wrapping_mul(1 << 20).into());
                left = after;
            }
            Err(what) => return hint(what),
        },
    }
    if skip_spaces(left).is_empty() {
        Line::Call { command, args, show }
    } else {
        wrong("extraneous characters at the end of line")
    }
}

/// The first word, which may be in double quotes, and what follows; none if there is none, or a quote
/// or an escape is wrong.
fn take_word(text: &str) -> Option<(String, &str)> {
    let text = skip_spaces(text);
    let Some(quoted) = text.strip_prefix('"') else {
        let end = text.find(is_space).unwrap_or(text.len());
        let (word, rest) = text.split_at_checked(end)?;
        return if word.is_empty() { None } else { Some((word.to_owned(), rest)) };
    };
    let mut word = String::new();
    let mut chars = quoted.chars();
    loop {
        match chars.next()? {
            '"' => return Some((word, chars.as_str())),
            '\\' => word.push(match chars.next()? {
                'n' => '\n',
                'r' => '\r',
                plain @ ('\\' | '\'' | '"') => plain,
                _ => return None,
            }),
            plain => word.push(plain),
        }
    }
}

/// A number that is not negative, in decimal, octal (`0...`) or hexadecimal (`0x...`), and what follows; QEMU's words
/// for what is wrong otherwise. QEMU would compute whole expressions.
fn take_number(text: &str) -> Result<(i64, &str), String> {
    let text = skip_spaces(text);
    let (negative, text) = match text.strip_prefix('-') {
        Some(text) => (true, text),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    let (radix, digits) = match (text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")), text.as_bytes())
    {
        (Some(digits), _) if digits.starts_with(|char: char| char.is_ascii_hexdigit()) => (16, digits),
        (_, [b'0', ..]) => (8, text),
        _ => (10, text),
    };
    let end = digits.find(|char: char| !char.is_digit(radix)).unwrap_or(digits.len());
    let (number, rest) = digits.split_at_checked(end).unwrap_or((digits, ""));
    match (number, rest.chars().next()) {
        ("", None) => Err("unexpected end of expression".to_owned()),
        ("", Some(char)) => Err(format!("invalid char '{char}' in expression")),
        _ => match i64::from_str_radix(number, radix) {
            Err(_) => Err("number too large".to_owned()),
            Ok(value) if negative && value != 0 => Err("enter a positive value".to_owned()),
            Ok(value) => Ok((value, rest)),
        },
    }
}

/// What `help` prints.
fn help(mut rest: &str) -> String {
    let mut words = Vec::new();
    while !skip_spaces(rest).is_empty() {
        match take_word(rest) {
            Some((word, after)) if words.len() < MAX_WORDS => {
                words.push(word);
                rest = after;
            }
            _ => return String::new(),
        }
    }
    let (mut table, mut prefix) = (COMMANDS, "");
    for (index, word) in words.iter().enumerate() {
        let Some(entry) = Entry::find(table, word) else {
            let named = words.get(..=index).unwrap_or_default().join(" ");
            return format!("unknown command: '{named}'\n");
        };
        if !matches!(entry.does, Does::Info) {
            return describe(prefix, entry);
        }
        (table, prefix) = (INFO, "info ");
    }
    table.iter().map(|entry| describe(prefix, entry)).collect()
}

fn describe(prefix: &str, entry: &Entry) -> String {
    format!("{prefix}{} {} -- {}\n", entry.title(), entry.params, entry.help)
}
