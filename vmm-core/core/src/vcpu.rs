//! A vCPU thread: in at the gate, run, forward exits, out with nothing half done.

use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{Arc, Barrier, Mutex, OnceLock};

use bulkhead_bus_api::{Access, Action, Op, Space};
use bulkhead_control_api::config::CpuPlace;
use bulkhead_control_api::dump::{MAX_PAGES, Translate, Translated};
use kvm_bindings::{
    KVM_INTERNAL_ERROR_EMULATION, KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN,
};
use kvm_ioctls::VcpuFd;
use nix::errno::Errno;

use crate::bus::{Bus, Links, Outcome};
use crate::error::{Result, io};
use crate::gate::{Gate, lock};
use crate::memory::PAGE;
use crate::notice::{Notice, Notices, What};
use crate::snapshot;
use crate::sys::{self, Exit, Kick};

/// Stack of a vCPU thread in bytes; the deepest use is the text of a KVM error.
const STACK: usize = 256 * 1024;

/// EFER: long mode is active.
const EFER_LMA: u64 = 1 << 10;
/// CR4: five levels of page tables.
const CR4_LA57: u64 = 1 << 12;

/// What all vCPU threads share.
#[derive(Debug)]
pub struct Shared {
    /// The gate that lets them run.
    pub gate: Gate,
    /// Their messages to the main thread.
    pub notices: Arc<Notices>,
    /// The bus.
    pub bus: Bus,
}

/// A vCPU as the main thread sees it.
#[derive(Debug)]
pub struct Vcpu {
    /// Its descriptor; the vCPU's thread holds the lock while it is inside the gate.
    pub fd: Mutex<VcpuFd>,
    /// Its place in the topology.
    pub place: CpuPlace,
    kick: OnceLock<Kick>,
    thread: AtomicI32,
    nmi: AtomicBool,
    /// What a dump asks.
    asked: Mutex<Option<Translate>>,
}

impl Vcpu {
    /// A vCPU without a thread yet.
    pub fn new(fd: VcpuFd, place: CpuPlace) -> Self {
        let (kick, thread, nmi, asked) = Default::default();
        Self { fd: Mutex::new(fd), place, kick, thread, nmi, asked }
    }

    /// Thread id inside this pid namespace.
    pub fn thread(&self) -> i32 {
        self.thread.load(Ordering::SeqCst)
    }

    /// Makes the thread come out of KVM soon.
    pub fn kick(&self, process: libc::pid_t) {
        if let Some(kick) = self.kick.get() {
            kick.kick(process);
        }
    }

    /// Injects an NMI as soon as the vCPU runs; the caller kicks.
    pub fn request_nmi(&self) {
        self.nmi.store(true, Ordering::SeqCst);
    }

    /// Forgets an NMI that was not injected (a reset).
    pub fn forget_nmi(&self) {
        self.nmi.store(false, Ordering::SeqCst);
    }

    /// Has pages looked up: at once if the thread is outside of the gate, else by the thread.
    pub fn translate(&self, what: Translate, notices: &Notices, process: libc::pid_t) {
        *lock(&self.asked) = Some(what);
        self.kick(process);
        // Who holds this looks again after it has let go.
        if let Ok(fd) = self.fd.try_lock() {
            self.look_up(&fd, notices);
        }
    }

    fn look_up(&self, fd: &VcpuFd, notices: &Notices) {
        let asked = lock(&self.asked).take();
        if let Some(what) = asked {
            notices.post(Notice::Translated(translate(fd, what)));
        }
    }
}

/// Where pages are, up to the first one that the vCPU's page tables do not map.
fn translate(fd: &VcpuFd, what: Translate) -> Translated {
    // KVM does not look at the upper bits: in long mode all from bit 47 or 56 on are equal.
    let unused = match fd.get_sregs() {
        Ok(sregs) if sregs.efer & EFER_LMA == 0 => 0,
        Ok(sregs) if sregs.cr4 & CR4_LA57 != 0 => 7,
        _ => 16,
    };
    let page = |number: u32| {
        let addr = what.addr.wrapping_add(u64::from(number) * PAGE);
        let is_canonical = (addr << unused).cast_signed() >> unused == addr.cast_signed();
        let found = fd.translate_gva(addr).ok().filter(|found| is_canonical && found.valid != 0);
        found.map(|found| found.physical_address)
    };
    Translated { what, pages: (0..what.pages.min(MAX_PAGES)).map_while(page).collect() }
}

