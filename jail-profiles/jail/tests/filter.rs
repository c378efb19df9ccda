//! The seccomp filters on the running kernel: what every compartment must be refused.
#![expect(unsafe_code, reason = "fork and raw system calls in the child")]
#![expect(clippy::unwrap_used, clippy::panic, reason = "helpers of tests fail their test")]

use bulkhead_jail::topology::{PROCESSES, Process};
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork};

/// One system call in a child under a process's filter; `None` if it was allowed, else the signal.
fn attempt(process: &Process, number: i64, args: [u64; 6]) -> Option<Signal> {
    // SAFETY: the child makes only system calls until it exits.
    match unsafe { fork() }.unwrap() {
        ForkResult::Child => {
            let installed = seccompiler::apply_filter(process.filter).is_ok();
            let [a, b, c, d, e, f] = args;
            // SAFETY: the filter traps the call, or its arguments are harmless where it is allowed.
            unsafe { libc::syscall(number, a, b, c, d, e, f) };
            // SAFETY: _exit does not return.
            unsafe { libc::_exit(if installed { 0 } else { 9 }) }
        }
        ForkResult::Parent { child } => match waitpid(child, None).unwrap() {
            WaitStatus::Exited(_, 0) => None,
            WaitStatus::Signaled(_, signal, _) => Some(signal),
            other => panic!("{}: {other:?}", process.name),
        },
    }
}

#[test]
fn nobody_opens_executes_connects_or_debugs() {
    let refused = [
        libc::SYS_open,
        libc::SYS_openat,
        libc::SYS_openat2,
        libc::SYS_creat,
        libc::SYS_execve,
        libc::SYS_execveat,
        libc::SYS_fork,
        libc::SYS_vfork,
        libc::SYS_clone,
        libc::SYS_clone3,
        libc::SYS_socket,
        libc::SYS_connect,
        libc::SYS_bind,
        libc::SYS_ptrace,
        libc::SYS_process_vm_readv,
        libc::SYS_pidfd_getfd,
        libc::SYS_mount,
        libc::SYS_unshare,
        libc::SYS_setns,
        libc::SYS_bpf,
        libc::SYS_userfaultfd,
        libc::SYS_io_uring_setup,
        libc::SYS_memfd_create,
        libc::SYS_unlink,
        libc::SYS_mknod,
        libc::SYS_chmod,
        libc::SYS_keyctl,
        libc::SYS_shmget,
        libc::SYS_semget,
    ];
    for process in PROCESSES {
        for number in refused {
            assert_eq!(
                attempt(process, number, [u64::MAX; 6]),
                Some(Signal::SIGSYS),
                "{} {number}",
                process.name
            );
        }
    }
}

#[test]
fn nobody_maps_executable_memory() {
    let private_anonymous = u64::from((libc::MAP_PRIVATE | libc::MAP_ANONYMOUS).unsigned_abs());
    for process in PROCESSES {
        let map = |protection: i32| {
            let args = [0, 4096, u64::from(protection.unsigned_abs()), private_anonymous, u64::MAX, 0];
            attempt(process, libc::SYS_mmap, args)
        };
        assert_eq!(map(libc::PROT_READ | libc::PROT_WRITE), None, "{}", process.name);
        assert_eq!(map(libc::PROT_READ | libc::PROT_EXEC), Some(Signal::SIGSYS), "{}", process.name);
        let protect = [4096, 4096, u64::from(libc::PROT_EXEC.unsigned_abs()), 0, 0, 0];
        assert_eq!(attempt(process, libc::SYS_mprotect, protect), Some(Signal::SIGSYS), "{}", process.name);
    }
}

#[test]
fn memory_is_given_back_and_moved_by_the_allocator_only() {
    let fixed = u64::from((libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED).unsigned_abs());
    for process in PROCESSES {
        // Address 0 is nobody's: where the calls are allowed, they fail.
        let advise = |advice: i32| {
            attempt(process, libc::SYS_madvise, [0, 4096, u64::from(advice.unsigned_abs()), 0, 0, 0])
        };
        assert_eq!(advise(libc::MADV_DONTNEED), None, "{}", process.name);
        assert_eq!(advise(libc::MADV_REMOVE), Some(Signal::SIGSYS), "{}", process.name);
        let remap = [0, 4096, 4096, fixed, 0x1000_0000, 0];
        assert_eq!(attempt(process, libc::SYS_mremap, remap), Some(Signal::SIGSYS), "{}", process.name);
    }
}

#[test]
fn only_core_speaks_to_kvm_and_nobody_types_into_a_terminal() {
    /// KVM_RUN and TIOCSTI.
    const CALLS: [(u64, bool); 2] = [(0xae80, true), (0x5412, false)];
    for process in PROCESSES {
        for (request, core_may) in CALLS {
            let refused = attempt(process, libc::SYS_ioctl, [u64::MAX, request, 0, 0, 0, 0]);
            let may = core_may && process.name == "core";
            assert_eq!(
                refused,
                if may { None } else { Some(Signal::SIGSYS) },
                "{} {request:#x}",
                process.name
            );
        }
    }
}

#[test]
fn the_filters_stay_small() {
    for process in PROCESSES {
        println!(
            "{}: {} system calls, {} instructions",
            process.name,
            process.syscalls.len(),
            process.filter.len()
        );
        assert!(process.syscalls.len() <= 40, "{}", process.name);
    }
    let core = PROCESSES.iter().find(|p| p.name == "core").unwrap();
    assert!(core.syscalls.len() < 25, "core: {} system calls {:?}", core.syscalls.len(), core.syscalls);
}
