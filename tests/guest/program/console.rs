//! The console: the default guest's little shell, and tests of input and output.

use crate::pvh::StartInfo;
use crate::{apic, chipset, print, println, reset, serial, smp, trap};

/// The longest line that is kept; more is dropped.
const LINE: usize = 128;
const HELP: &str = "commands: help, info, cpus, reset, poweroff; any other line is echoed";

/// Calls `each` with every received byte, halting in between.
fn receive(mut each: impl FnMut(u8)) -> ! {
    let counter = trap::gsi_counter(serial::GSI);
    apic::route(serial::GSI, false);
    crate::port::outb(serial::IER, 1);
    trap::enable();
    loop {
        let seen = counter.load(core::sync::atomic::Ordering::SeqCst);
        let mut any = false;
        while let Some(byte) = serial::read() {
            any = true;
            each(byte);
        }
        if !any {
            trap::wait(counter, seen);
        }
    }
}

/// The shell that runs when no kernel was given.
pub fn interactive(info: &StartInfo) -> ! {
    println!("{} MiB of RAM, {} vCPU(s), command line \"{}\"", mib(info), smp::count(info), info.cmdline);
    println!("{HELP}");
    print!("> ");
    let mut line = [0; LINE];
    let mut used = 0;
    receive(|byte| match byte {
        b'\r' | b'\n' => {
            print!("\r\n");
            run(info, core::str::from_utf8(&line[..used]).unwrap_or("?").trim());
            used = 0;
            print!("> ");
        }
        8 | 127 if used > 0 => {
            used -= 1;
            print!("\x08 \x08");
        }
        8 | 127 => {}
        _ if used < LINE => {
            line[used] = byte;
            used += 1;
            serial::write(&[byte]);
        }
        _ => {}
    })
}

fn mib(info: &StartInfo) -> u64 {
    info.ram_size().div_ceil(1 << 20)
}

fn run(info: &StartInfo, line: &str) {
    match line {
        "" => {}
        "help" => println!("{HELP}"),
        "info" => {
            println!("command line \"{}\"", info.cmdline);
            for entry in info.memory {
                println!("memory {:#x} {:#x} type {}", entry.address, entry.size, entry.kind);
            }
        }
        "cpus" => println!("{} vCPU(s)", smp::count(info)),
        "reset" => reset::reset(info),
        "poweroff" => reset::power_off(info),
        other => println!("{other}"),
    }
}

/// `test=echo`: sends back every byte.
pub fn echo(_: &StartInfo) {
    println!("ready");
    receive(|byte| serial::write(&[byte]))
}

/// `test=counter`: `count N` for ever, `ms=` apart.
pub fn counter(info: &StartInfo) {
    let clock = chipset::Clock::new(info);
    for count in 1.. {
        println!("count {count}");
        clock.sleep(info.number("ms", 10) * 1000);
    }
}

/// `test=flood`: `n=` lines of 64 bytes at full speed (for ever with n=0), then the cycles it took.
pub fn flood(info: &StartInfo) {
    const LINE: &[u8; 64] = b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ\r\n";
    let lines = info.number("n", 1000);
    let begin = crate::port::tsc();
    let mut done = 0;
    while lines == 0 || done < lines {
        serial::write(LINE);
        done += 1;
    }
    println!("flood bytes={} cycles={}", done * LINE.len() as u64, crate::port::tsc() - begin);
}

/// `test=outs`: the same byte stream by one string instruction per FIFO.
pub fn string_output(_: &StartInfo) {
    for burst in b"written by a string instruction, sixteen bytes at a time\r\n".chunks(16) {
        serial::write(&[]);
        crate::port::outs(serial::BASE, burst);
    }
}
