//! Guest RAM on both sides of the 32-bit hole.

use crate::boot;
use crate::port::{read32, write32};
use crate::println;
use crate::pvh::StartInfo;

/// Where `test=keep` leaves its mark.
const MARK_AT: u64 = 0x40_0000;
const MARK: u32 = 0x5eed_cafe;

/// `test=mem`: the memory map, whether first and last words of each RAM entry hold what is written, and the
/// initrd.
pub fn report(info: &StartInfo) {
    for entry in info.memory {
        println!("memory {:#x} {:#x} type {}", entry.address, entry.size, entry.kind);
    }
    let floor = boot::used_end(boot::MAX_CPUS);
    for entry in info.ram().filter(|entry| entry.address + entry.size > floor + 0x1000) {
        let (first, last) = (entry.address.max(floor), (entry.address + entry.size - 4) & !3);
        println!("touched {first:#x} {last:#x} {}", holds(first) && holds(last));
    }
    if let Some((address, size)) = info.initrd {
        println!("initrd {address:#x} {size} bytes sum {:#x}", sum(address, size));
    }
    println!("ram {} bytes", info.ram_size());
}

/// Sum of all whole 32-bit words.
fn sum(address: u64, size: u64) -> u32 {
    (0..size / 4).fold(0, |sum: u32, word| sum.wrapping_add(read32(address + 4 * word)))
}

fn holds(address: u64) -> bool {
    if !boot::map(address) {
        return false;
    }
    let before = read32(address);
    let pattern = !(address as u32) ^ 0x5a5a_5a5a;
    write32(address, pattern);
    let held = read32(address) == pattern;
    write32(address, before);
    held
}

/// `test=keep`: says whether RAM still has the mark of an earlier boot, leaves it, and resets once.
pub fn keep(info: &StartInfo) {
    let found = read32(MARK_AT) == MARK;
    println!("mark found: {found}");
    write32(MARK_AT, MARK);
    if !found {
        crate::reset::reset(info);
    }
}

/// `test=fill first= high= pages= step= alias=`: writes its number into the first word and its complement into the last word
/// of every `step`-th page, `pages` of them from page `first` on, and from page `high` on if there is one; then shows the first GiB at
/// GiB `alias`, too.
pub fn fill(info: &StartInfo) {
    let (pages, step) = (info.number("pages", 64), info.number("step", 1));
    for first in [info.number("first", 0x4000), info.number("high", 0)] {
        if first == 0 {
            continue;
        }
        for number in (0..pages).map(|page| first + page * step) {
            if !boot::map(number << 12) {
                return println!("page {number:#x} cannot be mapped");
            }
            write32(number << 12, number as u32);
            write32((number << 12) + 0xffc, !(number as u32));
        }
    }
    println!("filled, alias {}", boot::alias(info.number("alias", 0) as usize));
}
