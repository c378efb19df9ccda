//! Compartments that are killed again and again while Debian works: it sees nothing but stalls.

use std::time::{Duration, Instant};

use bulkhead_framework::{Result, Scratch};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use super::super::debian::{Debian, SOON};
use super::super::{Journal, show};
use super::devices::{COMPLAINTS, process_of, root};

/// What is killed in turn.
const PARTS: [&str; 4] = ["pci", "balloon", "console", "broker"];

/// How long one death in a hundred may stall the guest or a client at most.
const STALL: Duration = Duration::from_secs(1);

/// Where that is more, how many times the answer of a guest whom nothing disturbs: the host does something else.
const TIMES: u32 = 10;

/// What the shell says when it is asked: with input and output through the console, and a register read through pci.
const PROBE: &str = "p() { read s < /sys/bus/virtio/devices/virtio0/status; echo \"pong $1 $s.\"; }";

/// After this a probe is sent again, then after twice that, and so on: what is under way to a console goes with it.
const PATIENCE: Duration = Duration::from_millis(300);

/// Copies a file and compares, again and again, past the cache.
const LOAD: &str = "(n=0; while [ ! -e /stop ]; do dd if=/d/a of=/d/b bs=64k conv=fsync 2>/dev/null || echo cannot copy; \
    echo 3 > /proc/sys/vm/drop_caches; cmp /d/a /d/b || echo not the same; n=$((n + 1)); done; echo copied $n times) &";

/// What is asked before and after; not what counts time, memory or I/O.
const STATE: [&str; 9] = [
    "query-status",
    "query-chardev",
    "query-pci",
    "query-fdsets",
    "query-name",
    "query-uuid",
    "query-cpus-fast",
    "query-balloon",
    "query-iothreads",
];

/// MiB that the guest has before and after; every other time a MiB less.
const MOST: u64 = 252;

pub fn few(journal: &mut Journal) -> Result<()> {
    run(journal, 10)
}

pub fn many(journal: &mut Journal) -> Result<()> {
    run(journal, 100)
}

fn run(journal: &mut Journal, each: usize) -> Result<()> {
    let scratch = Scratch::new()?;
    let drive = format!("file={},if=none,id=d0,format=raw", root(&scratch)?);
    let args = ["-m", "256M", "-drive", &drive, "-device", "virtio-blk-pci,drive=d0,id=v0"];
    let args = [&args[..], &["-device", "virtio-balloon-pci,id=b0"]].concat();
    let guest = Debian::boot(journal, &args, "")?;
    let mut killer = Killer { guest, probes: 1000, inflated: false };
    killer.prepare()?;
    let before = killer.state()?;
    killer.guest.shell(LOAD)?;
    // A host that itself stops for a while fails nothing: it does not do so twice.
    let mut short = killer.kills(each)?;
    if !short {
        show("once more")?;
        short = killer.kills(each)?;
    }
    killer.guest.check(short, "the stalls are too long")?;
    killer.inflated = false;
    killer.follows()?;
    killer.guest.shell("touch /stop; wait; echo all over")?;
    killer.guest.expect("all over\r\n")?;
    let after = killer.state()?;
    let guest = &mut killer.guest;
    guest.check(before == after, &format!("before:\n{before:#?}\nafter:\n{after:#?}"))?;
    let text = guest.vm.console().text();
    // The shell does not show what is typed.
    let wrong = ["cannot copy", "not the same", "differ"].into_iter().find(|wrong| text.contains(wrong));
    guest.check(wrong.is_none(), &format!("the guest's load says {wrong:?}"))?;
    let copied = text.lines().filter_map(|line| line.strip_prefix("copied ")).next_back();
    guest.check(copied.is_some_and(|count| !count.starts_with("0 ")), "the guest has copied nothing")?;
    let errors = guest.ask("dmesg -r | grep '^<[0-3]>'")?;
    guest.check(errors.is_empty(), &format!("the kernel has errors: {errors}"))?;
    let complaints = guest.ask(COMPLAINTS)?;
    guest.check(complaints.is_empty(), &format!("the kernel complains: {complaints}"))?;
    guest.shell("umount /d; poweroff -f")?;
    guest.ends()
}

/// The median, what all but one in each hundred, or of fewer than that, keep below, and the longest.
fn figures(times: &mut [Duration]) -> [Duration; 3] {
    times.sort_unstable();
    let (count, longer) = (times.len(), times.len().div_ceil(100));
    [count / 2, count.saturating_sub(1 + longer), count.saturating_sub(1)]
        .map(|index| times.get(index).copied().unwrap_or_default())
}

/// The same as text.
fn said(times: &mut [Duration]) -> String {
    let [p50, p99, longest] = figures(times).map(|time| time.as_millis());
    format!("p50 {p50} ms, p99 {p99} ms, longest {longest} ms")
}

/// A guest whose compartments are killed.
struct Killer {
    guest: Debian,
    probes: u32,
    /// Whether the balloon has a MiB more.
    inflated: bool,
}

