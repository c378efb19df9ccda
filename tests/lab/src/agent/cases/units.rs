//! VMs as systemd runs them.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::Duration;

use bulkhead_framework::{Qmp, Result, Transcript};
use serde_json::json;

use super::super::Journal;
use super::super::debian::{APPEND, BOOT, SOON, UP};
use super::super::probe;
use super::super::units::{PARTS, UnitVm, check, output, tool, wait_for};
use crate::paths;

/// How long a VM may take to end when its target stops: the guest's power-off, and the kill after it.
const STOP: Duration = Duration::from_secs(80);

/// Users of L1, each the owner of a VM.
const TENANTS: [(&str, u32); 2] = [("vm1", 1001), ("vm2", 1002)];

pub fn host(journal: &mut Journal) -> Result<()> {
    let version = tool(&["systemctl", "--version"])?;
    check(version.starts_with("systemd 252 "), || version.clone())?;
    let node = tool(&["stat", "-c", "%G %a", "/dev/kvm"])?;
    check(node == "kvm 660", || format!("/dev/kvm: {node}"))?;
    let dir = "/tmp/transient";
    fs::create_dir(dir)?;
    let path = |name: &str| format!("{dir}/{name}");
    let work = format!("--working-directory={dir}");
    let mut words = vec!["systemd-run", "--quiet", "--unit=transient", &work, "--property=Type=exec"];
    words.extend([
        "/usr/bin/bulkhead",
        "run",
        "-m",
        "192M",
        "-kernel",
        paths::KERNEL,
        "-initrd",
        paths::INITRD,
    ]);
    words.extend(["-append", APPEND, "-serial", "file:serial", "-qmp", "unix:q.sock,server=on,wait=off"]);
    tool(&words)?;
    let mut qmp = Qmp::connect(Path::new(&path("q.sock")), SOON)?;
    journal.keep(std::slice::from_ref(qmp.wire()));
    let up = || fs::read_to_string(path("serial")).ok().filter(|text| text.contains(UP));
    wait_for("the guest's user space", BOOT, up)?;
    qmp.execute("quit", json!({}))?;
    let state = || {
        let shown = tool(&["systemctl", "show", "--value", "--property=ActiveState", "transient"]).ok()?;
        (shown != "active" && shown != "deactivating").then_some(shown)
    };
    let state = wait_for("the end of the transient unit", SOON, state)?;
    check(state == "inactive", || format!("the transient unit is {state}"))
}

/// The policy that makes a tenant the operator of a VM.
fn owned_by(uid: u32) -> String {
    format!("[access.operator]\nuid = [0, {uid}]\n[access.monitor]\nuid = [0, {uid}]\n")
}

