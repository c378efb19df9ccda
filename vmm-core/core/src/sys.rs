//! The unsafe corner: mappings, KVM calls that take addresses, and the kick of a vCPU thread.
#![expect(unsafe_code, reason = "mmap, KVM structures with unions, tgkill, mallopt")]

use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};

use bulkhead_bus_api::Space;
use kvm_bindings::{
    KVM_COALESCED_MMIO_PAGE_OFFSET, Xsave, kvm_coalesced_mmio, kvm_coalesced_mmio_ring,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use nix::errno::Errno;
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, munmap};
use vmm_sys_util::eventfd::EventFd;

use crate::memory::PAGE;

/// The signal that takes a vCPU thread out of `KVM_RUN` or out of a wait.
pub const KICK_SIGNAL: libc::c_int = libc::SIGUSR1;

/// Makes all threads share one heap that grows by `brk`: the jail has no `mprotect`.
pub fn one_heap() {
    // SAFETY: called while the process has one thread; mallopt takes plain integers.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}

/// Takes over the descriptor of /dev/kvm that the starter opened.
pub fn adopt_kvm(fd: OwnedFd) -> Kvm {
    // SAFETY: the descriptor is owned, so nobody else closes it; that it is /dev/kvm is checked by
    // KVM_GET_API_VERSION, which only /dev/kvm answers with 12.
    unsafe { Kvm::from_raw_fd(fd.into_raw_fd()) }
}

/// The descriptor of an eventfd.
pub fn borrow(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the eventfd is open as long as it is borrowed.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

/// A shared mapping, unmapped on drop.
#[derive(Debug)]
pub struct Mapping {
    addr: NonNull<libc::c_void>,
    len: usize,
}

// SAFETY: a mapping is not bound to the thread that made it, and `Mapping` gives out no reference
// into itself.
unsafe impl Send for Mapping {}
// SAFETY: as above; all methods take addresses only.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new(fd: impl AsFd, len: usize, offset: i64, prot: ProtFlags, flags: MapFlags) -> Result<Self, Errno> {
        let size = NonZeroUsize::new(len).ok_or(Errno::EINVAL)?;
        // SAFETY: the kernel chooses the address, so no existing mapping is touched.
        let addr = unsafe { mmap(None, size, prot, MapFlags::MAP_SHARED | flags, fd, offset) }?;
        Ok(Self { addr, len })
    }

    /// Maps `len` bytes of a file from `offset` on, left out of core dumps.
    pub fn of_file(fd: impl AsFd, offset: u64, len: u64, prot: ProtFlags) -> Result<Self, Errno> {
        let (Ok(offset), Ok(len)) = (offset.try_into(), len.try_into()) else { return Err(Errno::EINVAL) };
        let mapping = Self::new(fd, len, offset, prot, MapFlags::MAP_NORESERVE)?;
        // SAFETY: the range is exactly the mapping made above; DONTDUMP does not change its content.
        unsafe { madvise(mapping.addr, len, MmapAdvise::MADV_DONTDUMP) }?;
        Ok(mapping)
    }

    /// Asks for huge pages, where the host grants them to those who ask (`shmem_enabled`).
    pub fn ask_huge(&self) {
        // SAFETY: the range is exactly this mapping; HUGEPAGE does not change its content. A kernel without huge pages
        // refuses, and nothing is lost.
        let _ = unsafe { madvise(self.addr, self.len, MmapAdvise::MADV_HUGEPAGE) };
    }

    /// Makes the first `len` bytes slot `slot` of the VM at guest physical `gpa`, with flags of KVM (`KVM_MEM_*`); a length of
    /// 0 takes the slot away. The caller keeps the mapping as long as the slot.
    pub fn set_slot(
        &self,
        vm: &VmFd,
        slot: u32,
        gpa: u64,
        len: u64,
        flags: u32,
    ) -> Result<(), kvm_ioctls::Error> {
        if len > self.len as u64 {
            return Err(kvm_ioctls::Error::new(libc::EINVAL));
        }
        let region = kvm_userspace_memory_region {
            slot,
            flags,
            guest_phys_addr: gpa,
            memory_size: len,
            userspace_addr: self.addr.as_ptr() as u64,
        };
        // SAFETY: the range lies in this live mapping of shared memory (checked above), to which Rust holds no
        // reference; when it is unmapped KVM is told (MMU notifier) and the guest's access fails.
        unsafe { vm.set_user_memory_region(region) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: exactly the range that `new` mapped; no reference into it exists.
        let _ = unsafe { munmap(self.addr, self.len) };
    }
}

/// Entries of the ring: as many as fit into its page after the two indices.
const ENTRIES: u32 = 170;
const _: () = assert!((4096 - size_of::<kvm_coalesced_mmio_ring>()) / size_of::<kvm_coalesced_mmio>() == 170);

/// KVM's ring of coalesced writes, one per VM. Reading it is the caller's to serialize.
#[derive(Debug)]
pub struct Ring {
    page: Mapping,
}

impl Ring {
    /// Maps the ring through any vCPU of the VM.
    pub fn map(vcpu: &VcpuFd) -> Result<Self, Errno> {
        let page = usize::try_from(PAGE).map_err(|_| Errno::EINVAL)?;
        let offset =
            i64::from(KVM_COALESCED_MMIO_PAGE_OFFSET) * i64::try_from(PAGE).map_err(|_| Errno::EINVAL)?;
        // SAFETY: the borrow ends with this call, while `vcpu` is borrowed and so open.
        let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(vcpu.as_raw_fd()) };
        let prot = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        Ok(Self { page: Mapping::new(fd, page, offset, prot, MapFlags::empty())? })
    }

    fn ring(&self) -> *mut kvm_coalesced_mmio_ring {
        self.page.addr.as_ptr().cast()
    }

    fn first(&self) -> &AtomicU32 {
        // SAFETY: the page is mapped as long as `self`, and the ring begins at its start.
        let field = unsafe { &raw mut (*self.ring()).first };
        // SAFETY: the field is aligned; core and the kernel access it by atomic loads and stores only.
        unsafe { AtomicU32::from_ptr(field) }
    }

    fn last(&self) -> &AtomicU32 {
        // SAFETY: as in `first`.
        let field = unsafe { &raw mut (*self.ring()).last };
        // SAFETY: as in `first`.
        unsafe { AtomicU32::from_ptr(field) }
    }

    /// Whether the kernel has collected something.
    pub fn is_empty(&self) -> bool {
        self.first().load(Ordering::SeqCst) == self.last().load(Ordering::SeqCst)
    }

    /// Takes the oldest write. The caller holds the lock that makes it the only reader.
    pub fn pop(&self) -> Option<kvm_coalesced_mmio> {
        let first = self.first().load(Ordering::SeqCst);
        if first == self.last().load(Ordering::SeqCst) || first >= ENTRIES {
            return None;
        }
        // SAFETY: the entries follow the two indices in the same page.
        let entries = unsafe { self.ring().add(1) }.cast::<kvm_coalesced_mmio>();
        // SAFETY: `first < ENTRIES`, so the entry lies inside the page.
        let entry = unsafe { entries.add(first as usize) };
        // SAFETY: the entry is aligned; the kernel wrote it before it moved `last` past it and does
        // not touch it again before `first` has moved on.
        let entry = unsafe { entry.read() };
        self.first().store((first + 1) % ENTRIES, Ordering::SeqCst);
        Some(entry)
    }
}

