//! The jail of each process, as the host sees it in /proc while the guest runs.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::net::UnixStream;
use std::process::Command;

use bulkhead_bus_api::platform::ECAM;
use bulkhead_framework::{Process, Result, Scratch, process};
use bulkhead_jail::topology::{self, FileSize, Namespace};
use bulkhead_native_tests::{Guest, SOON, Setup, Step, eventually, install};
use serde_json::json;

/// An ordinary user without subordinate ids, and the group of its /dev/kvm.
const USER: (u32, u32) = (4242, 4243);
const KVM_GROUP: u32 = 4244;
const BINARIES: [&str; 10] = [
    "bulkhead-core",
    "bulkhead-console",
    "bulkhead-broker",
    "bulkhead-loader",
    "bulkhead-dump",
    "bulkhead-pci",
    "bulkhead-block",
    "bulkhead-balloon",
    "bulkhead-mem",
    "bulkhead-pmem",
];
const KINDS: [(&str, Namespace); 6] = [
    ("user", Namespace::User),
    ("mnt", Namespace::Mount),
    ("pid", Namespace::Pid),
    ("net", Namespace::Net),
    ("ipc", Namespace::Ipc),
    ("uts", Namespace::Uts),
];

/// The processes that live as long as the VM; it has no network.
fn residents() -> impl Iterator<Item = &'static topology::Process> {
    let in_machine = |process: &&topology::Process| process.name != "net";
    topology::PROCESSES
        .iter()
        .copied()
        .filter(|process| process.boots == topology::Boots::Vm)
        .filter(in_machine)
}

/// A field of /proc/PID/status.
fn field(pid: i32, name: &str) -> String {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.unwrap_or("?").trim().to_owned()
}

/// A guest with a serial socket, a QMP socket, a file, a disk, a balloon and memory devices, so that every kind of descriptor is there.
fn setup() -> Setup {
    let chardev = ["-chardev", "socket,id=c,path=s.sock,server=on,wait=off", "-serial", "chardev:c"];
    let file = ["-chardev", "file,id=f,path=log"];
    let disk = ["-drive", "if=none,id=d,file=disk.img", "-device", "virtio-blk-pci,drive=d,id=d0"];
    let balloon = ["-device", "virtio-balloon-pci,id=b0"];
    let memory = ["-m", "256M,maxmem=2G", "-object", "memory-backend-memfd,id=m0,size=512M"];
    let mem = ["-device", "virtio-mem-pci,id=vm0,memdev=m0,requested-size=64M"];
    let pmem =
        ["-object", "memory-backend-memfd,id=m1,size=64M", "-device", "virtio-pmem-pci,id=p0,memdev=m1"];
    let all = [&chardev[..], &file, &disk, &balloon, &memory, &mem, &pmem, &["-smp", "2"]].concat();
    Setup::new("test=counter", &all).with(|vm| vm.without_serial()).leaves("log").disk(1 << 20)
}

/// Runs `look` on each resident process of a guest that runs.
fn each(guest: &Guest, mut look: impl FnMut(&topology::Process, &Process) -> Result<()>) -> Result<()> {
    guest.running()?;
    for resident in residents() {
        look(resident, &guest.process(resident.name)?)?;
    }
    Ok(())
}

/// A guest of an ordinary user, who may use KVM by a supplementary group. The binaries go with the scratch.
fn of_user(setup: Setup) -> Result<(Scratch, Guest)> {
    let scratch = Scratch::new()?;
    let launcher = install(scratch.path(), &BINARIES)?;
    let (uid, gid) = USER;
    let steps = [Step::KvmOf(KVM_GROUP), Step::User(uid, gid, Some(KVM_GROUP))];
    let guest = setup.with(|vm| vm.launcher(launcher)).steps(&steps).start()?;
    Ok((scratch, guest))
}

