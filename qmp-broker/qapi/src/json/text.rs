//! Modified UTF-8: UTF-8 in which U+0000 is the two bytes C0 80, and noncharacters are invalid.

/// Whether QEMU accepts this code point.
const fn is_valid(code: u32) -> bool {
    let noncharacter = (code >= 0xFDD0 && code <= 0xFDEF) || code & 0xFFFE == 0xFFFE;
    code <= 0x10_FFFF && !(code >= 0xD800 && code <= 0xDFFF) && !noncharacter
}

/// The character of a valid code point; `None` for surrogates, noncharacters and out of range.
pub(super) fn character(code: u32) -> Option<char> {
    if is_valid(code) { char::from_u32(code) } else { None }
}

/// Decodes the sequence at the start of `bytes`: its character, if valid, and its length in bytes.
/// The length of an invalid sequence is what QEMU skips: the lead byte and the continuation bytes
/// that it announces, as far as they are there. Zero only for an empty slice.
pub(super) fn decode(bytes: &[u8]) -> (Option<char>, usize) {
    let Some((&lead, rest)) = bytes.split_first() else { return (None, 0) };
    if lead < 0x80 {
        return (Some(char::from(lead)), 1);
    }
    let announced = lead.leading_ones() as usize;
    if announced == 1 || announced > 6 {
        return (None, 1);
    }
    let mut code = u32::from(lead) & (0x7F >> announced);
    for seen in 1..announced {
        match rest.get(seen - 1) {
            Some(&byte) if byte & 0xC0 == 0x80 => code = code << 6 | u32::from(byte & 0x3F),
            _ => return (None, seen),
        }
    }
    let smallest = match announced {
        2 => 0x80,
        3 => 0x800,
        4 => 0x1_0000,
        _ => return (None, announced),
    };
    let nul = code == 0 && announced == 2;
    if code < smallest && !nul { (None, announced) } else { (character(code), announced) }
}

/// Bytes of a bad token as text for an error: up to the first NUL, U+FFFD for invalid sequences.
pub(super) fn lossy(bytes: &[u8]) -> String {
    let mut rest = bytes.split(|&byte| byte == 0).next().unwrap_or_default();
    let mut out = String::with_capacity(rest.len());
    loop {
        match decode(rest) {
            (_, 0) => return out,
            (decoded, length) => {
                out.push(decoded.unwrap_or(char::REPLACEMENT_CHARACTER));
                rest = rest.get(length..).unwrap_or_default();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decodes_modified_utf8() {
        assert_eq!(decode(b""), (None, 0));
        assert_eq!(decode(b"a"), (Some('a'), 1));
        assert_eq!(decode("é".as_bytes()), (Some('é'), 2));
        assert_eq!(decode("😀x".as_bytes()), (Some('😀'), 4));
        assert_eq!(decode(b"\xC0\x80"), (Some('\0'), 2));
        assert_eq!(decode(b"\xC0\x81"), (None, 2));
        assert_eq!(decode(b"\xE0\x80\x80"), (None, 3));
        assert_eq!(decode(b"\xED\xA0\x80"), (None, 3));
        assert_eq!(decode(b"\xEF\xBF\xBF"), (None, 3));
        assert_eq!(decode(b"\xF4\x90\x80\x80"), (None, 4));
        assert_eq!(decode(b"\xF8\x88\x80\x80\x80"), (None, 5));
        assert_eq!(decode(b"\xFD\xBF\xBF\xBF\xBF\xBF"), (None, 6));
        assert_eq!(decode(b"\xE2\x82x"), (None, 2));
        assert_eq!(decode(b"\x80\x80"), (None, 1));
        assert_eq!(decode(b"\xFE"), (None, 1));
    }

    #[test]
    fn shows_bad_tokens_as_qemu_does() {
        assert_eq!(lossy(b"\"a\x01"), "\"a\x01");
        assert_eq!(lossy(b"\"a\x00b"), "\"a");
        assert_eq!(lossy(b"\"\xE2\x82\xFF"), "\"\u{FFFD}\u{FFFD}");
    }
}
