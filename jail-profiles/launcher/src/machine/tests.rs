use bulkhead_control_api::config::{Chardev, ChardevKind, CpuTopology, Role};

use super::*;
use crate::cli::{Command, parse};

/// The plan of a command line.
pub fn try_plan(line: &str) -> Result<Plan, String> {
    let args: Vec<String> = format!("run {line}").split_whitespace().map(str::to_owned).collect();
    let Command::Run(given) = parse(&args).map_err(|e| e.to_string())? else { panic!("not a run: {line}") };
    let options = Options::new(&given).map_err(|e| e.to_string())?;
    plan(&options).map_err(|e| e.to_string())
}

/// The same, of a good one.
pub fn planned(line: &str) -> Plan {
    try_plan(line).unwrap_or_else(|e| panic!("{line}: {e}"))
}

/// Names of the descriptors in their order.
fn opened(plan: &Plan) -> Vec<&str> {
    plan.opens.iter().map(|open| open.name.as_str()).collect()
}

#[test]
fn run_alone_boots_the_native_guest_on_the_terminal() {
    let plan = planned("");
    let cpus = CpuTopology { cpus: 1, sockets: 1, cores: 1, threads: 1 };
    assert_eq!(
        plan.core,
        config::Core {
            ram: 128 << 20,
            cpus,
            no_reboot: false,
            no_shutdown: false,
            autostart: true,
            device_memory: 0,
        }
    );
    let kernel = "the native guest".to_owned();
    let loader = config::Loader {
        kernel,
        initrd: None,
        cmdline: String::new(),
        cpus,
        uuid: [0; 16],
        tables: Vec::new(),
    };
    assert_eq!(plan.loader, loader);
    let serial = Chardev { id: "serial0".into(), kind: ChardevKind::Stdio };
    assert_eq!(
        plan.console,
        config::Console { life: plan.broker.life, chardevs: vec![serial], serial: Some("serial0".into()) }
    );
    assert_eq!(
        plan.broker,
        config::Broker {
            life: plan.console.life,
            ram: 128 << 20,
            autostart: true,
            options: table::groups(),
            ..config::Broker::default()
        }
    );
    assert_eq!(opened(&plan), ["stdio.in", "stdio.out", "kernel", "kvm"]);
    assert_eq!(plan.opens[2].what, What::NativeGuest);
    assert_eq!(plan.terminal, Some(Terminal { signals: true }));
}

#[test]
fn the_documented_command_line() {
    let plan = planned(
        "-m 512M -smp 2 -kernel /vmlinuz -initrd /initrd -append console=ttyS0 -serial stdio \
         -qmp unix:q.sock,server=on,wait=off -name vm -S -no-reboot -no-shutdown -pidfile p",
    );
    assert_eq!((plan.core.ram, plan.core.cpus.cpus), (512 << 20, 2));
    assert!(plan.core.no_reboot && plan.core.no_shutdown && !plan.core.autostart && !plan.broker.autostart);
    assert_eq!((plan.loader.kernel.as_str(), plan.loader.initrd.as_deref()), ("/vmlinuz", Some("/initrd")));
    assert_eq!((plan.loader.cmdline.as_str(), plan.loader.cpus), ("console=ttyS0", plan.core.cpus));
    assert_eq!(plan.broker.name.as_deref(), Some("vm"));
    let kind = ChardevKind::Socket {
        fd: "chardev.compat_monitor0".into(),
        address: "q.sock".into(),
        server: true,
        wait: false,
    };
    let chardev = Chardev { id: "compat_monitor0".into(), kind };
    assert_eq!(
        plan.broker.monitors,
        [config::Monitor { chardev, role: Role::Operator, uids: vec![], gids: vec![] }]
    );
    assert_eq!(
        opened(&plan),
        ["stdio.in", "stdio.out", "kernel", "initrd", "kvm", "pidfile", "chardev.compat_monitor0",]
    );
    assert_eq!(plan.opens[2].at, "-kernel /vmlinuz");
    assert_eq!(plan.opens[6].what, What::Listener("q.sock".into()));
}

#[test]
fn the_command_line_of_libvirt() {
    let plan = planned(
        "-name guest=vm,debug-threads=on -machine bulkhead,accel=kvm -cpu host -m size=1048576k -no-user-config \
         -nodefaults -display none -mon chardev=m,id=monitor,mode=control \
         -chardev socket,id=m,fd=26,server=on,wait=off -chardev file,id=c,path=/log,append=on -serial chardev:c",
    );
    assert_eq!(plan.core.ram, 1 << 30);
    assert_eq!(plan.broker.monitors[0].chardev.id, "m");
    assert_eq!(plan.console.serial.as_deref(), Some("c"));
    assert_eq!(
        plan.console.chardevs,
        [Chardev { id: "c".into(), kind: ChardevKind::File { fd: "chardev.c".into() } }]
    );
    assert_eq!(plan.terminal, None);
    assert_eq!(opened(&plan), ["chardev.m", "kernel", "kvm", "chardev.c"]);
    assert_eq!(plan.opens[0].what, What::Inherited { fd: 26, listening: true });
    assert_eq!(plan.opens[3].what, What::Output { path: "/log".into(), append: true });
}

#[test]
fn the_serial_port() {
    for (line, serial, devices) in [
        ("-nodefaults", None, 0),
        ("-serial none", None, 0),
        ("-serial none -nographic", None, 0),
        ("-nodefaults -nographic", Some("serial0"), 1),
        ("-nodefaults -serial null", Some("serial0"), 1),
        ("-chardev null,id=a -serial chardev:a", Some("a"), 1),
        ("-chardev null,id=a -nodefaults", None, 1),
        ("-qmp stdio", Some("serial0"), 1),
    ] {
        let plan = planned(line);
        assert_eq!(plan.console.serial.as_deref(), serial, "{line}");
        assert_eq!(plan.console.chardevs.len(), devices, "{line}");
    }
    // Something else has the terminal.
    assert_eq!(planned("-qmp stdio").console.chardevs[0].kind, ChardevKind::Null);
    let raw = planned("-chardev stdio,id=a,signal=off -serial chardev:a");
    assert_eq!(raw.terminal, Some(Terminal { signals: false }));
}