fn confined(guest: &Guest, starter: &str) -> Result<()> {
    each(guest, |resident, found| {
        let name = resident.name;
        let pid = found.pid;
        for (key, value) in [("Seccomp", "2"), ("NoNewPrivs", "1"), ("Groups", "")] {
            let is = field(pid, key);
            let ok = is == value || (key == "Groups" && starter == "user");
            guest.check(ok, &format!("{name}: {key} is {is:?}, not {value:?}"))?;
        }
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            let is = field(pid, set);
            // Whoever has no user namespace of its own as an ordinary user keeps what it cannot use.
            let gap = set == "CapBnd" && starter == "user" && !resident.namespaces.contains(&Namespace::User);
            guest.check(gap || is == "0000000000000000", &format!("{name}: {set} is {is}"))?;
        }
        guest.check(field(pid, "CoreDumping") == "0", &format!("{name}: dumps core"))?;
        for thread in fs::read_dir(format!("/proc/{pid}/task"))?.flatten() {
            let status = fs::read_to_string(thread.path().join("status")).unwrap_or_default();
            guest.check(status.contains("Seccomp:\t2"), &format!("{name}: a thread without filter"))?;
        }
        limits(guest, resident, pid)
    })
}

fn limits(guest: &Guest, resident: &topology::Process, pid: i32) -> Result<()> {
    let text = fs::read_to_string(format!("/proc/{pid}/limits"))?;
    let limit = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
        line.split_whitespace().next().unwrap_or_default().to_owned()
    };
    let name = resident.name;
    guest.check(limit("Max core file size") == "0", &format!("{name}: core dumps are on"))?;
    let nofile = resident.limits.nofile.to_string();
    guest.check(limit("Max open files") == nofile, &format!("{name}: not {nofile} open files"))?;
    let size = match resident.limits.fsize {
        FileSize::Bytes(bytes) => bytes.to_string(),
        // The configuration window is larger than the RAM of this guest.
        FileSize::Ram => ECAM.len.to_string(),
        FileSize::Unlimited => "unlimited".to_owned(),
    };
    let is = limit("Max file size");
    guest.check(is == size, &format!("{name}: file size {is}, not {size}"))
}

#[test]
fn every_process_is_confined() -> Result<()> {
    let guest = setup().start()?;
    confined(&guest, "root")?;
    guest.quit()
}

#[test]
fn every_process_of_an_ordinary_user_is_confined() -> Result<()> {
    let (_binaries, guest) = of_user(setup())?;
    confined(&guest, "user")?;
    guest.quit()
}

/// Each process is in namespaces of its own, but for the gaps of the topology; those that root starts share one empty
/// network.
fn apart(guest: &Guest, starter: &str) -> Result<()> {
    let host = process(nix::unistd::Pid::this().as_raw())?;
    let mut seen: BTreeMap<String, String> = BTreeMap::new();
    let found: Vec<_> = residents().map(|r| guest.process(r.name).map(|p| (r, p))).collect::<Result<_>>()?;
    for (resident, process) in found {
        let own: Vec<Namespace> = resident.namespaces_under(starter).collect();
        for (kind, namespace) in KINDS {
            let id = process.namespaces.get(kind).cloned().unwrap_or_default();
            guest.check(!id.is_empty(), &format!("{}: {kind} namespace unreadable", resident.name))?;
            let message = format!("{}: {kind} namespace {id}", resident.name);
            if own.contains(&namespace) {
                guest.check(process.is_apart(&host, kind), &format!("{message} is the host's"))?;
                let shared = namespace == Namespace::Net && starter == "root";
                let other = seen.insert(id, resident.name.to_owned()).filter(|_| !shared);
                guest.check(other.is_none(), &format!("{message} is also that of {other:?}"))?;
            } else if namespace != Namespace::Mount || starter == "root" {
                guest.check(!process.is_apart(&host, kind), &format!("{message} is not the host's"))?;
            }
        }
    }
    Ok(())
}

#[test]
fn namespaces_are_the_topologys() -> Result<()> {
    let guest = setup().start()?;
    guest.running()?;
    apart(&guest, "root")?;
    guest.quit()
}

#[test]
fn namespaces_of_an_ordinary_user_are_the_topologys() -> Result<()> {
    let (_binaries, guest) = of_user(setup())?;
    guest.running()?;
    apart(&guest, "user")?;
    guest.quit()
}

