//! `-add-fd`: a descriptor that the launcher inherited becomes a member of an fd set.

use crate::cli::{Params, Problem};

/// An `-add-fd`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AddFd {
    /// Number of the descriptor.
    pub fd: i32,
    /// The set.
    pub set: i64,
    /// What query-fdsets says about it.
    pub opaque: Option<String>,
}

/// An `-add-fd`. Whether the descriptor is there is seen when it is taken.
pub fn add_fd(params: &Params) -> Result<AddFd, Problem> {
    let number = |name| params.number(name).map(u64::cast_signed).filter(|number| *number >= 0);
    let fd = number("fd").ok_or(Problem::RequiredNumber("fd"))?;
    if fd <= 2 {
        return Err(Problem::AddFdStandardStream);
    }
    // QEMU cuts a number to 32 bits.
    let fd = i32::try_from(fd).map_err(|_| Problem::AddFdInvalid)?;
    let set = number("set").ok_or(Problem::RequiredNumber("set"))?;
    Ok(AddFd { fd, set, opaque: params.text("opaque").map(str::to_owned) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::table::ADD_FD;

    fn parsed(text: &str) -> Result<AddFd, String> {
        Params::parse(&ADD_FD, text).and_then(|params| add_fd(&params)).map_err(|e| e.to_string())
    }

    #[test]
    fn members_of_sets() {
        let member = |fd, set, opaque: Option<&str>| AddFd { fd, set, opaque: opaque.map(str::to_owned) };
        assert_eq!(parsed("fd=3,set=0"), Ok(member(3, 0, None)));
        assert_eq!(parsed("set=0x10,fd=7,opaque=a,,b"), Ok(member(7, 16, Some("a,b"))));
        assert_eq!(parsed("fd=7,set=9223372036854775807"), Ok(member(7, i64::MAX, None)));
    }

    #[test]
    fn refused_members() {
        for (text, error) in [
            ("set=7", "fd option is required and must be non-negative"),
            ("fd=-1,set=0", "fd option is required and must be non-negative"),
            ("fd=0,set=0", "fd cannot be a standard I/O stream"),
            ("fd=2,set=-1", "fd cannot be a standard I/O stream"),
            ("fd=99999999999,set=0", "fd is not valid or already in use"),
            // QEMU takes this for 7.
            ("fd=4294967303,set=0", "fd is not valid or already in use"),
            ("fd=7", "set option is required and must be non-negative"),
            ("fd=7,set=-1", "set option is required and must be non-negative"),
            ("fd=7,set=18446744073709551615", "set option is required and must be non-negative"),
            (
                "fd=7,set=99999999999999999999",
                "Value '99999999999999999999' is too large for parameter 'set'",
            ),
            ("fd=x,set=1", "Parameter 'fd' expects a number"),
            ("fd=7,set=--1", "Parameter 'set' expects a number"),
            ("7,set=1", "Invalid parameter '7'"),
            ("fd=7,set=1,foo=1", "Invalid parameter 'foo'"),
        ] {
            assert_eq!(parsed(text).unwrap_err(), error, "{text}");
        }
    }
}
