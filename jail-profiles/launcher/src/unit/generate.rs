//! What a VM's devices add to its units: drop-ins, which `systemd.generator(7)` has this program write at the start of the
//! host and at each `systemctl daemon-reload`.
//!
//! An instance of a template knows its own name only. That of a device is `VM-DEVICE`, and the drop-ins say which VM that
//! is.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use crate::machine::{Plan, What};

/// Where generated units are while the host runs.
pub const GENERATED: &str = "/run/systemd/generator";
/// First line of a drop-in.
const HEAD: &str = "# Made by bulkhead-generator from the machine file.\n";
/// Sockets of the opener.
const INNER: &str = "/run/bulkhead-inner";
/// Sockets of back ends that are not ours.
pub const OTHERS: &str = "/run/bulkhead-vhost";

/// Drop-ins by path below the directory of generated units.
pub fn drop_ins(vm: &str, plan: &Plan) -> BTreeMap<String, String> {
    let mut all = BTreeMap::new();
    if plan.bus.config.devices.is_empty() {
        return all;
    }
    let pci = format!("bulkhead-pci@{vm}.service");
    all.insert(format!("{pci}.d/devices.conf"), format!("{HEAD}[Unit]\n{}", with_core(vm)));
    let mut services = vec![pci];
    let mut doors = String::new();
    for daemon in &plan.bus.daemons {
        let (part, key) = (daemon.process().name, &daemon.key);
        let unit = format!("bulkhead-{part}@{vm}-{key}.service");
        let _ = writeln!(doors, "ListenSequentialPacket={INNER}/{vm}/{part}-{key}");
        all.insert(
            format!("{unit}.d/vm.conf"),
            format!(
                "{HEAD}[Unit]\n{}{}Requires=bulkhead-opener@{vm}.socket bulkhead-limits@{vm}.service\n\
                 After=bulkhead-limits@{vm}.service bulkhead-opener@{vm}.socket bulkhead-opener@{vm}.service\n\n\
                 [Service]\nUser={}\nBindPaths={INNER}/{vm}/{part}-{key}:/run/bulkhead/opener\n",
                part_of(vm),
                with_core(vm),
                user(vm, key)
            ),
        );
        services.push(unit);
    }
    for id in others(plan) {
        let unit = format!("bulkhead-vhost@{vm}-{id}.service");
        all.insert(
            format!("{unit}.d/vm.conf"),
            format!(
                "{HEAD}[Unit]\n{}Requires=bulkhead-limits@{vm}.service\nAfter=bulkhead-limits@{vm}.service\n\n\
                 [Service]\nUser={}\nBindPaths={OTHERS}/{vm}\nWorkingDirectory={OTHERS}/{vm}\n",
                part_of(vm),
                user(vm, id)
            ),
        );
        services.push(unit);
    }
    let services = services.join(" ");
    let order = format!("After={services}\n");
    all.insert(
        format!("bulkhead@{vm}.target.d/devices.conf"),
        format!("{HEAD}[Unit]\nWants={services}\n{order}"),
    );
    // It stops first, while the others can still say what happens.
    all.insert(format!("bulkhead-core@{vm}.service.d/devices.conf"), format!("{HEAD}[Unit]\n{order}"));
    if !doors.is_empty() {
        all.insert(format!("bulkhead-opener@{vm}.socket.d/devices.conf"), format!("{HEAD}[Socket]\n{doors}"));
    }
    let mut opener = format!("[Unit]\n{}[Service]\n", with_core(vm));
    if plan.opens.iter().any(|open| matches!(open.what, What::Tap { .. })) {
        // It makes no other use of the host's network: it has no address family for that.
        opener.push_str("PrivateNetwork=no\nBindPaths=/dev/net/tun\nDeviceAllow=/dev/net/tun rw\n");
    }
    if others(plan).next().is_some() {
        let _ = writeln!(opener, "BindPaths={OTHERS}/{vm}:{OTHERS}");
    }
    all.insert(format!("bulkhead-opener@{vm}.service.d/devices.conf"), format!("{HEAD}{opener}"));
    all
}

/// A device is of one life of core: a disk is locked, and a TAP interface taken, as long as a daemon of the last life has
/// it, and the opener opens them anew before anybody asks. They stop after core, and start before it.
fn with_core(vm: &str) -> String {
    format!("PartOf=bulkhead-core@{vm}.service\n")
}

fn part_of(vm: &str) -> String {
    format!("PartOf=bulkhead@{vm}.target\n")
}

/// The user of a device's daemon.
pub fn user(vm: &str, key: &str) -> String {
    format!("bh-{vm}-{key}")
}

/// Ids of the character devices behind which others' back ends listen.
pub fn others(plan: &Plan) -> impl Iterator<Item = &str> {
    plan.bus.paths.keys().filter_map(|name| name.strip_prefix("chardev."))
}

/// Writes the drop-ins of all machine files in `from`. A file that is wrong has none, and one line says why.
///
/// # Errors
/// `to` cannot be written.
pub fn generate(from: &Path, to: &Path) -> Result<(), String> {
    let Ok(files) = fs::read_dir(from) else { return Ok(()) };
    for file in files.flatten() {
        let path = file.path().display().to_string();
        let planned = super::name_of(&path).and_then(|vm| Ok((super::plan(&vm, &path)?, vm)));
        match planned {
            Ok((plan, vm)) => {
                for (name, text) in drop_ins(&vm, &plan) {
                    let path = to.join(name);
                    let fail = |e: std::io::Error| format!("{}: {e}", path.display());
                    path.parent().map_or(Ok(()), fs::create_dir_all).map_err(fail)?;
                    fs::write(&path, text).map_err(fail)?;
                }
            }
            // Another file that lies there.
            Err(_) if !path.ends_with(".toml") => {}
            Err(why) => eprintln!("bulkhead-generator: {why}"),
        }
    }
    Ok(())
}

