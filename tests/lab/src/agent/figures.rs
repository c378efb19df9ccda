//! Figures of the Debian guest under the product and under QEMU, side by side in one L1. Emulation makes both slow, so only
//! their ratio says something. Each sample is a line `sample NAME SIDE VALUE`; the bench reads them.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use bulkhead_framework::{Child, Failure, Qmp, Result, Scratch, launcher_path};
use serde_json::json;

use super::cases::Case;
use super::debian::{APPEND, BOOT, UP};
use super::{Journal, show};
use crate::host::Kind;
use crate::paths;

/// All of them.
pub const ALL: &[Case] = &[
    Case {
        name: "figure-net",
        about: "TCP between the Debian guest and its host over a TAP interface, Gbit/s",
        kind: Kind::Busybox,
        run: net,
    },
    Case {
        name: "figure-balloon",
        about: "touched memory that Debian's balloon driver gives and takes back, GiB/s",
        kind: Kind::Busybox,
        run: balloon,
    },
];

const ROUNDS: usize = 7;
/// How long one transfer or one way of the balloon may take.
const LONG: Duration = Duration::from_secs(120);
/// MiB that a transfer has.
const TRANSFER: u32 = 48;
/// MiB that the guest has, and those that it gives.
const MEMORY: u32 = 512;
const GIVEN: u32 = 256;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Side {
    Ours,
    Qemu,
}

impl Side {
    const fn name(self) -> &'static str {
        match self {
            Self::Ours => "ours",
            Self::Qemu => "qemu",
        }
    }
}

/// A Debian guest of either side.
struct Guest {
    child: Child,
    qmp: Qmp,
    side: Side,
    asked: u32,
}

impl Guest {
    /// Boots one with devices that are written alike on both sides.
    fn boot(journal: &mut Journal, dir: &Path, side: Side, devices: &[&str]) -> Result<Self> {
        let mut command = match side {
            Side::Ours => Command::new(launcher_path()),
            Side::Qemu => Command::new("qemu-system-x86_64"),
        };
        match side {
            Side::Ours => command.arg("run"),
            Side::Qemu => command
                .args(["-machine", "q35,accel=kvm,memory-backend=ram", "-cpu", "host"])
                .args(["-nodefaults", "-no-user-config", "-display", "none"])
                .args(["-object", &format!("memory-backend-memfd,id=ram,size={MEMORY}M,share=on")]),
        };
        let socket = dir.join(side.name());
        command.args(["-m", &format!("{MEMORY}M"), "-serial", "stdio"]);
        command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", socket.display()));
        command.args(["-kernel", paths::KERNEL, "-initrd", paths::INITRD, "-append", APPEND]).args(devices);
        let child = Child::start(&mut command, side.name(), "its errors")?;
        journal.keep(&child.logs());
        child.stdout().expect(UP, BOOT).map_err(|failure| failure.with_logs(&child.logs()))?;
        let qmp = Qmp::connect(&socket, BOOT)?;
        Ok(Self { child, qmp, side, asked: 0 })
    }

    /// Runs shell code in the guest and returns its output in one line.
    fn ask(&mut self, code: &str) -> Result<String> {
        self.asked += 1;
        let mark = format!("answer {}: ", self.asked);
        self.child.write(format!("echo \"{mark}\"$({code})\n").as_bytes())?;
        let answer = self.child.stdout().expect_line(&mark, LONG);
        answer.map_err(|failure| failure.with_logs(&self.child.logs()))
    }

    fn sample(&self, name: &str, value: f64) -> Result<()> {
        show(&format!("sample {name} {} {value:.4}", self.side.name()))
    }
}

fn gbit(since: Instant) -> f64 {
    f64::from(TRANSFER) * f64::from(1 << 23) / 1e9 / since.elapsed().as_secs_f64()
}

/// TCP in both directions, the sides in turns.
fn net(journal: &mut Journal) -> Result<()> {
    let scratch = Scratch::new()?;
    let mut guests = Vec::new();
    for (side, network) in [(Side::Ours, 1), (Side::Qemu, 2)] {
        let netdev = format!("tap,id=n0,ifname=lab{network},script=no,downscript=no");
        let modern = if side == Side::Qemu { ",disable-legacy=on,romfile=" } else { "" };
        let device = format!("virtio-net-pci,netdev=n0,id=net0{modern}");
        let mut guest =
            Guest::boot(journal, scratch.path(), side, &["-netdev", &netdev, "-device", &device])?;
        let here = format!("ip addr add 10.9.{network}.1/24 dev lab{network}; ip link set lab{network} up");
        Command::new("sh").args(["-c", &here]).status()?;
        let there = format!(
            "ip addr add 10.9.{network}.2/24 dev eth0; ip link set eth0 up; \
            dd if=/dev/zero of=/file bs=1M count={TRANSFER} 2>/dev/null; httpd -h / -p 80; \
            ping -c 1 -W 5 10.9.{network}.1 | grep -c 'bytes from'"
        );
        let answers = guest.ask(&there)?;
        if answers != "1" {
            return Err(Failure::new(format!("{answers} answers to a ping")).with_logs(&guest.child.logs()));
        }
        guests.push((guest, network));
    }
    for _ in 0..ROUNDS {
        for (guest, network) in &mut guests {
            guest.sample("tcp-from-guest", fetch(&format!("10.9.{network}.2:80"))?)?;
            let rate = serve(guest, &format!("10.9.{network}.1:8080"))?;
            guest.sample("tcp-to-guest", rate)?;
        }
    }
    Ok(())
}

