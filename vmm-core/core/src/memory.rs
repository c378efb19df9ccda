//! Guest RAM: one sealed memfd per region, around the 32-bit hole.

use std::ffi::CStr;
use std::os::fd::OwnedFd;

use bulkhead_bus_api::platform::{ECAM, HIGH_RAM_START, LOW_RAM_END};
use bulkhead_control_api::loader::Region;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::ProtFlags;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::ftruncate;

use crate::error::{Error, Result, system};
use crate::sys::Mapping;

/// Page size of x86.
pub const PAGE: u64 = 4096;

/// One region of guest memory, mapped.
#[derive(Debug)]
pub struct Ram {
    /// Where the guest sees it.
    pub region: Region,
    /// Its memfd, of exactly its size and sealed.
    pub fd: OwnedFd,
    /// Where core (that is: KVM) sees it.
    pub mapping: Mapping,
}

/// Regions of `ram` bytes in ascending order.
#[must_use]
pub fn regions(ram: u64) -> Vec<Region> {
    let low = ram.min(LOW_RAM_END);
    let high = (ram > low).then(|| Region { gpa: HIGH_RAM_START, len: ram - low });
    [Region { gpa: 0, len: low }].into_iter().chain(high).collect()
}

/// Limits this process to files of `size` bytes, its largest memfd. A unit file cannot know that size.
pub fn limit_file_size(size: u64) -> Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_FSIZE).map_err(system("getrlimit"))?;
    let size = size.min(hard);
    setrlimit(Resource::RLIMIT_FSIZE, size, size).map_err(system("setrlimit"))
}

/// Makes and maps guest RAM of `ram` bytes.
///
/// # Errors
/// Limits or lack of memory, see [`Error`].
pub fn create(ram: u64) -> Result<Vec<Ram>> {
    if ram == 0 || !ram.is_multiple_of(PAGE) || i64::try_from(ram).is_err() {
        return Err(Error::Config("guest RAM is not a positive multiple of 4096 bytes"));
    }
    let prot = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    let make = |region: Region| {
        let name = if region.gpa == 0 { c"ram-low" } else { c"ram-high" };
        let fd = create_memfd(name, region.len, ram >> 20)?;
        let mapping = Mapping::of_file(&fd, 0, region.len, prot);
        let mapping = mapping.map_err(|errno| Error::Memory(ram >> 20, errno))?;
        mapping.ask_huge();
        Ok(Ram { region, fd, mapping })
    };
    regions(ram).into_iter().map(make).collect()
}

/// Makes the memory of the configuration window, empty: pci writes it, the guest reads it.
///
/// # Errors
/// As [`create`].
pub fn create_ecam() -> Result<OwnedFd> {
    create_memfd(c"ecam", ECAM.len, ECAM.len >> 20)
}

/// A memfd of a fixed size; `mib` is what a failure names.
fn create_memfd(name: &CStr, len: u64, mib: u64) -> Result<OwnedFd> {
    let fd = memfd_create(name, MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)
        .map_err(system("memfd_create"))?;
    let len = i64::try_from(len).map_err(|_| Error::Config("guest RAM is too large"))?;
    ftruncate(&fd, len).map_err(|errno| match errno {
        Errno::EFBIG => Error::FileSize(mib),
        other => Error::Memory(mib, other),
    })?;
    // Nobody who gets the memfd can make another holder fault by changing its size.
    let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
    fcntl(&fd, FcntlArg::F_ADD_SEALS(seals)).map_err(system("F_ADD_SEALS"))?;
    Ok(fd)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_goes_around_the_hole() {
        let gib = 1 << 30;
        assert_eq!(regions(gib), [Region { gpa: 0, len: gib }]);
        assert_eq!(regions(LOW_RAM_END), [Region { gpa: 0, len: LOW_RAM_END }]);
        assert_eq!(
            regions(300 * gib),
            [
                Region { gpa: 0, len: LOW_RAM_END },
                Region { gpa: HIGH_RAM_START, len: 300 * gib - LOW_RAM_END }
            ]
        );
    }

    #[test]
    fn the_memfd_is_sealed_and_of_exact_size() {
        let ram = create(PAGE * 4).unwrap();
        let fd = &ram[0].fd;
        assert_eq!(nix::sys::stat::fstat(fd).unwrap().st_size, 4 * 4096);
        assert_eq!(ftruncate(fd, 0), Err(Errno::EPERM));
        assert_eq!(ftruncate(fd, 1 << 20), Err(Errno::EPERM));
        assert_eq!(fcntl(fd, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_WRITE)), Err(Errno::EPERM));
    }

    #[test]
    fn ram_may_be_in_huge_pages_and_windows_may_not() {
        if !std::path::Path::new("/sys/kernel/mm/transparent_hugepage").exists() {
            return;
        }
        let window = Mapping::of_file(create_ecam().unwrap(), 0, PAGE, ProtFlags::PROT_READ).unwrap();
        let kept = (create(PAGE * 4).unwrap(), window);
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let flags = |name| {
            let at = maps.find(&format!("/memfd:{name} ")).unwrap();
            maps[at..].lines().find(|line| line.starts_with("VmFlags:")).unwrap()
        };
        assert!(flags("ram-low").contains(" hg"), "{}", flags("ram-low"));
        assert!(!flags("ecam").contains(" hg"), "{}", flags("ecam"));
        drop(kept);
    }

    #[test]
    fn hundreds_of_gib_are_sparse() {
        assert_eq!(create(256 << 30).unwrap().len(), 2);
    }

    #[test]
    fn odd_sizes_are_refused() {
        for ram in [0, 1, 4095, u64::MAX - 4095] {
            assert!(create(ram).is_err(), "{ram}");
        }
    }
}