/// Starts the VMs of both tenants, and waits for their user space.
fn two(journal: &mut Journal, more: &str) -> Result<[UnitVm; 2]> {
    let vm = |(name, uid): (&'static str, u32)| UnitVm::install(name, &format!("{}{more}", owned_by(uid)));
    let [one, other] = TENANTS;
    let mut vms = [vm(one)?, vm(other)?];
    let [first, second] = vms.each_ref().map(UnitVm::target);
    tool(&["systemctl", "start", &first, &second])?;
    // Nobody keeps what a guest says before its port has a client.
    for vm in &mut vms {
        vm.attach(journal)?;
    }
    for vm in &mut vms {
        vm.wait_for_user_space()?;
    }
    Ok(vms)
}

pub fn tenants(journal: &mut Journal) -> Result<()> {
    let mut vms = two(journal, "")?;
    let mut uids = BTreeSet::new();
    let mut pids = Vec::new();
    for vm in &vms {
        let mut own = Vec::new();
        for part in PARTS {
            let process = vm.process(part)?;
            let name = format!("{part} of {}: {process:?}", vm.name);
            check(process.uid != 0 && uids.insert(process.uid), || format!("not a uid of its own: {name}"))?;
            check(process.capabilities == [0; 3], || format!("capabilities: {name}"))?;
            check(process.seccomp == 2 && process.no_new_privs, || format!("not confined: {name}"))?;
            own.push(process.pid);
        }
        pids.push(own);
    }
    apart(&vms, &pids)?;
    roles(&vms, journal)?;
    let [first, second] = &mut vms;
    // The power button of one, and what is left then; the other goes on.
    first.watch_button()?;
    tool(&["systemctl", "stop", &first.target()])?;
    first.serial.expect("KEY_POWER pressed", SOON)?;
    let gone = || first.left().ok().filter(Vec::is_empty);
    if wait_for("the end of the VM", STOP, gone).is_err() {
        return Err(format!("the stopped VM has left {:?}", first.left()?).into());
    }
    check(second.ask("echo still here", SOON)? == "still here", || "the other VM is gone".to_owned())
}

/// Neither tenant, and no compartment of either, can touch the other's sockets and processes.
fn apart(vms: &[UnitVm; 2], pids: &[Vec<i32>]) -> Result<()> {
    for (owner, other) in [(0, 1), (1, 0)] {
        let (Some(vm), Some(theirs), Some((_, tenant)), Some(foreign)) =
            (vms.get(other), pids.get(other), TENANTS.get(owner), vms.get(owner))
        else {
            return Err("two VMs have two tenants".into());
        };
        // The probe finds what it may do: root everything, and a tenant the sockets of his roles.
        let all = probe::as_user(0, vm.name, theirs)?;
        let each = theirs.len() * 7;
        check(all.iter().filter(|what| !what.starts_with('/')).count() == each, || format!("root: {all:?}"))?;
        let own = probe::as_user(*tenant, foreign.name, &[])?;
        let sockets = ["operator", "monitor"].map(|role| format!("/run/bulkhead/{}/{role}", foreign.name));
        check(own == sockets, || format!("the tenant reaches {own:?} of his own VM"))?;
        let mut users = vec![*tenant];
        for part in PARTS {
            users.push(foreign.process(part)?.uid);
        }
        for uid in users {
            let done = probe::as_user(uid, vm.name, theirs)?;
            check(done.is_empty(), || {
                format!("user {uid} of {} can, to {}: {done:?}", foreign.name, vm.name)
            })?;
        }
    }
    Ok(())
}

/// What each role may say.
fn roles(vms: &[UnitVm; 2], journal: &mut Journal) -> Result<()> {
    let [vm, _] = vms;
    for (role, may, may_not) in [
        ("operator", &["query-status", "query-name", "stop", "cont"][..], &[][..]),
        ("monitor", &["query-status", "query-name"], &["stop", "cont", "quit", "add_client"]),
        ("console", &[], &["query-status", "stop", "quit"]),
    ] {
        let mut qmp = vm.qmp(role, journal)?;
        for command in may {
            qmp.execute(command, json!({}))?;
        }
        for command in may_not {
            let reply = qmp.try_execute(command, json!({}))?;
            let refused = reply.as_ref().is_err_and(|error| error.class == "CommandNotFound");
            check(refused, || format!("{role} says {command}: {reply:?}"))?;
        }
    }
    Ok(())
}

pub fn memory(journal: &mut Journal) -> Result<()> {
    let mut vms = two(journal, "[limits]\nMemoryMax = \"150M\"\nMemorySwapMax = 0\n")?;
    let core = vms.first().map(|vm| vm.service("core")).ok_or("no VM")?;
    let [first, second] = &mut vms;
    first.shell("mount -t tmpfs -o size=100% tmpfs /proc; dd if=/dev/zero of=/proc/full bs=64k")?;
    let failed = || {
        let result = tool(&["systemctl", "show", "--value", "--property=Result", &core]).ok()?;
        (result != "success").then_some(result)
    };
    let result = wait_for("the limit", BOOT, failed)?;
    check(result == "oom-kill", || format!("core ended with {result}"))?;
    check(second.ask("echo still here", SOON)? == "still here", || "the other VM is gone".to_owned())?;
    // The kernel's first line names the VM and the compartment. While core dies, and still holds the memory, another
    // allocation of the slice may cost the life of a small one.
    let kernel = tool(&["journalctl", "--no-pager", "--output=cat", "--dmesg", "--grep=oom_memcg="])?;
    let line = kernel.lines().next().unwrap_or_default().to_owned();
    let named = line.contains("oom_memcg=/bulkhead.slice/bulkhead-vm1.slice")
        && line.contains("bulkhead-core@vm1.service");
    check(named, || format!("the kernel says {line:?}"))
}

pub fn names(journal: &mut Journal) -> Result<()> {
    // Without a machine file, and under a name that units cannot carry, nothing starts and nothing stays.
    for bad in ["none", "Vm1", "abcdefghijklmnopq"] {
        if bad != "none" {
            fs::create_dir_all("/etc/bulkhead")?;
            fs::write(format!("/etc/bulkhead/{bad}.toml"), "")?;
        }
        let started = output(&["systemctl", "start", &format!("bulkhead@{bad}.target")])?;
        check(!started.status.success(), || format!("{bad} starts"))?;
    }
    // From the wrong end: a part alone brings what it needs, and the target makes a VM of them.
    let mut vm = UnitVm::install("vm1", "")?;
    for part in ["console", "broker", "core"] {
        tool(&["systemctl", "start", &vm.service(part)])?;
    }
    tool(&["systemctl", "start", &vm.target()])?;
    vm.attach(journal)?;
    vm.wait_for_user_space()?;
    // A second VM of the name is the same one.
    let before = vm.process("core")?.pid;
    tool(&["systemctl", "start", &vm.target()])?;
    check(vm.process("core")?.pid == before, || "a second start starts a second core".to_owned())?;
    // Nobody reads what the processes log.
    let silent = ["systemd-journald.socket", "systemd-journald-dev-log.socket", "systemd-journald.service"];
    tool(&[&["systemctl", "stop"][..], &silent].concat())?;
    let served = without_a_log(&mut vm, journal);
    tool(&["systemctl", "start", "systemd-journald.socket", "systemd-journald.service"])?;
    served
}

fn without_a_log(vm: &mut UnitVm, journal: &mut Journal) -> Result<()> {
    tool(&["systemctl", "restart", &vm.service("broker")])?;
    let mut qmp = vm.qmp("operator", journal)?;
    qmp.execute("system_reset", json!({}))?;
    vm.wait_for_user_space()?;
    qmp.execute("quit", json!({}))?;
    let gone = || vm.left().ok().filter(Vec::is_empty);
    wait_for("the end of a VM without a log", STOP, gone).map(drop)
}

/// Says a figure that the host prints.
fn figure(journal: &mut Journal, text: &str) -> Result<()> {
    let log = Transcript::new("figures");
    log.push(text.as_bytes());
    journal.keep(std::slice::from_ref(&log));
    super::super::show(text)
}

pub use restarts::restarts;

mod restarts {
    use std::io::IoSlice;
    use std::os::fd::AsRawFd as _;
    use std::os::unix::net::UnixStream;
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
    use std::time::Instant;

    use bulkhead_framework::Failure;
    use nix::sys::signal::{Signal, kill};
    use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
    use nix::unistd::Pid;
    use serde_json::Value;

    use super::*;

    /// What the clients of a broker see while it comes and goes.
    #[derive(Default)]
    struct Seen {
        stop: AtomicBool,
        replies: AtomicU64,
        refused: AtomicU64,
    }

    pub fn restarts(journal: &mut Journal) -> Result<()> {
        let mut vm = UnitVm::install("vm1", "")?;
        tool(&["systemctl", "start", &vm.target()])?;
        vm.attach(journal)?;
        vm.wait_for_user_space()?;
        let core = vm.process("core")?.pid;
        let (sets, passed) = pass_a_descriptor(&vm)?;
        let seen = Seen::default();
        let result = std::thread::scope(|scope| {
            scope.spawn(|| load(vm.name, &seen));
            let result = broker_dies(&vm, &sets, passed, journal);
            seen.stop.store(true, Ordering::Relaxed);
            result
        });
        result?;
        let (replies, refused) = (seen.replies.into_inner(), seen.refused.into_inner());
        figure(journal, &format!("{replies} replies under load, {refused} refused connections"))?;
        check(replies > 0 && refused == 0, || format!("{refused} connections refused, {replies} replies"))?;
        check(vm.ask("echo 1", SOON)? == "1", || "the guest is gone".to_owned())?;
        let console = vm.process("console")?.pid;
        kill(Pid::from_raw(console), Signal::SIGKILL).map_err(|error| error.to_string())?;
        let answer = vm.ask("echo $((6 * 7))", SOON)?;
        check(answer == "42", || format!("with another console the guest says {answer:?}"))?;
        check(vm.process("console")?.pid != console, || "the console was not killed".to_owned())?;
        opener_dies(&vm, journal)?;
        memory_is_saved(&vm, journal)?;
        access_changes(&vm)?;
        // The loader runs again for each boot.
        let mut qmp = vm.qmp("operator", journal)?;
        qmp.execute("system_reset", json!({}))?;
        qmp.event("RESET", SOON)?;
        vm.wait_for_user_space()?;
        check(vm.process("core")?.pid == core, || "core was started anew".to_owned())?;
        let log = tool(&["journalctl", "--no-pager", "--output=cat", "--unit", &vm.service("loader")])?;
        check(log.matches("Finished bulkhead-loader@vm1").count() >= 2, || format!("loaders: {log}"))
    }

    /// Kills and restarts the broker; each time the next client finds the fd sets as they were.
    fn broker_dies(vm: &UnitVm, sets: &Value, passed: Qmp, journal: &mut Journal) -> Result<()> {
        // An fd set goes with the last session while the guest runs.
        let mut sessions = vec![passed];
        for way in ["kill", "restart", "kill"] {
            let before = vm.process("broker")?.pid;
            let start = Instant::now();
            if way == "kill" {
                kill(Pid::from_raw(before), Signal::SIGKILL).map_err(|error| error.to_string())?;
            } else {
                tool(&["systemctl", "restart", "--no-block", &vm.service("broker")])?;
                // The old one would serve a client that comes at once.
                wait_for("the restart", SOON, || vm.process("broker").ok().filter(|now| now.pid != before))?;
            }
            let mut qmp = vm.qmp("operator", journal)?;
            figure(journal, &format!("broker {way}: a client is served again after {:?}", start.elapsed()))?;
            let now = qmp.execute("query-fdsets", json!({}))?;
            check(now == *sets, || format!("fd sets after {way}: {now} instead of {sets}"))?;
            check(qmp.status()? == "running", || format!("after {way} the VM does not run"))?;
            check(vm.process("broker")?.pid != before, || format!("{way} left the broker"))?;
            sessions.push(qmp);
        }
        Ok(())
    }

    /// The opener's death changes nothing: the next one gives the next broker and the console to each other.
    fn opener_dies(vm: &UnitVm, journal: &mut Journal) -> Result<()> {
        for part in ["opener", "broker"] {
            let before = vm.process(part)?.pid;
            kill(Pid::from_raw(before), Signal::SIGKILL).map_err(|error| error.to_string())?;
            wait_for(part, SOON, || vm.process(part).ok().filter(|now| now.pid != before))?;
        }
        let mut qmp = vm.qmp("operator", journal)?;
        let mut devices = || qmp.execute("query-chardev", json!({})).ok();
        let found = wait_for("the console behind the next broker", SOON, &mut devices)?;
        check(found.to_string().contains("serial"), || format!("character devices: {found}"))?;
        check(qmp.status()? == "running", || "the VM does not run".to_owned())
    }

    /// A dump is a file in the VM's directory, written by a unit of its own.
    fn memory_is_saved(vm: &UnitVm, journal: &mut Journal) -> Result<()> {
        let mut qmp = vm.qmp("operator", journal)?;
        for (filename, fits) in [("dump", true), ("../dump", false), ("/var/dump", false)] {
            let arguments = json!({ "val": 0, "size": 16 << 20, "filename": filename });
            let saved = qmp.try_execute("pmemsave", arguments)?;
            check(saved.is_ok() == fits, || format!("{filename}: {saved:?}"))?;
        }
        let path = format!("/var/lib/bulkhead/{}/dump", vm.name);
        let length = fs::metadata(&path)?.len();
        check(length == 16 << 20, || format!("a dump of {length} bytes"))?;
        fs::remove_file(path)?;
        let unit = vm.service("dump");
        let finished = || {
            let log = tool(&["journalctl", "--no-pager", "--output=cat", "--unit", &unit]).ok()?;
            log.contains("Finished bulkhead-dump@vm1").then_some(())
        };
        wait_for("the end of the dump's unit", SOON, finished)
    }

    /// A reload changes who may connect, and nothing else that the machine file says.
    fn access_changes(vm: &UnitVm) -> Result<()> {
        let path = format!("/etc/bulkhead/{}.toml", vm.name);
        let file = fs::read_to_string(&path)?;
        let served = || {
            let stream = UnixStream::connect(format!("/run/bulkhead/{}/monitor", vm.name));
            stream.is_ok_and(|stream| Qmp::negotiate(stream).is_ok())
        };
        check(served(), || "root is no monitor".to_owned())?;
        for (more, expected) in [("\n[access.monitor]\nuid = 4711\n", false), ("", true)] {
            fs::write(&path, format!("{file}{more}"))?;
            tool(&["systemctl", "reload", &vm.service("limits")])?;
            wait_for("another policy", SOON, || (served() == expected).then_some(()))?;
        }
        fs::write(&path, format!("no-such-option = 1\n{file}"))?;
        let refused = output(&["systemctl", "reload", &vm.service("limits")])?;
        check(!refused.status.success(), || "a wrong machine file is taken".to_owned())?;
        fs::write(&path, file)?;
        check(served(), || "a wrong machine file has changed the policy".to_owned())
    }

    /// Adds an fd set and returns what query-fdsets says, and the session.
    fn pass_a_descriptor(vm: &UnitVm) -> Result<(Value, Qmp)> {
        let stream = UnixStream::connect(format!("/run/bulkhead/{}/operator", vm.name))?;
        let mut qmp = Qmp::negotiate(stream.try_clone()?)?;
        let file = fs::File::open("/etc/hostname")?;
        let request = b"{\"execute\": \"add-fd\", \"arguments\": {\"fdset-id\": 7, \"opaque\": \"lab\"}}\n";
        let rights = [file.as_raw_fd()];
        let message = [ControlMessage::ScmRights(&rights)];
        sendmsg::<()>(stream.as_raw_fd(), &[IoSlice::new(request)], &message, MsgFlags::empty(), None)
            .map_err(|error| Failure::new(format!("add-fd: {error}")))?;
        let reply = qmp.receive(Instant::now() + SOON)?;
        check(reply.pointer("/return/fdset-id") == Some(&json!(7)), || format!("add-fd: {reply}"))?;
        Ok((qmp.execute("query-fdsets", json!({}))?, qmp))
    }

    /// A client that asks without pause, and connects again whenever its session ends.
    fn load(name: &str, seen: &Seen) {
        let path = format!("/run/bulkhead/{name}/operator");
        while !seen.stop.load(Ordering::Relaxed) {
            let Ok(stream) = UnixStream::connect(&path) else {
                seen.refused.fetch_add(1, Ordering::Relaxed);
                continue;
            };
            // A session that ends in its handshake belongs to a broker that was killed.
            let Ok(mut qmp) = Qmp::negotiate(stream) else { continue };
            while !seen.stop.load(Ordering::Relaxed) && qmp.status().is_ok() {
                seen.replies.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
}
