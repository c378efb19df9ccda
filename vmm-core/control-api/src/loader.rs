//! Link `loader`: core gives a loader the guest's memory and gets the initial registers back.
//!
//! The loader connects; after the version exchange core sends one [`Job`] with one memfd per region
//! attached, the loader answers one [`Outcome`] and exits.

use serde::{Deserialize, Serialize};

/// The longest failure text, in bytes.
pub const MAX_FAILURE: usize = 512;

/// What the loader is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Mode {
    /// Power-on or reset: write kernel, initrd, command line and tables anew.
    Boot,
    /// Reserved for waking a suspended guest (find the waking vector in the FACS).
    Wake,
}

/// One piece of guest RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Region {
    /// Guest physical address, page aligned.
    pub gpa: u64,
    /// Length in bytes, a multiple of the page size; the memfd has exactly this size.
    pub len: u64,
}

/// Core to loader, with one memfd per region in the same order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Job {
    /// What to do.
    pub mode: Mode,
    /// Guest RAM in ascending order.
    pub regions: Vec<Region>,
}

/// Where and how the first vCPU starts; core builds the segment registers from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Start {
    /// 64-bit mode with paging (Linux x86 boot protocol, "64-bit BOOT PROTOCOL"): CS selector 0x10,
    /// data selectors 0x18, flat, interrupts off.
    Long64 {
        /// Entry point.
        rip: u64,
        /// Stack pointer, 0 if the kernel brings its own.
        rsp: u64,
        /// Address of `boot_params`.
        rsi: u64,
        /// Page table root that maps at least kernel, `boot_params` and command line one to one.
        cr3: u64,
        /// Address of the descriptor table.
        gdt_base: u64,
        /// Its size in bytes less one.
        gdt_limit: u16,
    },
    /// 32-bit protected mode without paging (Xen PVH start of day): flat segments, interrupts off.
    Pvh32 {
        /// Entry point.
        eip: u32,
        /// Address of `hvm_start_info`.
        ebx: u32,
    },
}

/// Loader to core: where to start, or one line that says why not.
pub type Outcome = Result<Start, String>;
