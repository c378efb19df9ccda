//! The units in `jail-profiles/systemd` are those that the topology makes. `BLESS=1` writes them.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use bulkhead_jail::topology::{Boots, FileSize, Namespace, PROCESSES, Process, Restart};

/// Where a package puts the processes' executables.
const LIBEXEC: &str = "/usr/libexec/bulkhead";
/// An empty root directory with mount points.
const ROOT: &str = "/usr/lib/bulkhead/root";
/// Sockets of the opener and the loader's FIFO: nobody but root enters this directory.
const INNER: &str = "/run/bulkhead-inner/%i";
/// Sockets of back ends that are not ours, a directory for each VM.
const OTHERS: &str = "/run/bulkhead-vhost";
const HEAD: &str =
    "# Made from topology.toml: change that, then run BLESS=1 cargo test -p bulkhead-jail --test units\n";

/// What every unit has.
const SANDBOX: &str = "\
NoNewPrivileges=yes
CapabilityBoundingSet=
AmbientCapabilities=
PrivateNetwork=yes
PrivateIPC=yes
PrivateTmp=yes
ProtectSystem=strict
ProtectHome=yes
ProtectClock=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectControlGroups=yes
ProtectProc=invisible
ProcSubset=pid
RestrictAddressFamilies=AF_UNIX
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
MemoryDenyWriteExecute=yes
RemoveIPC=yes
KeyringMode=private
UMask=0077
IPAddressDeny=any
SystemCallArchitectures=native
SystemCallErrorNumber=EPERM
LimitCORE=0
";

/// A superset of the process's own filter, which it applies itself, and of what it needs until then. That one traps
/// and says what was called; this one only makes calls fail.
const CALLS: &str = "\
SystemCallFilter=@system-service seccomp landlock_create_ruleset landlock_add_rule landlock_restrict_self kcmp
SystemCallFilter=~@chown @clock @cpu-emulation @debug @module @mount @obsolete @privileged @raw-io @reboot @resources @swap @setuid
";

fn user(out: &mut String, part: &str) {
    let _ = writeln!(out, "DynamicUser=yes\nUser=bh-{part}-%i\nSlice=bulkhead-%i.slice");
}

/// What an instance is: a VM, or one of its devices.
fn instance(process: &Process) -> &'static str {
    if process.per_device { "device" } else { "VM" }
}

fn root(out: &mut String, binary: &str, binds: &[&str]) {
    let _ = writeln!(out, "RootDirectory={ROOT}\nMountAPIVFS=no\nBindReadOnlyPaths={binary}");
    for bind in binds {
        let _ = writeln!(out, "BindPaths={bind}");
    }
}

fn limits(out: &mut String, process: &Process) {
    let fsize = match process.limits.fsize {
        FileSize::Bytes(bytes) => bytes.to_string(),
        // Core sets its own, when it knows the size of RAM.
        FileSize::Ram | FileSize::Unlimited => "infinity".to_owned(),
    };
    let _ = writeln!(
        out,
        "LimitNOFILE={}\nLimitDATA={}\nLimitFSIZE={fsize}",
        process.limits.nofile, process.limits.data
    );
}

/// Order and death of a process.
fn unit_section(process: &Process) -> String {
    let mut out = format!(
        "{HEAD}[Unit]\nDescription=Bulkhead {} %i: {}\nDocumentation=man:bulkhead(1)\n",
        instance(process),
        process.about
    );
    if process.per_device {
        // Its instance does not say which VM it belongs to: the rest is in a drop-in that the generator makes.
        out.push_str("StartLimitIntervalSec=0\n");
        return out;
    }
    if process.boots == Boots::Vm {
        // A loader ends with core's link; a restart of the target would start one that nobody asked for.
        out.push_str("PartOf=bulkhead@%i.target\n");
    }
    // The opener's sockets are bound into its root directory.
    if process.boots == Boots::Vm {
        out.push_str("Requires=bulkhead-opener@%i.socket bulkhead-limits@%i.service\n");
    }
    let opener = "bulkhead-opener@%i.socket bulkhead-opener@%i.service";
    match process.name {
        // It stops first, while the others can still say what happens.
        "core" => {
            let _ = writeln!(
                out,
                "After=bulkhead-limits@%i.service {opener} bulkhead-broker@%i.service bulkhead-console@%i.service"
            );
        }
        "loader" | "dump" => {
            let _ = writeln!(out, "After={opener}\nStartLimitIntervalSec=0");
        }
        _ => {
            let _ = writeln!(out, "After=bulkhead-limits@%i.service {opener}\nStartLimitIntervalSec=0");
        }
    }
    out
}