/// Whether what was generated for a VM is what its machine file says now.
pub fn is_current(vm: &str, plan: &Plan, generated: &Path) -> bool {
    let wanted = drop_ins(vm, plan);
    let same = wanted
        .iter()
        .all(|(name, text)| fs::read_to_string(generated.join(name)).is_ok_and(|found| found == *text));
    same && (!wanted.is_empty() || !generated.join(format!("bulkhead@{vm}.target.d/devices.conf")).exists())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::unit::file;

    const DEVICES: &str = r#"
        drive = { if = "none", id = "d", file = "disk.img" }
        netdev = { type = "tap", id = "n", ifname = "tap0" }
        chardev = { backend = "socket", id = "fs0", path = "fs0" }
        device = [
            { driver = "virtio-blk-pci", id = "d0", drive = "d" },
            { driver = "virtio-net-pci", id = "n0", netdev = "n" },
            { driver = "vhost-user-fs-pci", chardev = "fs0", tag = "home" },
        ]
    "#;

    fn plan(text: &str) -> Plan {
        crate::machine::plan(&file::parse("vm1", text).unwrap().options).unwrap()
    }

    #[test]
    fn each_device_is_its_vms() {
        let all = drop_ins("vm1", &plan(DEVICES));
        let names: Vec<&str> = all.keys().map(String::as_str).collect();
        assert_eq!(
            names,
            [
                "bulkhead-block@vm1-d0.service.d/vm.conf",
                "bulkhead-core@vm1.service.d/devices.conf",
                "bulkhead-net@vm1-n0.service.d/vm.conf",
                "bulkhead-opener@vm1.service.d/devices.conf",
                "bulkhead-opener@vm1.socket.d/devices.conf",
                "bulkhead-pci@vm1.service.d/devices.conf",
                "bulkhead-vhost@vm1-fs0.service.d/vm.conf",
                "bulkhead@vm1.target.d/devices.conf",
            ]
        );
        let block = &all["bulkhead-block@vm1-d0.service.d/vm.conf"];
        for line in [
            "PartOf=bulkhead@vm1.target",
            "PartOf=bulkhead-core@vm1.service",
            "User=bh-vm1-d0",
            "BindPaths=/run/bulkhead-inner/vm1/block-d0:/run/bulkhead/opener",
        ] {
            assert!(block.lines().any(|found| found == line), "{line}");
        }
        let target = &all["bulkhead@vm1.target.d/devices.conf"];
        assert!(target.contains(
            "Wants=bulkhead-pci@vm1.service bulkhead-block@vm1-d0.service bulkhead-net@vm1-n0.service \
             bulkhead-vhost@vm1-fs0.service\n"
        ));
        for unit in ["opener", "pci"] {
            let text = &all[&format!("bulkhead-{unit}@vm1.service.d/devices.conf")];
            assert!(text.contains("[Unit]\nPartOf=bulkhead-core@vm1.service\n"), "{text}");
        }
        let opener = &all["bulkhead-opener@vm1.service.d/devices.conf"];
        assert!(
            opener.contains("PrivateNetwork=no\n")
                && opener.contains("BindPaths=/run/bulkhead-vhost/vm1:/run/bulkhead-vhost\n")
        );
        assert!(drop_ins("vm1", &plan("")).is_empty());
    }

    /// What no device uses has a daemon from the start where there is a port: nobody may start one later.
    #[test]
    fn what_may_be_plugged_in_has_a_unit() {
        let text = r#"
            drive = [{ if = "none", id = "d", file = "disk.img" }, { if = "none", id = "e", file = "e.img" }]
            device = [
                { driver = "pcie-root-port", id = "rp0" },
                { driver = "virtio-blk-pci", id = "d0", drive = "d", bus = "rp0" },
            ]
        "#;
        let all = drop_ins("vm1", &plan(text).without_spare_balloon());
        let target = &all["bulkhead@vm1.target.d/devices.conf"];
        let units = "bulkhead-block@vm1-d0.service bulkhead-block@vm1-e.service\n";
        assert!(target.contains(units) && !target.contains("balloon"), "{target}");
    }

    #[test]
    fn a_wrong_file_stops_no_other() {
        let dir = std::env::temp_dir().join(format!("bulkhead-generate-{}", std::process::id()));
        let (from, to) = (dir.join("from"), dir.join("to"));
        fs::create_dir_all(&from).unwrap();
        for (name, text) in [("vm1.toml", DEVICES), ("bad.toml", "foo = 1"), ("Bad.toml", ""), ("README", "")]
        {
            fs::write(from.join(name), text).unwrap();
        }
        generate(&from, &to).unwrap();
        assert!(is_current("vm1", &plan(DEVICES), &to));
        assert_eq!(fs::read_dir(&to).unwrap().count(), 8);
        assert!(!is_current("vm1", &plan(&DEVICES.replace("d0", "d1")), &to));
        // The devices are gone.
        assert!(!is_current("vm1", &plan(""), &to) && is_current("vm2", &plan(""), &to));
        generate(&dir.join("none"), &to).unwrap();
        fs::remove_dir_all(dir).unwrap();
    }
}
