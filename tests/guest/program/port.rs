//! Port and memory-mapped I/O from ring 3.

use core::arch::asm;

/// Reads one byte from a port.
pub fn inb(port: u16) -> u8 {
    let value;
    // SAFETY: port I/O touches no memory of this program.
    unsafe { asm!("in al, dx", out("al") value, in("dx") port, options(nomem, nostack)) };
    value
}

/// Reads two bytes from a port.
pub fn inw(port: u16) -> u16 {
    let value;
    // SAFETY: port I/O touches no memory of this program.
    unsafe { asm!("in ax, dx", out("ax") value, in("dx") port, options(nomem, nostack)) };
    value
}

/// Reads four bytes from a port.
pub fn inl(port: u16) -> u32 {
    let value;
    // SAFETY: port I/O touches no memory of this program.
    unsafe { asm!("in eax, dx", out("eax") value, in("dx") port, options(nomem, nostack)) };
    value
}

/// Writes one byte to a port.
pub fn outb(port: u16, value: u8) {
    // SAFETY: port I/O touches no memory of this program.
    unsafe { asm!("out dx, al", in("al") value, in("dx") port, options(nomem, nostack)) };
}

/// Writes two bytes to a port.
pub fn outw(port: u16, value: u16) {
    // SAFETY: port I/O touches no memory of this program.
    unsafe { asm!("out dx, ax", in("ax") value, in("dx") port, options(nomem, nostack)) };
}

/// Writes all of `bytes` to a port with one string instruction.
pub fn outs(port: u16, bytes: &[u8]) {
    // SAFETY: reads exactly the bytes of the slice.
    unsafe {
        asm!("rep outsb", in("dx") port, inout("rcx") bytes.len() => _, inout("rsi") bytes.as_ptr() => _,
            options(readonly, nostack));
    }
}

/// Reads 32 bits at a physical address (below 4 GiB, or mapped by [`crate::boot::map`]).
pub fn read32(address: u64) -> u32 {
    // SAFETY: all of it is identity-mapped; the caller names no memory that Rust owns.
    unsafe { (address as *const u32).read_volatile() }
}

/// Writes 32 bits at a physical address.
pub fn write32(address: u64, value: u32) {
    // SAFETY: as for `read32`.
    unsafe { (address as *mut u32).write_volatile(value) };
}

/// Reads a number of any width at a physical address, with one access.
pub fn read<T: Copy>(address: u64) -> T {
    // SAFETY: as for `read32`; x86 has no alignment that matters here.
    unsafe { (address as *const T).read_volatile() }
}

/// Writes a number of any width at a physical address, with one access.
pub fn write<T: Copy>(address: u64, value: T) {
    // SAFETY: as for `read32`.
    unsafe { (address as *mut T).write_volatile(value) };
}

/// Writes the low `size` bytes (1, 2, 4 or 8) of `value` with one access.
pub fn write_sized(address: u64, size: u64, value: u64) {
    match size {
        1 => write(address, value as u8),
        2 => write(address, value as u16),
        4 => write(address, value as u32),
        _ => write(address, value),
    }
}

/// Reads `size` bytes (1, 2, 4 or 8) with one access.
pub fn read_sized(address: u64, size: u64) -> u64 {
    match size {
        1 => read::<u8>(address).into(),
        2 => read::<u16>(address).into(),
        4 => read::<u32>(address).into(),
        _ => read(address),
    }
}

/// The time-stamp counter.
pub fn tsc() -> u64 {
    // SAFETY: reads a counter.
    unsafe { core::arch::x86_64::_rdtsc() }
}