#[test]
fn each_process_has_a_user_of_its_own() -> Result<()> {
    let (first, second) = (setup().start()?, setup().start()?);
    let mut users = BTreeSet::new();
    for guest in [&first, &second] {
        each(guest, |resident, process| {
            let uids: BTreeSet<String> =
                field(process.pid, "Uid").split_whitespace().map(str::to_owned).collect();
            guest.check(uids.len() == 1, &format!("{}: uids {uids:?}", resident.name))?;
            guest.check(process.uid > 0x6000_0000, &format!("{}: uid {}", resident.name, process.uid))?;
            guest.check(
                users.insert(process.uid),
                &format!("{}: uid {} is shared", resident.name, process.uid),
            )
        })?;
    }
    first.quit()?;
    second.quit()
}

#[test]
fn processes_of_an_ordinary_user_are_that_user() -> Result<()> {
    let (_binaries, guest) = of_user(setup())?;
    each(&guest, |resident, process| {
        guest.check(process.uid == USER.0, &format!("{}: uid {}", resident.name, process.uid))
    })?;
    guest.quit()
}

#[test]
fn the_root_directory_is_empty() -> Result<()> {
    let guest = setup().start()?;
    each(&guest, |resident, process| {
        let root = format!("/proc/{}/root/", process.pid);
        let entries: Vec<_> = fs::read_dir(&root)?.flatten().map(|entry| entry.file_name()).collect();
        guest.check(entries.is_empty(), &format!("{}: {entries:?} in its root", resident.name))?;
        let mounts = fs::read_to_string(format!("/proc/{}/mountinfo", process.pid))?;
        let read_only = mounts.lines().count() == 1 && mounts.contains(" / / ro,nosuid,nodev,noexec");
        guest.check(read_only, &format!("{}: mounts {mounts}", resident.name))?;
        let cwd = fs::read_link(format!("/proc/{}/cwd", process.pid))?;
        guest.check(cwd.as_os_str() == "/", &format!("{}: works in {cwd:?}", resident.name))
    })?;
    guest.quit()
}

/// Kinds of the open descriptors of a process, numbers replaced.
fn kinds(pid: i32) -> Result<Vec<(i32, String)>> {
    let mut kinds = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))?.flatten() {
        let target = match fs::read_link(entry.path()) {
            // Closed since it was listed.
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            target => target?.to_string_lossy().into_owned(),
        };
        let number = entry.file_name().to_string_lossy().parse().unwrap_or(-1);
        // A pipe or socket has an inode, an anonymous inode a kind, a vCPU a number.
        let kind = match target.split_once(":[") {
            Some((kind @ ("pipe" | "socket"), _)) => kind.to_owned(),
            _ => target.replace("anon_inode:", "").replace(['[', ']'], ""),
        };
        kinds.push((number, kind));
    }
    kinds.sort_unstable();
    Ok(kinds)
}

/// What a process may hold beyond its standard streams: beginning of a kind, and how many at most.
fn allowed(name: &str) -> &'static [(&'static str, usize)] {
    match name {
        // With two vCPUs. Sockets: five listeners, their connections, `boot`, and ends between threads. Eventfds: those of
        // the console and, for interrupts and doorbells, of all devices. What memory devices give the guest is mapped, not held.
        "core" => &[
            ("kvm-vm", 1),
            ("kvm-vcpu:", 2),
            ("/memfd:ram-low", 1),
            ("/memfd:ecam", 1),
            ("socket", 20),
            ("eventfd", 22),
            ("signalfd", 1),
        ],
        // Links, the starter, the listener of the serial port, and ends between threads; what outlives it.
        "console" => &[
            ("socket", 10),
            ("LOG", 1),
            ("eventfd", 4),
            ("eventpoll", 1),
            ("timerfd", 1),
            ("/memfd:bulkhead-state", 1),
        ],
        // Links, the starter, the opener, `job`, listeners of links and of QMP, and a client that is about to go; what outlives it.
        "broker" => &[("socket", 13), ("eventfd", 1), ("eventpoll", 2), ("/memfd:bulkhead-state", 1)],
        // Links with two vCPUs, the starter, the opener, and of each device a back end, its side link and a channel for what
        // it asks; its eventfds, and the one that its queue thread owns.
        "pci" => &[
            ("/memfd:ram-low", 1),
            ("/memfd:ecam", 1),
            ("/memfd:bulkhead-state", 1),
            ("/memfd:", 4),
            ("socket", 20),
            ("eventfd", 24),
        ],
        "block" => &[
            ("DISK", 1),
            ("signalfd", 1),
            ("timerfd", 2),
            ("/memfd:", 4),
            ("socket", 8),
            ("eventfd", 9),
            ("eventpoll", 2),
        ],
        "balloon" => &[
            ("signalfd", 1),
            ("timerfd", 2),
            ("/memfd:", 5),
            ("socket", 9),
            ("eventfd", 15),
            ("eventpoll", 2),
        ],
        // The memory and the piece of it that the guest has are one file.
        "mem" | "pmem" => &[
            ("signalfd", 1),
            ("timerfd", 2),
            ("/memfd:", 6),
            ("socket", 8),
            ("eventfd", 9),
            ("eventpoll", 2),
        ],
        _ => &[],
    }
}