fn service(process: &Process) -> String {
    let binary = format!("{LIBEXEC}/{}", process.binary);
    let mut out = unit_section(process);
    let _ = writeln!(out, "\n[Service]\nExecStart={binary} %i\nEnvironment=BULKHEAD_STARTER=systemd");
    match process.boots {
        Boots::Vm => out.push_str("Type=notify\nNotifyAccess=main\nTimeoutStartSec=30s\n"),
        // One that hangs is ended before core gives it up.
        Boots::Boot => out.push_str("Type=oneshot\nTimeoutStartSec=50s\n"),
        // One takes as long as its output; it ends with the client, the broker and core.
        Boots::Job => out.push_str("Type=oneshot\nTimeoutStartSec=infinity\n"),
    }
    match process.restart {
        Restart::Never => out.push_str("Restart=no\n"),
        Restart::Always => out.push_str("Restart=always\nRestartSec=20ms\n"),
    }
    if process.store > 0 {
        let _ = writeln!(out, "FileDescriptorStoreMax={}", process.store);
    }
    match process.name {
        "core" => out.push_str(
            "ExecStop=/usr/bin/bulkhead unit power-off $MAINPID\nTimeoutStopSec=75s\nOOMPolicy=stop\n",
        ),
        // They end when core has ended, and have nothing to say to a signal.
        "broker" => out
            .push_str("WatchdogSec=30s\nKillSignal=SIGKILL\nSuccessExitStatus=SIGKILL\nTimeoutStopSec=10s\n"),
        "loader" | "dump" => {}
        _ => out.push_str("KillSignal=SIGKILL\nSuccessExitStatus=SIGKILL\nTimeoutStopSec=10s\n"),
    }
    out.push_str("LogRateLimitIntervalSec=1s\nLogRateLimitBurst=200\n\n");
    if process.per_device {
        // Slices with a dash nest: the limits of the VM's slice hold for it.
        out.push_str("DynamicUser=yes\nSlice=bulkhead-%i.slice\n");
        root(&mut out, &binary, &[]);
    } else {
        user(&mut out, process.name);
        root(&mut out, &binary, &[&format!("{INNER}/{}:/run/bulkhead/opener", process.name)]);
    }
    if process.name == "core" {
        // ExecStop runs in the same root directory and as the same user, which may send core its signal.
        out.push_str("BindReadOnlyPaths=/usr/bin/bulkhead\n");
    }
    if process.namespaces.contains(&Namespace::User) {
        out.push_str("PrivateUsers=yes\n");
    }
    out.push_str("PrivateDevices=yes\nDevicePolicy=closed\n");
    limits(&mut out, process);
    out.push_str(SANDBOX);
    out.push_str(CALLS);
    out
}

fn opener() -> String {
    let mut out = format!(
        "{HEAD}[Unit]\nDescription=Bulkhead VM %i: opens what its machine file names\n\
         Documentation=man:bulkhead(1)\nPartOf=bulkhead@%i.target\nRequires=bulkhead-loader@%i.socket bulkhead-dump@%i.socket bulkhead-limits@%i.service\n\
         After=bulkhead-limits@%i.service bulkhead-loader@%i.socket bulkhead-dump@%i.socket\nStartLimitIntervalSec=0\n\n\
         [Service]\nType=notify\nNotifyAccess=main\nExecStart=/usr/bin/bulkhead unit opener %i\n\
         LoadCredential=machine:/etc/bulkhead/%i.toml\nRestart=always\nRestartSec=200ms\nFileDescriptorStoreMax=4096\n\
         RuntimeDirectory=bulkhead-links-%i\nRuntimeDirectoryMode=0700\nRuntimeDirectoryPreserve=restart\n\
         StateDirectory=bulkhead/%i\nStateDirectoryMode=0700\nKillSignal=SIGKILL\nSuccessExitStatus=SIGKILL\n\
         TimeoutStopSec=10s\nLogRateLimitIntervalSec=1s\nLogRateLimitBurst=200\n\n"
    );
    let fifo = |name: &str| format!("{INNER}/{name}:/run/bulkhead/{name}");
    user(&mut out, "opener");
    root(&mut out, "/usr/bin/bulkhead", &[&fifo("boot"), &fifo("job"), "-/dev/kvm"]);
    out.push_str("SupplementaryGroups=kvm\nPrivateUsers=no\nDevicePolicy=closed\nDeviceAllow=/dev/kvm rw\n");
    out.push_str("LimitNOFILE=8192\nLimitDATA=67108864\n");
    out.push_str(SANDBOX);
    out.push_str(CALLS);
    out
}

