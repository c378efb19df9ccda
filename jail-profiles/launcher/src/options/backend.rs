//! `-object memory-backend-*`.

use crate::cli::{Params, Problem};

/// A page in bytes.
const PAGE: u64 = 4096;
/// A huge page in bytes, where the user names no other length.
const HUGE_PAGE: u64 = 2 << 20;

/// A memory back end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryBackEnd {
    /// Its type.
    pub qom_type: &'static str,
    /// Its id.
    pub id: String,
    /// Length in bytes, a multiple of the page.
    pub size: u64,
    /// Others may map it.
    pub share: bool,
    /// All of it is taken from the host at once.
    pub prealloc: bool,
    /// What it is in.
    pub backing: Backing,
}

/// What memory is in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Backing {
    /// Memory of its own.
    Memfd,
    /// The same in huge pages of this length in bytes.
    HugePages(u64),
    /// A file.
    File(String),
}

/// A memory back end.
pub fn memory(params: &Params) -> Result<MemoryBackEnd, Problem> {
    let id = params.text("id").map(str::to_owned).ok_or(Problem::MissingParameter("id"))?;
    let size = params.number("size").ok_or(Problem::MissingParameter("size"))?;
    let (qom_type, backing) = match params.text("qom-type") {
        Some("memory-backend-file") => {
            let path = params.text("mem-path").ok_or(Problem::MissingParameter("mem-path"))?;
            ("memory-backend-file", Backing::File(path.to_owned()))
        }
        Some("memory-backend-memfd") => ("memory-backend-memfd", memfd(params)?),
        _ => ("memory-backend-ram", Backing::Memfd),
    };
    let value = || size.to_string();
    if size == 0 {
        return Err(Problem::ObjectValue("size", qom_type, value()));
    }
    let size = size.checked_next_multiple_of(PAGE).ok_or_else(|| Problem::OutOfRange("size", value()))?;
    let is_file = matches!(backing, Backing::File(_));
    let share = params.flag("share").unwrap_or(qom_type == "memory-backend-memfd");
    if is_file && !share {
        return Err(Problem::PrivateFile("share"));
    }
    Ok(MemoryBackEnd {
        qom_type,
        id,
        size,
        share,
        prealloc: params.flag("prealloc").unwrap_or(false),
        backing,
    })
}

fn memfd(params: &Params) -> Result<Backing, Problem> {
    if params.flag("seal") == Some(false) {
        return Err(Problem::ObjectValue("seal", "memory-backend-memfd", "off".to_owned()));
    }
    let pages = params.number("hugetlbsize").filter(|pages| *pages != 0).unwrap_or(HUGE_PAGE);
    match params.flag("hugetlb") {
        Some(true) if !pages.is_power_of_two() => Err(Problem::HugePageSize),
        Some(true) => Ok(Backing::HugePages(pages)),
        _ => Ok(Backing::Memfd),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::devices::OBJECT;

    fn parsed(text: &str) -> Result<MemoryBackEnd, String> {
        Params::parse_kinds(&OBJECT, text).and_then(|params| memory(&params)).map_err(|e| e.to_string())
    }

    #[test]
    fn kinds() {
        let ram = parsed("memory-backend-ram,id=m,size=1M").unwrap();
        assert_eq!((ram.size, ram.share, ram.backing), (1 << 20, false, Backing::Memfd));
        let memfd =
            parsed("memory-backend-memfd,id=m,size=5000,prealloc=on,seal=on,hugetlb=off,hugetlbsize=4M");
        let memfd = memfd.unwrap();
        assert_eq!(
            (memfd.size, memfd.share, memfd.prealloc, memfd.backing),
            (8192, true, true, Backing::Memfd)
        );
        let huge = parsed("memory-backend-memfd,id=m,size=4M,hugetlb=on,hugetlbsize=2M").unwrap();
        assert_eq!(huge.backing, Backing::HugePages(2 << 20));
        let file = parsed("memory-backend-file,id=m,size=4M,mem-path=/p,share=on").unwrap();
        assert_eq!((file.backing, file.qom_type), (Backing::File("/p".into()), "memory-backend-file"));
    }

    #[test]
    fn refused() {
        for (text, error) in [
            ("memory-backend-ram,size=1M", "Parameter 'id' is missing"),
            ("memory-backend-ram,id=m", "Parameter 'size' is missing"),
            (
                "memory-backend-memfd,id=m,size=0",
                "property 'size' of memory-backend-memfd doesn't take value '0'",
            ),
            (
                "memory-backend-ram,id=m,size=18446744073709551615",
                "Value '18446744073709551615' is out of range for parameter 'size'",
            ),
            ("memory-backend-file,id=m,size=4M", "Parameter 'mem-path' is missing"),
            (
                "memory-backend-file,id=m,size=4M,mem-path=/p",
                "'share' of memory-backend-file: only share=on is available: what the guest writes is in the file",
            ),
            (
                "memory-backend-memfd,id=m,size=4M,hugetlb=on,hugetlbsize=3M",
                "Hugepage size must be a power of 2",
            ),
            (
                "memory-backend-memfd,id=m,size=4M,seal=off",
                "property 'seal' of memory-backend-memfd doesn't take value 'off'",
            ),
            ("memory-backend-memfd,id=m,size=4M,policy=bind", "Invalid parameter 'policy'"),
            ("memory-backend-ram,id=m,size=4M,hugetlb=on", "Invalid parameter 'hugetlb'"),
            ("memory-backend-file,id=m,size=4M,mem-path=/p,pmem=on", "Invalid parameter 'pmem'"),
        ] {
            assert_eq!(parsed(text).unwrap_err(), error, "{text}");
        }
    }
}