/// Reads the guest's file from its server; the rate in Gbit/s.
fn fetch(from: &str) -> Result<f64> {
    let begin = Instant::now();
    let mut stream = TcpStream::connect(from)?;
    stream.set_read_timeout(Some(LONG))?;
    stream.write_all(b"GET /file HTTP/1.0\r\n\r\n")?;
    let (mut buffer, mut total) = (vec![0; 256 << 10], 0);
    loop {
        match stream.read(&mut buffer)? {
            0 => break,
            read => total += read,
        }
    }
    if total < (TRANSFER as usize) << 20 {
        return Err(format!("{total} bytes instead of {TRANSFER} MiB").into());
    }
    Ok(gbit(begin))
}

/// The guest reads as much from here; the rate in Gbit/s.
fn serve(guest: &mut Guest, at: &str) -> Result<f64> {
    let listener = TcpListener::bind(at)?;
    let server = std::thread::spawn(move || -> std::io::Result<f64> {
        let (mut stream, _) = listener.accept()?;
        stream.set_read_timeout(Some(LONG))?;
        let mut request = [0; 4096];
        let begin = Instant::now();
        if stream.read(&mut request)? == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        let length = u64::from(TRANSFER) << 20;
        stream.write_all(format!("HTTP/1.0 200 OK\r\nContent-Length: {length}\r\n\r\n").as_bytes())?;
        let part = vec![0; 256 << 10];
        (0..TRANSFER * 4).try_for_each(|_| stream.write_all(&part))?;
        // It closes when it has all.
        stream.shutdown(std::net::Shutdown::Write)?;
        while stream.read(&mut request)? != 0 {}
        Ok(gbit(begin))
    });
    let status = guest.ask(&format!("wget -q -O /dev/null http://{at}/ && echo done"))?;
    if status != "done" {
        return Err(Failure::new("wget fails in the guest").with_logs(&guest.child.logs()));
    }
    let rate = server.join().map_err(|_| "the server panicked")?;
    Ok(rate?)
}

/// Memory goes to the host and comes back, the sides in turns.
fn balloon(journal: &mut Journal) -> Result<()> {
    let scratch = Scratch::new()?;
    let mut guests = Vec::new();
    for side in [Side::Ours, Side::Qemu] {
        let modern = if side == Side::Qemu { ",disable-legacy=on" } else { "" };
        let device = format!("virtio-balloon-pci,id=b0{modern}");
        guests.push(Guest::boot(journal, scratch.path(), side, &["-device", &device])?);
    }
    for _ in 0..ROUNDS {
        for guest in &mut guests {
            // It uses the memory and leaves it.
            let touch =
                format!("dd if=/dev/zero of=/fill bs=1M count={GIVEN} 2>/dev/null; rm /fill; echo done");
            guest.ask(&touch)?;
            let rate = move_to(guest, MEMORY - GIVEN)?;
            guest.sample("balloon-given", rate)?;
            let rate = move_to(guest, MEMORY)?;
            guest.sample("balloon-taken-back", rate)?;
        }
    }
    Ok(())
}

/// Gives the guest so many MiB and waits until it has them; the rate in GiB/s.
fn move_to(guest: &mut Guest, mib: u32) -> Result<f64> {
    let target = u64::from(mib) << 20;
    let begin = Instant::now();
    guest.qmp.execute("balloon", json!({"value": target}))?;
    loop {
        let actual = guest.qmp.execute("query-balloon", json!({}))?;
        if actual.get("actual") == Some(&json!(target)) {
            return Ok(f64::from(GIVEN) / 1024.0 / begin.elapsed().as_secs_f64());
        }
        if begin.elapsed() > LONG {
            return Err(Failure::new(format!("the balloon stays at {actual}")).with_logs(&guest.child.logs()));
        }
        // Seldom: each question takes time from the guest.
        std::thread::sleep(Duration::from_millis(100));
    }
}
