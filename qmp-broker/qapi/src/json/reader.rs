//! The incremental reader: bytes in, values and errors out.

use serde_json::Value;

use super::lexer::{Kind, State, Step, is_string_byte, step};
use super::parser::{Token, parse};
use super::text;

/// The most text one value may hold, in bytes (QEMU's `MAX_TOKEN_SIZE`).
pub const MAX_TOKEN_BYTES: usize = 64 << 20;
/// The most tokens of one value (QEMU's `MAX_TOKEN_COUNT`).
pub const MAX_TOKENS: usize = 2 << 20;
/// The deepest nesting (QEMU's `MAX_NESTING`).
pub const MAX_NESTING: i32 = 1 << 10;
/// The longest bad token that an error quotes, in bytes. QEMU has no limit.
const MAX_QUOTED: usize = 4096;
/// Buffers that grew beyond this are given back after each value.
const KEEP: usize = 64 * 1024;

/// What the reader found.
#[derive(Clone, Debug, PartialEq)]
pub enum Item {
    /// A complete value.
    Value(Value),
    /// An error in QEMU's words. Reading goes on after it.
    Error(String),
}

/// Reads a stream of values as QEMU's QMP server does, with its errors, limits and recovery.
#[derive(Debug)]
pub struct Reader {
    state: State,
    /// The token that is being read.
    token: Vec<u8>,
    /// The complete tokens of the value that is being read, and their texts back to back.
    tokens: Vec<Token>,
    text: Vec<u8>,
    braces: i32,
    brackets: i32,
    /// What may be held.
    budget: usize,
}

impl Default for Reader {
    fn default() -> Self {
        Self {
            state: State::Start,
            token: Vec::new(),
            tokens: Vec::new(),
            text: Vec::new(),
            braces: 0,
            brackets: 0,
            budget: usize::MAX,
        }
    }
}

impl Reader {
    /// Bytes held for a value that is not complete.
    #[must_use]
    pub fn held(&self) -> usize {
        self.token.len() + self.text.len() + self.tokens.len() * size_of::<Token>()
    }

    /// Limits what may be held; a value that needs more is an error like one that is too long.
    pub fn set_budget(&mut self, bytes: usize) {
        self.budget = bytes;
    }

    /// Reads from `input` up to the end of one item. Returns the number of bytes used and the item,
    /// if one is complete; without one, all of `input` has been used.
    pub fn feed(&mut self, input: &[u8]) -> (usize, Option<Item>) {
        let mut used = 0;
        while let Some(rest) = input.get(used..).filter(|rest| !rest.is_empty()) {
            let taken = self.take_run(rest);
            let item = match rest.first() {
                Some(&byte) if taken == 0 => {
                    let (consumed, item) = self.feed_byte(byte);
                    used += usize::from(consumed);
                    item
                }
                _ => {
                    used += taken;
                    None
                }
            };
            let item = item.or_else(|| self.check_token_size());
            if item.is_some() {
                return (used, item);
            }
        }
        (used, None)
    }

    /// Takes the bytes at the start of `rest` that are plain text of the string being read.
    fn take_run(&mut self, rest: &[u8]) -> usize {
        let State::Text(quote) = self.state else { return 0 };
        let room = (MAX_TOKEN_BYTES - self.token.len().min(MAX_TOKEN_BYTES))
            .min(self.budget.saturating_sub(self.held()))
            .saturating_add(1);
        let plain = |byte: u8| is_string_byte(byte) && byte != quote && byte != b'\\';
        let rest = rest.get(..room).unwrap_or(rest);
        let run = rest.iter().position(|&byte| !plain(byte)).unwrap_or(rest.len());
        self.token.extend_from_slice(rest.get(..run).unwrap_or_default());
        run
    }

    fn feed_byte(&mut self, byte: u8) -> (bool, Option<Item>) {
        match step(self.state, byte) {
            Step::Take(state) => {
                self.token.push(byte);
                self.state = state;
                (true, None)
            }
            Step::Skip(state) => {
                self.state = state;
                (true, None)
            }
            Step::Finish(kind) => {
                self.token.push(byte);
                (true, self.finish(kind))
            }
            Step::FinishBefore(kind) => (false, self.finish(kind)),
            Step::Restart => {
                self.state = State::Start;
                (false, None)
            }
            Step::Stray => {
                self.token.push(byte);
                let quoted = self.token.get(..self.token.len().min(MAX_QUOTED)).unwrap_or_default();
                let error = format!("JSON parse error, stray '{}'", text::lossy(quoted));
                self.token.clear();
                self.state = State::Recovery;
                (true, Some(self.emit(Item::Error(error))))
            }
        }
    }

    /// A single token may not grow beyond the limit; what follows is read as something new.
    fn check_token_size(&mut self) -> Option<Item> {
        if self.token.len() <= MAX_TOKEN_BYTES && self.held() <= self.budget {
            return None;
        }
        self.token.clear();
        self.state = State::Start;
        Some(self.emit(Item::Error("JSON token size limit exceeded".to_owned())))
    }

    /// Adds the token to the value; emits the value when its brackets are balanced.
    fn finish(&mut self, kind: Kind) -> Option<Item> {
        self.state = State::Start;
        match kind {
            Kind::LeftBrace => self.braces += 1,
            Kind::RightBrace => self.braces -= 1,
            Kind::LeftBracket => self.brackets += 1,
            Kind::RightBracket => self.brackets -= 1,
            _ => (),
        }
        let exceeded = if self.text.len() + self.token.len() + 1 > MAX_TOKEN_BYTES {
            Some("JSON token size limit exceeded")
        } else if self.tokens.len() + 1 > MAX_TOKENS {
            Some("JSON token count limit exceeded")
        } else if self.braces + self.brackets > MAX_NESTING {
            Some("JSON nesting depth limit exceeded")
        } else {
            None
        };
        if let Some(error) = exceeded {
            self.token.clear();
            return Some(self.emit(Item::Error(error.to_owned())));
        }
        self.text.append(&mut self.token);
        self.tokens.push(Token { kind, end: self.text.len() });
        if (self.braces > 0 || self.brackets > 0) && self.braces >= 0 && self.brackets >= 0 {
            return None;
        }
        let item = match parse(&self.tokens, &self.text) {
            Ok(value) => Item::Value(value),
            Err(error) => Item::Error(format!("JSON parse error, {error}")),
        };
        Some(self.emit(item))
    }

    /// Forgets the value's tokens and passes `item` on.
    fn emit(&mut self, item: Item) -> Item {
        self.braces = 0;
        self.brackets = 0;
        self.tokens.clear();
        self.text.clear();
        self.tokens.shrink_to(KEEP / size_of::<Token>());
        self.text.shrink_to(KEEP);
        self.token.shrink_to(KEEP);
        item
    }
}

#[cfg(test)]
mod tests;