impl Killer {
    /// The guest's disk, its answers, and some state to lose.
    fn prepare(&mut self) -> Result<()> {
        let code = "mkdir /d; mount -t ext4 /dev/vda /d; dd if=/dev/urandom of=/d/a bs=64k count=16 2>/dev/null; \
            dmesg -c > /dev/null; echo ready";
        let ready = self.guest.ask(code)?;
        self.guest.check(ready == "ready", "the disk cannot be mounted")?;
        self.guest.shell(PROBE)?;
        let interval =
            json!({"path": "/machine/peripheral/b0", "property": "guest-stats-polling-interval", "value": 2});
        self.guest.qmp.execute("qom-set", interval)?;
        self.follows()
    }

    /// Kills every part so often and prints how long that stalls. True if it is short enough.
    fn kills(&mut self, each: usize) -> Result<bool> {
        let began = Instant::now();
        let mut stalls = PARTS.map(|part| (part, Vec::new()));
        let mut undisturbed = Vec::new();
        for _ in 0..each {
            for (part, stalls) in &mut stalls {
                stalls.push(self.kill(part)?);
                let asked = Instant::now();
                self.probe()?;
                undisturbed.push(asked.elapsed());
            }
        }
        let [_, p99, _] = figures(&mut undisturbed);
        let most = STALL.max(p99 * TIMES);
        show(&format!("answers: {}; p99 may be up to {} ms", said(&mut undisturbed), most.as_millis()))?;
        let mut short = true;
        for (part, mut stalls) in stalls {
            show(&format!("{part:8} {each} deaths: {}", said(&mut stalls)))?;
            let [_, p99, _] = figures(&mut stalls);
            short &= p99 < most;
        }
        show(&format!("{} deaths in {:.0} s", each * PARTS.len(), began.elapsed().as_secs_f32()))?;
        Ok(short)
    }

    /// Kills a part, and returns how long it takes until the guest or a client gets again what only this part gives.
    fn kill(&mut self, part: &str) -> Result<Duration> {
        let process = process_of(&self.guest, part)?.ok_or_else(|| format!("there is no {part}"))?;
        if part == "balloon" {
            // It dies while the guest gives memory or takes it.
            self.inflated = !self.inflated;
            self.set_target()?;
        }
        let began = Instant::now();
        kill(Pid::from_raw(process.pid), Signal::SIGKILL).map_err(|error| format!("kill {part}: {error}"))?;
        match part {
            "balloon" => self.reached()?,
            "broker" => {
                self.guest.qmp = self.guest.vm.qmp()?;
                self.guest.check_status("running")?;
            }
            _ => self.probe()?,
        }
        let stall = began.elapsed();
        // The next death comes when all are back.
        self.probe()?;
        Ok(stall)
    }

    /// Waits until the guest's shell answers.
    fn probe(&mut self) -> Result<()> {
        let end = Instant::now() + SOON;
        let first = self.probes + 1;
        self.guest.vm.console().take_new();
        let mut text = String::new();
        let mut patience = PATIENCE;
        while Instant::now() < end {
            self.probes += 1;
            self.guest.shell(&format!("p {}", self.probes))?;
            let sent = Instant::now();
            while sent.elapsed() < patience {
                text.push_str(&self.guest.vm.console().take_new());
                if (first..=self.probes).any(|probe| text.contains(&format!("pong {probe} 0x0000000f.\r\n")))
                {
                    return Ok(());
                }
                std::thread::sleep(Duration::from_millis(2));
            }
            patience *= 2;
        }
        Err(self.guest.failure("the shell does not answer"))
    }

    /// Gives the balloon another target and waits until the guest has followed.
    fn follows(&mut self) -> Result<()> {
        self.set_target()?;
        self.reached()
    }

    fn target(&self) -> u64 {
        (MOST - u64::from(self.inflated)) << 20
    }

    fn set_target(&mut self) -> Result<()> {
        let target = self.target();
        self.until("balloon", &json!({"value": target}), &json!({}))
    }

    fn reached(&mut self) -> Result<()> {
        let target = self.target();
        self.until("query-balloon", &json!({}), &json!({"actual": target}))
    }

    /// Repeats a command until the answer is this one. While somebody on the way is away it is an error.
    fn until(&mut self, command: &str, arguments: &Value, wanted: &Value) -> Result<()> {
        let end = Instant::now() + SOON;
        loop {
            let answer = self.guest.qmp.try_execute(command, arguments.clone())?;
            if answer.as_ref() == Ok(wanted) {
                return Ok(());
            }
            self.guest.check(Instant::now() < end, &format!("{command}: {answer:?}, not {wanted}"))?;
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// What clients see of the VM.
    fn state(&mut self) -> Result<Vec<(String, Value)>> {
        let mut state = Vec::new();
        for command in STATE {
            let answer = self.guest.qmp.execute(command, json!({}))?;
            state.push((command.to_owned(), answer));
        }
        for property in ["guest-stats-polling-interval", "type"] {
            let which = json!({"path": "/machine/peripheral/b0", "property": property});
            state.push((property.to_owned(), self.guest.qmp.execute("qom-get", which)?));
        }
        Ok(state)
    }
}
