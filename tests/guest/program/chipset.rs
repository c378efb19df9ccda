//! Clocks: RTC, PM timer, and the TSC measured against it.

use crate::acpi::Tables;
use crate::port::{inb, inl, outb, tsc};
use crate::println;
use crate::pvh::StartInfo;

/// Ticks of the PM timer per second.
const PM_HZ: u64 = 3_579_545;
/// Assumed cycles per microsecond where no PM timer can tell.
const ASSUMED_MHZ: u64 = 2500;

fn pm_port(info: &StartInfo) -> Option<u16> {
    Tables::find(info.rsdp)?.fixed().map(|fixed| fixed.pm_timer).filter(|&port| port != 0)
}

/// The TSC as a clock in microseconds.
pub struct Clock {
    mhz: u64,
}

impl Clock {
    /// Measures the TSC for 2 ms.
    pub fn new(info: &StartInfo) -> Self {
        let Some(port) = pm_port(info) else { return Self { mhz: ASSUMED_MHZ } };
        let (ticks, cycles) = (inl(port), tsc());
        while inl(port).wrapping_sub(ticks) & 0xff_ffff < (PM_HZ / 500) as u32 {}
        let (elapsed, cycles) = (inl(port).wrapping_sub(ticks) & 0xff_ffff, tsc() - cycles);
        Self { mhz: (cycles * PM_HZ / u64::from(elapsed.max(1)) / 1_000_000).max(1) }
    }

    /// A point in time.
    pub fn now(&self) -> u64 {
        tsc()
    }

    /// Microseconds since that point.
    pub fn microseconds_since(&self, begin: u64) -> u64 {
        tsc().wrapping_sub(begin) / self.mhz
    }

    /// Spins for so many microseconds.
    pub fn sleep(&self, microseconds: u64) {
        let begin = self.now();
        while self.microseconds_since(begin) < microseconds {
            core::hint::spin_loop();
        }
    }
}

fn cmos(register: u8) -> u8 {
    outb(0x70, register);
    inb(0x71)
}

/// `test=rtc`: the time as the RTC tells it, twice if `seconds=` lie between.
pub fn rtc(info: &StartInfo) {
    print_time();
    let mut left = info.number("seconds", 0);
    let mut second = cmos(0);
    while left > 0 {
        let now = cmos(0);
        if now != second {
            (second, left) = (now, left - 1);
        }
    }
    if info.option("seconds").is_some() {
        print_time();
    }
}

fn print_time() {
    while cmos(0x0a) & 0x80 != 0 {}
    let binary = cmos(0x0b) & 4 != 0;
    let field = |register| {
        let value = cmos(register);
        if binary { value } else { (value >> 4) * 10 + (value & 15) }
    };
    let [second, minute, hour, day, month, year, century] = [0, 2, 4, 7, 8, 9, 0x32].map(field);
    println!("rtc {century:02}{year:02}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}");
}

/// `test=pmtimer`: that it runs forward, and how fast against the TSC.
pub fn pm_timer(info: &StartInfo) {
    let Some(port) = pm_port(info) else { return println!("no PM timer") };
    let mut last = inl(port);
    let mut forward = true;
    for _ in 0..100 {
        let now = inl(port);
        forward &= now.wrapping_sub(last) & 0xff_ffff < PM_HZ as u32;
        last = now;
    }
    println!("pmtimer port={port:#x} monotonic={forward} tsc-mhz={}", Clock::new(info).mhz);
}