/// Somebody else's back end: the command is the administrator's.
fn vhost() -> String {
    format!(
        "{HEAD}[Unit]\nDescription=Bulkhead device %i: a vhost-user back end\nDocumentation=man:bulkhead(1)\n\
         ConditionPathExists=/etc/bulkhead/%i.env\nStartLimitIntervalSec=0\n\n\
         [Service]\nEnvironmentFile=/etc/bulkhead/%i.env\nExecStart=/usr/bin/env $COMMAND\nRestart=always\nRestartSec=200ms\n\
         TimeoutStopSec=10s\nLogRateLimitIntervalSec=1s\nLogRateLimitBurst=200\n\n\
         DynamicUser=yes\nSlice=bulkhead-%i.slice\nSupplementaryGroups=kvm\nTemporaryFileSystem={OTHERS}:ro\n\
         PrivateUsers=yes\nPrivateDevices=yes\nDevicePolicy=closed\n{}{CALLS}",
        // The opener connects to its socket by the group.
        SANDBOX.replace("UMask=0077", "UMask=0007")
    )
}

fn limits_service() -> String {
    format!(
        "{HEAD}[Unit]\nDescription=Bulkhead VM %i: checks its machine file and limits its slice\nDocumentation=man:bulkhead(1)\n\
         PartOf=bulkhead@%i.target\n\n\
         [Service]\nType=oneshot\nRemainAfterExit=yes\n\
         Group=kvm\nRuntimeDirectory=bulkhead-vhost/%i\nRuntimeDirectoryMode=2770\n\
         ExecStart=/usr/bin/bulkhead unit limits /etc/bulkhead/%i.toml\n\
         ExecReload=/usr/bin/bulkhead unit limits /etc/bulkhead/%i.toml\n\
         ExecReload=systemctl --no-block try-restart bulkhead-opener@%i.service\n\
         {}{}ProtectProc=invisible\nPrivateDevices=yes\n",
        SANDBOX
            .replace("ProtectProc=invisible\n", "")
            .replace("PrivateNetwork=yes\n", "PrivateNetwork=yes\nPrivateUsers=no\n"),
        CALLS
    )
}

fn target() -> String {
    let parts = ["opener", "broker", "console"].map(|part| format!("bulkhead-{part}@%i.service")).join(" ");
    let sockets = sockets().keys().map(|name| name.replace("@.", "@%i.")).collect::<Vec<_>>().join(" ");
    format!(
        "{HEAD}[Unit]\nDescription=Bulkhead VM %i\nDocumentation=man:bulkhead(1)\n\
         BindsTo=bulkhead-core@%i.service\nWants={parts} {sockets}\n\
         After=bulkhead-core@%i.service {parts} {sockets}\n\n[Install]\nWantedBy=multi-user.target\n"
    )
}

/// A socket unit: what it is for, its lines, and whose it is.
fn socket(about: &str, lines: &str, service: &str) -> String {
    format!(
        "{HEAD}[Unit]\nDescription=Bulkhead VM %i: {about}\nDocumentation=man:bulkhead(1)\n\
         PartOf=bulkhead@%i.target\n{}\n[Socket]\n{lines}Service=bulkhead-{service}@%i.service\nRemoveOnStop=yes\n{}",
        last(service).0,
        last(service).1
    )
}

