//! What a process does to itself: Landlock, no_new_privs, seccomp, and the report of a violation.
#![expect(unsafe_code, reason = "signal handler and prctl")]

use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicPtr, Ordering};
use std::{env, ptr};

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, PathBeneath, Ruleset, RulesetAttr,
    RulesetCreatedAttr, Scope,
};
use nix::errno::Errno;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

use crate::start::StartError;
use crate::topology::Process;

/// Exit status after a seccomp violation: as of a process that SIGSYS killed.
const VIOLATION_STATUS: i32 = 128 + libc::SIGSYS;

static PROCESS: AtomicPtr<Process> = AtomicPtr::new(ptr::null_mut());

/// Removes every environment variable: nothing in a compartment reads one after its start.
pub(crate) fn forget_environment() {
    let names: Vec<_> = env::vars_os().map(|(name, _)| name).collect();
    for name in names {
        // SAFETY: called once at the start of `main`, while the process has one thread, so nobody
        // reads the environment meanwhile.
        unsafe { env::remove_var(name) };
    }
}

fn no_landlock(error: landlock::RulesetError) -> StartError {
    StartError::Jail(format!("{error} (Landlock needs Linux 5.13 or later and `landlock` in its lsm= list)"))
}

/// Refuses every file, TCP port, abstract socket and outside signal by Landlock, for this thread and
/// all that it makes. `readable` is a directory that may still be read.
pub(crate) fn restrict_files(readable: Option<BorrowedFd<'_>>) -> Result<(), StartError> {
    // SAFETY: prctl with constant arguments touches no memory of ours.
    if unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) } != 0 {
        return Err(StartError::Step("no_new_privs", Errno::last()));
    }
    let mut rules = Ruleset::default()
        .set_compatibility(CompatLevel::HardRequirement)
        .handle_access(AccessFs::from_all(ABI::V1))
        .map_err(no_landlock)?
        // What later kernels offer is taken where it is there.
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(ABI::V5))
        .map_err(no_landlock)?
        .handle_access(AccessNet::from_all(ABI::V4))
        .map_err(no_landlock)?
        .scope(Scope::AbstractUnixSocket | Scope::Signal)
        .map_err(no_landlock)?
        .create()
        .map_err(no_landlock)?;
    if let Some(dir) = readable {
        let access = AccessFs::ReadFile | AccessFs::ReadDir;
        rules = rules.add_rule(PathBeneath::new(dir, access)).map_err(no_landlock)?;
    }
    rules.restrict_self().map_err(no_landlock)?;
    Ok(())
}

/// Makes a seccomp violation a line in the log instead of a silent death.
pub(crate) fn catch_violations(process: &'static Process) -> Result<(), StartError> {
    PROCESS.store(ptr::from_ref(process).cast_mut(), Ordering::Relaxed);
    let action = SigAction::new(SigHandler::SigAction(on_violation), SaFlags::SA_NODEFER, SigSet::empty());
    // SAFETY: the handler only formats into its own stack and calls write and _exit, which are
    // async-signal-safe.
    unsafe { sigaction(Signal::SIGSYS, &action) }.map_err(|e| StartError::Step("SIGSYS handler", e))?;
    Ok(())
}

/// A line built on the stack; what does not fit is cut.
struct Line {
    bytes: [u8; 512],
    len: usize,
}

impl std::fmt::Write for Line {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        for (slot, byte) in self.bytes.iter_mut().skip(self.len).zip(text.bytes()) {
            *slot = byte;
            self.len += 1;
        }
        Ok(())
    }
}

extern "C" fn on_violation(_: libc::c_int, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    use std::fmt::Write as _;
    let mut line = Line { bytes: [0; 512], len: 0 };
    // SAFETY: PROCESS is null or came from a `&'static Process`.
    let binary = unsafe { PROCESS.load(Ordering::Relaxed).as_ref() }.map_or("bulkhead", |p| p.binary);
    // SAFETY: with SA_SIGINFO the third argument is a valid ucontext_t, as sigaction(2) says.
    let registers = unsafe { &(*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    let register =
        |index: i32| usize::try_from(index).ok().and_then(|i| registers.get(i)).copied().unwrap_or(0);
    let number = register(libc::REG_RAX);
    let name = usize::try_from(number).ok().and_then(syscalls::Sysno::new).map_or("?", |s| s.name());
    let arguments = [libc::REG_RDI, libc::REG_RSI, libc::REG_RDX, libc::REG_R10, libc::REG_R8, libc::REG_R9];
    let _ = write!(line, "<2>{binary}: seccomp violation: {name} ({number})");
    for (i, index) in arguments.into_iter().enumerate() {
        let _ = write!(line, "{}{:#x}", if i == 0 { " arguments " } else { ", " }, register(index));
    }
    let _ = line.write_str("\n");
    // SAFETY: the first `len` bytes of the line are initialised and inside the array.
    unsafe { libc::write(2, line.bytes.as_ptr().cast(), line.len) };
    // SAFETY: _exit does not return and takes no pointer.
    unsafe { libc::_exit(VIOLATION_STATUS) };
}

/// Installs the process's filter on all its threads and checks that it is there.
pub(crate) fn filter_system_calls(process: &Process) -> Result<(), StartError> {
    seccompiler::apply_filter_all_threads(process.filter)
        .map_err(|_| StartError::Step("seccomp (CONFIG_SECCOMP_FILTER)", Errno::last()))?;
    // SAFETY: prctl with constant arguments touches no memory of ours.
    let mode = unsafe { libc::prctl(libc::PR_GET_SECCOMP, 0, 0, 0, 0) };
    // SECCOMP_MODE_FILTER of linux/seccomp.h.
    if mode != 2 {
        return Err(StartError::Jail("no seccomp filter".into()));
    }
    Ok(())
}