/// Takes one vCPU thread out of `KVM_RUN`, also if it is only about to enter.
#[derive(Debug)]
pub struct Kick {
    immediate_exit: NonNull<u8>,
    thread: libc::pid_t,
}

// SAFETY: the pointer goes to a page shared with the kernel that stays mapped as long as the vCPU;
// it is used for atomic accesses only.
unsafe impl Send for Kick {}
// SAFETY: as above.
unsafe impl Sync for Kick {}

impl Kick {
    /// Kick of `thread` (a kernel thread id of this process), which runs `vcpu`. The caller keeps the
    /// vCPU open as long as the kick.
    pub fn new(vcpu: &mut VcpuFd, thread: libc::pid_t) -> Self {
        Self { immediate_exit: NonNull::from(&mut vcpu.get_kvm_run().immediate_exit), thread }
    }

    fn flag(&self) -> &AtomicU8 {
        // SAFETY: the byte is part of the vCPU's mapped kvm_run, which outlives `self` by the
        // contract of `new`; everybody accesses it by single-byte loads and stores.
        unsafe { AtomicU8::from_ptr(self.immediate_exit.as_ptr()) }
    }

    /// Whether the next `KVM_RUN` only completes the pending operation and returns.
    pub fn set(&self, exit: bool) {
        self.flag().store(u8::from(exit), Ordering::SeqCst);
    }

    /// Makes the thread leave `KVM_RUN` soon, or not enter it.
    pub fn kick(&self, process: libc::pid_t) {
        self.set(true);
        // SAFETY: tgkill takes plain integers; the thread lives as long as the process.
        unsafe { libc::syscall(libc::SYS_tgkill, process, self.thread, KICK_SIGNAL) };
    }
}

