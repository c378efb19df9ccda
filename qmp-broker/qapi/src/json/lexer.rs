//! The lexer's state machine, one byte at a time.

/// Kind of a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    LeftBrace,
    RightBrace,
    LeftBracket,
    RightBracket,
    Colon,
    Comma,
    Integer,
    Float,
    Keyword,
    String,
}

/// Where the lexer is within a token.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum State {
    /// Between tokens.
    #[default]
    Start,
    /// After a bad token, skipping to a byte that may begin something new.
    Recovery,
    /// In a string that ends with this quote.
    Text(u8),
    /// After a backslash in such a string.
    Escape(u8),
    /// After `-`.
    Sign,
    /// After a leading `0`.
    Zero,
    /// In the integer part.
    Digits,
    /// After the decimal point.
    Point,
    /// In the fraction.
    Fraction,
    /// After `e`.
    Exponent,
    /// After the exponent's sign.
    ExponentSign,
    /// In the exponent.
    ExponentDigits,
    /// In a bare word.
    Word,
}

/// What to do with a byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Add it to the token and go on in this state.
    Take(State),
    /// Drop it and go on in this state.
    Skip(State),
    /// Add it: the token is complete.
    Finish(Kind),
    /// The token was complete before it; look at it again between tokens.
    FinishBefore(Kind),
    /// Recovery ends before it.
    Restart,
    /// It cannot follow: the token, with it, is an error.
    Stray,
}

/// Whether a string may hold this byte as it is.
pub(super) const fn is_string_byte(byte: u8) -> bool {
    byte >= 0x20 && byte <= 0xFD
}

/// Decides what `byte` means in `state`.
pub(super) const fn step(state: State, byte: u8) -> Step {
    match state {
        State::Start => start(byte),
        State::Recovery => recover(byte),
        State::Text(_) | State::Escape(_) if !is_string_byte(byte) => Step::Stray,
        State::Text(quote) => match byte {
            b'\\' => Step::Take(State::Escape(quote)),
            _ if byte == quote => Step::Finish(Kind::String),
            _ => Step::Take(state),
        },
        State::Escape(quote) => Step::Take(State::Text(quote)),
        State::Word => match byte {
            b'a'..=b'z' => Step::Take(state),
            _ => Step::FinishBefore(Kind::Keyword),
        },
        _ => number(state, byte),
    }
}

const fn start(byte: u8) -> Step {
    match byte {
        b' ' | b'\t' | b'\r' | b'\n' => Step::Skip(State::Start),
        b'{' => Step::Finish(Kind::LeftBrace),
        b'}' => Step::Finish(Kind::RightBrace),
        b'[' => Step::Finish(Kind::LeftBracket),
        b']' => Step::Finish(Kind::RightBracket),
        b':' => Step::Finish(Kind::Colon),
        b',' => Step::Finish(Kind::Comma),
        b'"' | b'\'' => Step::Take(State::Text(byte)),
        b'-' => Step::Take(State::Sign),
        b'0' => Step::Take(State::Zero),
        b'1'..=b'9' => Step::Take(State::Digits),
        b'a'..=b'z' => Step::Take(State::Word),
        _ => Step::Stray,
    }
}

/// Structural characters and bytes that no token may hold end a recovery, a tab does not.
const fn recover(byte: u8) -> Step {
    match byte {
        b'\t' => Step::Skip(State::Recovery),
        b'{' | b'}' | b'[' | b']' | b':' | b',' | 0..=0x1F | 0xFE..=0xFF => Step::Restart,
        _ => Step::Skip(State::Recovery),
    }
}

const fn number(state: State, byte: u8) -> Step {
    match (state, byte) {
        (State::Sign, b'0') => Step::Take(State::Zero),
        (State::Sign, b'1'..=b'9') | (State::Digits, b'0'..=b'9') => Step::Take(State::Digits),
        (State::Zero | State::Digits, b'.') => Step::Take(State::Point),
        (State::Digits | State::Fraction, b'e' | b'E') => Step::Take(State::Exponent),
        (State::Point | State::Fraction, b'0'..=b'9') => Step::Take(State::Fraction),
        (State::Exponent, b'+' | b'-') => Step::Take(State::ExponentSign),
        (State::Exponent | State::ExponentSign | State::ExponentDigits, b'0'..=b'9') => {
            Step::Take(State::ExponentDigits)
        }
        (State::Zero, b'0'..=b'9') => Step::Stray,
        (State::Zero | State::Digits, _) => Step::FinishBefore(Kind::Integer),
        (State::Fraction | State::ExponentDigits, _) => Step::FinishBefore(Kind::Float),
        _ => Step::Stray,
    }
}
