//! Memory for rings and buffers: a few MiB of RAM that nothing else in this program uses, handed out upwards.

use core::sync::atomic::{AtomicU64, Ordering};

/// Far above the image and the stacks of all CPUs.
const START: u64 = 16 << 20;
const END: u64 = 56 << 20;

static NEXT: AtomicU64 = AtomicU64::new(START);

/// Zeroed memory of this size, on a page of its own. Ends the program when there is no more.
pub fn pages(size: u64) -> u64 {
    let size = size.next_multiple_of(0x1000);
    let address = NEXT.fetch_add(size, Ordering::Relaxed);
    assert!(address + size <= END, "out of memory for rings");
    // SAFETY: RAM of this program that has no other owner.
    unsafe { core::ptr::write_bytes(address as *mut u8, 0, size as usize) };
    address
}

/// Where the next page comes from, for [`release`].
pub fn mark() -> u64 {
    NEXT.load(Ordering::Relaxed)
}

/// Takes back all that was handed out since the mark.
pub fn release(mark: u64) {
    NEXT.store(mark, Ordering::Relaxed);
}
