//! Ports and MMIO that nobody claims, and what an exit costs.

use crate::port::{inb, inl, inw, outb, read32, tsc, write32};
use crate::println;
use crate::pvh::StartInfo;

/// In the 32-bit hole, given to nobody.
const NOWHERE: u64 = 0xd000_0000;
/// A port that no machine uses.
const NO_PORT: u16 = 0x5658;

/// `test=unclaimed`: reads of every size are all ones, writes vanish.
pub fn unclaimed(info: &StartInfo) {
    let port = info.number("port", NO_PORT.into()) as u16;
    outb(port, 0);
    println!("port {port:#x}: {:#x} {:#x} {:#x}", inb(port), inw(port), inl(port));
    let address = info.number("mmio", NOWHERE);
    write32(address, 0);
    println!("mmio {address:#x}: {:#x}", read32(address));
}

/// `test=mmio at=ADDRESS n=WORDS [write=VALUE]`: prints words, or writes one value to all of them.
pub fn mmio(info: &StartInfo) {
    let address = info.number("at", NOWHERE);
    for word in 0..info.number("n", 1) {
        let at = address + 4 * word;
        if !crate::boot::map(at) {
            return println!("{at:#x} is out of reach");
        }
        if info.option("write").is_some() {
            write32(at, info.number("write", 0) as u32);
        }
        println!("mmio {at:#x}: {:#x}", read32(at));
    }
}

/// `test=bench-pio`: cycles for `n=` reads of `port=`.
pub fn bench_ports(info: &StartInfo) {
    let port = info.number("port", NO_PORT.into()) as u16;
    bench(info, "pio", || {
        inb(port);
    });
}

/// `test=bench-mmio`: cycles for `n=` reads at `at=`.
pub fn bench_mmio(info: &StartInfo) {
    let address = info.number("at", NOWHERE);
    bench(info, "mmio", || {
        read32(address);
    });
}

/// `test=bench-link`: the middle of `n=` times, in cycles, that a read of `port=` takes, and one of a port
/// that nobody claims; they take turns.
pub fn bench_link(info: &StartInfo) {
    const MOST: usize = 1000;
    let port = info.number("port", 0x3fd) as u16;
    let count = info.number("n", 1000).clamp(1, MOST as u64) as usize;
    let mut times = [[0u32; MOST]; 2];
    let begin = tsc();
    for round in 0..count {
        for (port, times) in [NO_PORT, port].into_iter().zip(&mut times) {
            let start = tsc();
            inb(port);
            times[round] = (tsc() - start) as u32;
        }
    }
    let cycles = tsc() - begin;
    let [nobody, claimed] = times.each_mut().map(|times| {
        times[..count].sort_unstable();
        times[count / 2]
    });
    println!("bench link n={count} cycles={cycles} nobody={nobody} claimed={claimed}");
}

fn bench(info: &StartInfo, name: &str, once: impl Fn()) {
    let count = info.number("n", 10_000).max(1);
    let begin = tsc();
    for _ in 0..count {
        once();
    }
    let cycles = tsc() - begin;
    println!("bench {name} n={count} cycles={cycles} each={}", cycles / count);
}

/// `test=exception`: a page fault in ring 3, reported on the console.
pub fn exception(_: &StartInfo) {
    read32(0x7f_ffff_f000);
}