/// Starts the thread of vCPU `index`; when `ready` has met, all threads are set up for the jail.
pub fn spawn(
    index: usize,
    vcpu: Arc<Vcpu>,
    shared: Arc<Shared>,
    links: Links,
    ready: Arc<Barrier>,
) -> Result<()> {
    let thread = move || {
        let tid = nix::unistd::gettid().as_raw();
        vcpu.thread.store(tid, Ordering::SeqCst);
        let _ = vcpu.kick.set(Kick::new(&mut lock(&vcpu.fd), tid));
        ready.wait();
        drop(ready);
        Runner { vcpu: &vcpu, shared: &shared, links, posted: 0 }.run();
    };
    let builder = std::thread::Builder::new().name(format!("vcpu{index}")).stack_size(STACK);
    builder.spawn(thread).map(drop).map_err(io("vCPU thread"))
}

/// What is left to do after an exit.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Next {
    /// Run on.
    Run,
    /// Run on; KVM completes an access first.
    Complete,
    /// Complete the access, then stay out until the next release.
    CompleteAndHold,
    /// Stay out until the next release.
    Hold,
}

impl Next {
    fn may_run(self) -> bool {
        matches!(self, Self::Run | Self::Complete)
    }

    fn is_pending(self) -> bool {
        matches!(self, Self::Complete | Self::CompleteAndHold)
    }
}

struct Runner<'a> {
    vcpu: &'a Vcpu,
    shared: &'a Shared,
    links: Links,
    /// The last epoch in which something was posted.
    posted: u64,
}