#[test]
fn monitors_keep_their_order() {
    let plan = planned(
        "-qmp unix:a,server,nowait -mon b,mode=control -chardev socket,id=b,path=b -qmp stdio -qmp chardev:c \
         -chardev socket,id=c,path=c,server=on",
    );
    let ids: Vec<&str> = plan.broker.monitors.iter().map(|m| m.chardev.id.as_str()).collect();
    assert_eq!(ids, ["compat_monitor0", "b", "compat_monitor1", "c"]);
    assert!(matches!(
        &plan.broker.monitors[1].chardev.kind,
        ChardevKind::Socket { server: false, wait: false, .. }
    ));
    assert!(matches!(
        &plan.broker.monitors[3].chardev.kind,
        ChardevKind::Socket { server: true, wait: true, .. }
    ));
}

#[test]
fn members_of_fd_sets_come_first() {
    let plan = planned(
        "-chardev file,id=a,path=/dev/fdset/3,append=on -serial chardev:a -kernel /dev/fdset/4 -add-fd fd=9,set=3,opaque=x \
         -qmp unix:q,server=on -add-fd fd=9,set=4",
    );
    assert_eq!(
        opened(&plan),
        ["fdset.0", "fdset.1", "kernel", "kvm", "chardev.a", "chardev.compat_monitor0"]
    );
    assert_eq!(plan.opens[1].what, What::Member { fd: 9, set: 4 });
    let member = |fd: &str, set, opaque: Option<&str>| config::FdsetMember {
        fd: fd.to_owned(),
        set,
        opaque: opaque.map(str::to_owned),
    };
    assert_eq!(plan.broker.fdsets, [member("fdset.0", 3, Some("x")), member("fdset.1", 4, None)]);
    assert_eq!(plan.broker.used_fdsets, [3]);
}

#[test]
fn acpi_tables_are_the_loaders() {
    let plan = planned("-acpitable sig=ABCD,data=a:b -acpitable file=/dev/fdset/1 -add-fd fd=9,set=1");
    assert_eq!(
        opened(&plan),
        ["fdset.0", "stdio.in", "stdio.out", "kernel", "acpi.0.0", "acpi.0.1", "acpi.1.0", "kvm"]
    );
    assert_eq!(plan.opens[5].what, What::Table("b".into()));
    let [first, second] = plan.loader.tables.as_slice() else { panic!("{:?}", plan.loader.tables) };
    assert_eq!((first.at.as_str(), first.has_header), ("-acpitable sig=ABCD,data=a:b", false));
    assert_eq!(first.files, ["acpi.0.0", "acpi.0.1"]);
    assert_eq!((first.header.sig, second.has_header), (Some(*b"ABCD"), true));
    assert_eq!(second.files, ["acpi.1.0"]);
    // As many as the loader can hold.
    let many = "-acpitable a ".repeat(32);
    assert_eq!(planned(&many).loader.tables.len(), 32);
    let files = format!("{}z", "a:".repeat(64));
    for (line, last) in
        [(format!("{many}-acpitable b"), "b"), (format!("-acpitable {files}"), files.as_str())]
    {
        let error = try_plan(&line).unwrap_err();
        assert_eq!(error, format!("-acpitable {last}: at most 32 tables with 64 files together"));
    }
}

#[test]
fn every_descriptor_is_in_the_topology() {
    let plan = planned(
        "-add-fd fd=9,set=3 -kernel k -initrd i -acpitable t -serial file:f -chardev socket,id=a,path=a -qmp unix:q,server=on -qmp stdio",
    );
    for open in plan.opens.iter() {
        assert!(bulkhead_jail::topology::PROCESSES.iter().any(|p| p.may_have(&open.name)), "{open:?}");
    }
}

#[test]
fn contradictions() {
    for (line, error) in [
        ("-initrd y", "-initrd y: -initrd only allowed with -kernel option"),
        ("-chardev null,id=a -chardev null,id=a", "-chardev null,id=a: Duplicate ID 'a' for chardev"),
        ("-chardev null,id=serial0", "default -serial: Duplicate ID 'serial0' for chardev"),
        ("-serial stdio -qmp stdio", "-serial stdio: cannot use stdio by multiple character devices"),
        (
            "-chardev socket,id=a,fd=5 -chardev socket,id=b,fd=5",
            "-chardev socket,id=b,fd=5: file descriptor 5 is used twice",
        ),
        ("-mon nope,mode=control", "-mon nope,mode=control: chardev \"nope\" not found"),
        ("-serial chardev:nope", "-serial chardev:nope: chardev \"nope\" not found"),
        (
            "-chardev socket,id=a,path=p -mon a,mode=control -mon a,mode=control",
            "-mon a,mode=control: Device 'a' is in use",
        ),
        (
            "-chardev socket,id=a,path=p -serial chardev:a -mon a,mode=control",
            "-serial chardev:a: Device 'a' is in use",
        ),
        (
            "-chardev null,id=a -mon a,mode=control",
            "-mon a,mode=control: a QMP monitor needs a character device of type socket or stdio",
        ),
        ("-qmp file:/x", "-qmp file:/x: a QMP monitor needs a character device of type socket or stdio"),
    ] {
        assert_eq!(try_plan(line).unwrap_err(), error, "{line}");
    }
}