fn only_its_own_descriptors(guest: &Guest) -> Result<()> {
    let path = |file: &str| guest.trace().dir().join(file).to_string_lossy().into_owned();
    let (log, disk) = (path("log"), path("disk.img"));
    each(guest, |resident, process| {
        let name = resident.name;
        let kinds = kinds(process.pid)?;
        // In a mount namespace of its own the process sees the device without its directory.
        let standard: Vec<&str> =
            kinds.iter().take(3).map(|(_, kind)| kind.strip_prefix("/dev").unwrap_or(kind)).collect();
        guest.check(standard == ["/null", "/null", "pipe"], &format!("{name}: {kinds:?}"))?;
        let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
        for (_, kind) in kinds.iter().skip(3) {
            let kind = match kind {
                kind if *kind == log => "LOG",
                kind if *kind == disk => "DISK",
                kind => kind,
            };
            let rule = allowed(name).iter().find(|(start, _)| kind.starts_with(start));
            let Some((start, most)) = rule else {
                return guest.check(false, &format!("{name} holds {kind}"));
            };
            let count = counts.entry(start).or_default();
            *count += 1;
            guest.check(*count <= *most, &format!("{name}: more than {most} of {start}: {kinds:?}"))?;
        }
        Ok(())
    })
}

#[test]
fn each_process_has_its_own_descriptors_only() -> Result<()> {
    let guest = setup().start()?;
    only_its_own_descriptors(&guest)?;
    guest.quit()
}

#[test]
fn descriptors_of_an_ordinary_users_processes() -> Result<()> {
    let (_binaries, guest) = of_user(setup())?;
    only_its_own_descriptors(&guest)?;
    guest.quit()
}

/// A dump is opened as the invoking user may, and is that user's.
#[test]
fn a_dump_is_the_invoking_users() -> Result<()> {
    let (_binaries, guest) = of_user(setup())?;
    let mut qmp = guest.running()?;
    let dir = guest.trace().dir().to_owned();
    let (own, foreign) = (dir.join("own"), dir.join("foreign"));
    fs::write(&foreign, "root's")?;
    let mut save = |path: &std::path::Path| {
        qmp.try_execute("pmemsave", json!({ "val": 0, "size": 4096, "filename": path }))
    };
    let refused = save(&foreign)?.err().map(|error| error.desc).unwrap_or_default();
    let expected = format!("Could not open '{}': Permission denied", foreign.display());
    guest.check(refused == expected && fs::read(&foreign)? == b"root's", &refused)?;
    let saved = save(&own)?;
    guest.check(saved.is_ok(), &format!("{saved:?}"))?;
    let file = fs::metadata(&own)?;
    let is_own = (file.uid(), file.len(), file.mode() & 0o777) == (USER.0, 4096, 0o600);
    guest.check(is_own, &format!("{file:?}"))?;
    fs::remove_file(own)?;
    fs::remove_file(foreign)?;
    guest.quit()
}

#[test]
fn only_core_holds_kvm() -> Result<()> {
    let guest = setup().start()?;
    guest.running()?;
    let mut holders = Vec::new();
    for process in guest.trace().processes() {
        let kinds = match kinds(process.pid) {
            // The loader ends when it is done.
            Err(_) if process.name == "bulkhead-loader" => continue,
            kinds => kinds?,
        };
        if kinds.iter().any(|(_, kind)| kind.contains("kvm")) {
            holders.push(process.name);
        }
    }
    guest.check(holders == ["bulkhead-core"], &format!("/dev/kvm is open in {holders:?}"))?;
    guest.quit()
}