impl Runner<'_> {
    fn run(mut self) -> ! {
        let mut epoch = 0;
        loop {
            epoch = self.shared.gate.enter(epoch);
            self.execute(epoch);
            self.vcpu.look_up(&lock(&self.vcpu.fd), &self.shared.notices);
            self.shared.gate.leave();
        }
    }

    fn exit_at_once(&self, exit: bool) {
        if let Some(kick) = self.vcpu.kick.get() {
            kick.set(exit);
        }
    }

    /// Runs the guest until the gate closes or something has to be settled.
    fn execute(&mut self, epoch: u64) {
        let vcpu = self.vcpu;
        let mut fd = lock(&vcpu.fd);
        let mut next = Next::Run;
        while next.may_run() {
            if next == Next::Run {
                // Clear before the looks below: whoever kicks sets its reason first, then this flag.
                self.exit_at_once(false);
            }
            if !self.shared.gate.is_open(epoch) {
                break;
            }
            if vcpu.nmi.swap(false, Ordering::SeqCst) && snapshot::takes_nmi(&fd).unwrap_or(false) {
                // KVM has no reason to refuse; if it does, the guest misses an NMI and nothing else.
                let _ = fd.nmi();
            }
            vcpu.look_up(&fd, &self.shared.notices);
            next = self.step(&mut fd, epoch);
        }
        // Let KVM complete what the last exit began, without running the guest. A string instruction
        // may exit again meanwhile; after at most 1,024 rounds KVM looks at the flag in between.
        self.exit_at_once(true);
        while self.step(&mut fd, epoch).is_pending() {}
    }

    /// Enters KVM once and carries out what it comes back with.
    fn step(&mut self, fd: &mut VcpuFd, epoch: u64) -> Next {
        let what = match sys::run(fd) {
            Exit::Interrupted => return Next::Run,
            Exit::Access { space, addr, size, input, data } => {
                let mut access = Access { space, addr, size, op: Op::Read };
                return self.items(&mut access, input, data, epoch);
            }
            Exit::Shutdown | Exit::SystemEvent(KVM_SYSTEM_EVENT_RESET) => What::Reset,
            Exit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN) => What::PowerOff,
            Exit::SystemEvent(KVM_SYSTEM_EVENT_CRASH) => What::Panicked,
            Exit::SystemEvent(kind) => self.kvm_error(fd, &format!("system event {kind}")),
            Exit::InternalError(suberror, data) => self.kvm_error(fd, &internal_error(suberror, data)),
            Exit::FailEntry(reason) => {
                self.kvm_error(fd, &format!("entry failed, hardware reason {reason:#x}"))
            }
            Exit::Other(reason) => self.kvm_error(fd, &format!("unexpected exit {reason}")),
            Exit::Failed(errno @ (Errno::EFAULT | Errno::ENOMEM)) => {
                self.kvm_error(fd, &format!("no memory for the guest's page ({errno})"))
            }
            Exit::Failed(errno) => self.kvm_error(fd, &format!("KVM_RUN: {errno}")),
        };
        self.post(epoch, what);
        Next::Hold
    }

    fn kvm_error(&self, fd: &VcpuFd, text: &str) -> What {
        let rip = fd.get_regs().map_or(0, |regs| regs.rip);
        What::KvmError(format!("vCPU with APIC id {} at {rip:#x}: {text}", self.vcpu.place.apic_id))
    }

    /// Posts what comes first in an epoch: a string instruction may ask for the same many times.
    fn post(&mut self, epoch: u64, what: What) {
        if std::mem::replace(&mut self.posted, epoch) != epoch {
            self.shared.notices.post(Notice::Vcpu(epoch, what));
        }
    }

    /// Carries out one access for each item: a string instruction has many at one port, memory across the end of a
    /// page has some of an odd length one after the other.
    fn items(&mut self, access: &mut Access, input: bool, data: &mut [u8], epoch: u64) -> Next {
        let mut next = Next::Complete;
        // An item of no bytes would be a bug of KVM, but must not be a panic.
        for item in data.chunks_mut(usize::from(access.size.max(1))) {
            access.op = if input { Op::Read } else { Op::Write(low_bytes(item)) };
            let outcome = self.shared.bus.access(&mut self.links, access);
            if input {
                for (slot, byte) in item.iter_mut().zip(outcome.data.to_le_bytes()) {
                    *slot = byte;
                }
            }
            if self.after(outcome, epoch) == Next::CompleteAndHold {
                next = Next::CompleteAndHold;
            }
            if access.space == Space::Mmio {
                access.addr = access.addr.wrapping_add(u64::from(access.size));
            }
        }
        next
    }

    fn after(&mut self, outcome: Outcome, epoch: u64) -> Next {
        match outcome.action {
            Some(Action::None) => return Next::Complete,
            Some(Action::Reset) => self.post(epoch, What::Reset),
            Some(Action::PowerOff) => self.post(epoch, What::PowerOff),
            // The main thread knows already and halts the machine.
            None => {}
        }
        Next::CompleteAndHold
    }
}

/// Details of `KVM_EXIT_INTERNAL_ERROR`.
fn internal_error(suberror: u32, data: [u64; 4]) -> String {
    let [flags, code @ .., _] = data;
    // KVM_INTERNAL_ERROR_EMULATION with a length and up to 15 instruction bytes.
    if suberror == KVM_INTERNAL_ERROR_EMULATION && flags & 1 != 0 {
        let code: Vec<u8> = code.iter().flat_map(|word| word.to_le_bytes()).collect();
        let (len, code) = code.split_first().unwrap_or((&0, &[]));
        let shown = code.get(..usize::from(*len)).unwrap_or(code);
        return format!("KVM cannot emulate the instruction {shown:02x?}");
    }
    format!("KVM internal error, suberror {suberror}, data {data:x?}")
}

/// Up to eight bytes, little-endian.
fn low_bytes(data: &[u8]) -> u64 {
    data.iter().take(8).rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
}
