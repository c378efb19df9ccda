//! `-acpitable`: a table of the user's own.

use bulkhead_control_api::config::AcpiHeader;

use crate::cli::{Params, Problem};

/// An `-acpitable`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AcpiTable {
    /// Its files, at least one; their contents follow each other.
    pub files: Vec<String>,
    /// They begin with a header.
    pub has_header: bool,
    /// Fields of the header.
    pub header: AcpiHeader,
}

/// An `-acpitable`. What its files hold is the loader's to look at.
pub fn table(params: &Params) -> Result<AcpiTable, Problem> {
    let header = AcpiHeader {
        sig: text(params, "sig"),
        rev: number(params, "rev", "uint8_t")?,
        oem_id: text(params, "oem_id"),
        oem_table_id: text(params, "oem_table_id"),
        oem_rev: number(params, "oem_rev", "uint32_t")?,
        asl_compiler_id: text(params, "asl_compiler_id"),
        asl_compiler_rev: number(params, "asl_compiler_rev", "uint32_t")?,
    };
    let (files, has_header) = match (params.text("file"), params.text("data")) {
        (Some(file), None) => (file, true),
        (None, Some(data)) => (data, false),
        (Some(_), Some(_)) | (None, None) => return Err(Problem::TableSource),
    };
    if files.is_empty() {
        return Err(Problem::TableWithoutPath);
    }
    Ok(AcpiTable { files: files.split(':').map(str::to_owned).collect(), has_header, header })
}

/// A text of `N` bytes at most: cut, or filled up with zeros.
fn text<const N: usize>(params: &Params, name: &str) -> Option<[u8; N]> {
    let text = params.text(name)?;
    let mut bytes = [0; N];
    bytes.iter_mut().zip(text.bytes()).for_each(|(to, from)| *to = from);
    Some(bytes)
}

/// A number as QEMU reads it here: decimal, hexadecimal with `0x`, octal with `0`; blanks and `+` may come first.
fn number<T: TryFrom<u64>>(
    params: &Params,
    name: &'static str,
    kind: &'static str,
) -> Result<Option<T>, Problem> {
    let Some(text) = params.text(name) else { return Ok(None) };
    let digits = text.trim_start_matches([' ', '\t', '\n', '\u{b}', '\u{c}', '\r']);
    let digits = digits.strip_prefix('+').unwrap_or(digits);
    let (digits, radix) = match digits.strip_prefix("0x").or_else(|| digits.strip_prefix("0X")) {
        Some(hex) => (hex, 16),
        None if digits.len() > 1 && digits.starts_with('0') => (digits, 8),
        None => (digits, 10),
    };
    // The parser of the standard library takes a sign of its own.
    let number = Some(digits).filter(|digits| digits.chars().all(|c| c.is_digit(radix)));
    let number = number.and_then(|digits| u64::from_str_radix(digits, radix).ok());
    let number = number.ok_or(Problem::ExpectsValue(name, "a uint64 value"))?;
    T::try_from(number).map(Some).map_err(|_| Problem::ExpectsValue(name, kind))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::table::ACPI;

    fn parse(text: &str) -> Result<AcpiTable, String> {
        Params::parse(&ACPI, text).and_then(|params| table(&params)).map_err(|e| e.to_string())
    }

    #[test]
    fn all_fields() {
        let all = "sig=TEST,rev=1,oem_id=FOO,oem_table_id=LONGER THAN THAT,oem_rev=0xffffffff,asl_compiler_id=,\
                   asl_compiler_rev=010,data=a:b,,c:";
        let header = AcpiHeader {
            sig: Some(*b"TEST"),
            rev: Some(1),
            oem_id: Some(*b"FOO\0\0\0"),
            oem_table_id: Some(*b"LONGER T"),
            oem_rev: Some(u32::MAX),
            asl_compiler_id: Some([0; 4]),
            asl_compiler_rev: Some(8),
        };
        let files = vec!["a".to_owned(), "b,c".to_owned(), String::new()];
        assert_eq!(parse(all), Ok(AcpiTable { files, has_header: false, header }));
        let table = parse("file=/dev/fdset/1").unwrap();
        assert!(table.has_header && table.header.is_empty());
        // The parameter whose name may be left out.
        assert_eq!(parse("x,rev= +255").unwrap().files, ["x"]);
        assert_eq!(parse("x,rev=1,rev=0").unwrap().header.rev, Some(0));
    }

    /// The texts are those of QEMU 7.2.
    #[test]
    fn refused_tables() {
        let one = "'-acpitable' requires one of 'data' or 'file'";
        for (text, error) in [
            ("", one),
            ("sig=FOOO", one),
            ("file=a,data=b", one),
            ("a,file=b", one),
            ("data=", "'-acpitable' requires at least one pathname"),
            ("file=", "'-acpitable' requires at least one pathname"),
            ("foo=1,data=a", "Invalid parameter 'foo'"),
            ("id=x,data=a", "Invalid parameter 'id'"),
            ("rev=256,data=a", "Parameter 'rev' expects uint8_t"),
            ("oem_rev=4294967296,data=a", "Parameter 'oem_rev' expects uint32_t"),
            ("asl_compiler_rev=0x100000000,data=a", "Parameter 'asl_compiler_rev' expects uint32_t"),
        ] {
            assert_eq!(parse(text).unwrap_err(), error, "{text}");
        }
        for number in ["", "x", "-1", "1k", "1 ", "1-2", "08", "0x", "++1", "+-1", "18446744073709551616"] {
            let expected = "Parameter 'oem_rev' expects a uint64 value";
            assert_eq!(parse(&format!("oem_rev={number},data=a")).unwrap_err(), expected, "{number}");
        }
    }
}
