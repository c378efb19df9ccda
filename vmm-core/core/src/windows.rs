//! Windows: pieces of a peer's files that the guest reaches without an exit, each in a KVM slot of its own.
//!
//! A peer has a table of its own: numbers, slots and ranges that no other peer has and that hold neither RAM nor anything of
//! core's. So what one peer asks cannot touch what another one has.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;

use bulkhead_bus_api::pci::{Refusal, Window};
use bulkhead_bus_api::platform::Range;
use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY};
use kvm_ioctls::VmFd;
use nix::sys::mman::ProtFlags;
use nix::sys::stat::{SFlag, fstat};

use crate::memory::PAGE;
use crate::sys::Mapping;

type Result<T> = std::result::Result<T, Refusal>;

/// Device and inode of a file: nobody else has the same while it is mapped here.
type File = (u64, u64);

/// The windows of one peer.
#[derive(Debug)]
pub struct Windows {
    first_slot: u32,
    most: u16,
    /// Where they may be.
    ranges: Vec<Range>,
    mapped: BTreeMap<u16, (Window, File, Mapping)>,
    /// Flags of the slots that the guest may write.
    flags: u32,
}

impl Windows {
    /// No window yet; at most `most`, in KVM's slots from `first_slot` on.
    pub fn new(first_slot: u32, most: u16, ranges: Vec<Range>) -> Self {
        Self { first_slot, most, ranges, mapped: BTreeMap::new(), flags: 0 }
    }

    /// Whether the peer may have something at these addresses.
    fn permits(&self, gpa: u64, len: u64) -> bool {
        self.ranges.iter().any(|range| range.contains(gpa, len))
    }

    /// Puts a piece of a file where the guest reaches it, or nothing. After an error what was there is still there,
    /// unless it is the host's.
    pub fn set(&mut self, vm: &VmFd, number: u16, to: Option<(Window, OwnedFd)>) -> Result<()> {
        if number >= self.most {
            return Err(Refusal::NotPermitted);
        }
        let new = match &to {
            None => None,
            Some((window, fd)) => {
                let file = self.check(number, window, fd)?;
                let known = self.mapped.get(&number);
                if known.is_some_and(|(old, its, _)| old == window && *its == file) {
                    return Ok(());
                }
                let write = if window.writable { ProtFlags::PROT_WRITE } else { ProtFlags::empty() };
                let mapping = Mapping::of_file(fd, window.offset, window.len, ProtFlags::PROT_READ | write);
                Some((*window, file, mapping.map_err(|errno| Refusal::Host(errno as i32))?))
            }
        };
        let slot = self.first_slot + u32::from(number);
        let host = |error: kvm_ioctls::Error| Refusal::Host(error.errno());
        if let Some((old, _, mapping)) = self.mapped.get(&number) {
            mapping.set_slot(vm, slot, old.gpa, 0, 0).map_err(host)?;
            self.mapped.remove(&number);
        }
        if let Some((window, file, mapping)) = new {
            let flags = if window.writable { self.flags } else { KVM_MEM_READONLY };
            mapping.set_slot(vm, slot, window.gpa, window.len, flags).map_err(host)?;
            self.mapped.insert(number, (window, file, mapping));
        }
        Ok(())
    }

    /// KVM notes from now on, or no longer, which pages of its windows the guest writes, also of those that come.
    pub fn log_dirty(&mut self, vm: &VmFd, on: bool) -> std::result::Result<(), kvm_ioctls::Error> {
        self.flags = if on { KVM_MEM_LOG_DIRTY_PAGES } else { 0 };
        let mut written = self.mapped.iter().filter(|(_, (window, ..))| window.writable);
        written.try_for_each(|(number, (window, _, mapping))| {
            let slot = self.first_slot + u32::from(*number);
            mapping.set_slot(vm, slot, window.gpa, window.len, self.flags)
        })
    }

    #[cfg(test)]
    pub fn count(&self) -> usize {
        self.mapped.len()
    }

    fn check(&self, number: u16, window: &Window, fd: &OwnedFd) -> Result<File> {
        let Window { gpa, len, offset, .. } = *window;
        let aligned = [gpa, len, offset].iter().all(|value| value.is_multiple_of(PAGE)) && len > 0;
        let mut others = self.mapped.iter().filter(|(other, _)| **other != number);
        // No sum here is beyond a range that has an end.
        if !aligned
            || !self.permits(gpa, len)
            || others.any(|(_, (other, ..))| gpa < other.gpa + other.len && other.gpa < gpa + len)
        {
            return Err(Refusal::NotPermitted);
        }
        let stat = fstat(fd).map_err(|errno| Refusal::Host(errno as i32))?;
        let regular = SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT == SFlag::S_IFREG;
        let end = offset.checked_add(len).and_then(|end| i64::try_from(end).ok());
        if !regular || end.is_none_or(|end| end > stat.st_size) {
            return Err(Refusal::NotPermitted);
        }
        Ok((stat.st_dev, stat.st_ino))
    }
}