/// What the launcher inherits from a careless parent reaches no compartment.
#[test]
fn descriptors_of_the_parent_reach_nobody() -> Result<()> {
    use std::os::fd::AsRawFd as _;
    let (kept, _other) = UnixStream::pair()?;
    let file = fs::File::open("/etc/passwd")?;
    let keep = [Step::Keep(kept.as_raw_fd()), Step::Keep(file.as_raw_fd())];
    let guest = setup().steps(&keep).start()?;
    let inode = fs::read_link(format!("/proc/self/fd/{}", kept.as_raw_fd()))?;
    each(&guest, |resident, process| {
        for entry in fs::read_dir(format!("/proc/{}/fd", process.pid))?.flatten() {
            let target = fs::read_link(entry.path())?;
            let foreign = target == inode || target.ends_with("passwd");
            guest.check(!foreign, &format!("{} holds {target:?}", resident.name))?;
        }
        Ok(())
    })?;
    guest.quit()
}

#[test]
fn names_are_what_ps_shows() -> Result<()> {
    let guest = setup().start()?;
    guest.running()?;
    let mut names: Vec<String> = guest.trace().processes().into_iter().map(|process| process.name).collect();
    names.retain(|name| name != "bulkhead-loader");
    names.sort_unstable();
    let expected = [
        "bulkhead",
        "bulkhead-balloo",
        "bulkhead-block",
        "bulkhead-broker",
        "bulkhead-consol",
        "bulkhead-core",
        "bulkhead-guard",
        "bulkhead-mem",
        "bulkhead-pci",
        "bulkhead-pmem",
    ];
    guest.check(names == expected, &format!("{names:?}"))?;
    each(&guest, |resident, process| {
        let line = fs::read(format!("/proc/{}/cmdline", process.pid))?;
        let line = String::from_utf8_lossy(&line).into_owned();
        guest.check(line.starts_with(resident.binary), &format!("{}: {line:?}", resident.name))?;
        let environment = fs::read(format!("/proc/{}/environ", process.pid)).unwrap_or_default();
        let secret = String::from_utf8_lossy(&environment).contains("PATH=");
        guest.check(!secret, &format!("{}: it has the user's environment", resident.name))
    })?;
    guest.quit()
}

/// The loader is caught at work: its image is large, and it is asked for over and over.
#[test]
fn the_loader_is_jailed_and_has_no_kvm() -> Result<()> {
    let guest = setup().start()?;
    let mut qmp = guest.qmp()?;
    let caught = eventually("a loader", SOON, || {
        qmp.execute("system_reset", json!({})).map_err(|failure| failure.to_string())?;
        let loader = guest.trace().find("bulkhead-loader").ok_or("no loader")?;
        let kinds = kinds(loader.pid).map_err(|failure| failure.to_string())?;
        if loader.seccomp == 2 && !kinds.is_empty() {
            Ok((loader, kinds))
        } else {
            Err("too late".to_owned())
        }
    });
    let (loader, kinds) = caught.map_err(|failure| guest.explain(failure))?;
    guest.check(loader.no_new_privs && loader.capabilities == [0; 3], &format!("{loader:?}"))?;
    let forbidden = kinds.iter().find(|(_, kind)| kind.contains("kvm") || kind.contains("eventfd"));
    guest.check(forbidden.is_none(), &format!("the loader holds {forbidden:?}"))?;
    guest.quit()
}

/// Nothing of the host's network is in a compartment's namespace.
#[test]
fn there_is_no_network() -> Result<()> {
    let guest = setup().start()?;
    each(&guest, |resident, process| {
        let devices = fs::read_to_string(format!("/proc/{}/net/dev", process.pid))?;
        let names: Vec<&str> =
            devices.lines().filter_map(|line| Some(line.split_once(':')?.0.trim())).collect();
        guest.check(names == ["lo"], &format!("{}: {names:?}", resident.name))
    })?;
    guest.quit()
}

#[test]
fn started_by_hand_a_compartment_refuses() -> Result<()> {
    let beside = bulkhead_framework::launcher_path();
    for binary in BINARIES {
        let output = Command::new(beside.with_file_name(binary)).output()?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        let refused = output.status.code() == Some(1) && said.lines().count() == 1;
        assert!(refused && said.contains("start VMs with `bulkhead run`"), "{binary}: {said}");
    }
    Ok(())
}
