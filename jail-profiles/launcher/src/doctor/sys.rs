//! The doctor's unsafe part: a forked child, two system calls without a wrapper, KVM by number.
#![expect(unsafe_code, reason = "fork, _exit, raw system calls, KVM_SET_USER_MEMORY_REGION")]

use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};

use kvm_bindings::kvm_userspace_memory_region;
use nix::errno::Errno;
use nix::libc;
use nix::unistd::{ForkResult, Pid, fork};

/// Runs `work` in a child, which then exits with status 0.
///
/// # Errors
/// What `fork` answers.
pub fn in_child(work: impl FnOnce()) -> Result<Pid, Errno> {
    // SAFETY: `doctor` runs in a process of one thread, so the child's copy is whole.
    match unsafe { fork() }? {
        ForkResult::Parent { child } => Ok(child),
        ForkResult::Child => {
            work();
            // SAFETY: does not return; the destructors are the parent's business.
            unsafe { libc::_exit(0) }
        }
    }
}

/// The kernel's Landlock ABI.
pub fn landlock_abi() -> Result<u32, Errno> {
    /// `LANDLOCK_CREATE_RULESET_VERSION` of linux/landlock.h.
    const VERSION: u32 = 1;
    // SAFETY: asked for the version, the call takes no pointer.
    let abi =
        unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, std::ptr::null::<u8>(), 0_usize, VERSION) };
    Errno::result(abi).map(|abi| u32::try_from(abi).unwrap_or(0))
}

/// Whether the kernel has a seccomp filter action (`SECCOMP_RET_*`).
pub fn has_seccomp_action(action: u32) -> bool {
    // SAFETY: the call reads one u32 behind the pointer, which is one.
    unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_GET_ACTION_AVAIL, 0, &raw const action) == 0 }
}

/// Takes over a descriptor of /dev/kvm.
pub fn adopt_kvm(fd: OwnedFd) -> kvm_ioctls::Kvm {
    // SAFETY: the number comes from an owned descriptor that is given up here.
    unsafe { kvm_ioctls::Kvm::from_raw_fd(fd.into_raw_fd()) }
}

/// Page-aligned memory.
#[repr(C, align(4096))]
pub struct Pages<const BYTES: usize>(pub [u8; BYTES]);

/// Makes pages that are given up for good the guest's memory at address 0.
///
/// # Errors
/// What KVM answers.
pub fn give_memory<const BYTES: usize>(
    vm: &kvm_ioctls::VmFd,
    pages: &'static mut Pages<BYTES>,
) -> Result<(), kvm_ioctls::Error> {
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: BYTES as u64,
        userspace_addr: std::ptr::from_mut(pages).expose_provenance() as u64,
    };
    // SAFETY: the region is exactly `pages`, which live for ever and which nothing else can use.
    unsafe { vm.set_user_memory_region(region) }
}