/// The last socket to stop in its directory removes that: order, and what to do then.
fn last(service: &str) -> (&'static str, &'static str) {
    match service {
        // Not before the machine file is known to be what its devices' sockets were made from. Without the default
        // dependencies, as the loader's: by those it would come before basic.target, and so before what it waits for.
        "opener" => (
            "DefaultDependencies=no\nConflicts=shutdown.target\nBefore=shutdown.target\n\
             Requires=bulkhead-limits@%i.service\nAfter=bulkhead-limits@%i.service\n",
            "ExecStopPost=-/bin/rmdir /run/bulkhead-inner/%i\nExecStopPost=-/bin/rm -f /run/bulkhead-links-%i\n",
        ),
        "console" => ("", "ExecStopPost=-/bin/rmdir /run/bulkhead/%i\n"),
        "loader" | "dump" => (
            "DefaultDependencies=no\nConflicts=shutdown.target\nBefore=shutdown.target\n\
             After=bulkhead-opener@%i.socket\n",
            "",
        ),
        _ => ("After=bulkhead-serial@%i.socket\n", ""),
    }
}

fn sockets() -> BTreeMap<String, String> {
    let mut all = BTreeMap::new();
    let mut lines = String::new();
    for process in PROCESSES.iter().filter(|process| !process.per_device) {
        let _ = writeln!(lines, "ListenSequentialPacket={INNER}/{}", process.name);
    }
    // Each unit has one of them in its own root directory; nobody else gets through the directory.
    lines.push_str("DirectoryMode=0700\nSocketMode=0666\nFileDescriptorName=opener\n");
    all.insert(
        "bulkhead-opener@.socket".to_owned(),
        socket("where its processes get their descriptors", &lines, "opener"),
    );
    for (name, about, service) in
        [("boot", "core asks for a loader", "loader"), ("job", "the broker asks for a dump", "dump")]
    {
        let lines = format!(
            "ListenFIFO={INNER}/{name}\nDirectoryMode=0700\nSocketMode=0622\nFileDescriptorName={name}\nTriggerLimitIntervalSec=0\n"
        );
        all.insert(format!("bulkhead-{service}@.socket"), socket(about, &lines, service));
    }
    for role in ["operator", "monitor", "console"] {
        // Who may connect, the broker checks by the machine file's lists.
        let lines = format!(
            "ListenStream=/run/bulkhead/%i/{role}\nSocketMode=0666\nFileDescriptorName=chardev.{role}\n"
        );
        all.insert(
            format!("bulkhead-qmp-{role}@.socket"),
            socket(&format!("QMP, role {role}"), &lines, "broker"),
        );
    }
    let lines = "ListenStream=/run/bulkhead/%i/serial\nSocketMode=0600\nFileDescriptorName=chardev.serial\n";
    all.insert("bulkhead-serial@.socket".to_owned(), socket("serial port", lines, "console"));
    all
}

fn units() -> BTreeMap<String, String> {
    let mut all = sockets();
    for process in PROCESSES {
        let mut text = service(process);
        // A service without these would be started without its sockets.
        let own: Vec<String> = sockets()
            .iter()
            .filter(|(_, socket)| socket.contains(&format!("Service=bulkhead-{}@%i.service", process.name)))
            .map(|(name, _)| name.replace("@.", "@%i."))
            .collect();
        if !own.is_empty() {
            let sockets = own.join(" ");
            text = text.replace("\n\n[Service]\n", &format!("\n\n[Service]\nSockets={sockets}\n"));
        }
        all.insert(format!("bulkhead-{}@.service", process.name), text);
    }
    let opener = opener().replace("[Service]\n", "[Service]\nSockets=bulkhead-opener@%i.socket\n");
    all.insert("bulkhead-opener@.service".to_owned(), opener);
    all.insert("bulkhead-limits@.service".to_owned(), limits_service());
    all.insert("bulkhead-vhost@.service".to_owned(), vhost());
    all.insert("bulkhead@.target".to_owned(), target());
    all
}

fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../systemd")
}

#[test]
fn the_units_follow_the_topology() {
    let expected = units();
    if std::env::var_os("BLESS").is_some() {
        for (name, text) in &expected {
            std::fs::write(directory().join(name), text).unwrap();
        }
    }
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(directory()).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        found.insert(name, std::fs::read_to_string(entry.path()).unwrap());
    }
    for (name, text) in &expected {
        assert_eq!(
            found.get(name),
            Some(text),
            "{name}: run BLESS=1 cargo test -p bulkhead-jail --test units"
        );
    }
    let names = |all: &BTreeMap<String, String>| all.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&found), names(&expected));
}