/// Reads the extended state into a buffer of the size that KVM asked for.
pub fn get_xsave(vcpu: &VcpuFd, xsave: &mut Xsave) -> Result<(), kvm_ioctls::Error> {
    // SAFETY: `xsave` was allocated for the size in KVM_CAP_XSAVE2 (snapshot.rs), and the process
    // never asks for dynamic features, so the size stays.
    unsafe { vcpu.get_xsave2(xsave) }
}

/// Sets the extended state that [`get_xsave`] read.
pub fn set_xsave(vcpu: &VcpuFd, xsave: &Xsave) -> Result<(), kvm_ioctls::Error> {
    // SAFETY: the buffer is the one that `get_xsave` filled, so it has the size that KVM reads.
    unsafe { vcpu.set_xsave2(xsave) }
}

/// Why a vCPU came out of `KVM_RUN`, as far as core tells exits apart.
#[derive(Debug)]
pub enum Exit<'a> {
    /// Port I/O, or memory where no RAM is: `data` is a whole number of items of `size` bytes.
    Access {
        /// Address space.
        space: Space,
        /// The port, of all items, or the address of the first item.
        addr: u64,
        /// Bytes per item: 1, 2, 4 or 8.
        size: u8,
        /// To the guest rather than from it.
        input: bool,
        /// The items.
        data: &'a mut [u8],
    },
    /// A signal or `immediate_exit`, or nothing to do.
    Interrupted,
    /// Triple fault.
    Shutdown,
    /// `KVM_EXIT_SYSTEM_EVENT` of this type.
    SystemEvent(u32),
    /// `KVM_EXIT_INTERNAL_ERROR`: suberror and data.
    InternalError(u32, [u64; 4]),
    /// `KVM_EXIT_FAIL_ENTRY`: the hardware's reason.
    FailEntry(u64),
    /// An exit that nothing asked for.
    Other(u32),
    /// `KVM_RUN` failed.
    Failed(Errno),
}

/// Runs the vCPU until something needs core.
pub fn run(vcpu: &mut VcpuFd) -> Exit<'_> {
    use Space::{Mmio, Pio};
    let (space, addr, input, data, len) = match vcpu.run() {
        Ok(VcpuExit::IoIn(port, data)) => (Pio, port.into(), true, data.as_mut_ptr(), data.len()),
        Ok(VcpuExit::IoOut(port, data)) => (Pio, port.into(), false, data.as_ptr().cast_mut(), data.len()),
        Ok(VcpuExit::MmioRead(addr, data)) => (Mmio, addr, true, data.as_mut_ptr(), data.len()),
        Ok(VcpuExit::MmioWrite(addr, data)) => (Mmio, addr, false, data.as_ptr().cast_mut(), data.len()),
        Ok(VcpuExit::Intr) => return Exit::Interrupted,
        Ok(VcpuExit::Shutdown) => return Exit::Shutdown,
        Ok(VcpuExit::SystemEvent(kind, _)) => return Exit::SystemEvent(kind),
        Ok(VcpuExit::FailEntry(reason, _)) => return Exit::FailEntry(reason),
        Ok(VcpuExit::InternalError) => {
            // SAFETY: for this exit reason the kernel fills `internal`; any bytes are valid integers.
            let internal = unsafe { vcpu.get_kvm_run().__bindgen_anon_1.internal };
            let [a, b, c, d, ..] = internal.data;
            return Exit::InternalError(internal.suberror, [a, b, c, d]);
        }
        Ok(_) => return Exit::Other(vcpu.get_kvm_run().exit_reason),
        Err(error) => {
            return match Errno::from_raw(error.errno()) {
                // EAGAIN: a vCPU that waits for its start was woken.
                Errno::EINTR | Errno::EAGAIN => Exit::Interrupted,
                errno => Exit::Failed(errno),
            };
        }
    };
    let size = match space {
        // SAFETY: for both port exits the kernel fills `io`; any bytes are valid integers.
        Pio => unsafe { vcpu.get_kvm_run().__bindgen_anon_1.io.size },
        // What crosses the end of a page comes in two exits, each of up to seven bytes.
        Mmio => u8::try_from(len).ok().filter(|len| len.is_power_of_two()).unwrap_or(1),
    };
    // SAFETY: the slice that KVM's wrapper gave lies in the mapped kvm_run pages, behind `io` or in `mmio`, and
    // `vcpu` stays mutably borrowed as long as it lives.
    let data = unsafe { std::slice::from_raw_parts_mut(data, len) };
    Exit::Access { space, addr, size, input, data }
}
